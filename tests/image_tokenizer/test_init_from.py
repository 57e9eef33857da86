import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import VQModel
from tiny_tokenizers import TINY, squares

from t2i.config import TokenizerConfig
from t2i.data.sources import open_source
from t2i.errors import UserError
from t2i.image_tokenizer import make
from t2i.image_tokenizer import train as image_tokenizer
from t2i.image_tokenizer.make import make_tokenizer
from t2i.image_tokenizer.start import open_start, shaped_as
from t2i.image_tokenizer.train import train_image_tokenizer
from t2i.tokens.image import ImageTokenizer

pytestmark = pytest.mark.usefixtures("few_latents")


@pytest.fixture
def begun(tmp_path):
    """A folder of a tokenizer."""
    model = train_image_tokenizer(squares(), config=TINY, out=tmp_path / "state")
    model.save_pretrained(tmp_path / "begun")
    return tmp_path / "begun"


def of(begun, **settings):
    return TokenizerConfig(
        **{"image_size": 16, "batch_size": 4, "max_steps": 3, "init_from": str(begun), **settings}
    )


def trained(config, *, out):
    start = open_start(config)
    return train_image_tokenizer(squares(), config=shaped_as(config, start), out=out, start=start)


def a_plain_vqgan(**settings):
    torch.manual_seed(0)
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        num_vq_embeddings=8,
        norm_type="group",
        **{"block_out_channels": (32, 32), **settings},
    )


def test_a_training_begins_with_the_weights_the_codebook_and_the_shape_of_a_folder(
    begun, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        image_tokenizer, "_start_codebook", lambda *_: pytest.fail("the codes were made anew")
    )
    source, out = open_source(folder, heldout_share=0.3), tmp_path / "out"
    # Without a rate and with codes that stay, nothing moves: what comes out is what came in.
    make_tokenizer(source, out=out, config=of(begun, lr=0.0, codebook_decay=1 - 1e-9), command="test")
    first, last = (ImageTokenizer.load(path) for path in (begun, out))
    assert last.codebook_size == 8 and last.downscale == 2
    for before, after in zip(first.model.parameters(), last.model.parameters(), strict=True):
        assert torch.allclose(before.half().float(), after, atol=1e-6)
    card = (out / "README.md").read_text()
    assert "- channels: (32, 32)" in card and "- continuous_share: 0.0" in card
    assert f"It began with the weights of `{begun}` (fingerprint {first.fingerprint()[:12]})" in card
    # It learns from there.
    moved = trained(of(begun, channels=(32, 32)), out=tmp_path / "moved")
    changed = [
        not torch.equal(a, b) for a, b in zip(first.model.parameters(), moved.parameters(), strict=True)
    ]
    assert sum(changed) > 0.9 * len(changed)


def test_codes_stay_near_where_they_were(begun, tmp_path):
    """They are averages over a hundred steps, and no code is thrown onto the first batch."""
    before = ImageTokenizer.load(begun).code_vectors()
    after = trained(of(begun, max_steps=1, lr=0.0), out=tmp_path / "out").quantize.embedding.weight
    moved = (after - before).norm(dim=1)
    # Of 256 latents eight codes have 32 each on average. One that gets all of them moves by 7% of the way.
    assert 0 < moved.max() < 0.1 * torch.cdist(before, before).max()


def test_a_plain_vqgan_is_trained_further_too(folder, tmp_path):
    a_plain_vqgan().half().save_pretrained(tmp_path / "begun")
    config = of(tmp_path / "begun")
    made = trained(config, out=tmp_path / "out")
    assert made.config.norm_type == "group" and made.dtype == torch.float32
    moved = [
        not torch.equal(a, b)
        for a, b in zip(a_plain_vqgan().half().float().parameters(), made.parameters(), strict=True)
    ]
    assert sum(moved) > 0.9 * len(moved)
    make_tokenizer(
        open_source(folder, heldout_share=0.3), out=tmp_path / "made", config=config, command="test"
    )
    assert 'VQModel(norm_type="group")' in (tmp_path / "made" / "README.md").read_text()


def test_sizes_are_checked_against_the_shape_that_is_taken_over(begun):
    # Two pixels per code: 22 is no multiple of the eight of the default.
    assert shaped_as(of(begun, image_size=22), open_start(of(begun))).image_size == 22
    with pytest.raises(UserError, match="23 is no multiple of the tokenizer's 2 pixels per code"):
        shaped_as(of(begun, image_size=23), open_start(of(begun)))


def test_what_does_not_serve_is_refused_before_images_are_read(begun, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(make, "read_captioned", lambda *_, **__: pytest.fail("images were read"))
    a_plain_vqgan(block_out_channels=(48, 48), norm_num_groups=16).save_pretrained(tmp_path / "narrow")
    directions = VQModel.from_pretrained(begun)
    with torch.no_grad():
        directions.quantize.embedding.weight.copy_(
            torch.nn.functional.normalize(directions.quantize.embedding.weight)
        )
    directions.save_pretrained(tmp_path / "directions")
    source = open_source(folder, heldout_share=0.3)
    for settings, refusal in (
        ({"codebook_size": 16}, r"--codebook-size is 16, and --init-from .*begun has 8\. Leave it out"),
        ({"channels": (32, 64)}, r"--channels is \(32, 64\), and --init-from .*begun has \(32, 32\)"),
        ({"init_from": str(tmp_path / "nothing")}, "nothing is no image tokenizer"),
        (
            {"init_from": str(tmp_path / "narrow")},
            "--init-from .*narrow has a shape that is not trained here",
        ),
        ({"init_from": str(tmp_path / "directions")}, "its codes all have length 1"),
    ):
        with pytest.raises(UserError, match=refusal):
            make_tokenizer(source, out=tmp_path / "out", config=of(begun, **settings), command="test")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="--continuous-share is 0.3: it is for a codebook that is made anew"):
        of(begun, continuous_share=0.3)


def test_a_tokenizer_is_known_by_what_it_began_with_and_not_by_its_path(begun, folder, tmp_path):
    source, out = open_source(folder, heldout_share=0.3), tmp_path / "out"
    found = make_tokenizer(source, out=out, config=of(begun), command="test")
    trained(of(begun), out=tmp_path / "stopped")
    moved = shutil.copytree(begun, tmp_path / "moved")
    for path in (begun, moved):
        assert make_tokenizer(source, out=out, config=of(path), command="again") == found
        trained(of(path), out=tmp_path / "stopped")
    other = train_image_tokenizer(squares(), config=replace(TINY, seed=1), out=tmp_path / "other")
    other.save_pretrained(begun)
    with pytest.raises(UserError, match="already holds a tokenizer of other images or settings"):
        make_tokenizer(source, out=out, config=of(begun), command="test")
    with pytest.raises(UserError, match=r"other settings \(init_from\)"):
        trained(of(begun), out=tmp_path / "stopped")
    with pytest.raises(UserError, match=r"other settings \(init_from\)"):
        make_tokenizer(source, out=tmp_path / "stopped", config=of(begun), command="test")


def test_a_tokenizer_that_was_made_before_settings_were_there_is_the_one_of_their_defaults(folder, tmp_path):
    source, out = open_source(folder, heldout_share=0.3), tmp_path / "out"
    config = replace(TINY, max_steps=3)
    found = make_tokenizer(source, out=out, config=config, command="test")
    made = json.loads((out / "made.json").read_text())
    del made["begun_with"]
    for key in ("adversarial_weight", "adversarial_after_share", "discriminator_channels"):
        del made["settings"][key]
    (out / "made.json").write_text(json.dumps(made))
    assert make_tokenizer(source, out=out, config=config, command="again") == found
    with pytest.raises(UserError, match="already holds a tokenizer"):
        make_tokenizer(source, out=out, config=replace(config, adversarial_weight=1.0), command="again")
