"""Captions and folders that launchers/sample.py is given."""

import json
import os
from functools import partial

import pytest
from PIL import Image

from t2i.generate import image_files


@pytest.fixture
def draw(call):
    return partial(call, "launchers/sample.py")


def test_captions_are_read_from_the_lists_that_people_have(model_folder, draw, tmp_path):
    (tmp_path / "my captions.csv").write_text(
        'uid,caption\n391895_mscoco_0,"a cat, a dog"\n5_mscoco_1,a bus\n'
    )
    (tmp_path / "captions.txt").write_text("a cat, a dog\n\n  a bus \n")
    for name in ("my captions.csv", "captions.txt"):
        out = tmp_path / name.replace(".", "_")
        assert draw(model_folder, "--prompts", tmp_path / name, "--out", out) == 0
        found = [Image.open(out / f"0000{index}.png").text["caption"] for index in range(2)]
        assert found == ["a cat, a dog", "a bus"]


def test_a_file_that_is_no_list_is_not_taken_for_a_caption(model_folder, draw, tmp_path, capsys):
    (tmp_path / "captions.json").write_text(json.dumps(["a cat"]))
    for name, sentence in (
        ("captions.json", "ends in .json; expected a file that ends in .txt"),
        ("gone.csv", "is no file"),
    ):
        assert draw(model_folder, "--prompts", tmp_path / name, "--out", tmp_path / "out") == 3
        assert sentence in capsys.readouterr().err
    (tmp_path / "my captions.png").write_text("no list")
    assert draw(model_folder, "--prompts", tmp_path / "my captions.png", "--out", tmp_path / "out") == 3
    assert not (tmp_path / "out").exists()


def test_bytes_that_are_no_text_are_drawn_as_a_caption(model_folder, draw, tmp_path):
    assert draw(model_folder, "--prompts", "caf\udce9", "--out", tmp_path) == 0
    with Image.open(tmp_path / "00000.png") as image:
        assert image.info["caption"] == "caf?"


def test_what_cannot_be_is_refused_before_the_model_is_read(draw, tmp_path, capsys):
    (tmp_path / "file").touch()
    asked = ("no/such/model", "--prompts", "a cat", "--out", tmp_path / "file")
    assert draw(*asked) == 2 and "file cannot be written: Not a directory" in capsys.readouterr().err
    assert draw(*asked, "--compile", "--window", 3) == 2
    assert "--window is 3; expected 1 or auto with --compile" in capsys.readouterr().err


def test_images_of_somebody_else_are_kept_and_not_taken_for_drawn_ones(model_folder, draw, tmp_path, capsys):
    mine = tmp_path / "00001.png"
    mine.write_bytes(b"a photograph")
    (tmp_path / "holiday.png").write_bytes(b"another")
    assert draw(model_folder, "--prompts", "a cat", "a dog", "--out", tmp_path) == 0
    assert "00002.png to 00003.png" in capsys.readouterr().out
    assert mine.read_bytes() == b"a photograph"
    (tmp_path / "settings.json").write_text("[]")
    assert draw(model_folder, "--prompts", "a cat", "--out", tmp_path) == 3
    assert "settings.json holds list; expected an object of keys" in capsys.readouterr().err


def test_a_window_draws_the_same_images(model_folder, draw, tmp_path, capsys):
    drawn = {}
    for window in ("1", "auto", "3"):
        out = tmp_path / window
        assert draw(model_folder, "--prompts", "a cat", "a dog", "--out", out, "--window", window) == 0
        drawn[window] = [Image.open(path).tobytes() for path in sorted(out.glob("*.png"))]
    assert len(drawn["1"]) == 2 and drawn["1"] == drawn["auto"] == drawn["3"]
    # A folder may be continued with auto after 1, for they are one setting, as in folders from before there was any.
    settings = {window: json.loads((tmp_path / window / "settings.json").read_text()) for window in drawn}
    assert settings["1"] == settings["auto"] and "window" not in settings["1"]
    assert settings["3"]["window"] == 3
    asked = (model_folder, "--prompts", "a cat", "--out", tmp_path / "none", "--window", "3", "--compile")
    assert draw(*asked) == 2
    assert "--window is 3; expected 1 or auto with --compile" in capsys.readouterr().err


def test_flags_that_would_change_nothing_are_refused(model_folder, draw, tmp_path, capsys):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("a cat\n")
    for words, sentence in (
        (["--prompts", tmp_path / "a.txt", tmp_path / "b.txt"], "a.txt is a file; expected captions, or one file"),
        (["--prompts", "a", "--best-of", 2, "--judge-url", "http://x", "--judges", "a"], "are for --best-by judge"),
        (["--prompts", "a", "--best-of", 2, "--best-by", "judge", "--judge-url", "x", "--judges", "a"],
         "--judge-url is x; expected an address such as http://"),
    ):  # fmt: skip
        assert draw(model_folder, *words, "--out", tmp_path / "out") == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_processes_that_draw_the_same_image_do_not_write_into_one_file(tmp_path, monkeypatch):
    image, path = Image.new("RGB", (8, 8)), tmp_path / "0.png"
    save = Image.Image.save

    def other_is_quicker(self, file, **settings):
        save(self, file, **settings)
        monkeypatch.setattr(Image.Image, "save", save)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        image_files._write(path, image, {})

    monkeypatch.setattr(Image.Image, "save", other_is_quicker)
    image_files._write(path, image, {})
    assert Image.open(path).size == (8, 8)
    assert [file.name for file in tmp_path.iterdir()] == ["0.png"]
