"""What a study expects to be there before it begins: models and shards that none of its own steps makes."""

from collections.abc import Iterator
from pathlib import Path

from t2i.config import EMBEDDED_SHARDS, RunConfig
from t2i.data.sources.place import PATTERN_CHARACTERS, PREFIXES
from t2i.files import hub_name
from t2i.runs.loading import SHIPPED_MODEL
from t2i.study.jobs import (
    filled,
    outputs_of,
    read_record,
    run_config,
    run_dir,
    run_name,
    step_config,
    trial_config,
)
from t2i.study.spec import TRAIN, Settings, Study
from t2i.study.tuning import trial_name, trials
from t2i.verbs import SCRIPTS

SOURCE_READERS = ("launchers/prepare.py", "launchers/tokenizer.py")
"""Scripts whose --captions is a choice, not a file."""
INPUTS = (
    *(
        "model",
        "checkpoint",
        "reference",
        "before",
        "clip",
        "inception",
        "features_folder",
        "align_to",
        "init_from",
    ),
    *("image_tokenizer", "text_tokenizer", "tokenizer"),
    *("source", "text", "captions", "coco", "shards", "heldout_shards"),
)
"""Flags of steps and measures that name what they read."""
SHARDS = ("shards", "heldout_shards", "captions")
"""Those that name shards, or may."""
EMBEDDED = ("openmoji", "docstrings", "code", "efficientnet_lite0", SHIPPED_MODEL)
"""What comes with t2i, or with the packages that it needs."""


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
    """Say what jobs that are not done need, and is neither here nor made by a job of the study, each once."""
    made = {path for step in study.steps for path in outputs_of(step, out=out)}
    runs = training_runs(study, out=out)
    made |= {config.run_dir for config in runs.values()}
    needed = [(name, key, path) for name, config in runs.items() for key, path in _inputs(config)]
    needed += [
        (name, key, path)
        for name, command, flags in _other_jobs(study, out=out)
        for key, path in _named_inputs(flags, command=command)
    ]
    found: dict[str, str] = {}
    for name, key, path in needed:
        is_made = made & {path, *path.parents}
        # A job that is done needs nothing any more.
        if not is_made and not path.exists() and read_record(out, name).state != "done":
            found.setdefault(
                f"{key} is {path}",
                f"{key} is {path} (in {name}), which is not here, and no step makes it",
            )
    return list(found.values())


def _other_jobs(study: Study, *, out: Path) -> Iterator[tuple[str, str, Settings]]:
    """List the jobs of t2i's other commands: name, command and flags."""
    for step in study.steps:
        if step.command != TRAIN and _is_ours(step.command):
            yield step.name, step.command, filled(step.flags, out=out)
    for measure in study.measures:
        if not _is_ours(measure.command):
            continue
        for arm in measure.arms or study.arms:
            for seed in measure.seeds or study.seeds_of(arm):
                flags = filled(measure.flags, out=out, run=run_dir(out, arm, seed))
                yield f"{measure.name}-{run_name(arm, seed)}", measure.command, flags


def _is_ours(command: str) -> bool:
    # Commands of one's own may call anything `model` or `source`.
    return command.split(" ")[0] in SCRIPTS.values()


def _named_inputs(flags: Settings, *, command: str) -> Iterator[tuple[str, Path]]:
    """List the paths that flags name as inputs, by the names that t2i's commands have for them."""
    for flag, value in flags.items():
        key = flag.replace("-", "_")
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", path) for name, path in _named_inputs(value, command=command))
        above, _, last = key.rpartition(".")
        # Remote shards are downloaded, and the embedded ones made on first use.
        remote = f"{above}.remote" if above else "remote"
        is_made = last in SHARDS and (flags.get(remote) or Path(str(value)) == EMBEDDED_SHARDS)
        is_choice = key == "captions" and command.startswith(SOURCE_READERS)
        is_input = isinstance(value, str) and last in INPUTS and not (is_choice or is_made)
        place = _place_of(f"text:{value}" if key == "text" else str(value)) if is_input else ""
        if place:
            yield key, Path(place)


def _place_of(source: str) -> str:
    """Return the path that a source names; empty for one that comes with t2i, a name on the hub, and a pattern."""
    path = source.removeprefix(next((prefix for prefix in PREFIXES if source.startswith(prefix)), ""))
    is_pattern = not PATTERN_CHARACTERS.isdisjoint(path)
    return "" if is_pattern or hub_name(source) or hub_name(path) or path.split(":")[0] in EMBEDDED else path


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
