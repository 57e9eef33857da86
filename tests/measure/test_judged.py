"""Scores and drawings of which a judge behind HTTP has a say."""

import json

import numpy as np
import pytest
from PIL import Image

from t2i.commands.judges import JudgeFlags, judges_of


def test_scores_carry_what_a_judge_said_of_every_row(
    service, model_folder, coco_folder, narrow_inception_file, call, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    words = ["eval/coco_fid.py", model_folder, "--coco", coco_folder, "--num-samples", 6, "--out", out]
    words += ["--inception", narrow_inception_file, "--bootstrap", 0, "--best-of", 2, "--best-by", "judge"]
    words += ["--judge-url", service.url, "--judges"]
    assert call(*words, "hpsv3") == 2
    assert "Name it: --judges hpsv3=REVISION" in capsys.readouterr().err
    assert not out.exists()  # found out before anything was drawn
    assert call(*words, "hpsv3=v3.0", "pickscore=v1") == 0
    assert "hpsv3 chose the images of" in capsys.readouterr().out
    scores = json.loads((out / "scores.json").read_text())
    captions = [json.loads(line)["caption"] for line in (out / "captions.jsonl").read_text().splitlines()]
    files = sorted((out / "model").glob("*.png"))
    judges = scores["judges"]
    assert [judges[name]["revision"] for name in ("hpsv3", "pickscore")] == ["v3.0", "v1"]
    assert [judges[name].get("chose_the_images") for name in ("hpsv3", "pickscore")] == [True, None]
    assert (scores["sampler"]["best_of"], scores["sampler"]["ranked_by"]) == (2, "hpsv3 v3.0")
    assert scores["seeds"].startswith(
        "candidate j of image i of captions.jsonl is drawn with sampler.seed + i + 6 j"
    )
    brightness = np.mean([np.asarray(Image.open(file)).mean() for file in files])
    letters = np.mean([len(caption) for caption in captions])
    assert scores["hpsv3"] == pytest.approx(brightness + 100 * letters)
    rows = scores["rows"]
    assert {row for row, found in rows.items() if "hpsv3" in found} == {
        "real",
        "reconstructions",
        "model",
        "other_captions",
        "mismatched",
    }
    assert "matched" in rows and rows["mismatched"]["n"] == rows["real"]["n"]
    assert call("eval/coco_fid.py", "compare", out, out) == 0
    # All is drawn and judged: the same command asks no more than whether the judges are there.
    service.bodies.clear()
    assert call(*words, "hpsv3=v3.0", "pickscore=v1") == 0
    assert [len(body["requests"]) for body in service.bodies] == [1, 1]
    # Another judge would have chosen other images.
    service.revision = "2"
    assert call(*words, "hpsv3=v3.0", "pickscore=v1") == 2
    assert "ranked_by: hpsv3 v3.0 there, hpsv3 v3.0 (service: 2) asked" in capsys.readouterr().err


def test_sample_draws_what_a_judge_chose_and_says_which_candidate(
    service, model_folder, call, tmp_path, capsys
):
    captions = ["a red cup", "a blue cup"]
    words = ["launchers/sample.py", model_folder, "--prompts", *captions, "--seed", 4]
    best = [
        *words,
        "--out",
        tmp_path / "best",
        "--best-of",
        3,
        "--best-by",
        "judge",
        "--judge-url",
        service.url,
    ]
    assert call(*best, "--judges", "hpsv3") == 2
    assert "Name it: --judges hpsv3=REVISION" in capsys.readouterr().err
    assert not (tmp_path / "best").exists()
    assert call(*best, "--judges", "hpsv3=v3.0") == 0
    assert json.loads((tmp_path / "best" / "settings.json").read_text())["ranked_by"] == "hpsv3 v3.0"
    for place, caption in enumerate(captions):
        candidates = []
        for turn in range(3):
            out = tmp_path / f"{place}_{turn}"
            again = [
                "launchers/sample.py",
                model_folder,
                "--prompts",
                caption,
                "--seed",
                4 + place + 2 * turn,
            ]
            assert call(*again, "--out", out) == 0
            candidates.append(np.asarray(Image.open(out / "00000.png")))
        found = Image.open(tmp_path / "best" / f"{place:05d}.png")
        brightest = int(np.argmax([each.mean() for each in candidates]))
        np.testing.assert_array_equal(np.asarray(found), candidates[brightest])
        assert (found.text["candidate"], found.text["image_seed"]) == (
            str(brightest),
            str(4 + place + 2 * brightest),
        )
    service.revision = "2"
    assert call(*best, "--judges", "hpsv3=v3.0") == 0  # images of another judge, beside the first
    assert json.loads((tmp_path / "best" / "settings_00002.json").read_text())["ranked_by"].endswith(
        "(service: 2)"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--judges", "hpsv3=v3.0"], "--judge-url and --judges go together"),
        (["--best-of", 2, "--best-by", "judge"], "expects --judge-url and its --judges"),
        (
            ["--best-by", "judge", "--judge-url", "http://h", "--judges", "a=1"],
            "--best-by judge chooses among several",
        ),
        (["--judge-revision", "v3"], "expected --judges with one name that it is of"),
        (["--judge-url", "http://h", "--judges", "a", "b", "--judge-revision", "v3"], "each names its own"),
        (["--judge-url", "http://h", "--judges", "a=1", "--judge-revision", "v3"], "each names its own"),
        (["--judge-url", "http://h", "--judges", "a=1", "a=2"], "expected names, each once"),
        (["--judge-url", "http://h", "--judges", "=1"], "expected names, each once"),
        (["--judge-timeout-seconds", "0"], "judge-timeout-seconds"),
    ],
)
def test_flags_of_judges_that_contradict_are_refused(words, sentence, model_folder, call, tmp_path, capsys):
    assert call("eval/coco_fid.py", model_folder, "--out", tmp_path / "out", *words) == 2
    assert sentence in capsys.readouterr().err


def test_one_revision_and_a_timeout_reach_the_judge(service):
    flags = JudgeFlags(service.url, ("hpsv3",), judge_revision="v3.0", judge_timeout_seconds=7)
    (judge,) = judges_of(flags)
    assert (judge.name, judge.timeout_seconds) == ("hpsv3 v3.0", 7)
