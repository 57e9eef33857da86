"""Documents for text-only training: docstrings or code of installed packages, text files, a dataset's text column."""

import ast
import importlib.metadata
import importlib.util
import logging
import random
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from t2i.data.sources.folder import list_files
from t2i.data.sources.source import Listed, Tally
from t2i.errors import DataError
from t2i.files import hub_name, not_here

logger = logging.getLogger(__name__)

PREFIX = "text:"
"""Prefix of a source of documents: text:docstrings, text:PATH, text:hf:USER/NAME."""
SHUFFLED = "shuffled:"
"""Behind the prefix: another source, whose documents have their words in random order."""

DOCUMENTED_PACKAGES = (
    "accelerate", "datasets", "deepspeed", "diffusers", "huggingface_hub", "matplotlib", "networkx", "numpy", "pandas",
    "PIL", "scipy", "streaming", "sympy", "torch", "torchvision", "transformers",
)  # fmt: skip
"""Packages whose docstrings are read beside the standard library's; t2i depends on all of them."""

DISTRIBUTIONS = {"PIL": "pillow", "streaming": "mosaicml-streaming", "yaml": "pyyaml"}
"""Distribution names that differ from the import name."""

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
MIN_WORDS = 12
"""Shorter paragraphs are mostly headings, lists of names or formulas."""


@dataclass(frozen=True)
class Documents:
    """Texts in a fixed order, and what the manifest records about them."""

    name: str
    texts: Iterable[str]
    versions: dict[str, str] = field(default_factory=dict)
    """Versions of the packages that were read; empty for other sources."""
    files: Sequence[Path] = ()
    """The files that were listed; empty for packages and datasets."""

    def listing(self) -> Iterator[Listed]:
        """List what the documents are read from, so that a change of it is noticed."""
        yield from (Listed(package, version) for package, version in self.versions.items())
        yield from (Listed(f"{path.parent.name}/{path.name}", file=path) for path in self.files)


def open_documents(source: str) -> Documents:
    """Open a source of documents.

    Args:
        source: `text:` followed by `docstrings`, `code` (the same packages' Python without docstrings and comments),
            either with `:PACKAGE,PACKAGE`, a text file (each paragraph is a document), a folder of .txt files, or
            hf:USER/NAME, a Hugging Face dataset. `text:shuffled:` before any of these shuffles each document's words.

    Raises:
        DataError: the file does not exist, or a package is not installed.
    """
    name = source.removeprefix(PREFIX)
    if name.startswith(SHUFFLED):
        inner = open_documents(PREFIX + name.removeprefix(SHUFFLED))
        return replace(inner, name=source, texts=map(shuffled, inner.texts))
    kind, _, chosen = name.partition(":")
    if kind in READERS:
        packages = tuple(chosen.split(",")) if chosen else DOCUMENTED_PACKAGES
        folders = [_folder(package, kind) for package in packages]
        if not chosen:
            folders.insert(0, Path(sysconfig.get_paths()["stdlib"]))
        versions = {package: _version(package, kind) for package in packages}
        return Documents(source, _documents_of(folders, READERS[kind]), versions)
    path = Path(name)
    if path.is_file():
        return Documents(source, _paragraphs(_read(path)), files=[path])
    if path.is_dir():
        tally = Tally()
        files = [file for file in list_files(path, tally) if file.suffix.lower() == ".txt"]
        if tally.unread:
            logger.warning(
                "%s: not read: %s",
                path,
                ", ".join(f"{count} times {why}" for why, count in tally.unread.items()),
            )
        if not files:
            raise DataError(f"--source {source}: {path} holds no .txt file.")
        return Documents(source, filter(None, (_read(file).strip() for file in files)), files=files)
    if not hub_name(name):
        raise DataError(f"--source {source}: {not_here(name)}.")
    return Documents(source, _dataset_texts(hub_name(name)))


def shuffled(text: str) -> str:
    """Put a document's words in a random order, which depends on the document alone."""
    words = text.split()
    random.Random(text).shuffle(words)
    return " ".join(words)


def prose(text: str) -> str:
    """Keep the paragraphs of a docstring that read like English, without examples and tables."""
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if _is_prose(paragraph))


def _is_prose(paragraph: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    words = len(paragraph.split())
    return words >= MIN_WORDS and letters >= 0.9 * len(paragraph) and ">>>" not in paragraph


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors of some systems put a byte order mark first
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}.") from error


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]


def _documents_of(folders: list[Path], read: Callable[[Path], Iterable[str]]) -> Iterator[str]:
    """Read the Python files of folders in sorted order."""
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            # The standard library's folder holds site-packages, which has everything else that is installed.
            if "site-packages" not in path.relative_to(folder).parts:
                yield from filter(None, read(path))


def _folder(package: str, kind: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"--source text:{kind} reads {package}, which is not installed.")
    return Path(spec.submodule_search_locations[0])


def _version(package: str, kind: str) -> str:
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(package, package))
    except importlib.metadata.PackageNotFoundError as error:
        raise DataError(f"--source text:{kind} reads {package}, which is not installed.") from error


def _dataset_texts(name: str) -> Iterator[str]:
    """Stream the `text` column of a Hugging Face dataset's training split."""
    from datasets import load_dataset  # here: importing it takes seconds, and files do not need it

    try:
        rows: Any = load_dataset(name, split="train", streaming=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"the Hugging Face dataset {name} cannot be opened: {error}") from error
    for row in rows:
        if "text" not in row:
            raise DataError(
                f"--source text:{name} has the columns {', '.join(row)}; expected one named text."
            )
        if not isinstance(row["text"], str | None):
            raise DataError(
                f"--source text:{name} has {row['text']!r:.80} in its column text; expected text."
            )
        if row["text"]:
            yield row["text"]


def documentation_strings(path: Path) -> list[str]:
    """Read the docstrings of one Python file; one that this Python cannot parse has none."""
    nodes = filter(_is_documented, ast.walk(_parsed(path)))
    return [text for text in map(ast.get_docstring, nodes) if text]


def code_without_words(path: Path) -> list[str]:
    """Read the code of one Python file without docstrings and comments, as one document.

    A file whose expressions are nested too deeply to be written again has none.
    """
    tree = _parsed(path)
    for node in filter(_is_documented, ast.walk(tree)):
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    try:
        return [ast.unparse(tree)]
    except RecursionError:
        return []


def _parsed(path: Path) -> ast.Module:
    """Parse a Python file; one that this Python cannot parse is empty."""
    try:
        # Invalid escapes in other people's code are not ours to report.
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
            return ast.parse(path.read_bytes())
    # The last two are of expressions that are nested deeply.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module([], [])


def _is_documented(node: ast.AST) -> TypeGuard[Documented]:
    return isinstance(node, Documented)


def _prose_of(path: Path) -> Iterator[str]:
    return map(prose, documentation_strings(path))


READERS: dict[str, Callable[[Path], Iterable[str]]] = {"docstrings": _prose_of, "code": code_without_words}
"""What can be read from installed packages -> the documents of one of their files."""
