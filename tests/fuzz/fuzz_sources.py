"""Make random sources whose right reading is known, read them, and compare; then damage them and read them again.

  python tests/fuzz/fuzz_sources.py --seconds 600 --seed 0

Every entry must be kept, left out or broken, and what is kept must be what was put in. A damaged source may lose
entries, and may be refused in a sentence, but it never ends in another error. Failures are printed with their seed;
`--seed N --seconds 0` makes that source again.
"""

import argparse
import csv
import io
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import made_sources as made  # noqa: E402  found by the path above

from t2i.data.sources.image import IMAGE_SUFFIXES  # noqa: E402
from t2i.errors import UserError  # noqa: E402

WORDS = (
    "a",
    "cat",
    "naïve é",
    "猫",
    "😀",
    "1,5",
    '"so"',
    "x;y",
    "<p>",
    "it's",
    "\ttab",
    "100%",
    "line\u2028sep",
)
LATIN = ("a", "café au lait", "über uns", "cat")
"""Words whose bytes in cp1252 are never UTF-8."""
NAMES = ("", " space", ".v1", "[b]", "{c}", "é", "猫", "-", "_x", ".tar", "%20", "#1", "'")
NOT_TEXT = (7, 1.5, True, {"en": "a cat"}, [{"role": "user"}], [7], [["a"]])
MAX_FAILED = 10


@dataclass
class Made:
    """A source and the truth about it."""

    source: str
    kept: dict[str, str] = field(default_factory=dict)
    seen: int = 0
    used: set[str] = field(default_factory=set)
    settings: dict[str, object] = field(default_factory=dict)
    opens: bool = True


@dataclass(frozen=True)
class Content:
    """The content of an image file."""

    data: bytes
    is_good: bool
    is_told: bool = True
    """Its first bytes tell that it is an image."""


def contents():
    def encoded(image, kind, **options):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    image = made.picture(1).resize((9, 6))
    good = [
        Content(encoded(image, kind), True, kind != "TIFF") for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF")
    ]
    deep = Image.fromarray(np.arange(54, dtype=np.uint16).reshape(6, 9) * 999)
    good += [Content(encoded(deep, "PNG"), True), Content(encoded(image.convert("CMYK"), "JPEG"), True)]
    good += [Content(encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)]), True)]
    bad = (b"", b"no image", good[0].data[:60], encoded(image.resize((1, 1)), "PNG"))
    return good, [Content(data, False) for data in bad]


GOOD, BAD = contents()


class Maker:
    """Draws the parts of a source from one generator."""

    def __init__(self, seed, folder):
        self.random = random.Random(seed)
        self.folder = folder

    def chance(self, share):
        return self.random.random() < share

    def content(self):
        return self.random.choice(BAD if self.chance(0.15) else GOOD)

    def stem(self, place):
        """Draw a name; the number makes it unique, before any dot."""
        return f"{place:03d}{''.join(self.random.choices(NAMES, k=2))}"

    def text(self, words=WORDS):
        """Draw a caption as it is written."""
        blank = self.random.choice([" ", "  ", " \t"])
        return blank.join(self.random.choices(words, k=self.random.randint(1, 6)))

    def caption_file(self):
        """Draw the bytes of a caption file and what they say; empty if it cannot be used."""
        kind = self.random.choice(["utf-8"] * 4 + ["utf-8-sig", "utf-16", "cp1252", "blank", "none", "image"])
        if kind in ("blank", "none", "image"):
            return {"blank": b" \r\n", "none": b"", "image": GOOD[0].data}[kind], ""
        text = self.text(LATIN if kind == "cp1252" else WORDS)
        return self.random.choice(["", "\n"]).join(["", text, ""]).encode(kind), " ".join(text.split())

    def write(self, path, data):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def value(self):
        """Draw a caption of a table, and its lines of text."""
        kind = self.random.choice(["text"] * 5 + ["list", "list", "none", "blank", "other"])
        if kind == "none":
            return self.random.choice([None, float("nan"), []]), []
        if kind == "blank":
            return self.random.choice(["", " \n", [None, ""]]), []
        if kind == "other":
            return self.random.choice(NOT_TEXT), []
        texts = [self.text() for _ in range(self.random.randint(1, 3) if kind == "list" else 1)]
        return (texts if kind == "list" else texts[0]), [" ".join(text.split()) for text in texts]

    def add(self, truth, key, lines, *, is_good):
        """Add an entry of a table to the truth: all of its captions, or the first."""
        if truth.settings.get("captions") != "all":
            lines = lines[:1]
        truth.seen += max(1, len(lines))
        for number, line in enumerate(lines):
            name = f"{key}#{number}" if number else key
            # The first of a key is used, even if its image turns out to be broken.
            if is_good and name not in truth.used:
                truth.kept[name] = line
            truth.used.add(name)


def text_folder(maker):
    truth = Made(str(maker.folder / "set"))
    root = maker.folder / "set"
    for place in range(maker.random.randint(1, 12)):
        where = maker.random.choice(["", "sub/", "sub/deep.er/"])
        stem, content = maker.stem(place), maker.content()
        ending = maker.random.choice(IMAGE_SUFFIXES)
        if content.is_good and content.is_told and maker.chance(0.2):
            # An ending of its own, or none: then a name's last dot begins the ending, and the caption lacks it too.
            stem, ending = stem.replace(".", ""), maker.random.choice(["", ".jpg_large", ".1"])
        name = f"{where}{stem}{ending.upper() if maker.chance(0.2) else ending}"
        data, text = maker.caption_file()
        has_image, has_caption = not maker.chance(0.1), not maker.chance(0.1)
        if has_image:
            maker.write(root / name, content.data)
        if has_caption:
            maker.write(root / f"{where}{stem}{maker.random.choice(['.txt', '.TXT'])}", data)
        truth.seen += has_image or has_caption
        if has_image and has_caption and content.is_good and text:
            truth.kept[name] = text
    for name in maker.random.sample(["._000.png", ".DS_Store", "__MACOSX/a.png", "a.json", "b.heic"], 2):
        maker.write(root / name, GOOD[0].data if name == "__MACOSX/a.png" else b"\0\5\26\7")
    if maker.chance(0.5):
        maker.write(maker.folder / "outside.png", GOOD[0].data)
        root.mkdir(exist_ok=True)
        (root / "link.png").symlink_to(maker.folder / "outside.png")
    return truth


def tars(maker):
    names = maker.random.sample(["x/0", "y/0", "y/1", "[z]/0"], maker.random.randint(1, 2))
    pattern = f"{{{','.join(names)}}}" if len(names) > 1 else names[0]
    truth = Made(f"{maker.folder}/{pattern}.tar")
    for name in names:
        members = []
        for place in range(maker.random.randint(0, 8)):
            stem, content = maker.random.choice(["", "in/"]) + maker.stem(place), maker.content()
            data, text = maker.caption_file()
            ending = maker.random.choice(IMAGE_SUFFIXES)
            as_json = maker.chance(0.2)
            if as_json:
                value, lines = maker.value()
                data, text = json.dumps({"caption": value}).encode(), (lines or [""])[0]
            parts = [(f"{stem}{ending}", content.data), (f"{stem}.{'json' if as_json else 'TXT'}", data)]
            parts = [part for part in parts if not maker.chance(0.08)]
            repeated = parts[:1] if maker.chance(0.1) else []
            members += [*parts, *repeated]
            # An image that comes twice is an entry each time, of which the first is used.
            truth.seen += bool(parts) + sum(name.endswith(ending) for name, _ in repeated)
            if len(parts) == 2 and content.is_good and text:
                truth.kept[f"{name}/{stem}"] = text
        members += [("./._000.png", b"\0\5\26\7"), ("README.md", b"read me")] * maker.chance(0.5)
        if maker.chance(0.5):
            maker.random.shuffle(members)
        made.write_tar(maker.folder / f"{name}.tar", members)
    return truth


def parquet(maker):
    names = maker.random.sample(["x/0", "y/0", "y/1"], maker.random.randint(1, 2))
    pattern = f"{{{','.join(names)}}}" if len(names) > 1 else names[0]
    truth = Made(f"{maker.folder}/{pattern}.parquet")
    truth.settings["captions"] = maker.random.choice(["first", "all"])
    for name in names:
        kind = maker.random.choice(["string", "binary", "list", "large", "dictionary", "other"])
        has_keys, is_struct, size = maker.chance(0.3), maker.chance(0.3), maker.random.randint(1, 5)
        images, captions, keys = [], [], []
        for place in range(maker.random.randint(0, 12)):
            content, lines = maker.content(), []
            data = None if maker.chance(0.1) else content.data
            if kind == "binary":
                value, text = maker.caption_file()
                lines = [text] if text else []
            elif kind == "list":
                lines = [" ".join(maker.text().split()) for _ in range(maker.random.randint(0, 3))]
                value = [*lines, None] if maker.chance(0.2) else lines
            elif kind == "other":
                value = maker.random.choice([{"en": "a"}, None])
            else:
                value = None if maker.chance(0.1) else maker.text()
                lines = [" ".join(value.split())] if value else []
            images.append({"bytes": data, "path": "a.png"} if is_struct else data)
            captions.append(value)
            # A key may be there before, and may be missing.
            keys.append(maker.random.choice([f"k{place}", None, "k0"]) if has_keys else None)
            key = f"{name}/{keys[-1]}" if keys[-1] else f"{name}/{place // size}/{place % size}"
            maker.add(truth, key, lines, is_good=data is not None and content.is_good)
        types = {
            "string": pa.string(),
            "large": pa.large_string(),
            "binary": pa.binary(),
            "list": pa.list_(pa.string()),
        }
        column = pa.array(captions, types.get(kind))
        if kind == "dictionary":
            column = pa.array(captions, pa.string()).dictionary_encode()
        if kind == "other":
            column = pa.array(captions, pa.struct([("en", pa.string())]))
        image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if is_struct else pa.binary()
        table = {"image": pa.array(images, image_type), "text": column}
        if has_keys:
            table["key"] = pa.array(keys, pa.string())
        (maker.folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), maker.folder / f"{name}.parquet", row_group_size=size)
    return truth


def metadata(maker):
    """Write a table that names images, with some rows of one image, of none and of no file."""
    kind = maker.random.choice(["jsonl", "csv", "tsv", "parquet"])
    root = maker.folder / "set"
    columns = maker.random.choice([("file_name", "text"), ("path", "title")])
    truth = Made(str(root), settings={"captions": maker.random.choice(["first", "all"])})
    if columns[0] == "path":
        truth.settings |= {"image_key": "path", "caption_key": "title"}
    encoding = maker.random.choice(["utf-8", "utf-8-sig", "utf-16", "cp1252"])
    words = WORDS if encoding != "cp1252" else LATIN
    rows, named = [], {}
    for place in range(maker.random.randint(1, 10)):
        stem = f"{place:03d}" if encoding == "cp1252" else maker.stem(place)
        name, content = f"{stem}{maker.random.choice(IMAGE_SUFFIXES)}", maker.content()
        maker.write(root / name, content.data)
        for _ in range(maker.random.choice([0, 1, 1, 1, 2])):
            value, lines = maker.value() if kind == "jsonl" and words is WORDS else (maker.text(words), [])
            if isinstance(value, str):
                lines = [" ".join(value.split())] if value.strip() else []
            rows.append((name, value))
            named.setdefault(name, []).append((lines, content.is_good))
        if name not in named:
            truth.seen += 1
    for name in ("gone.png", "../outside.png", "", "https://example.org/a.png"):
        if maker.chance(0.3):
            rows.append((name, "a caption"))
            truth.seen += 1
    for name, found in named.items():
        for number, (lines, is_good) in enumerate(found):
            maker.add(truth, f"{name}#{number}" if number else name, lines, is_good=is_good)
    file = root / f"metadata.{kind}" if kind != "tsv" else root / "list.tsv"
    truth.source = str(file) if kind == "tsv" else str(root)
    write_table(maker, file, columns, rows, encoding)
    return truth


def write_table(maker, file, columns, rows, encoding):
    """Write rows of (name, caption), with other columns about."""
    header = ("id", *columns)
    values = [(number, *row) for number, row in enumerate(rows)]
    if file.suffix == ".parquet":
        texts = {name: [row[place] for row in values] for place, name in enumerate(header)}
        pq.write_table(pa.table(texts), file)
    elif file.suffix == ".jsonl":
        lines = [json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) for row in values]
        file.write_bytes(maker.random.choice(["\n", "\r\n", "\n\n"]).join(lines).encode(encoding))
    else:
        text = io.StringIO()
        writer = csv.writer(
            text, "excel-tab" if file.suffix == ".tsv" else maker.random.choice(["excel", Semicolons])
        )
        writer.writerows([header, *values])
        file.write_bytes(text.getvalue().encode(encoding))


class Semicolons(csv.excel):
    """The values of spreadsheets in much of Europe."""

    delimiter = ";"


def precomputed(maker):
    root = maker.folder / "ids"
    truth = Made(f"ids:{root}", opens=False)
    maker.write(root / "ids.json", b'{"vocab_size": 9, "length": 3, "made_by": "a"}')
    maker.write(root / "whole.jsonl", b'{"ids": [1, 1, 1]}')
    maker.add(truth, "whole/0", [""], is_good=True)
    rows = []
    for place in range(maker.random.randint(1, 9)):
        ids = maker.random.choice(
            [[1, 2, 8], [1, 2, 8], [0, 0, 0], [1, 2, 9], [-1, 2, 3], [1, 2], [], None, "123", [1.5] * 3]
        )
        value, lines = maker.value()
        is_text = bool(lines) or value in ("", None, []) or value != value or isinstance(value, str)
        is_text = is_text or value == [None, ""]
        key = maker.random.choice([None, f"k{place}", "k0"])
        rows.append({"ids": ids, "caption": value} | ({"key": key} if key else {}))
        good = ids in ([1, 2, 8], [0, 0, 0]) and is_text
        if good:
            maker.add(truth, key or f"rows/{place}", lines or [""], is_good=True)
        else:
            truth.seen += 1
    maker.write(root / "rows.jsonl", "\n".join(map(json.dumps, rows)).encode())
    texts = [maker.text() for _ in range(maker.random.randint(1, 4))]
    np.save(root / "z.npy", np.ones((len(texts), 3), maker.random.choice([np.uint8, np.int64])))
    maker.write(root / "z.txt", maker.random.choice(["\n", "\r\n"]).join(texts).encode())
    for place, text in enumerate(texts):
        maker.add(truth, f"z/{place}", [" ".join(text.split())], is_good=True)
    return truth


def hub_folder(maker):
    """Write what a Hugging Face dataset's folder has: tables of bytes, or images with metadata."""
    root = maker.folder / "set"
    truth = Made(f"hf:{root}", settings={"captions": maker.random.choice(["first", "all"])})
    for part in range(maker.random.randint(1, 2)):
        images, captions = [], []
        for place in range(maker.random.randint(1, 6)):
            content, text = maker.content(), maker.text() if maker.chance(0.9) else None
            data = None if maker.chance(0.1) else content.data
            images.append(
                {"bytes": data, "path": maker.random.choice([None, "/etc/passwd", "https://x.org/a"])}
            )
            captions.append(text)
            lines = [" ".join(text.split())] if text else []
            maker.add(truth, f"{part:06d}/{place:06d}", lines, is_good=data is not None and content.is_good)
        root.mkdir(exist_ok=True)
        image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = {"image": pa.array(images, image_type), "text": pa.array(captions, pa.string())}
        pq.write_table(pa.table(table), root / f"train-{part}.parquet")
    return truth


def coco(maker):
    """Write COCO's layout, with images that are missing and captions that are blank."""
    root = maker.folder / "coco"
    truth = Made(f"coco:{root}")
    images, notes = [], []
    for place in range(maker.random.randint(1, 8)):
        content, name = maker.content(), f"COCO_train2014_{place:012d}.jpg"
        has_file = not maker.chance(0.1)
        maker.write(root / "train2014" / (name if has_file else "other.jpg"), content.data)
        images.append({"id": place, "file_name": name})
        texts = [maker.text() if maker.chance(0.9) else " " for _ in range(maker.random.randint(0, 3))]
        notes += [{"id": 10 * place + n, "image_id": place, "caption": text} for n, text in enumerate(texts)]
        truth.seen += max(1, len(texts))
        for number, text in enumerate(texts):
            if has_file and content.is_good and text.strip():
                truth.kept[f"{place:012d}-{number}"] = " ".join(text.split())
    maker.random.shuffle(images)
    maker.random.shuffle(notes)
    content = json.dumps({"images": images, "annotations": notes})
    maker.write(root / "annotations" / "captions_train2014.json", content.encode())
    return truth


# The last takes longer than the others together.
KINDS = (*(4 * (text_folder, tars, parquet, metadata, precomputed, coco)), hub_folder)


def damage(maker):
    """Change, remove or cut some bytes of some files."""
    files = sorted(path for path in maker.folder.rglob("*") if path.is_file() and not path.is_symlink())
    for path in maker.random.sample(files, min(len(files), 2)):
        content = bytearray(path.read_bytes())
        if not content:
            continue
        place = maker.random.randrange(len(content))
        way = maker.random.choice(["cut", "flip", "drop", "swap"])
        if way == "cut":
            del content[place:]
        elif way == "drop":
            del content[place : place + maker.random.randint(1, 600)]
        elif way == "flip":
            content[place] ^= 1 << maker.random.randrange(8)
        else:
            content[place : place + 8] = maker.random.randbytes(8)
        path.write_bytes(made.resealed(content) if path.suffix == ".tar" else bytes(content))


def check(seed, folder):
    """Make one source, read it, damage it and read it again.

    Raises:
        AssertionError: an entry was lost, or is not what was put in.
    """
    folder.mkdir(exist_ok=True)
    maker = Maker(seed, folder)
    truth = maker.random.choice(KINDS)(maker)
    kept, seen = {}, 0
    try:
        kept, tally = made.accounted(truth.source, opens=truth.opens, **truth.settings)
        seen = tally.seen
    except UserError as error:
        # A source without a usable pair may be refused.
        assert not truth.kept, error
        seen = truth.seen
    assert kept == truth.kept, {
        key: (kept.get(key), truth.kept.get(key)) for key in kept.keys() ^ truth.kept.keys()
    }
    assert seen == truth.seen, (seen, truth.seen)
    damage(maker)
    with suppress(UserError):
        made.accounted(truth.source, opens=truth.opens, **truth.settings)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="time to go on for; 0 for one source")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the first source; the next has the next number"
    )
    arguments = parser.parse_args()
    start, seed, failed = time.monotonic(), arguments.seed, 0
    while True:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        try:
            check(seed, folder)
        except Exception:
            traceback.print_exc()
            print(f"seed {seed} failed; its source is in {folder}", file=sys.stderr)
            failed += 1
        else:
            shutil.rmtree(folder)
        seed += 1
        if failed == MAX_FAILED or time.monotonic() - start >= arguments.seconds:
            break
    print(f"{seed - arguments.seed} sources, of which {failed} are not read as they should be")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
