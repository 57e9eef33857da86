"""Files: untrusted JSON and YAML read as plain values, files written whole or not at all, hashes."""

import hashlib
import json
import os
import select
import shutil
import socket
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import xxhash
import yaml

from t2i.disk import put_in_place, share
from t2i.errors import CheckpointError, DataError, UserError

Kind = type | tuple[type, ...] | dict[str, Any]
"""The type of a key's value: a type, one of several, or an object with keys of its own."""
Refusal = type[UserError] | type[CheckpointError]

REASON_CHARACTERS = 200
"""Characters that are quoted of a library's own error message."""

HUB = "hf:"
"""Prefix of a name on the Hugging Face hub: hf:USER/NAME. Any other name is a path on this machine."""

MOST_JSON_BYTES, MOST_YAML_BYTES = 2**30, 2**24
"""Larger files are not read: parsed, they would take many times their size of memory. The index of a billion images has
less."""
HASH = "xxh64"
"""The hash in the index of shards. xxh64, because it is much faster than SHA-256; it protects from accidents only."""


class _NoAliases(yaml.SafeLoader):
    """A safe loader that refuses `*name`: a few lines of aliases can stand for billions of values.

    It refuses a key that comes twice, too, of which YAML's own would keep the last.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"it has an alias, *{self.peek_event().anchor}, which is not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if repeated := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"it has the key {repeated} twice")
        return super().construct_mapping(node, deep)


def parse_json(text: bytes | str, *, where: Path | str, error: Refusal = DataError) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        error: the text is not a JSON object; the message begins with `where`.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as broken:
        raise error(f"{where} is not JSON: {_reason(broken)}.") from broken
    if not isinstance(values, dict):
        raise error(f"{where} holds {type(values).__name__}; expected an object of keys.")
    return values


def read_json(path: Path, *, error: Refusal = DataError) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        error: it cannot be read, or holds something else.
    """
    return parse_json(
        _bytes_of(path, name=str(path), limit=MOST_JSON_BYTES, error=error), where=path, error=error
    )


def read_optional_json(path: Path, *, error: Refusal = DataError) -> dict[str, Any]:
    """Read a file that holds a JSON object; a missing file is an empty object.

    Raises:
        error: it cannot be read, or holds something else.
    """
    return read_json(path, error=error) if path.is_file() else {}


def read_yaml(path: Path, *, name: str) -> dict[str, Any]:
    """Read a file that holds a YAML mapping, with a safe loader.

    Args:
        name: name of the file in errors, such as `--config x.yaml`.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    values = parse_yaml(_bytes_of(path, name=name, limit=MOST_YAML_BYTES, error=UserError), name=name)
    if not isinstance(values, dict):
        raise UserError(f"{name} holds {type(values).__name__}; expected a mapping of keys.")
    return values


def read_yaml_list(path: Path) -> list[Any]:
    """Read a file that holds a YAML list, with a safe loader.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    name = str(path)
    values = parse_yaml(_bytes_of(path, name=name, limit=MOST_YAML_BYTES, error=UserError), name=name)
    if not isinstance(values, list):
        raise UserError(f"{name} holds {type(values).__name__}; expected a list.")
    return values


def parse_yaml(text: bytes | str, *, name: str) -> object:
    """Read a YAML text with a safe loader.

    Raises:
        UserError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_NoAliases)  # a SafeLoader
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError) as broken:
        raise UserError(f"{name} is not YAML: {_reason(broken)}.") from broken


def _bytes_of(path: Path, *, name: str, limit: int, error: Refusal) -> bytes:
    """Read a file that has at most so many bytes."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise error(f"{name} has {size:,} bytes; expected at most {limit:,}.")
        return path.read_bytes()
    except OSError as failed:
        if isinstance(failed, CheckpointError):
            raise
        raise error(f"{name} cannot be read: {failed.strerror}.") from failed


def check_keys(
    values: dict[str, Any], wanted: dict[str, Kind], *, where: Path | str, error: Refusal = DataError
) -> None:
    """Check that keys exist and that their values have the expected types.

    Raises:
        error: a key is missing or has another type; the first one is named.
    """
    for key, kind in wanted.items():
        value = values.get(key)
        if isinstance(kind, dict):
            if not isinstance(value, dict):
                raise error(f"{where}: {key} is {value!r:.80}; expected an object of keys.")
            check_keys(value, kind, where=f"{where}: {key}", error=error)
        # In Python a bool is an int, but `true` is no number of samples.
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            names = " or ".join(one.__name__ for one in kinds)
            raise error(f"{where}: {key} is {value!r:.80}; expected {names}.")


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_bytes_whole(path, text.encode())


def write_bytes_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def copy_whole(source: Path, path: Path) -> None:
    """Copy a file's bytes whole or not at all."""
    with whole_file(path) as temporary:
        shutil.copyfile(source, temporary)


def aside(path: Path) -> Path:
    """Name a place beside a path, of this process alone, for what is renamed to the path when it is whole.

    The name holds host and process, so that several writers on a shared disk do not mix their files: one is kept whole.
    """
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a place beside a file to write to, which becomes the file if there was no error.

    Raises:
        OSError: it cannot be written, and names the file.
    """
    temporary = aside(path)  # renamed, which is atomic
    try:
        yield temporary
        put_in_place(temporary, path)
    except OSError as error:
        # On a full disk a write names no file, and a copy names the file that it reads first.
        is_of_another = error.filename2 is None and error.filename not in (None, str(temporary))
        if is_of_another or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(path, json.dumps(value, indent=1))


def hub_name(name: Path | str) -> str:
    """Return what follows `hf:`, which is a name on the Hugging Face hub; empty for a path on this machine."""
    # The prefix alone decides, never what exists here. A mistyped `runs/trian` has the form of a hub name too, and
    # whoever owns that name there would supply the model.
    text = str(name)
    return text.removeprefix(HUB) if text.startswith(HUB) else ""


def not_here(name: Path | str) -> str:
    """Say that a path does not exist, and how a hub name is written; empty if it exists."""
    if os.path.exists(name):  # noqa: PTH110  (Path.exists raises for a name that is too long)
        return ""
    return f"{name!s:.200} does not exist here; a name on the Hugging Face hub is written {HUB}USER/NAME"


def why_lacking(folder: Path | str, name: str) -> str:
    """Say why a folder does not have the file `name`: the folder does not exist, is a file, or has none."""
    if os.path.isdir(folder):  # noqa: PTH112  (Path.is_dir raises for a name that is too long)
        return f"it has no {name}"
    return "it is a file" if os.path.exists(folder) else "it does not exist here"  # noqa: PTH110


def is_inside(name: str) -> bool:
    """Tell whether a relative name stays inside its folder."""
    path = Path(name)
    return bool(name) and "\0" not in name and not path.is_absolute() and ".." not in path.parts


def is_file(name: Path | str) -> bool:
    """Tell whether a name is that of a file; a text that no file can be named, such as a long one, is not."""
    return os.path.isfile(name)  # noqa: PTH113  (Path.is_file raises for a name that is too long)


def lines_of(text: str) -> list[str]:
    """Split text into lines, which end at LF, CR or CR LF: the one rule for every list that is a file."""
    # Not str.splitlines, which also ends lines at nine characters that captions hold, such as U+2028.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _reason(broken: Exception) -> str:
    text = " ".join(str(broken).split()) or type(broken).__name__
    return text[:REASON_CHARACTERS].rstrip(".")


def sha256_of(file: Path) -> str:
    """Hash a file's bytes (SHA-256, hex)."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def refuse_existing(out: Path) -> None:
    """Check that nothing is where a new folder is to be, also no link that leads nowhere.

    Raises:
        UserError: there is.
    """
    if os.path.lexists(out):
        raise UserError(f"--out {out} already exists; choose another.")


PART = ".part"
"""How the name of a folder ends that is not whole yet."""


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder to write into, which becomes `out` if there was no error.

    Raises:
        UserError: `out` exists.
    """
    refuse_existing(out)
    part = Path(f"{aside(out)}{PART}")
    _remove_left_parts(out)
    part.mkdir(parents=True)
    try:
        yield part
        share(part)
        refuse_existing(out)  # another process may have been quicker
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _remove_left_parts(out: Path) -> None:
    """Remove what killed processes of this machine have left of the same folder."""
    begins = aside(out).name.removesuffix(str(os.getpid()))
    for left in out.parent.iterdir() if out.parent.is_dir() else ():
        number = left.name.removeprefix(begins).removesuffix(PART)
        if left.name == f"{begins}{number}{PART}" and number.isdecimal() and not _is_alive(int(number)):
            shutil.rmtree(left, ignore_errors=True)


def _is_alive(process: int) -> bool:
    """Tell whether another process of this machine has this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return process != os.getpid()


def check_results_file(
    out: Path | None, *, name: str, keys: Collection[str], others: Collection[str] = ()
) -> None:
    """Check the file that a user names for the results of a measure, before anything is read; None for none.

    Args:
        name: of the file by default.
        keys: some that every such file has, by which an older one is known.
        others: some that only files of another measure have, beside these keys.

    Raises:
        UserError: it is a folder, cannot be written, or is there and no result of this measure.
    """
    if out is None:
        return
    _check_place(out, name=name)
    if out.suffix != ".json":
        raise UserError(f"--out {out} ends in {out.suffix or 'nothing'}; expected .json.")
    if out.exists() and (not _has_keys(out, keys) or (others and _has_keys(out, others))):
        raise UserError(f"--out {out} exists and is no {name}, so it is not replaced; choose another.")


def results_file(out: Path | None, *, default: Path) -> Path:
    """Choose the file that a measure is written to, and make its folder, before anything is measured.

    Args:
        out: what the user asks for, which check_results_file has checked; None for the default.

    Raises:
        UserError: the default is a folder, or cannot be written.
    """
    if out is None:
        _check_place(default, name=default.name)
    path = out or default
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _check_place(path: Path, *, name: str) -> None:
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; expected a file, such as {path / name}.")
    check_writable(path.parent)


def _has_keys(path: Path, keys: Collection[str]) -> bool:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and set(keys) <= found.keys()


def try_writing(out: Path) -> None:
    """Write a file that leaves no trace into a folder, or where it will be made.

    Raises:
        OSError: that cannot be.
    """
    # The folder itself is made when something is written into it.
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    with TemporaryFile(dir=there):
        pass


def check_writable(out: Path) -> None:
    """Refuse a folder that cannot be written before anything is measured or drawn for it.

    Raises:
        UserError: it cannot, as the folder of a model that others share may be.
    """
    try:
        try_writing(out)
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror}. Name another place with --out."
        ) from error


def values_sha256(values: object) -> str:
    """Hash plain values by their JSON, in whatever order their keys are; what JSON has no form of, by its text."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def valid_text(text: str) -> str:
    """Replace what is no text, and no tokenizer takes, such as half a surrogate, by question marks."""
    return text.encode(errors="replace").decode()


def hash_uniform(*parts: object) -> float:
    """Map parts to a number in [0, 1), evenly distributed, by a hash of their text."""
    # Python's own hash() differs from process to process, and a generator depends on the order of its draws.
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def file_hash(path: Path) -> str:
    """Hash a file's bytes (xxh64, hex)."""
    digest = xxhash.xxh64()
    with path.open("rb") as file:
        # In pieces, because a shard or a checkpoint's file may not fit in memory.
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def is_readable(stream: IO[str] | socket.socket, *, seconds: float = 0) -> bool:
    """Wait so long until a stream can be read, or its other side has closed it."""
    # poll, for select takes no file descriptor above 1,023.
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    return bool(poll.poll(seconds * 1000))
