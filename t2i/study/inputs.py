"""What a study expects to be there before it begins: models and shards that none of its own steps makes."""

from collections.abc import Iterator
from pathlib import Path

from t2i.config import EMBEDDED_SHARDS, RunConfig
from t2i.files import hub_name
from t2i.runs.loading import SHIPPED_MODEL
from t2i.study.jobs import outputs_of, read_record, run_config, run_name, step_config, trial_config
from t2i.study.spec import TRAIN, Study
from t2i.study.tuning import trial_name, trials


def training_runs(study: Study, *, out: Path) -> dict[str, RunConfig]:
    """List what every training run is, those among the steps and the trials too, by name."""
    found = {step.name: step_config(step, out=out) for step in study.steps if step.command == TRAIN}
    found |= {
        trial_name(arm, value): trial_config(study, arm=arm, value=value, out=out)
        for arm, value in trials(study)
    }
    return found | {
        run_name(arm, seed): run_config(study, arm=arm, seed=seed, out=out) for arm, seed in study.runs()
    }


def missing_inputs(study: Study, *, out: Path) -> list[str]:
    """Say what runs that are not done need, and is neither here nor made by a step of the study, each once."""
    made = {path for step in study.steps for path in outputs_of(step, out=out)}
    found: dict[str, str] = {}
    for name, config in training_runs(study, out=out).items():
        if read_record(out, name).state == "done":  # and needs nothing any more
            continue
        for key, path in _inputs(config):
            is_made = made & {path, *path.parents}
            if not is_made and not path.exists():
                found.setdefault(
                    f"{key} is {path}",
                    f"{key} is {path} (in {name}), which is not here, and no step makes it",
                )
    return list(found.values())


def _inputs(config: RunConfig) -> Iterator[tuple[str, Path]]:
    """List the paths that a training run reads."""
    init, data = config.model.init, config.data
    if init not in ("random", SHIPPED_MODEL) and not hub_name(init):
        yield "model.init", Path(init)
    # Remote shards are downloaded, and the embedded ones made on first use.
    if not data.remote and data.shards != EMBEDDED_SHARDS:
        yield "data.shards", data.shards
    if data.replay_shards is not None:
        yield "data.replay_shards", data.replay_shards
