"""Fuzz the readers that meet strangers' files, guided by the lines of Python they reach; not a part of the test suite.

Examples:
  python tests/fuzz/fuzz_readers.py pictures --seconds 300
  python tests/fuzz/fuzz_readers.py tars --seconds 300

It needs atheris (pip install 't2i[fuzz]') and ends with a traceback and the input at the first error that is neither
a result nor a refusal, at 2 GB of memory, or at 20 seconds for one input. What it found so far is in tests/data/.
"""

import argparse
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

with atheris.instrument_imports(include=["PIL", "tarfile", "json", "t2i.data.sources", "t2i.files"]):
    import made_sources as made
    from PIL import JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin  # noqa: F401  read on first use

    from t2i.data.sources import UNREADABLE, Tally, decode_image, open_source


def pictures(data: bytes) -> None:
    """Decode one picture; open-source decoders below Pillow are not instrumented."""
    with suppress(*UNREADABLE):
        assert decode_image(data).image.mode == "RGB"


def tars(data: bytes) -> None:
    """List one tar and read its pictures, with the headers' checksums made right and as they are."""
    for content in (made.resealed(data), data):
        TAR.write_bytes(content)
        for unit in open_source(str(TAR)).units(8):
            for pair in unit(Tally()):
                assert pair.key.encode() and pair.caption.encode()
                with suppress(*UNREADABLE):
                    pair.open()


TARGETS = {"pictures": pictures, "tars": tars}
TAR = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)) / "x.tar"


def write_seeds(folder: Path, target: str) -> None:
    """Begin with whole files of each kind."""
    if target == "pictures":
        for kind in ("JPEG", "PNG", "WEBP"):
            for mode in ("RGB", "L", "P", "RGBA"):
                if (kind, mode) not in (("JPEG", "P"), ("JPEG", "RGBA")):
                    (folder / f"{kind}-{mode}").write_bytes(made.small_image(kind, mode))
        return
    for name, content in made.small_tars().items():
        (folder / name).write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=300, help="time to fuzz for")
    parser.add_argument(
        "--corpus", type=Path, help="folder of inputs, kept and added to; a new one by default"
    )
    arguments = parser.parse_args()
    corpus = arguments.corpus or Path(tempfile.mkdtemp(prefix=f"fuzz-{arguments.target}-"))
    corpus.mkdir(exist_ok=True)
    write_seeds(corpus, arguments.target)
    options = [f"-max_total_time={arguments.seconds}", "-max_len=16384", "-rss_limit_mb=2048", "-timeout=20"]
    atheris.Setup([sys.argv[0], str(corpus), *options, "-print_final_stats=1"], TARGETS[arguments.target])
    print(f"corpus: {corpus}", file=sys.stderr)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
