"""Compare two scores that are there, or say how often the exact judge is right: the other verbs of `score`.

Examples:
  python eval/coco_fid.py compare A/scores.json B/scores.json
  python eval/coco_fid.py judge --out judge_yardsticks.json
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from annotated_types import Ge, Le

from t2i.settings import OR_ZERO


@dataclass(frozen=True)
class CompareCommand:
    """The two scores."""

    a: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")]
    """scores.json of one model, its folder, a file of an export's .eval_results/, or the export's card, README.md."""
    b: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")]
    """scores.json of the other model, its folder, a file of its .eval_results/, or its card."""


@dataclass(frozen=True)
class JudgeCommand:
    """How the judge's own shares are told: it is trained on the embedded images, and nothing else is asked."""

    bootstrap: Annotated[int | None, Ge(2), Le(100_000), OR_ZERO] = None
    """Resamplings per 95% interval; 0 for no intervals. Default: 100."""
    out: Path | None = None
    """Results file. Default: the shares are only printed."""


def show_judge(command: JudgeCommand) -> None:
    from t2i.config import ASSETS
    from t2i.files import check_results_file, results_file, write_json
    from t2i.measure.compare import table, verdict_line
    from t2i.measure.judge import YARDSTICKS, load_judge, yardsticks
    from t2i.measure.measures import BOOTSTRAP_SEED, REPLICATES
    from t2i.measure.pairing import judge_scores
    from t2i.measure.protocol import BOOTSTRAP, JUDGES, Bootstrap, RowScore
    from t2i.measure.verdict import MEAN, POOLED
    from t2i.tokens.image import ImageTokenizer

    # A model's own scores have these keys too.
    check_results_file(
        command.out, name="judge_yardsticks.json", keys=("rows", "judged"), others=("sampler",)
    )
    path = results_file(command.out, default=Path("judge_yardsticks.json")) if command.out else None
    judge, tokenizer = load_judge(), ImageTokenizer.load(ASSETS / "image_tokenizer")
    verdicts = yardsticks(judge, tokenizer)
    replicates = REPLICATES if command.bootstrap is None else command.bootstrap
    scores = judge_scores(judge, verdicts, replicates=replicates)
    rows = {
        name: RowScore(
            YARDSTICKS[name],
            n=verdict.num_captions,
            measures=scores.rows.get(name, {}),
            intervals=scores.intervals[name],
        )
        for name, verdict in verdicts.items()
    }
    print("\n".join(table(rows.values(), measures=[MEAN, POOLED])))
    for name, verdict in scores.details.items():
        print(f"{name}: {verdict_line(verdict)}")
    print(f"Judge {judge.sha256()}, trained on {judge.made_of['train_images']:,} real images.")
    if path:
        found = {
            "measures": [MEAN, POOLED],
            "rows": {name: row.to_json() for name, row in rows.items()},
            BOOTSTRAP: asdict(Bootstrap(replicates, seed=BOOTSTRAP_SEED)),
            JUDGES: {MEAN: scores.protocol},
            "judged": {MEAN: scores.details},
            "image_tokenizer_sha256": tokenizer.fingerprint(),
        }
        write_json(path, found)
        print(f"All of it: {path}")


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
