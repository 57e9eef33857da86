"""The checkpoint with the lowest held-out loss: kept, named, and opened by its name; and what is said of a rise."""

from dataclasses import replace

import pytest
from conftest import ROOT

from t2i.distributed.run_id import give_run_id, read_run_id
from t2i.errors import Stopped
from t2i.measure.reduce import Interrupted
from t2i.runs import checkpoint_store as checkpoints
from t2i.runs.best_checkpoint import best_of
from t2i.runs.loading import find
from t2i.runs.metrics_log import append_metrics
from t2i.train import main
from t2i.train.main import train
from t2i.train.periodic import Periodic
from t2i.train.progress import Progress


@pytest.fixture
def run_dir(tmp_path):
    give_run_id(tmp_path)
    return tmp_path


def save(run_dir, step, *, losses, evaluated=None, owed=()):
    staging = checkpoints.begin(run_dir)
    (staging / "model.safetensors").write_bytes(b"weights")
    (staging / "config.json").write_text("{}")
    progress = vars(
        Progress(
            step=step,
            heldout_losses=losses,
            heldout_step=step if evaluated is None else evaluated,
            owed=list(owed),
        )
    )
    facts = checkpoints.Facts(run_id=read_run_id(run_dir), progress=progress)
    return checkpoints.commit(run_dir, step=step, facts=facts, keep_last=2)


def names(run_dir):
    checkpoints.wait_for_removals()
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_the_best_is_kept_beside_the_last_ones(run_dir):
    for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5), (4, 2.6), (5, 2.7)):
        save(run_dir, step, losses=[9.0, loss])
    assert names(run_dir) == ["best", "step_000002", "step_000004", "step_000005"]
    assert (run_dir / "checkpoints" / "best").resolve().name == "step_000002"
    save(run_dir, 6, losses=[1.5])
    save(run_dir, 7, losses=[1.6])
    assert names(run_dir) == ["best", "step_000006", "step_000007"]
    assert best_of(run_dir).name == "step_000006"


def test_a_loss_of_an_earlier_step_does_not_count(run_dir):
    save(run_dir, 1, losses=[2.0])
    save(run_dir, 2, losses=[1.0], evaluated=1)
    assert best_of(run_dir).name == "step_000001"
    save(run_dir, 3, losses=[])
    assert best_of(run_dir).name == "step_000001"


def test_an_evaluation_that_a_stop_cut_short_counts_once_it_was_made_up_for(run_dir):
    save(run_dir, 1, losses=[2.0])
    save(run_dir, 2, losses=[2.0], evaluated=1, owed=[0])
    assert best_of(run_dir).name == "step_000001"
    append_metrics(run_dir, {"step": 2, "loss": 0.1}, {"step": 2, "split": "heldout", "image_loss": 1.5})
    assert best_of(run_dir).name == "step_000002"
    save(run_dir, 3, losses=[1.6])
    save(run_dir, 4, losses=[1.7])
    assert names(run_dir) == ["best", "step_000002", "step_000003", "step_000004"]


def test_a_stop_during_an_evaluation_hides_no_best_checkpoint(finished, tmp_path, monkeypatch):
    """The losses are those of an undisturbed run, so the best one is too."""
    losses = {2: 1.0, 4: 2.0, 6: 3.0}
    row = {"split": "heldout", "image_loss": None}
    settings = replace(finished.train, max_steps=6, eval_every=2, save_every=2, keep_last=1)
    config = replace(finished, run_dir=tmp_path / "run", train=settings)
    interrupted = []

    def work(step, is_asked):
        if step == 2 and not interrupted:
            interrupted.append(step)
            raise Interrupted
        return [{**row, "step": step, "image_loss": losses[step]}]

    monkeypatch.setattr(main, "periodic_work", lambda *_, **__: [Periodic(2, work)])
    with pytest.raises(Stopped, match="Stopped at step 2 of 6"):
        main.train(config, ds_config_path=ROOT / "ds_configs" / "zero2_fp32.json")
    assert not (config.run_dir / "checkpoints" / "best").exists()
    main.train(config, ds_config_path=ROOT / "ds_configs" / "zero2_fp32.json")
    assert names(config.run_dir) == ["best", "step_000002", "step_000006"]
    assert (config.run_dir / "checkpoints" / "best").resolve().name == "step_000002"


def test_the_best_opens_as_the_checkpoint_of_its_step(run_dir):
    (run_dir / "resolved.yaml").write_text("{}")
    folder = save(run_dir, 4, losses=[2.0])
    assert find(str(run_dir / "checkpoints" / "best")) == (folder, run_dir)


@pytest.mark.parametrize(
    ("losses", "is_said"),
    [
        ([3.0, 2.0, 2.1, 2.2, 2.3], [False, False, False, False, True]),
        ([3.0, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5], [False] * 4 + [True, False, False]),  # once
        ([1.0, 2.0, 3.0, 4.0], [False, False, False, True]),
        ([3.0, 2.0, 2.1, 2.0, 2.3, 2.4], [False] * 6),
    ],
)
def test_overfitting_is_said_once_after_three_rises(losses, is_said):
    progress = Progress()
    found = []
    for step, loss in enumerate(losses):
        progress.step = step
        progress.note_heldout(loss)
        progress.note_heldout(loss)  # measured again where a run was resumed
        found.append(progress.has_begun_to_rise())
    assert found == is_said


def test_a_run_whose_heldout_loss_rises_says_so_once_and_names_the_best_checkpoint(
    finished, tmp_path, monkeypatch, caplog
):
    losses = iter([3.0, 2.0, 2.1, 2.2, 2.3, 2.4])
    monkeypatch.setattr("t2i.train.loop.heldout_loss", lambda rows: next(losses) if rows else None)
    settings = replace(finished.train, max_steps=6, eval_every=1, save_every=1)
    config = replace(finished, run_dir=tmp_path / "run", train=settings)
    train(config, ds_config_path=ROOT / "ds_configs" / "zero2_fp32.json")
    [said] = [each.getMessage() for each in caplog.records if "begins to overfit" in each.getMessage()]
    assert said.startswith("the held-out loss has risen in 3 evaluations in a row, from 2.000 to 2.300")
    best = config.run_dir / "checkpoints" / "step_000002"
    assert said.endswith(f"The checkpoint of its lowest is kept: {best}.")
    assert best.is_dir()
