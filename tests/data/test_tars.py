"""Tars as people have them: in any order, with dots in names, with files of macOS, with more than pairs."""

import made_sources as made
import numpy as np

from t2i.data.sources import decode_image, open_source
from t2i.data.sources.listing import list_source

IMAGE = made.encoded(1)


def read(tmp_path, members, **settings):
    made.write_tar(tmp_path / "set" / "a.tar", [(name, data) for name, data in members])
    kept, tally = made.accounted(tmp_path / "set" / "a.tar", **settings)
    return {key.removeprefix("set/a/"): caption for key, caption in kept.items()}, tally


def test_the_order_of_members_does_not_matter(tmp_path):
    images = [(f"{i:04d}.jpg", IMAGE) for i in range(5)]
    texts = [(f"{i:04d}.txt", f"t{i}".encode()) for i in range(5)]
    kept, tally = read(tmp_path, images + texts[::-1])
    assert kept == {f"{i:04d}": f"t{i}" for i in range(5)}
    assert (list(kept), tally.left_out) == (sorted(kept), {})


def test_names_with_dots_pair_by_their_last_one(tmp_path):
    members = [
        (f"IMG.v1.{i:04d}{end}", data) for i in range(3) for end, data in ((".JPG", IMAGE), (".Txt", b"t"))
    ]
    assert set(read(tmp_path, members)[0]) == {f"IMG.v1.{i:04d}" for i in range(3)}


def test_parts_of_a_sample_that_are_no_pair_are_not_entries(tmp_path):
    members = [
        ("1.jpg", IMAGE),
        ("1.seg.png", IMAGE),
        ("1.txt", b"t"),
        ("1.cls", b"7"),
        ("1.de.txt", b"auf deutsch"),
    ]
    kept, tally = read(tmp_path, members)
    assert (kept, tally.seen, tally.unread) == ({"1": "t"}, 1, {})
    kept, tally = read(
        tmp_path, [*members, ("README.md", b"all of it"), ("1.png", IMAGE)], caption_key="de.txt"
    )
    assert (kept, tally.left_out) == ({"1": "auf deutsch"}, {"another image of the same key in a tar": 1})
    assert tally.unread == {"a file of another kind in a tar (.md)": 1}


def test_files_of_macos_are_counted_and_the_pairs_are_read(tmp_path):
    members = [
        member
        for i in range(4)
        for name, data in ((f"{i}.jpg", IMAGE), (f"{i}.txt", b"t"))
        for member in ((f"./._{name}", b"\0\5\26\7"), (f"__MACOSX/{name}", b"\0"), (f"./{name}", data))
    ]
    kept, tally = read(tmp_path, members)
    assert (len(kept), tally.seen, tally.unread) == (4, 4, {"a hidden file in a tar": 16})


def test_folders_in_a_tar_are_part_of_the_key(tmp_path):
    members = [
        (f"{folder}/1.{end}", data) for folder in "ab" for end, data in (("jpg", IMAGE), ("txt", b"t"))
    ]
    assert set(read(tmp_path, members)[0]) == {"a/1", "b/1"}


def test_a_text_that_is_too_long_or_no_text_is_left_out(tmp_path):
    members = [("a.jpg", IMAGE), ("a.txt", b"x" * (2**20 + 1)), ("b.jpg", IMAGE), ("b.txt", IMAGE)]
    assert read(tmp_path, members)[1].left_out == {
        f"a text over {2**20} bytes": 1,
        "a caption of bytes that are not text": 1,
    }


def test_of_a_key_that_comes_twice_the_first_image_has_the_first_caption(tmp_path):
    other = made.encoded(2)
    for members, images in (
        (["k.jpg", "k.txt", "k.jpg", "k.txt"], 2),
        (["k.txt", "k.jpg", "k.txt", "k.jpg", "k.jpg"], 3),
        (["k.png", "k.txt", "k.jpg", "k.txt"], 2),
        (["k.jpg", "k.txt", "k.png", "k.txt"], 2),
    ):
        seen = {"txt": 0, "image": 0}
        written = []
        for name in members:
            kind = "txt" if name.endswith("txt") else "image"
            data = f"caption {seen['txt']}".encode() if kind == "txt" else (other if seen["image"] else IMAGE)
            seen[kind] += 1
            written.append((name, data))
        kept, tally = read(tmp_path, written)
        assert kept == {"k": "caption 0"}
        assert tally.left_out == {"another image of the same key in a tar": images - 1}
        (pair,) = open_source(str(tmp_path / "set" / "a.tar"), heldout_share=0.0).pairs
        assert np.array_equal(np.asarray(pair.open().image), np.asarray(decode_image(IMAGE).image))


def test_a_tar_that_is_finished_later_is_a_change_of_the_source(tmp_path):
    for name in ("0", "1"):
        made.write_tar(tmp_path / "set" / f"{name}.tar", made.tar_members(range(2)))
    prints = []
    for name in ("0", "1"):
        (tmp_path / "set" / f"{name}_stats.json").write_text("{}")
        prints.append(list_source(open_source(f"{tmp_path}/set/*.tar", heldout_share=0.0)).fingerprint)
    assert prints[0] != prints[1]


def test_a_finished_download_says_nothing_of_another_folder(tmp_path):
    for name in ("finished", "other"):
        made.write_tar(tmp_path / name / "0.tar", made.tar_members(range(2)))
    (tmp_path / "finished" / "0_stats.json").write_text("{}")
    kept, tally = made.accounted(f"{tmp_path}/{{finished,other}}/0.tar")
    assert (len(kept), tally.unread) == (4, {})
