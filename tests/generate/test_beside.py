"""Sampling into a folder that holds images: new ones beside the old, and the same command resumed."""

import json
from functools import partial

import pytest
from PIL import Image

from t2i.commands.sample import captions_of
from t2i.data.sources.caption_list import read_caption_list
from t2i.errors import DataError, UserError
from t2i.files import is_file, lines_of
from t2i.generate import sample
from t2i.generate.beside import named_beside
from t2i.generate.claim import claim_folder


@pytest.fixture
def draw(call, model_folder, tmp_path):
    return partial(call, "launchers/sample.py", model_folder, "--out", tmp_path / "out")


def captions_in(folder):
    return {path.stem: Image.open(path).text["caption"] for path in sorted(folder.glob("*.png"))}


def test_other_prompts_are_numbered_after_those_that_are_there_and_each_command_resumes_its_own(
    draw, tmp_path, capsys
):
    out = tmp_path / "out"
    first, second = ("--prompts", "a cup", "a hat"), ("--prompts", "a dog", "--seed", 3)
    assert draw(*first) == 0 and draw(*second) == 0
    assert captions_in(out) == {"00000": "a cup", "00001": "a hat", "00002": "a dog"}
    assert "1 images in" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in out.glob("*.png")}
    (out / "00001.png").unlink()
    times = (out / "00002.png").stat().st_mtime_ns
    assert draw(*second) == 0 and draw(*first) == 0
    assert {path: path.read_bytes() for path in out.glob("*.png")} == before
    assert (out / "00002.png").stat().st_mtime_ns == times
    assert (
        draw("--prompts", "a cup", "a hat", "--guidance-scale", 1) == 0
    )  # the same captions, drawn otherwise
    assert list(captions_in(out).values()) == ["a cup", "a hat", "a dog", "a cup", "a hat"]


def test_a_drawing_that_was_stopped_keeps_the_numbers_of_images_it_has_not_drawn(tmp_path):
    def settings_of(captions):
        return {"captions": list(captions.values())}

    (tmp_path / "settings.json").write_text(json.dumps({"captions": ["a", "b", "c"], "images": 3}))
    (tmp_path / "00000.png").touch()
    named = partial(named_beside, out=tmp_path, settings_of=settings_of)
    assert named(["d"]) == ({"00003": "d"}, "settings_00003.json")
    assert named(["a", "b", "c"]) == ({"00000": "a", "00001": "b", "00002": "c"}, "settings.json")
    (tmp_path / "00041.png").touch()  # somebody else's
    assert named(["d"]) == ({"00042": "d"}, "settings_00042.json")
    # Settings that an earlier release wrote do not say how many images there are: the files do.
    (tmp_path / "settings.json").write_text(json.dumps({"captions": ["a"]}))
    assert named(["d"]) == ({"00042": "d"}, "settings_00042.json")


@pytest.mark.parametrize(
    "special",
    [
        {"best_of": 8},
        {"best_of": 8, "best_by": "judge", "ranked_by": "hpsv3 v3.0"},
        {"compile": True},
        {"window": 8},
        {"dtype": "bfloat16"},
        {"seed": 1},
    ],
    ids=lambda special: next(iter(special)),
)
def test_a_drawing_is_another_whichever_of_the_two_says_so(tmp_path, special):
    usual = {"weights": "a", "seed": 0}
    for there, asked in ((usual, usual | special), (usual | special, usual)):
        (tmp_path / "settings.json").write_text(json.dumps({**there, "images": 1}))
        names, record = named_beside(["a cup"], out=tmp_path, settings_of=lambda captions, asked=asked: asked)
        assert (names, record) == ({"00001": "a cup"}, "settings_00001.json")
        with pytest.raises(UserError, match=f"other settings .*{next(iter(special))}: .* there, .* asked"):
            claim_folder(tmp_path / "settings.json", [], settings=asked)
    for same in (usual, usual | special):
        (tmp_path / "settings.json").write_text(json.dumps({**same, "images": 1}))
        assert named_beside(["a cup"], out=tmp_path, settings_of=lambda captions, same=same: same) == (
            {"00000": "a cup"},
            "settings.json",
        )


def test_images_of_another_image_tokenizer_are_another_drawing_where_both_say_theirs(tmp_path):
    old, own, other = (
        {"weights": "a", **more} for more in ({}, {"image_tokenizer": "x"}, {"image_tokenizer": "y"})
    )
    for there, asked, is_same in ((own, other, False), (old, own, True), (own, own, True)):
        (tmp_path / "settings.json").write_text(json.dumps({**there, "images": 1}))
        if is_same:
            claim_folder(tmp_path / "settings.json", [], settings=asked)
        else:
            with pytest.raises(UserError, match="other settings .another image tokenizer"):
                claim_folder(tmp_path / "settings.json", [], settings=asked)


def test_an_empty_prompt_is_the_null_caption_and_moves_no_number(draw, tmp_path):
    assert draw("--prompts", "a cup", "", "a hat") == 0
    assert captions_in(tmp_path / "out") == {"00000": "a cup", "00001": "", "00002": "a hat"}


@pytest.mark.parametrize("prompt", ["一只红色的苹果" * 40, "a" * 300, "a cup\0", "what? a cup / a hat"])
def test_a_prompt_that_no_file_can_be_named_is_a_caption(prompt):
    assert captions_of((prompt,)) == [prompt]
    assert not is_file(prompt)


def test_a_file_that_is_not_there_is_not_drawn_as_a_caption(tmp_path):
    for name in ("captions.txt", str(tmp_path / "my captions.txt"), "x" * 300 + ".csv"):
        with pytest.raises(DataError, match="is no file"):
            captions_of((name,))


STRANGE = "a red\u2028apple\x0b\x0c\x1c\x1d\x1e\x85\u2029"


def test_lines_end_at_line_feeds_and_carriage_returns_alone(tmp_path, caplog):
    assert lines_of(f"{STRANGE}\nb\r\nc\rd") == [STRANGE, "b", "c", "d"]
    assert lines_of("a\n\n") == ["a", ""] and lines_of("") == []
    (tmp_path / "p.txt").write_text(f"{STRANGE} pear\r\n\na plum\n", newline="")
    assert [row.text for row in read_caption_list(tmp_path / "p.txt")] == ["a red apple pear", "a plum"]
    assert "1 empty lines are no captions" in caplog.text


def test_guidance_of_diffusion_models_is_warned_of_once(caplog, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    sample._warn_of_guidance.cache_clear()
    for scale in (2.0, sample.MOST_GUIDANCE, 7.5, 7.5):
        sample._warn_of_guidance(scale)
    assert [record.args[0] for record in caplog.records] == [7.5]


def test_captions_that_are_cut_are_said(draw, caplog):
    assert draw("--prompts", "a cup", "one and " * 60) == 0
    (record,) = [one for one in caplog.records if "are cut there" in one.msg]
    assert record.args[0] == 1 and record.args[2].startswith("one and")
