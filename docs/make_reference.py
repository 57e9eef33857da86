"""Write docs/reference/ from the tables in the code; `make reference` runs it, and a test says when it is due."""

import inspect
from pathlib import Path

from t2i import errors
from t2i.env import VARIABLES
from t2i.runs import contents
from t2i.runs.contents import Described

FOLDER = Path(__file__).parent / "reference"
NOTE = "*Made by `make reference` from the code; edit it there.*"


def main() -> None:
    """Write every page."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)


def pages() -> dict[str, str]:
    """Make every page's text, by file name."""
    return {
        "exit_statuses.md": exit_statuses(),
        "environment.md": page(
            "Environment variables",
            "Every environment variable that t2i reads or sets itself. Libraries read more of their own.",
            table(("variable", "meaning"), [(f"`{name}`", text) for name, text in VARIABLES.items()]),
        ),
        "metrics.md": page(
            "metrics.jsonl",
            "One JSON object per line: a row per recorded step, and at each evaluation a row per held-out split, which"
            " has `split`. Losses are in nats. Nothing is smoothed; figures smooth when they are drawn.",
            "## A training step\n\n" + entries(contents.STEP_KEYS, head="key"),
            "## A held-out split\n\n" + entries(contents.HELDOUT_KEYS, head="key"),
        ),
        "folders.md": page(
            "Files",
            "What a run, a checkpoint of it, a shard folder and an exported folder hold.",
            "## A run\n\n" + entries(contents.RUN_FOLDER, head="file"),
            "## A checkpoint\n\n" + entries(contents.CHECKPOINT, head="file"),
            "## Shards\n\n" + entries(contents.SHARDS, head="file"),
            "## An export\n\n" + entries(contents.EXPORT, head="file"),
        ),
    }


def exit_statuses() -> str:
    """List what every command can end with, from the errors themselves."""
    known = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if "exit_code" in vars(kind)]
    rows = {0: "Done.", 1: "An error that nobody expected: please report it."}
    rows |= {kind.exit_code: inspect.cleandoc(kind.__doc__ or "").partition("\n")[0] for kind in known}
    rows[errors.READER_GONE] = "Nobody reads what is printed any more, as after `t2i --help | head`."
    rows[errors.exit_code(KeyboardInterrupt())] = "A second Ctrl-C, or one where nothing is saved."
    return page(
        "Exit statuses",
        "Every command ends with one of these. An error is a sentence or three on stderr. `T2I_DEBUG=1` adds the"
        " traceback, which a run also writes to `error.txt`. The `deepspeed` command has a status of its own where it"
        " was signalled itself, so scripts read `status.json` in the run folder.",
        table(("status", "meaning"), [(str(code), rows[code]) for code in sorted(rows)]),
        "What is missing has the status of what it is: images, captions and shards 3, everything else that a command"
        " line names 2.",
    )


def page(title: str, *parts: str) -> str:
    """Join a page's parts under its title."""
    return "\n\n".join([f"# {title}", *parts, NOTE]) + "\n"


def entries(of: tuple[Described, ...], *, head: str) -> str:
    """Write a table of entries; what is there only at times says so."""
    rows = [(f"`{one.name}`", "" if one.is_always_there else "at times", one.text) for one in of]
    return table((head, "", "meaning"), rows)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Write a Markdown table."""
    rule = tuple("---" for _ in head)
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in (head, rule, *rows))


if __name__ == "__main__":
    main()
