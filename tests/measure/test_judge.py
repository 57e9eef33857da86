"""The exact judge: what it reads, and that other judges have other names."""

import json
import resource

import numpy as np
import pytest
import torch

from t2i.commands.scores import JudgeCommand, show_judge
from t2i.errors import DataError, UserError
from t2i.measure import descriptors
from t2i.measure import judge as judging
from t2i.measure.judge import load_judge, train_judge
from t2i.measure.verdict import judged


def coloured(values):
    """Images of one colour each, with captions that say which; and some whose captions say nothing."""
    colours = {"red": (220, 30, 30), "blue": (30, 30, 220), "green": (30, 200, 30)}
    rng = np.random.default_rng(0)
    images = [
        np.clip(np.full((64, 64, 3), colours[value]) + rng.integers(-30, 30, (64, 64, 3)), 0, 255).astype(
            np.uint8
        )
        for value in values
    ]
    return images, [f"{value} thing" for value in values]


def test_a_judge_reads_what_it_was_trained_on():
    images, captions = coloured(["red", "blue", "green"] * 8)
    judge = train_judge(images, [*captions[:-1], "stadium"], made_of={"data": "colours"})
    assert set(judge.heads) == {"colour"}
    others, said = coloured(["green", "red", "blue", "red"])
    assert judged(judge.read(others), said).accuracy == {"colour": 1}
    assert judged(judge.read(others), said).n == {"colour": 4}
    mismatched = judged(judge.read(others), ["red thing", "red thing", "stadium", "blue thing"])
    assert mismatched.accuracy == {"colour": 1 / 3} and mismatched.n == {"colour": 3}
    assert judged(judge.read(others), ["stadium"] * 4).mean() is None


def test_training_is_the_minimum_of_its_loss():
    """At a minimum the gradient of the mean cross-entropy plus the penalty is zero: computed by hand."""
    images, captions = coloured(["red", "blue"] * 6)
    head = train_judge(images, captions, made_of={}).heads["colour"]
    described = torch.from_numpy(descriptors.describe(images))
    known = ((described - described.mean(0)) / described.std(0).clamp(min=1e-3)).double()
    chosen = torch.tensor([[0.0, 1.0], [1.0, 0.0]] * 6).double()  # blue, red
    error = torch.softmax(known @ head.weight + head.bias, dim=1) - chosen
    gradient = known.T @ error / len(images) + 2 * judging.PENALTY * head.weight
    assert head.classes == ("blue", "red") and gradient.abs().max() < 1e-4


def test_a_judge_is_trained_once_and_named_by_its_data(tmp_path, monkeypatch):
    images, captions = coloured(["red", "blue", "green", "red"])
    opened = [type("Opened", (), {"image": judging_image(image)}) for image in images]
    pairs = [
        judging.Pair(key=str(place), caption=caption, split="train", open=lambda place=place: opened[place])
        for place, caption in enumerate(captions)
    ]
    source = type("Source", (), {"pairs": pairs})
    monkeypatch.setattr(judging, "open_source", lambda name: source)
    first = load_judge(folder=tmp_path)
    (file,) = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    monkeypatch.setattr(judging, "train_judge", lambda *args, **rest: pytest.fail("trained again"))
    again = load_judge(folder=tmp_path)
    assert again.sha256() == first.sha256() and file.stat().st_mtime_ns == before
    assert again.read(images) == first.read(images) == {"colour": ["red", "blue", "green", "red"]}
    assert first.made_of["train_images"] == 4 and json.dumps(first.made_of)
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    with pytest.raises(DataError, match="a trained judge, is damaged: .* Remove it to train it again"):
        load_judge(folder=tmp_path)
    file.write_bytes(whole)
    monkeypatch.undo()
    monkeypatch.setattr(judging, "open_source", lambda name: source)
    monkeypatch.setattr(
        judging, "attributes_of", lambda caption: {"colour": caption.split()[0], "kind": "thing"}
    )
    assert load_judge(folder=tmp_path).sha256() != first.sha256()  # of the same captions, other facts
    monkeypatch.undo()
    monkeypatch.setattr(judging, "open_source", lambda name: source)
    pairs[0] = judging.Pair(key="0", caption="blue thing", split="train", open=pairs[0].open)
    assert load_judge(folder=tmp_path).sha256() != first.sha256()


def test_yardsticks_are_of_real_images_what_a_tokenizer_leaves_and_captions_of_others(
    monkeypatch, capsys, tmp_path
):
    train, captions = coloured(["red", "blue", "green"] * 8)
    judge = train_judge(train, captions, made_of={"train_images": len(train)})
    images, said = coloured(["green", *["red", "blue"] * 6])
    pairs = [
        judging.Pair(
            key=str(place),
            caption=caption,
            split="heldout" if place else "train",
            open=lambda image=image: type("Opened", (), {"image": judging_image(image)}),
        )
        for place, (image, caption) in enumerate(zip(images, said, strict=True))
    ]
    monkeypatch.setattr(judging, "open_source", lambda name: type("Source", (), {"pairs": pairs}))
    # An image tokenizer that takes red for blue and blue for red.
    monkeypatch.setattr(
        judging, "Reconstructions", lambda images, tokenizer: [one[..., ::-1] for one in images]
    )
    monkeypatch.setattr(judging, "load_judge", lambda: judge)
    monkeypatch.setattr("t2i.measure.verdict.FEWEST", 12)
    show_judge(JudgeCommand(out=tmp_path / "made" / "yardsticks.json"))
    # Of six times red and blue, which are not of the training split. A caption of another is never an equal one.
    _, real, left, others, *attributes, trained, file = capsys.readouterr().out.splitlines()
    assert real.split() == ["held-out", "real", "images", "12", "1.0000", "1.0000"]
    assert left.split()[-2:] == ["0.0000"] * 2 and others.split()[-2:] == ["0.0000"] * 2
    assert attributes[0] == "real: colour 100% of 12" and attributes[2] == "mismatched: colour 0% of 12"
    assert trained == f"Judge {judge.sha256()}, trained on 24 real images."
    found = json.loads((tmp_path / "made" / "yardsticks.json").read_text())
    assert file == f"All of it: {tmp_path / 'made' / 'yardsticks.json'}"
    assert found["judges"]["judge"] == {**judge.made_of, "sha256": judge.sha256()}
    assert found["rows"]["reconstructions"]["judge_pooled"] == 0 and found["rows"]["real"]["judge"] == 1
    assert found["judged"]["judge"]["real"]["n"] == {"colour": 12}
    assert found["bootstrap"] == {"replicates": 100, "seed": 0}
    with pytest.raises(UserError, match="is a folder; expected a file, such as"):
        show_judge(JudgeCommand(out=tmp_path))


def judging_image(array):
    from PIL import Image

    return Image.fromarray(array)


def test_descriptions_are_counted_by_hand():
    image = np.zeros((1, 64, 64, 3), dtype=np.uint8)
    image[0, :, 32:] = 255
    found = descriptors.describe(list(image))[0]
    grid, histogram, edges = np.split(found, [768, 768 + 320])
    places = grid.reshape(16, 16, 3)
    assert (places[:, :8] == 0).all() and (places[:, 8:] == 1).all()
    black, white = 0, 63
    assert histogram[black] == pytest.approx(0.5**0.5) and histogram[white] == pytest.approx(0.5**0.5)
    assert [histogram[64 * part + white] for part in (1, 2, 3, 4)] == [0, 1, 0, 1]
    cells = edges.reshape(8, 8, 8)
    # The step lies on columns 31 and 32: one in cell 3, one in cell 4, to the right, each 8 x 0.5 strong.
    assert np.flatnonzero(cells.sum((0, 2))).tolist() == [3, 4]
    assert cells[0, 3, 0] == pytest.approx(4 / 5) and cells[0, 3, 1:].sum() == 0


def test_a_full_disk_is_no_end_of_a_judge(tmp_path, monkeypatch, caplog):
    images, captions = coloured(["red", "blue", "green"] * 8)
    trained = train_judge(images, captions, made_of={"data": "colours"})
    monkeypatch.setattr(judging, "train_judge", lambda *_, **__: trained)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_192, limits[1]))
    try:
        assert judging.load_judge(folder=tmp_path) is trained
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written (File too large)" in caplog.text
    assert list(tmp_path.iterdir()) == []
    assert judging.load_judge(folder=tmp_path).heads["colour"].classes == trained.heads["colour"].classes


def test_a_judge_that_finds_no_place_judges_all_the_same(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setattr(judging, "_save", lambda judge, file: None)
    monkeypatch.setattr(judging, "train_judge", lambda *_, **__: "a judge")
    assert judging.load_judge(folder=tmp_path / "file" / "judge") == "a judge"
    assert "cannot be written" in caplog.text and "trains the judge again" in caplog.text
