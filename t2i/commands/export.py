"""Export a checkpoint to a Hugging Face folder that draws images without t2i.

Examples:
  python launchers/export.py runs/train --out exported
  python launchers/export.py runs/train --out exported --push-to-hub USER/NAME
"""

from dataclasses import dataclass
from pathlib import Path

from t2i.cli import Ckpt, parse
from t2i.errors import UserError
from t2i.verbs import own_command_line


@dataclass(frozen=True)
class ExportCommand:
    """The checkpoint and the new folder."""

    ckpt: Ckpt
    """A run folder, a checkpoint, an exported folder, or demo, which comes with t2i."""
    out: Path
    """New folder."""
    trust_remote_code: bool = False
    """Run the Python code that the model's folder brings for its class. Read it first: it can do all that you can."""
    push_to_hub: str | None = None
    """Also upload it to this hub repository (USER/NAME)."""
    private: bool = False
    """Make that repository a private one, if it does not exist yet."""


def main() -> None:
    command = parse(ExportCommand, description=__doc__ or "")
    from t2i.files import check_writable, refuse_existing
    from t2i.runs.export import check_repo, export, push
    from t2i.runs.loading import open_model

    refuse_existing(command.out)  # before gigabytes are read
    check_writable(command.out.parent)
    if command.private and not command.push_to_hub:
        raise UserError("--private is for --push-to-hub USER/NAME, which is not given.")
    if command.push_to_hub:
        check_repo(command.push_to_hub)
    opened = open_model(command.ckpt, needs_images=True, trust_remote_code=command.trust_remote_code)
    export(
        opened,
        out=command.out,
        command=own_command_line(),
        trust_remote_code=command.trust_remote_code,
        repo=command.push_to_hub,
    )
    print(f"{command.out}, made of {opened.folder}, draws images without t2i; its README.md says how.")
    if command.push_to_hub:
        print(push(command.out, repo=command.push_to_hub, is_private=command.private))
