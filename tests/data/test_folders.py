"""Folders of images as people have them: each file in them is read, or counted by the reason that it is not."""

import errno
import io
import json
import os
from pathlib import Path

import made_sources as made
import pytest

from t2i.data.sources import open_source
from t2i.errors import DataError


def converted(kind):
    buffer = io.BytesIO()
    made.picture(3).save(buffer, kind)
    return buffer.getvalue()


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def test_images_are_told_by_ending_or_content_and_captions_in_any_case(tmp_path):
    images = {
        "a.JPG": converted("JPEG"),
        "b.jfif": converted("JPEG"),
        "c.jpe": converted("JPEG"),
        "d.bmp": converted("BMP"),
        "e.gif": converted("GIF"),
        "f.tiff": converted("TIFF"),
        "g.avif": converted("AVIF"),
        "no ending": converted("PNG"),
        "h.jpg_large": converted("JPEG"),
        "IMG.v1.0001.png": converted("PNG"),
        "i.png": converted("WEBP"),
    }
    captions = {
        f"{Path(name).stem}.TXT" if name < "c" else f"{Path(name).stem}.txt": "a caption" for name in images
    }
    kept, tally = made.accounted(write(tmp_path, {**images, **captions}))
    assert set(kept) == set(images)
    assert (tally.left_out, tally.unread) == ({}, {})


def test_every_other_file_is_counted_by_reason(tmp_path):
    image = made.encoded(1)
    files = {
        "a.png": image, "a.txt": "kept", "b.png": image, "c.txt": "no image", "d.png": image, "d.txt": " \n",
        "e.png": b"", "e.txt": "broken", "f.png": converted("PNG"), "f.txt": b"\x81",
        "._a.png": b"\0\5\26\7", "._a.txt": b"\0", ".DS_Store": b"\0", "__MACOSX/a.png": image, ".cache/a.png": image,
        "photo.dng": converted("TIFF"), "h.heic": b"\0\0\0\x18ftypheic", "h.txt": "of a phone", "a.json": "{}",
    }  # fmt: skip
    kept, tally = made.accounted(write(tmp_path, files))
    assert kept == {"a.png": "kept"}
    assert tally.left_out == {
        "no .txt caption beside the image": 1,
        "no image beside the caption": 2,
        "no caption": 1,
        "a caption that is neither UTF-8 nor cp1252 (--caption-encoding names another)": 1,
        "cannot identify one of JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF": 1,
    }
    assert tally.unread == {
        "a hidden file or folder": 5,
        "a file of another kind (.dng)": 1,
        "a file of another kind (.heic)": 1,
        "a file of another kind (.json)": 1,
    }


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path):
    image = made.encoded(1)
    outside = write(
        tmp_path / "home", {"diary.txt": "my secrets", "passport.png": image, "more/m.png": image}
    )
    folder = write(tmp_path / "set", {"x.png": image, "sub/y.png": image, "sub/y.txt": "why", "z.png": image})
    (folder / "x.txt").symlink_to(outside / "diary.txt")
    (folder / "z.txt").symlink_to("sub/y.txt")
    (folder / "p.png").symlink_to("../home/passport.png")
    (folder / "more").symlink_to(outside / "more")
    (folder / "again").symlink_to("sub")
    (folder / "gone.png").symlink_to("nothing")
    (folder / "round.png").symlink_to("round.png")
    os.mkfifo(folder / "pipe.png")
    (tmp_path / "link to set").symlink_to(folder)
    for root in (folder, tmp_path / "link to set"):
        kept, tally = made.accounted(root)
        assert kept == {"sub/y.png": "why", "z.png": "why"}
        assert tally.left_out == {"no .txt caption beside the image": 1}
        assert tally.unread == {
            "a link that leads out of the folder": 3,
            "a link to a folder": 1,
            "a link to nothing": 2,
            "neither a file nor a folder": 1,
        }
    rows = [{"file_name": name, "text": name} for name in ("p.png", "more/m.png", "sub/y.png", "again/y.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept, tally = made.accounted(folder)
    assert set(kept) == {"sub/y.png", "again/y.png"}
    assert tally.left_out["metadata names a file that is not in the folder"] == 2


def test_names_of_folders_are_captions_when_asked_for(tmp_path):
    folder = write(tmp_path, {f"{name}/001.png": made.encoded(1) for name in ("cat", "dog/small")})
    (folder / "top.png").write_bytes(made.encoded(2))
    with pytest.raises(DataError, match=r"3 times no \.txt caption .*give --caption-key label"):
        open_source(str(folder))
    kept, tally = made.accounted(folder, caption_key="label")
    assert kept == {"cat/001.png": "cat", "dog/small/001.png": "small"}
    assert tally.left_out == {"no caption": 1}


def test_other_endings_of_captions_are_asked_for(tmp_path):
    files = {"a.png": made.encoded(1), "a.caption": "asked for", "a.txt": "tags", "a.en.txt": "in English"}
    assert made.accounted(write(tmp_path, files), caption_key="caption")[0] == {"a.png": "asked for"}
    assert made.accounted(tmp_path, caption_key="en.txt")[0] == {"a.png": "in English"}


@pytest.mark.parametrize("name", ["metadata.jsonl", "a.png"])
def test_a_table_or_an_image_that_the_disk_hides_for_a_moment_is_not_passed_over(name, tmp_path, monkeypatch):
    made.write_images(tmp_path)
    row = {"file_name": "000.png" if name != "a.png" else "a.png", "text": "a cat"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    is_file = Path.is_file

    def stale(path):
        if path.name == name:
            raise OSError(errno.ESTALE, "Stale file handle")
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", stale)
    with pytest.raises(OSError, match="Stale"):
        made.accounted(tmp_path)


def test_each_row_of_an_image_is_a_caption_and_an_image_is_in_one_split(tmp_path):
    made.write_images(tmp_path)
    rows = [
        {"file_name": f"{i:03d}.png", "text": f"{n} {i}"} for n in ("one", "two", "three") for i in range(20)
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    kept, tally = made.accounted(tmp_path)
    assert (len(kept), tally.left_out) == (60, {"an image that the metadata does not name": 4})
    assert [kept[key] for key in ("007.png", "007.png#1", "007.png#2")] == ["one 7", "two 7", "three 7"]
    splits = {}
    for pair in open_source(str(tmp_path), heldout_share=0.5).pairs:
        splits.setdefault(pair.key.partition("#")[0], set()).add(pair.split)
    assert all(len(found) == 1 for found in splits.values())
    # A first caption keeps its split when others are added.
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows[:20])))
    alone = {pair.key: {pair.split} for pair in open_source(str(tmp_path), heldout_share=0.5).pairs}
    assert alone == splits


def test_an_image_under_two_spellings_is_in_one_split(tmp_path):
    made.write_images(tmp_path)
    rows = [
        {"file_name": f"{start}{i:03d}.png", "text": f"{start}{i}"} for start in ("", "./") for i in range(20)
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits = {}
    for pair in open_source(str(tmp_path), heldout_share=0.5).pairs:
        splits.setdefault(pair.file, set()).add(pair.split)
    assert len(splits) == 20 and all(len(found) == 1 for found in splits.values())


def test_a_quote_that_is_never_closed_takes_no_other_row(tmp_path):
    made.write_images(tmp_path)
    rows = ['000.png\t"The best day ever', "001.png\ta dog", '002.png\t"quoted" and not', '003.png\t"x\ty"']
    table = tmp_path / "mine.tsv"
    table.write_text("\n".join(["file_name\ttext", *rows[:3]]))
    assert made.accounted(table)[0] == {
        "000.png": '"The best day ever',
        "001.png": "a dog",
        "002.png": '"quoted" and not',
    }
    # Two of them hold the rows between them together.
    table.write_text("\n".join(["file_name\ttext", *rows[:2], '002.png\t"end"']))
    assert made.accounted(table)[0]["001.png"] == "a dog"
    table.write_text("\n".join(["file_name\ttext", rows[1], rows[3]]))
    assert made.accounted(table)[0]["003.png"] == "x y"
    table.unlink()
    (tmp_path / "metadata.csv").write_text('file_name,text\n000.png,"The best day ever\n001.png,a dog\n')
    with pytest.raises(DataError, match=r"unexpected end of data.*its own quotes twice"):
        open_source(str(tmp_path))


def test_tables_with_other_columns_and_separators(tmp_path):
    made.write_images(tmp_path)
    (tmp_path / "metadata.csv").write_text("filepath;title\n000.png;a, b\n001.png;c\n")
    with pytest.raises(DataError, match=r"the columns filepath, title; expected one of text, caption"):
        open_source(str(tmp_path))
    keys = {"image_key": "filepath", "caption_key": "title"}
    assert made.accounted(tmp_path, **keys)[0] == {"000.png": "a, b", "001.png": "c"}
    (tmp_path / "metadata.csv").rename(tmp_path / "mine.csv")
    assert made.accounted(tmp_path / "mine.csv", **keys)[0] == {"000.png": "a, b", "001.png": "c"}
    table = tmp_path / "metadata.csv"
    for content, sentence in {
        "file_name,text,text\n000.png,a,b": "several columns named text",
        "file_name,text\n": r"metadata\.csv has no rows",
        "": r"metadata\.csv has no rows",
        "file_name,text\n\n000.png": "1 times no caption",
        "file_name,text\nhttps://example.org/a.png,a": "1 times a row that names an address",
        ",text\n000.png,a": r"expected one of file_name \(--image-key\)",
    }.items():
        table.write_text(content)
        with pytest.raises(DataError, match=sentence):
            open_source(str(tmp_path))


def test_scores_in_text_are_numbers(tmp_path):
    made.write_images(tmp_path)
    (tmp_path / "metadata.csv").write_text(
        "file_name,text,score\n000.png,a,0.5\n001.png,b,0.1\n002.png,c,high\n"
    )
    kept, tally = made.accounted(tmp_path, score_key="score", min_score=0.3)
    assert set(kept) == {"000.png"}
    assert tally.left_out["score below 0.3"] == tally.left_out["no number in score"] == 1


def test_metadata_one_folder_below_is_named(tmp_path):
    made.metadata_jsonl(tmp_path / "train")
    with pytest.raises(
        DataError,
        match=rf"train/metadata\.jsonl is not at its top: give {tmp_path}/train, or hf:{tmp_path}\.",
    ):
        open_source(str(tmp_path))


def test_images_of_one_pixel_are_left_out(tmp_path):
    made.text_folder(tmp_path)
    buffer = io.BytesIO()
    made.picture(0).resize((1, 1)).save(buffer, "GIF")
    (tmp_path / "000.png").write_bytes(buffer.getvalue())
    assert made.accounted(tmp_path)[1].left_out == {"a side below 2 pixels": 1}


def test_files_too_large_to_be_an_image_or_a_caption_are_not_read(tmp_path):
    folder = write(
        tmp_path, {"a.png": made.encoded(1), "b.png": b"", "b.txt": "large", "c.png": made.encoded(1)}
    )
    for name, size in (("a.txt", 2**20 + 1), ("b.png", 2**29 + 1)):
        with (folder / name).open("wb") as file:
            file.truncate(size)  # without a byte on the disk
    (folder / "c.txt").mkdir()
    kept, tally = made.accounted(folder)
    assert not kept
    assert tally.left_out == {
        f"a text over {2**20} bytes": 1,
        f"a file over {2**29} bytes": 1,
        "no .txt caption beside the image": 1,
    }


def test_a_caption_may_have_the_whole_name_of_its_image(tmp_path):
    files = {"a.png": made.encoded(1), "a.png.txt": "a", "b.v2": made.encoded(1), "b.v2.txt": "b"}
    kept, tally = made.accounted(write(tmp_path, files))
    assert (kept, tally.left_out) == ({"a.png": "a", "b.v2": "b"}, {})


def test_what_lies_beside_tars_is_counted_and_links_out_are_not_read(tmp_path):
    made.write_tar(tmp_path / "elsewhere" / "1.tar", made.tar_members(range(4, 8)))
    folder = write(tmp_path / "set", {"a.png": made.encoded(1), "sub/b.txt": "b", "0_stats.json": "{}"})
    made.write_tar(folder / "0.tar", made.tar_members(range(4)))
    (folder / "1.tar").symlink_to(tmp_path / "elsewhere" / "1.tar")
    kept, tally = made.accounted(folder)
    assert set(kept) == {f"set/0/{index:09d}" for index in range(4)}
    assert tally.unread == {
        "a file of another kind (.png)": 1,
        "a file of another kind (.txt)": 1,
        "a link that leads out of the folder": 1,
    }
    # By a pattern a link is asked for.
    (folder / "0_stats.json").unlink()
    assert len(made.accounted(f"{folder}/1.tar")[0]) == 4
