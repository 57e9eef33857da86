import errno
import fcntl
import json
import os
import re
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from PIL import Image
from tiny_tokenizers import TINY, Killed, at_step, kill, squares

from t2i.config import SourceConfig, TokenizerConfig
from t2i.data.sources import open_source
from t2i.errors import DataError, NumericalError, Stopped, UserError
from t2i.image_tokenizer import codebook, make
from t2i.image_tokenizer import train as image_tokenizer
from t2i.image_tokenizer.card import read_card
from t2i.image_tokenizer.codebook import Codebook, kmeans
from t2i.image_tokenizer.make import make_tokenizer, read_captioned
from t2i.image_tokenizer.quality import structural_similarity
from t2i.image_tokenizer.train import build_vq_model, train_image_tokenizer
from t2i.tokens.image import ImageTokenizer


def test_a_folder_without_held_out_images_is_refused_before_training_with_a_share_that_suffices(
    folder, tmp_path
):
    out = tmp_path / "out"
    with pytest.raises(DataError, match="a tokenizer is measured on at least 2") as refusal:
        make_tokenizer(open_source(folder, heldout_share=0.001), out=out, config=TINY, command="test")
    assert not out.exists()
    share = float(re.search(r"`--heldout-share ([\d.]+)`", str(refusal.value))[1])
    made = make_tokenizer(open_source(folder, heldout_share=share), out=out, config=TINY, command="test")
    assert made.num_pictures >= 2


def test_sizes_that_no_code_covers_are_refused_with_the_settings():
    with pytest.raises(
        UserError, match="--image-size is 60; expected a multiple of 8, the pixels per side of a code"
    ):
        TokenizerConfig(image_size=60)
    with pytest.raises(UserError, match="--channels is empty"):
        TokenizerConfig(channels=())
    with pytest.raises(UserError, match="--image-size is 8; expected a whole number from 16"):
        TokenizerConfig(image_size=8)  # structural similarity could not be measured


def test_the_last_step_always_uses_the_codebook(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(image_tokenizer, "KMEANS_LATENTS", 512)
    start = image_tokenizer._start_codebook
    monkeypatch.setattr(image_tokenizer, "_start_codebook", lambda *args: begun.append(1) or start(*args))
    for steps, share in ((1, 0.6), (3, 0.9)):
        train_image_tokenizer(
            squares(),
            config=replace(TINY, max_steps=steps, continuous_share=share),
            out=tmp_path / str(steps),
        )
    assert len(begun) == 2


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    with pytest.raises(NumericalError, match="The loss of step 0 is inf"):
        train_image_tokenizer(squares(), config=replace(TINY, edge_weight=1e300), out=tmp_path)


def test_kmeans_in_blocks_finds_the_same_centres(monkeypatch):
    points = torch.randn(500, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    centres = [
        kmeans(points, num_centres=30, generator=torch.Generator().manual_seed(1))
        for size in (codebook.AT_ONCE, 30 * 7, 1)
        if monkeypatch.setattr(codebook, "AT_ONCE", size) is None
    ]
    assert torch.allclose(centres[0], centres[1]) and torch.allclose(centres[0], centres[2])


def test_kmeans_finds_separate_clusters():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    generator = torch.Generator().manual_seed(0)
    points = centres.repeat(50, 1) + 0.1 * torch.randn(200, 2, generator=generator)
    found = kmeans(points, num_centres=4, generator=generator)
    assert torch.cdist(centres, found).min(1).values.max() < 0.1
    with pytest.raises(DataError, match="3 latents are too few for 4 codes"):
        kmeans(points[:3], num_centres=4, generator=generator)


def test_codes_follow_their_latents_and_dead_ones_are_revived():
    codebook = Codebook(torch.tensor([[0.0, 0.0], [100.0, 100.0]]), decay=0.5)
    latents = torch.tensor([[1.0, 1.0], [3.0, 1.0]])
    for _ in range(20):
        codebook.follow(latents, codebook.nearest(latents))
    assert torch.allclose(codebook.weight[0], torch.tensor([2.0, 1.0]), atol=1e-3)
    assert codebook.revive(latents, generator=torch.Generator().manual_seed(0)) == 1
    assert codebook.weight[1].tolist() in latents.tolist()


def test_training_learns_and_resuming_equals_never_having_stopped(tmp_path, monkeypatch):
    pictures = squares()
    monkeypatch.setattr(image_tokenizer, "KMEANS_LATENTS", 512)
    torch.set_num_threads(1)
    whole = train_image_tokenizer(pictures, config=TINY, out=tmp_path / "whole")

    with monkeypatch.context() as patched:
        at_step(patched, 15, kill)
        with pytest.raises(Killed):
            train_image_tokenizer(pictures, config=TINY, out=tmp_path / "stopped")
    resumed = train_image_tokenizer(pictures, config=TINY, out=tmp_path / "stopped")
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    # A signal ends the step that it meets, saves, and leaves the state as if there had been none.
    with monkeypatch.context() as patched:
        calls = at_step(patched, 7, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match="saved after step 7 of 20"):
            train_image_tokenizer(pictures, config=TINY, out=tmp_path / "told")
    assert len(calls) == 7
    told = train_image_tokenizer(pictures, config=TINY, out=tmp_path / "told")
    assert all(map(torch.equal, whole.state_dict().values(), told.state_dict().values()))
    with pytest.raises(UserError, match="other settings \\(lr\\)"):
        train_image_tokenizer(pictures, config=replace(TINY, lr=0.1), out=tmp_path / "stopped")
    with pytest.raises(UserError, match="other settings \\(images\\)"):
        train_image_tokenizer(pictures[1:], config=TINY, out=tmp_path / "stopped")


def test_a_folder_of_images_becomes_a_tokenizer_with_a_card(tmp_path, monkeypatch):
    monkeypatch.setattr(image_tokenizer, "KMEANS_LATENTS", 512)
    (tmp_path / "pictures").mkdir()
    for index, picture in enumerate(squares(150)):
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{index}.png")
        (tmp_path / "pictures" / f"{index}.txt").write_text("a square")
    out = tmp_path / "made"
    source = open_source(str(tmp_path / "pictures"))
    out.mkdir()
    (out / "README.md").write_text("of other tokenizers")
    with pytest.raises(UserError, match=r"has a README\.md of another kind, which would be replaced"):
        make_tokenizer(source, out=out, config=TINY, command="made by a test")
    (out / "README.md").unlink()
    measures = make_tokenizer(source, out=out, config=TINY, command="made by a test")
    tokenizer = ImageTokenizer.load(out)
    assert tokenizer.num_codes(16) == 64
    card = read_card(out)
    assert (card.psnr, card.ssim) == (round(measures.psnr, 2), round(measures.ssim, 4))
    assert card.codes_in_use == pytest.approx(measures.codes_in_use, abs=5e-4)  # a tenth of a per cent
    assert not list(out.glob("*.pt"))
    before = (out / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert make_tokenizer(source, out=out, config=TINY, command="again") == measures
    assert (out / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="already holds a tokenizer of other images or settings"):
        make_tokenizer(source, out=out, config=replace(TINY, lr=0.1), command="again")


def test_a_training_shorter_than_its_first_save_is_finished(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_tokenizer, "KMEANS_LATENTS", 512)
    config = replace(TINY, max_steps=3, save_every=500)
    make_tokenizer(
        open_source(folder, heldout_share=0.3), out=tmp_path / "made", config=config, command="test"
    )
    assert not list((tmp_path / "made").glob("*.pt"))


def test_a_kill_while_files_are_put_in_place_leaves_what_the_same_command_finishes(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(image_tokenizer, "KMEANS_LATENTS", 512)
    source, out, replaced = open_source(folder, heldout_share=0.3), tmp_path / "made", []
    put = Path.replace

    def killed(path, target):
        if path.parent.name == ".part":
            replaced.append(path.name)
            if path.name == "config.json":
                raise KeyboardInterrupt
        return put(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            make_tokenizer(source, out=out, config=TINY, command="test")
    assert replaced[-1] == "config.json"
    made = make_tokenizer(source, out=out, config=TINY, command="test")
    assert made.num_pictures >= 2
    assert ImageTokenizer.load(out).num_codes(16) == 64


def test_a_second_training_in_the_same_folder_is_refused_by_name(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_tokenizer, "KMEANS_LATENTS", 512)
    begun, may_end, read = processes.FORK.Event(), processes.FORK.Event(), make.read_captioned

    def wait(*args, **settings):
        begun.set()
        may_end.wait(60)
        return read(*args, **settings)

    monkeypatch.setattr(make, "read_captioned", wait)
    source, out = open_source(folder, heldout_share=0.3), tmp_path / "made"
    arguments = {"out": out, "config": replace(TINY, max_steps=3), "command": "test"}
    first = processes.fork(make_tokenizer, source, **arguments)
    assert begun.wait(60)
    with pytest.raises(UserError, match=rf"made is being written by process {first.pid} on .* another --out"):
        make_tokenizer(source, **arguments)
    may_end.set()
    first.join(60)
    assert first.exitcode == 0
    assert make_tokenizer(source, **arguments).num_pictures >= 2


def test_a_finished_tokenizer_is_not_replaced_where_a_disk_has_no_locks(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_tokenizer, "KMEANS_LATENTS", 512)

    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    source, out, config = (
        open_source(folder, heldout_share=0.3),
        tmp_path / "made",
        replace(TINY, max_steps=3),
    )
    train, finished = make.train_image_tokenizer, []

    def overtaken(*args, **settings):
        model = train(*args, **settings)
        with monkeypatch.context() as patched:
            patched.setattr(make, "train_image_tokenizer", train)
            finished.append(make_tokenizer(source, out=out, config=config, command="the quicker one"))
        return model

    monkeypatch.setattr(make, "train_image_tokenizer", overtaken)
    assert make_tokenizer(source, out=out, config=config, command="the slower one") == finished[0]
    assert "the quicker one" in (out / "README.md").read_text()
    assert not list(out.glob("*.pt")) and not (out / ".part").exists()


def test_a_place_or_settings_that_do_not_serve_are_refused_before_an_image_is_read(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(image_tokenizer, "KMEANS_LATENTS", 512)
    source, out, config = open_source(folder, heldout_share=0.3), tmp_path / "out", replace(TINY, max_steps=3)
    train_image_tokenizer(squares(), config=config, out=out)
    monkeypatch.setattr(make, "read_captioned", lambda *_, **__: pytest.fail("images were read"))
    with pytest.raises(UserError, match=r"other settings \(lr\)"):
        make_tokenizer(source, out=out, config=replace(config, lr=0.1), command="test")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match="cannot be written: Not a directory"):
            make_tokenizer(source, out=place, config=config, command="test")


def test_channels_must_suit_spatial_norms():
    with pytest.raises(UserError, match="expected for each a whole number .* multiple of 32"):
        build_vq_model(replace(TINY, channels=(32, 48)))


def test_structural_similarity_is_one_for_equal_images_and_falls_with_noise():
    rng = np.random.default_rng(0)
    pictures = torch.from_numpy(rng.integers(0, 255, (2, 16, 16, 3), dtype=np.uint8))
    noisy = (pictures.float() + 40 * torch.randn(pictures.shape)).clamp(0, 255).to(torch.uint8)
    assert structural_similarity(pictures, pictures).tolist() == pytest.approx([1, 1])
    assert (structural_similarity(noisy, pictures) < 0.95).all()


def test_an_image_with_several_captions_is_one_image(tmp_path):
    (tmp_path / "images").mkdir()
    for index, picture in enumerate(squares(9)):
        Image.fromarray(picture).save(tmp_path / "images" / f"{index}.png")
        (tmp_path / "images" / f"{index}.txt").write_text("\n".join(f"{line} {index}" for line in "abc"))
    source = open_source(str(tmp_path / "images"), heldout_share=0.0, config=SourceConfig(captions="all"))
    assert len(source.pairs) == 27
    images, captions = read_captioned(source, split="train", image_size=16)
    assert len(images) == 9 and captions == [f"a {index}" for index in range(9)]
    some, _ = read_captioned(source, split="all", image_size=16, num_images=5)
    assert len(np.unique(some, axis=0)) == 5


def test_a_finished_tokenizer_is_kept_only_for_the_images_that_it_was_made_of(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(image_tokenizer, "KMEANS_LATENTS", 512)
    make = partial(make_tokenizer, out=tmp_path / "made", config=replace(TINY, max_steps=3), command="test")
    measures = make(open_source(folder, heldout_share=0.3))
    assert make(open_source(folder, heldout_share=0.3)) == measures
    with pytest.raises(UserError, match="already holds a tokenizer of other images or settings"):
        make(open_source(folder, heldout_share=0.3, config=SourceConfig(min_caption=2)))
    made = json.loads((tmp_path / "made" / "made.json").read_text())
    Image.new("RGB", (16, 16), (9, 9, 200)).save(Path(folder) / "new.png")
    (Path(folder) / "new.txt").write_text("a new one")
    with pytest.raises(UserError, match="already holds a tokenizer of other images or settings"):
        make(open_source(folder, heldout_share=0.3))
    # One from before this was written down is known by the rest.
    for key in ("listed", "reading"):
        made.pop(key)
    (tmp_path / "made" / "made.json").write_text(json.dumps(made))
    assert make(open_source(folder, heldout_share=0.3)) == measures
