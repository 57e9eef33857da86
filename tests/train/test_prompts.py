"""Prompts of a file along a run: drawn again and again, each beside its image if it has one."""

import itertools
import json
from types import SimpleNamespace

import pytest
from PIL import Image

from t2i.config import SampleConfig
from t2i.errors import DataError
from t2i.generate.sample import drawer_of
from t2i.play.watching import grids_of
from t2i.runs.loading import open_model
from t2i.runs.run_folder import read_sample_captions
from t2i.train.periodic import _samples
from t2i.train.prompts import MOST_PROMPTS, read_prompts


def written(tmp_path, rows):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "prompts.jsonl"


def test_lines_and_rows_are_prompts_and_some_have_an_image(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    assert [(one.text, one.real) for one in read_prompts(tmp_path / "prompts.txt")] == [
        ("a cat", None),
        ("a dog", None),
    ]
    file = written(tmp_path, [{"text": "a red\nthing", "image": "red.png"}, {"text": "a dog"}])
    first, second = read_prompts(file)
    assert (first.text, first.real.size, second.real) == ("a red thing", (40, 20), None)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "image": "gone.png"}], r"row 1 names the image .*gone\.png, which cannot be read"),
        ([{"title": "a"}], "row 1 has the columns title; expected a prompt in one of caption, text, prompt"),
        ([{"text": "a"}] * (MOST_PROMPTS + 1), "has 65 prompts; expected 1 to 64"),
        ([{"text": "a"}, {"text": 5}], "row 2 cannot be used: "),
        ([], "has 0 prompts"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_name(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_prompts(written(tmp_path, rows))


def test_a_table_that_is_not_utf_8_is_refused_before_the_run(tmp_path):
    file = tmp_path / "prompts.csv"
    file.write_bytes("text\na café\n".encode("latin-1"))  # as spreadsheet programs write it
    with pytest.raises(DataError, match="row 1 cannot be used: a caption that is neither UTF-8"):
        read_prompts(file)


def test_a_real_image_stands_to_the_right_of_the_drawn_one(tmp_path, model_folder):
    drawer = drawer_of(open_model(str(model_folder), needs_images=True), settings=SampleConfig())
    prompts = read_prompts(written(tmp_path, [{"text": "a dog"}, {"text": "red", "image": "red.png"}]))
    shown = []
    writer = SimpleNamespace(run_dir=tmp_path, show=lambda sheet, step: shown.append(step))
    _samples(drawer, prompts=prompts, writer=writer)(7, lambda: False)
    sheet = Image.open(tmp_path / "samples" / "step_000007.png")
    assert sheet.size == (8 * 32, 32)  # drawn, white, drawn, red, and white up to eight
    assert sheet.getpixel((32 + 16, 16)) == (255, 255, 255)
    assert sheet.getpixel((3 * 32 + 16, 16)) == (255, 0, 0)
    assert shown == [7]


def test_a_run_leaves_a_grid_of_its_prompts(finished, tmp_path, call):
    file = written(tmp_path, [{"text": "a dog"}, {"text": "red", "image": "red.png"}])
    run, data, model, settings = tmp_path / "run", finished.data, finished.model, finished.train
    words = {
        "--ds_config": "ds_configs/zero2_fp32.json",
        "--run-dir": run,
        "--data.shards": data.shards,
        "--data.seq-len": data.seq_len,
        "--model.hidden-size": model.hidden_size,
        "--model.num-layers": model.num_layers,
        "--model.num-heads": model.num_heads,
        "--train.global-batch-tokens": settings.global_batch_tokens,
        "--train.max-steps": 2,
        "--train.sample-every": 1,
        "--train.sample-prompts": file,
    }
    assert call("launchers/train.py", *itertools.chain(*words.items())) == 0
    assert read_sample_captions(run) == ["a dog", "red"]
    assert list(grids_of(run)) == [1, 2]
    sheet = Image.open(grids_of(run)[2])
    side = sheet.height
    assert sheet.width == 8 * side  # drawn, white, drawn, red, and white up to eight
    assert sheet.getpixel((3 * side + side // 2, side // 2)) == (255, 0, 0)
