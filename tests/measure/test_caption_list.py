"""Lists of COCO's captions as papers published them, in place of the list that a seed draws."""

import hashlib
import json
import re
from dataclasses import replace

import pytest

from t2i.errors import DataError, UserError
from t2i.measure.coco import listed_captions, read_val2014

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")

SCORE = "eval/coco_fid.py"
LISTS = {
    "uid_caption.csv": 'uid,caption\n{0}_mscoco_3,A bus.\n{1}_mscoco_0,"A cat, a dog."\n{0}_mscoco_1,A tram.\n',
    "coco_30k.csv": 'case_number,prompt,coco_id\n0,A bus.,{0}\n1,"A cat, a dog.",{1}\n2,A tram.,{0}\n',
    "list.tsv": "image_id\ttext\n{0}\tA bus.\n{1}\tA cat, a dog.\n{0}\tA tram.\n",
    "list.jsonl": '{{"file_name": "COCO_val2014_{0:012d}.jpg", "caption": "A bus."}}\n'
    '{{"file_name": "COCO_val2014_{1:012d}.jpg", "caption": "A cat, a dog."}}\n\n'
    '{{"file_name": "COCO_val2014_{0:012d}.jpg", "caption": "A tram."}}\n',
}


@pytest.mark.parametrize("name", LISTS)
def test_a_published_list_is_drawn_in_its_order_with_each_images_first_caption_first(
    name, coco_folder, tmp_path
):
    coco = read_val2014(coco_folder)
    ids = sorted(coco.images)[3:5]
    (tmp_path / name).write_text(LISTS[name].format(*ids))
    choice = listed_captions(coco, tmp_path / name, num_samples=None)
    found = [(each.image_id, each.text, each.caption_id) for each in choice.captions]
    assert found == [(ids[0], "A bus.", 0), (ids[1], "A cat, a dog.", 1), (ids[0], "A tram.", 2)]
    assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() in choice.rule
    turned = LISTS[name].format(ids[0], ids[0])  # the first two rows are of one picture, but for one list
    (tmp_path / name).write_text(
        turned + turned.splitlines(keepends=True)[-1].replace(str(ids[0]), str(ids[1]))
    )
    order = [each.caption_id for each in listed_captions(coco, tmp_path / name, num_samples=4).captions]
    assert order == [0, 3, 1, 2]


@pytest.mark.parametrize("name", ["coco_captions.csv", "captions.txt"])
def test_a_list_without_images_finds_them_by_their_captions(name, coco_folder, tmp_path):
    coco = read_val2014(coco_folder)
    ids = sorted(coco.images)
    coco.captions[ids[7]][0] = replace(coco.captions[ids[7]][0], text="A bus, seen from here,")
    coco.captions[ids[2]][1] = replace(coco.captions[ids[2]][1], text="A bus, seen from here,")
    other = coco.captions[ids[9]][4].text
    head = (
        "Prompt\n" if name.endswith(".csv") else ""
    )  # of one column, as LlamaGen's: its commas are unquoted
    (tmp_path / name).write_text(f"{head}{other}\nA bus, seen  from here,\n")
    choice = listed_captions(coco, tmp_path / name, num_samples=None)
    assert [each.image_id for each in choice.captions] == [ids[9], ids[2]]


def test_a_list_that_does_not_fit_is_refused_by_its_row(coco_folder, tmp_path):
    coco = read_val2014(coco_folder)
    known = min(coco.images)
    for name, text, sentence in (
        ("a.csv", "image_id,text\n1000,A bus.\n", "a.csv, row 1: val2014 has no image 1000"),
        ("b.txt", "A bus that nobody described.\n" * 2, "b.txt, row 1: val2014 has no caption 'A bus that"),
        ("c.csv", f"image_id,title\n{known},A bus.\n", "c.csv: row 1 has the columns image_id, title; expected"),
        ("d.csv", f"image_id,text\n{known},A bus, red.\n", "d.csv: line 2 has 3 values for the 2 columns"),
        ("e.tsv", "image_id\ttext\nfirst\tA bus.\n", "e.tsv: row 1 names the image 'first'; expected a COCO image id"),
        ("f.jsonl", "A bus.\n", "f.jsonl: line 1 is not JSON"),
        ("f.jsonl", '{"caption": {"en": "A bus."}}\n', "f.jsonl: row 1 cannot be used: a caption that is an object"),
        ("g.txt", "", "g.txt lists no caption"),
        ("h.docx", "", "h.docx ends in .docx; expected a file that ends in .txt, .jsonl, .parquet"),
        ("i.parquet", "", "i.parquet is not a parquet file"),
    ):  # fmt: skip
        (tmp_path / name).write_text(text + text[text.find("\n") + 1 :])  # a list has two rows at least
        with pytest.raises(DataError, match=re.escape(sentence)):
            listed_captions(coco, tmp_path / name, num_samples=None)
    with pytest.raises(DataError, match="gone.csv is no file"):
        listed_captions(coco, tmp_path / "gone.csv", num_samples=None)
    (tmp_path / "two.csv").write_text(f"image_id,text\n{known},A bus.\n{known},A tram.\n")
    with pytest.raises(UserError, match="--num-samples is 3; expected 2 to 2, the number of captions"):
        listed_captions(coco, tmp_path / "two.csv", num_samples=3)


def test_a_list_of_a_paper_is_scored_and_named(
    model_folder, coco_folder, narrow_inception_file, call, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    ids = sorted(read_val2014(coco_folder).images)[:4]
    file = tmp_path / "uid_caption.csv"
    file.write_text("uid,caption\n" + "".join(f"{id_}_mscoco_0,A bus {id_}.\n" for id_ in ids))
    words = ["--coco", coco_folder, "--inception", narrow_inception_file, "--out", tmp_path / "out"]
    assert call(SCORE, model_folder, *words, "--captions", file) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["n"] == 4 and hashlib.sha256(file.read_bytes()).hexdigest() in scores["captions"]
    drawn = [json.loads(line) for line in (tmp_path / "out" / "captions.jsonl").read_text().splitlines()]
    assert drawn == [{"name": f"{id_:012d}_{row}", "caption": f"A bus {id_}."} for row, id_ in enumerate(ids)]
    for changed in (["--list-seed", 1, *words], words[2:]):
        assert call(SCORE, model_folder, "--captions", file, *changed) == 2
        assert "--captions is a list of COCO's captions" in capsys.readouterr().err
