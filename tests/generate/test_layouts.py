"""What is drawn for GenEval and DPG-Bench lies where their own scorers look."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i.errors import DataError
from t2i.generate.benchmarks import read_benchmark

ROWS = [
    {"tag": "two_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
    {"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], "prompt": "a red cup"},
]


@pytest.fixture
def draw(call):
    return partial(call, "launchers/sample.py")


def test_genevals_scorer_finds_metadata_and_four_images_a_prompt(model_folder, draw, tmp_path):
    prompts, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "geneval"
    rows = [{**ROWS[0], "tag": "two\u2028objects"}, ROWS[1]]  # a line all the same
    prompts.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert draw(model_folder, "--layout", "geneval", "--prompts", prompts, "--out", out) == 0
    found = {}
    for folder in sorted(path for path in out.iterdir() if path.is_dir() and path.name.isdigit()):
        samples = [path for path in (folder / "samples").iterdir() if re.match(r"\d+\.png", path.name)]
        found[folder.name] = json.loads((folder / "metadata.jsonl").read_text())
        assert sorted(path.name for path in samples) == ["0000.png", "0001.png", "0002.png", "0003.png"]
        assert {Image.open(path).text["caption"] for path in samples} == {found[folder.name]["prompt"]}
        assert len({path.read_bytes() for path in samples}) == 4
    assert found == {"00000": rows[0], "00001": rows[1]}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert draw(model_folder, "--layout", "geneval", "--prompts", prompts, "--out", out) == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}


def test_geneval_2s_scorer_finds_an_image_by_its_prompt(model_folder, draw, tmp_path):
    prompts, out = tmp_path / "geneval2_data.jsonl", tmp_path / "geneval2"
    rows = [
        {"prompt": "four white bicycles", "atom_count": 2},
        {"prompt": "a “plastic” cow", "atom_count": 2},
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert draw(model_folder, "--layout", "geneval2", "--prompts", prompts, "--out", out) == 0
    paths = json.loads((out / "image_paths.json").read_text())
    assert list(paths) == [row["prompt"] for row in rows]
    assert {prompt: Image.open(path).text["caption"] for prompt, path in paths.items()} == {
        prompt: prompt for prompt in paths
    }
    prompts.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[0]))
    with pytest.raises(DataError, match="has the prompt 'four white bicycles' twice"):
        read_benchmark("geneval2", prompts=prompts, out=out)


def test_dpg_benchs_scorer_finds_nothing_but_a_sheet_a_prompt(model_folder, draw, tmp_path):
    prompts, out = tmp_path / "prompts", tmp_path / "dpg"
    prompts.mkdir()
    for stem in ("COCOval2014000000000042", "partiprompts7", "stanford.1"):
        (prompts / f"{stem}.txt").write_text(f"A picture\nof {stem}.\n")
    assert draw(model_folder, "--layout", "dpg", "--prompts", prompts, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "COCOval2014000000000042.png",
        "partiprompts7.png",
        "stanford.1.png",
    ]
    sheet = np.asarray(Image.open(out / "partiprompts7.png"))
    assert sheet.shape == (64, 64, 3)
    singles = tmp_path / "dpg-single"
    for place, (top, left) in enumerate([(0, 0), (0, 32), (32, 0), (32, 32)]):  # the crops of the scorer
        single = Image.open(singles / f"partiprompts7_{place}.png")
        assert single.text["caption"] == "A picture of partiprompts7."
        np.testing.assert_array_equal(sheet[top : top + 32, left : left + 32], np.asarray(single))
    # Sheets whose images are gone may be of another model.
    singles.rename(tmp_path / "elsewhere")
    assert draw(model_folder, "--layout", "dpg", "--prompts", prompts, "--out", out) == 2
    assert not singles.exists()


def test_prompts_of_another_kind_are_refused(model_folder, draw, tmp_path, capsys):
    with pytest.raises(DataError, match="holds no .txt file"):
        read_benchmark("dpg", prompts=tmp_path, out=tmp_path / "out")
    with pytest.raises(DataError, match="is no file; GenEval's is evaluation_metadata.jsonl"):
        read_benchmark("geneval", prompts=tmp_path, out=tmp_path / "out")
    (tmp_path / "captions.txt").write_text("a red cup\n")
    with pytest.raises(DataError, match="line 1 is not JSON"):
        read_benchmark("geneval", prompts=tmp_path / "captions.txt", out=tmp_path / "out")
    # With the byte order mark of a spreadsheet program; the line is that of the file.
    (tmp_path / "rows.jsonl").write_text('\ufeff{"prompt": "a cup"}\n\n{"prompt": null}\n')
    for layout in ("geneval", "geneval2"):
        with pytest.raises(DataError, match=r"rows\.jsonl, line 3: prompt is None; expected str"):
            read_benchmark(layout, prompts=tmp_path / "rows.jsonl", out=tmp_path / "out")
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "1.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"dpg/1\.txt is empty; expected a prompt"):
        read_benchmark("dpg", prompts=tmp_path / "dpg", out=tmp_path / "out")
    assert draw(model_folder, "--layout", "dpg", "--prompts", "a", "b", "--out", tmp_path / "out") == 2
    assert "expects one --prompts path; found 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_place_of_sheets_that_cannot_be_written_is_refused_before_the_model_is_read(draw, tmp_path, capsys):
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "1.txt").write_text("a red cup\n")
    (tmp_path / "dpg").write_text("a file")
    asked = ("no/such/model", "--layout", "dpg", "--prompts", tmp_path / "prompts", "--out", tmp_path / "dpg")
    assert draw(*asked) == 2
    assert "dpg cannot be written: Not a directory" in capsys.readouterr().err


def test_dpg_bench_is_drawn_beside_the_working_folder_too(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "1.txt").write_text("a cup")
    monkeypatch.chdir(tmp_path / "here")
    work = read_benchmark("dpg", prompts=tmp_path / "prompts", out=Path())
    assert work.drawn == tmp_path / "here-single"
