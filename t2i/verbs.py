"""What commands are called: `t2i VERB` where the package is installed, or a script of the checkout."""

import re
import shlex
import sys

PROGRAM = "t2i"
SCRIPTS = {
    "prepare": "launchers/prepare.py",
    "convert": "launchers/convert.py",
    "tokenizer": "launchers/tokenizer.py",
    "train": "launchers/train.py",
    "align": "launchers/align.py",
    "sample": "launchers/sample.py",
    "export": "launchers/export.py",
    "serve": "launchers/serve.py",
    "play": "launchers/play.py",
    "plan": "launchers/plan.py",
    "study": "launchers/study.py",
    "report": "launchers/report.py",
    "verify-resume": "launchers/verify_resume.py",
    "score": "eval/coco_fid.py",
    "forgetting": "eval/forgetting.py",
    "perplexity": "eval/perplexity.py",
    "nearest": "eval/nearest.py",
    "gradients": "eval/gradients.py",
}
"""Every verb that has a script too, in the order of the story."""
RANK_FLAG = "--local_rank"
"""What DeepSpeed's launcher puts before a command's own words."""

CALL = re.compile(
    rf"(?P<launcher>(?:python|deepspeed|torchrun)\b(?:[^\n`]*?))?\b(?P<script>{'|'.join(SCRIPTS.values())})\b"
)
MODULE_FLAGS = {"deepspeed": "--module", "torchrun": "-m"}
"""How each launcher is told that a module follows, not a file."""


def is_typed_as_verb() -> bool:
    """Tell whether this process was started as `t2i VERB`, by a launcher or not."""
    return sys.argv[0].split()[:1] == [PROGRAM]


def command_line(verb: str, *words: str) -> str:
    """Write out a command for whoever started this process, in the form that they use."""
    program = [PROGRAM, verb] if is_typed_as_verb() else ["python", SCRIPTS[verb]]
    return shlex.join([*program, *words])


def own_command_line() -> str:
    """Write out the command that started this process, as a person would type it again."""
    words = [word for word in sys.argv[1:] if not word.startswith(RANK_FLAG)]
    is_launched = len(words) < len(sys.argv) - 1
    if is_typed_as_verb():
        program = [*(["deepspeed", MODULE_FLAGS["deepspeed"]] if is_launched else []), *sys.argv[0].split()]
    else:
        program = ["deepspeed" if is_launched else "python", sys.argv[0]]
    return shlex.join([*program, *words])


def as_typed(text: str) -> str:
    """Let a text that calls scripts call verbs, where this process was started as one."""
    return CALL.sub(_as_verb, text) if is_typed_as_verb() else text


def _as_verb(call: re.Match[str]) -> str:
    verb = next(verb for verb, script in SCRIPTS.items() if script == call["script"])
    launcher = call["launcher"] or ""
    name = launcher.split(maxsplit=1)[0] if launcher else ""
    module = f"{launcher}{MODULE_FLAGS[name]} " if name in MODULE_FLAGS else ""
    return f"{module}{PROGRAM} {verb}"
