import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from t2i.errors import UserError
from t2i.measure import embeddings
from t2i.measure.embeddings import (
    compare_rows,
    linear_cka,
    nearest_of,
    nearness,
    random_nearer,
    rows_of,
    write_nearest,
)
from t2i.runs.loading import open_model


def test_nearest_equals_every_pair_compared():
    generator = torch.Generator().manual_seed(0)
    rows, others = torch.randn(7, 5, generator=generator), torch.randn(11, 5, generator=generator)
    cosines, places = nearest_of(rows, others, count=3)
    for row, found, at in zip(rows, cosines, places, strict=True):
        all_cosines = [float(F.cosine_similarity(row, other, dim=0)) for other in others]
        order = sorted(range(11), key=lambda place: -all_cosines[place])[:3]
        assert at.tolist() == order
        assert found.tolist() == pytest.approx([all_cosines[place] for place in order], abs=1e-6)


def test_copies_of_text_rows_are_nearer_to_text_than_text_and_noise():
    text = torch.randn(60, 16, generator=torch.Generator().manual_seed(1))
    found = nearness(text[:20] * 3, text)
    assert found.image.tolist() == pytest.approx([1.0] * 20)
    assert found.tokens[:, 0].tolist() == list(range(20))
    assert found.text.max() < 0.95  # a row is not its own neighbour
    assert random_nearer(found.image, found.random) == 0


@pytest.mark.parametrize(("num_image", "num_text"), [(1, 60), (60, 1)])
def test_one_embedding_alone_is_refused(num_image, num_text):
    with pytest.raises(
        UserError, match=f"{num_image} image and {num_text} text embeddings; expected at least 2"
    ):
        nearness(torch.randn(num_image, 4), torch.randn(num_text, 4))


def test_noise_is_as_near_as_noise():
    generator = torch.Generator().manual_seed(2)
    image, text = torch.randn(400, 16, generator=generator), torch.randn(60, 16, generator=generator)
    found = nearness(image, text)
    # The standard error of this share over 400 draws a side is at most 0.02; four of them.
    assert random_nearer(found.image, found.random) == pytest.approx(0.5, abs=0.08)


def test_noise_has_the_deviation_of_each_dimension():
    generator = torch.Generator().manual_seed(4)
    # Image rows lie along the first axis, text rows along it or across: noise of one deviation would lie anywhere.
    image = torch.randn(400, 8, generator=generator) * torch.tensor([1.0] + 7 * [1e-3])
    text = torch.eye(8)[:1].repeat(2, 1) * torch.tensor([[1.0], [-1.0]])
    found = nearness(image, text)
    assert found.image.min() > 0.5
    assert found.random.quantile(0.1) > 0.99


def test_rows_that_no_token_uses_are_nobodys_neighbours(model_folder):
    model = open_model(str(model_folder), needs_images=False)
    with torch.no_grad():
        model.model.get_input_embeddings().weight.copy_(
            torch.arange(1.0, model.layout.vocab_size + 1)[:, None]
        )
    layout = replace(model.layout, num_text_tokens=2000)
    side = rows_of(replace(model, layout=layout))["input"]
    first = layout.num_text_rows + 7  # six markers and <pad>
    assert side.image[:, 0].tolist() == [*range(first + 1, first + 1 + layout.codebook_size)]
    assert side.text[:, 0].tolist() == [*range(1, 2001)]


def test_a_random_row_that_ties_counts_half():
    assert random_nearer(torch.tensor([1.0, 2.0]), torch.tensor([2.0])) == 0.75


def test_cka_sees_through_rotation_and_scale_and_tells_strangers_apart():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(200, 6, generator=generator)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    assert linear_cka(rows, 5 * rows @ rotation + 1) == pytest.approx(1)
    assert linear_cka(rows, torch.randn(200, 6, generator=generator)) < 0.1
    x, y = rows - rows.mean(0), rows[:, :3] ** 2 - (rows[:, :3] ** 2).mean(0)
    gram_x, gram_y = x @ x.T, y @ y.T  # the twin compares all pairs of rows
    twin = (gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm())
    assert linear_cka(rows, rows[:, :3] ** 2) == pytest.approx(twin.item(), abs=1e-5)


def test_a_trained_model_is_compared_with_its_earlier_self(finished, tmp_path):
    now = open_model(str(finished.run_dir), needs_images=False)
    before = open_model(str(finished.run_dir / "checkpoints" / "step_000003"), needs_images=False)
    results = compare_rows(now, before=before)
    assert set(results) == {"input", "output"}
    assert len(results["input"].nearest_tokens) == now.layout.codebook_size
    assert 0.5 < results["input"].cka < 1
    write_nearest(results, model=now, path=tmp_path / "nearest.json")
    side = json.loads((tmp_path / "nearest.json").read_text())["output"]
    assert set(side) == {"image", "text", "random", "compared", "nearest_tokens", "cosines", "cka"}
    assert set(side["image"]) == {"0.05", "0.25", "0.50", "0.75", "0.95"}
    assert side["compared"] == {"random_nearer": results["output"].random_nearer}


def test_codes_of_different_image_tokenizers_are_not_compared(finished, tmp_path):
    model = open_model(str(finished.run_dir), needs_images=False)
    manifest = json.loads((finished.run_dir / "data_manifest.json").read_text())
    manifest["image_tokenizer"]["fingerprint"] = "f" * 64
    (tmp_path / "data_manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="were trained on codes of different image tokenizers"):
        compare_rows(model, before=replace(model, run_dir=tmp_path))


def test_a_language_model_alone_is_refused(finished):
    model = open_model(str(finished.run_dir), needs_images=False)
    alone = replace(model, layout=replace(model.layout, codebook_size=0))
    with pytest.raises(UserError, match="a language model without image codes"):
        compare_rows(alone, before=None)


def test_a_tied_model_is_measured_once(monkeypatch):
    weight = torch.randn(30, 8)
    untied = SimpleNamespace(model=TwoSides(weight, weight.clone()))
    tied = SimpleNamespace(model=TwoSides(weight, weight))
    assert embeddings.is_tied(tied) and not embeddings.is_tied(untied)
    calls = []
    real = embeddings.nearness
    monkeypatch.setattr(embeddings, "nearness", lambda *args: calls.append(1) or real(*args))
    layout = SimpleNamespace(codebook_size=10, first_image_id=20, num_text_tokens=20)
    text = SimpleNamespace(decode=lambda ids: str(ids.tolist()))
    for model, wanted in ((tied, 1), (untied, 2)):
        calls.clear()
        model.layout, model.text_tokenizer = layout, text
        found = embeddings.compare_rows(model, before=None)
        assert (len(calls), set(found)) == (wanted, {"input", "output"})


class TwoSides:
    """Embeddings and an LM head, as compare_rows asks for them."""

    def __init__(self, embedding, head):
        self.embedding, self.lm_head = SimpleNamespace(weight=embedding), SimpleNamespace(weight=head)
        self.config = SimpleNamespace()

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.lm_head
