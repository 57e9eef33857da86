"""Print versions, compiler, shared memory, ports and disk: what a bug report needs.

Examples:
  t2i env
"""

from dataclasses import dataclass

from t2i.cli import parse
from t2i.env import describe_lines


@dataclass(frozen=True)
class EnvCommand:
    """There is nothing to choose."""


def main() -> None:
    parse(EnvCommand, description=__doc__ or "", has_run_file=False)
    print("\n".join(describe_lines()))
