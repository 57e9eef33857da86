"""`t2i VERB ...`: every command under one name. `python -m t2i` is the same, for launchers that start modules."""

import ast
import difflib
import sys
from importlib import import_module
from pathlib import Path

import t2i
from t2i.errors import UserError, run_command
from t2i.verbs import PROGRAM, RANK_FLAG, SCRIPTS

VERBS = (*SCRIPTS, "env")
HELP = ("-h", "--help")


def main() -> None:
    """Run the command that this process's command line names."""
    run_command(dispatch)


def dispatch() -> None:
    """Find the verb, and hand the rest of the command line to its command.

    Raises:
        UserError: there is no such verb.
    """
    ranks = [word for word in sys.argv[1:2] if word.startswith(RANK_FLAG)]
    verb, *words = sys.argv[1 + len(ranks) :] or ["--help"]
    verb = verb.replace("_", "-") if verb.replace("_", "-") in VERBS else verb
    if verb in HELP:
        print(list_of_verbs())
    elif verb == "--version":
        print(f"{PROGRAM} {t2i.__version__}")
    elif verb in VERBS:
        sys.argv = [f"{PROGRAM} {verb}", *ranks, *words]
        import_module(f"t2i.commands.{module_of(verb)}").main()
    else:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        meant = f"perhaps you meant {close[0]}. " if close else ""
        raise UserError(f"t2i has no command {verb!r}; {meant}`t2i --help` lists them all.")


def list_of_verbs() -> str:
    """Write one line per verb, each the first of its command's own help."""
    lines = [f"  {verb:14s} {first_line(verb)}" for verb in VERBS]
    return "\n".join(
        [
            f"usage: {PROGRAM} VERB ...",
            "",
            "Turn a pre-trained language model into a text-to-image model; measure what the pre-training was worth.",
            "",
            *lines,
            "",
            f"`{PROGRAM} VERB --help` explains one command. On many processes:",
            f"`deepspeed --module {PROGRAM} train ...`, and for other verbs",
            f"`torchrun --nproc-per-node N -m {PROGRAM} VERB ...`.",
        ]
    )


def first_line(verb: str) -> str:
    """Read what a command says of itself, without the second that importing it takes."""
    source = Path(__file__).with_name("commands") / f"{module_of(verb)}.py"
    return (ast.get_docstring(ast.parse(source.read_text())) or "").partition("\n")[0]


def module_of(verb: str) -> str:
    """Name a verb's module in t2i.commands."""
    return verb.replace("-", "_")


if __name__ == "__main__":
    main()
