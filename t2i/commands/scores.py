"""Compare two scores that are there, or say how often the exact judge is right: the other verbs of `score`.

Examples:
  python eval/coco_fid.py compare A/scores.json B/scores.json
  python eval/coco_fid.py judge
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class CompareCommand:
    """The two scores."""

    a: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")]
    """scores.json of one model, its folder, a file of an export's .eval_results/, or the export's card, README.md."""
    b: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")]
    """Those of another, in any of these forms."""


@dataclass(frozen=True)
class JudgeCommand:
    """Nothing is asked: the judge is trained on the embedded images."""


def show_judge() -> None:
    from t2i.config import ASSETS
    from t2i.measure.compare import verdict_line
    from t2i.measure.judge import load_judge, yardsticks
    from t2i.tokens.image import ImageTokenizer

    judge = load_judge()
    for row, verdict in yardsticks(judge, ImageTokenizer.load(ASSETS / "image_tokenizer")).items():
        print(f"{row}: {verdict_line(asdict(verdict))}; mean {verdict.mean():.1%}")
    print(f"Judge {judge.sha256()}, trained on {judge.made_of['train_images']:,} real images.")


def compare(command: CompareCommand) -> None:
    from t2i.measure.compare import check_protocols, differing_subjects, lone_judges, read_scores, table

    a, b = read_scores(command.a), read_scores(command.b)
    check_protocols(a, b)
    for file, scores in ((command.a, a), (command.b, b)):
        print("\n".join([str(file), *table(scores.rows.values(), measures=scores.measures)]))
    for file, judges in zip((command.a, command.b), lone_judges(a, b), strict=True):
        if judges:
            print(f"Compared with nothing, as they judged {file} alone: {', '.join(judges)}.")
    print("\n".join(["Measured alike. They differ in (first | second):", *differing_subjects(a, b)]))
