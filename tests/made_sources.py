"""The same captioned pictures as every kind of source that people have."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

NUM_IMAGES = 24


def picture(index):
    pixels = np.random.default_rng(index).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((90, 60))


def caption(index):
    return f"thing number {index}"


def encoded(index, kind="PNG"):
    buffer = io.BytesIO()
    picture(index).save(buffer, kind, lossless=True)
    return buffer.getvalue()


def write_images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(NUM_IMAGES):
        (folder / f"{index:03d}.png").write_bytes(encoded(index))


def text_folder(folder):
    write_images(folder)
    for index in range(NUM_IMAGES):
        (folder / f"{index:03d}.txt").write_text(caption(index))
    return str(folder)


def rows(image=None):
    named = [{"file_name": f"{index:03d}.png", "text": caption(index)} for index in range(NUM_IMAGES)]
    return named if image is None else [{image: encoded(i), **row} for i, row in enumerate(named)]


def metadata_jsonl(folder):
    write_images(folder)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows())))
    return str(folder)


def metadata_csv(folder):
    write_images(folder)
    lines = ["file_name,text", *(f"{row['file_name']},{row['text']}" for row in rows())]
    (folder / "metadata.csv").write_text("\n".join(lines))
    return str(folder)


def write_table(path, content, row_group_size=5):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(content), path, row_group_size=row_group_size)


def metadata_parquet(folder):
    write_images(folder)
    write_table(folder / "metadata.parquet", rows())
    return str(folder)


def write_tar(path, members):
    """Write (name, bytes) in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def small_image(kind, mode):
    """A picture of few bytes, with EXIF."""
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    picture(1).resize((9, 6)).convert(mode).save(buffer, kind, exif=exif)
    return buffer.getvalue()


def small_tars():
    """A tar of one pair in each of three formats, with a name that needs their extensions, by format."""
    tars = {}
    for name, kind in (
        ("ustar", tarfile.USTAR_FORMAT),
        ("gnu", tarfile.GNU_FORMAT),
        ("pax", tarfile.PAX_FORMAT),
    ):
        stem = "a" if name == "ustar" else "é" * 60
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            facts = {"caption": "json says", "similarity": 0.5}
            contents = {
                "png": small_image("PNG", "L"),
                "txt": b"a caption",
                "json": json.dumps(facts).encode(),
            }
            for suffix, content in contents.items():
                entry = tarfile.TarInfo(f"{stem}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        tars[name] = buffer.getvalue()[: tar.offset]
    return tars


def resealed(content):
    """Make the checksums of a damaged tar's headers right again, so that its fields are read."""
    content = bytearray(content)
    for start in range(0, len(content) - 511, 512):
        block = content[start : start + 512]
        if block[257:262] == b"ustar":
            content[start + 148 : start + 156] = b"%06o\0 " % tarfile.calc_chksums(bytes(block))[0]
    return bytes(content)


def tar_members(indexes, kind="png"):
    for index in indexes:
        facts = {"caption": f"json says {index}", "similarity": index / NUM_IMAGES, "width": 90}
        yield f"{index:09d}.{kind}", encoded(index, kind.upper())
        yield f"{index:09d}.txt", caption(index).encode()
        yield f"{index:09d}.json", json.dumps(facts).encode()


def tars(folder):
    """Write img2dataset's layout: two finished tars, one unfinished, and their parquet files of metadata."""
    for number, kind in enumerate(("png", "webp")):
        half = range(number * NUM_IMAGES // 2, (number + 1) * NUM_IMAGES // 2)
        write_tar(folder / f"{number:05d}.tar", tar_members(half, kind))
        (folder / f"{number:05d}_stats.json").write_text("{}")
        write_table(folder / f"{number:05d}.parquet", [{"url": "http://x", "caption": "x"}])
    return folder


def tar_folder(folder):
    return str(tars(folder))


def tar_braces(folder):
    return f"{tars(folder)}/{{00000..00001}}.tar"


def tar_glob(folder):
    return f"{tars(folder)}/*.tar"


def parquet_bytes(folder):
    write_table(folder / "a.parquet", rows(image="image")[:14])
    write_table(folder / "b.parquet", rows(image="image")[14:])
    return f"{folder}/*.parquet"


def parquet_struct(folder):
    content = [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows(image="image")]
    write_table(folder / "only.parquet", content)
    return str(folder / "only.parquet")


def coco(folder):
    """Write COCO's layout: 20 train pictures with one caption, 4 val pictures with one."""
    for split, indexes in (("train2014", range(20)), ("val2014", range(20, NUM_IMAGES))):
        (folder / split).mkdir(parents=True)
        images, notes = [], []
        for index in indexes:
            name = f"COCO_{split}_{index:012d}.jpg"
            (folder / split / name).write_bytes(encoded(index))  # PNG bytes: content decides, and no loss
            images.append({"id": index, "file_name": name, "width": 90, "height": 60})
            notes.append({"id": 1000 - index, "image_id": index, "caption": f" {caption(index)}\n"})
        (folder / "annotations").mkdir(exist_ok=True)
        content = {"info": {}, "licenses": [], "images": images[::-1], "annotations": notes}
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    return f"coco:{folder}"


def hub_parquet(folder):
    """Write a data set as the hub keeps it: parquet files with Image features, and no script."""
    from datasets import Dataset, Features, Image, Value

    features = Features({"image": Image(), "text": Value("string")})
    for part in range(2):
        indexes = range(part * 12, part * 12 + 12)
        data = {"image": [{"bytes": encoded(i), "path": None} for i in indexes]}
        data["text"] = [caption(i) for i in indexes]
        (folder / "data").mkdir(parents=True, exist_ok=True)
        path = folder / "data" / f"train-{part:05d}-of-00002.parquet"
        Dataset.from_dict(data, features=features).to_parquet(path)
    return f"hf:{folder}"


def hub_image_folder(folder):
    return f"hf:{metadata_jsonl(folder)}"


def hub_tars(folder):
    for number in range(2):
        write_tar(folder / f"{number}.tar", tar_members(range(number * 12, number * 12 + 12)))
    return f"hf:{folder}"


KINDS = {
    function.__name__: function
    for function in (
        text_folder,
        metadata_jsonl,
        metadata_csv,
        metadata_parquet,
        tar_folder,
        tar_braces,
        tar_glob,
        parquet_bytes,
        parquet_struct,
        coco,
        hub_parquet,
        hub_image_folder,
        hub_tars,
    )
}


def accounted(name, *, opens=True, **settings):
    """Read a source whole; check that each entry was kept, left out or broken; return captions by key, and the tally.

    Broken images and repeated keys are in the tally as left out.

    Args:
        opens: whether there are images to be opened.
    """
    from t2i.config import SourceConfig
    from t2i.data.sources import UNREADABLE, Tally, open_source

    source = open_source(str(name), heldout_share=0.0, config=SourceConfig(**settings))
    tally, kept, keys = Tally(), {}, set()
    tally.add(source.tally)
    for unit in source.units(8):
        for pair in unit(tally):
            if pair.key in keys:
                tally.left_out["a key that was there before"] += 1
                continue
            keys.add(pair.key)
            try:
                opened = pair.open() if opens else None
            except UNREADABLE as reason:
                tally.left_out[str(reason)] += 1
                continue
            kept[pair.key] = pair.caption
            tally.changed.update(pair.changed)
            if opened:
                assert opened.image.mode == "RGB"
                tally.changed.update(opened.changed)
    assert tally.seen == len(kept) + tally.left_out.total(), (kept, tally)
    return kept, tally
