"""Contrastive alignment of image embeddings to a frozen language model's text embeddings (paper, Figure 7)."""

import logging
import math
import os
import pickle
from collections.abc import Iterator
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from t2i.config import AlignConfig, AlignRun, DataConfig
from t2i.data.dataset import caption_ids_of, stack_sequences, tokenizer_to_apply
from t2i.data.loader import StepLoader, num_trained_on
from t2i.data.shards.integrity import Sample
from t2i.data.shards.manifest import Manifest
from t2i.data.shards.reader import read_split
from t2i.disk import share
from t2i.distributed.collectives import any_rank
from t2i.distributed.signals import StopFlag, stop_flag
from t2i.errors import DataError, Stopped, UserError, exit_code
from t2i.files import whole_file, write_json
from t2i.model.contrastive_loss import MAX_SCALE
from t2i.model.resize import INPUT_ROWS, OUTPUT_ROWS, ends_of, grow_vocabulary, new_rows
from t2i.model.uniform_start import Probe, shift_to_uniform
from t2i.runs.metrics_log import MetricsRow
from t2i.runs.run_folder import State, open_run, record_run, write_status
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout
from t2i.train.contrastive import AlignedRows, loss_and_gradient, retrieval_accuracy, retrieval_hits
from t2i.train.inputs import found_start, manifest_of
from t2i.train.metrics import MetricsWriter
from t2i.train.new_embeddings import first_sequences
from t2i.train.start import Start, loaded_start

logger = logging.getLogger(__name__)

ROWS_FILE, STATE_FILE, SUMMARY = "rows.safetensors", "training_state.pt", "align.json"
HITS = "hits.json"
"""Which held-out images found their captions, so that two alignments compare image by image."""


def align(run: AlignRun) -> dict[str, dict[str, float]]:
    """Align, write rows.safetensors for model.new_embeddings, and return the held-out retrieval of each space.

    Needs torch.distributed. Resumes from its last save; SIGTERM and Ctrl-C save after the step.

    Raises:
        UserError: more pairs per step than the data has, or a model that was trained on these codes already.
        DataError: the shards have no images, or too few held-out pairs to measure retrieval among.
        Stopped: a signal asked for it, and all is saved.
    """
    manifest, config = manifest_of(run.data), run.align
    if manifest.is_text:
        raise DataError(f"{run.data.shards} holds text only; expected shards of captioned images to align.")
    count = num_trained_on(manifest, subsample_every=run.data.subsample_every)
    if count < config.num_pairs:
        raise UserError(
            f"align.num_pairs is {config.num_pairs}; expected <= {count}, the training pairs of {run.data.shards}."
        )
    if (heldout_count := manifest.counts.get("heldout", 0)) < 2:
        raise DataError(
            f"{run.data.shards} holds out {heldout_count} pairs; retrieval is measured among at least 2. Prepare with a"
            " larger --heldout-share."
        )
    lock = open_run(run, ds_config={}) if dist.get_rank() == 0 else None
    try:
        with stop_flag() as flag:
            return _align(run, manifest=manifest, flag=flag)
    except (Exception, KeyboardInterrupt) as error:
        if lock is not None:
            _report(run.run_dir, error)
        raise
    finally:
        if lock is not None:
            lock.close()


def _align(run: AlignRun, *, manifest: Manifest, flag: StopFlag) -> dict[str, dict[str, float]]:
    config, is_first = run.align, dist.get_rank() == 0
    # A dropped caption leaves no pair, nor does replayed text, and only text-to-image sequences hold both an image and
    # its caption.
    data = replace(run.data, mode="text-to-image", caption_dropout=0.0, replay_ratio=0.0, replay_shards=None)
    folder = found_start(run.model)
    tokenizer = TextTokenizer.load(Path(folder))
    start = loaded_start(
        folder, manifest=manifest, text_tokenizer=tokenizer, trust_remote_code=run.trust_remote_code
    )
    layout = start.layout
    if start.num_kept >= layout.vocab_size:
        raise UserError(f"model is {run.model}, which was trained on the codes of {data.shards} already.")
    sides = make_sides(start, temperature=config.temperature, seed=config.seed)
    pairs = heldout_pairs(data, num_pairs=config.num_pairs)
    heldout = Heldout(heldout_ids(pairs, data, layout=layout, tokenizer=tokenizer), styles_of(pairs))
    loader = StepLoader(
        data,
        layout=layout,
        global_batch=config.num_pairs,
        world_size=dist.get_world_size(),
        seed=config.seed,
        tokenizer=tokenizer,
    )
    if is_first:
        record_run(run, ds_config={})
    has_learned = _train(sides, config=config, loader=loader, heldout=heldout, run_dir=run.run_dir, flag=flag)
    hits = {name: heldout.hits(side) for name, side in sides.items()}
    summary = {
        name: heldout.retrieval(hits[name]) | {"temperature": side.temperature}
        for name, side in sides.items()
    }
    if is_first:
        # A finished alignment is left alone, also one whose embeddings were placed by an older rule.
        if has_learned or not (run.run_dir / ROWS_FILE).exists():
            rows = _all_rows(sides, start=start, config=config)
            if config.placement == "uniform":
                sequences = first_sequences(data, layout=layout, tokenizer=tokenizer)
                rows = _placed(rows, start=start, sequences=sequences, seed=config.seed)
            with whole_file(run.run_dir / ROWS_FILE) as written:
                save_file(rows, written)
                share(written)
        spaces = {name: {way: one.tolist() for way, one in found.items()} for name, found in hits.items()}
        write_json(run.run_dir / HITS, {"keys": [pair["key"] for pair in pairs], "spaces": spaces})
        write_json(run.run_dir / SUMMARY, {**summary, "settings": asdict(config)})
        write_status(run.run_dir, state="done", step=config.max_steps, code=0)
    return summary


def _report(run_dir: Path, error: BaseException) -> None:
    """Write status.json; a disk that refuses must not hide the error."""
    state: State = "stopped" if isinstance(error, Stopped | KeyboardInterrupt) else "failed"
    with suppress(OSError):
        write_status(
            run_dir,
            state=state,
            step=_saved_step(run_dir / STATE_FILE),
            code=exit_code(error),
            reason=str(error) or type(error).__name__,
            # A command that was refused would be refused again.
            next_command="" if isinstance(error, UserError) else None,
        )


def make_sides(start: Start, *, temperature: float, seed: int) -> dict[str, AlignedRows]:
    """Make the spaces to align: the input embeddings, and the LM head where it is not tied to them."""
    # An untied head lives in another space than the embedding: one aligned set could not serve both.
    embedding, head = start.model.get_input_embeddings().weight, start.model.get_output_embeddings().weight
    rows = {INPUT_ROWS: embedding} | ({} if head is embedding else {OUTPUT_ROWS: head})
    return {
        name: AlignedRows(
            value.detach()[: start.layout.num_text_rows].clone(),
            layout=start.layout,
            temperature=temperature,
            seed=seed,
        ).to(_device())
        for name, value in rows.items()
    }


def heldout_pairs(data: DataConfig, *, num_pairs: int) -> list[Sample]:
    """Read at most num_pairs held-out pairs, evenly spread: a source may list one kind of image after another."""
    samples = list(read_split(data.shards, "heldout", remote=data.remote))
    count = min(num_pairs, len(samples))
    return [samples[place * len(samples) // count] for place in range(count)]


def heldout_ids(
    pairs: list[Sample], data: DataConfig, *, layout: VocabLayout, tokenizer: TextTokenizer
) -> Tensor:
    """Make sequences (N, S) of held-out pairs."""
    apply = tokenizer_to_apply(data, tokenizer=tokenizer)
    captions = [caption_ids_of(pair, tokenizer=apply) for pair in pairs]
    return stack_sequences(pairs, layout=layout, config=data, captions=captions).to(_device())


def styles_of(pairs: list[Sample]) -> Tensor:
    """Number the styles that pairs are drawn in: (N,); all 0 where shards have none."""
    numbers: dict[str, int] = {}
    styles = [numbers.setdefault(pair.get("style", ""), len(numbers)) for pair in pairs]
    return torch.tensor(styles, device=_device())


@dataclass(frozen=True)
class Heldout:
    """Held-out pairs that retrieval is measured among."""

    ids: Tensor
    """Sequences (N, S)."""
    styles: Tensor
    """(N,) numbers of what each image is drawn in."""

    @torch.no_grad()
    def hits(self, side: AlignedRows) -> dict[str, Tensor]:
        """Tell of each pair, in both ways, whether it is found among those of its style: (N,) each."""
        return retrieval_hits(*side.bags(self.ids), styles=self.styles)

    def retrieval(self, hits: dict[str, Tensor]) -> dict[str, float]:
        """Say how often pairs find each other, by their hits (N,) of both ways."""
        return retrieval_accuracy(hits, styles=self.styles) | {"num_pairs": len(self.ids)}


@dataclass(frozen=True)
class _State:
    """What a save holds, besides the number of steps done."""

    modules: nn.ModuleDict
    optimizer: torch.optim.Optimizer
    loader: StepLoader


def _train(
    sides: dict[str, AlignedRows],
    *,
    config: AlignConfig,
    loader: StepLoader,
    heldout: Heldout,
    run_dir: Path,
    flag: StopFlag,
) -> bool:
    """Train up to max_steps; tell whether there was a step left to take.

    Raises:
        Stopped: a signal met one of the ranks, and all is saved.
    """
    modules = nn.ModuleDict(sides)
    state = _State(modules, torch.optim.Adam(modules.parameters(), lr=config.lr), loader)
    first_step = _restore(run_dir / STATE_FILE, state)
    if first_step == config.max_steps:
        return False
    writer = MetricsWriter(run_dir) if dist.get_rank() == 0 else None
    if writer:
        writer.start(step=first_step if first_step else -1)
    batches = iter(loader)
    bar = tqdm(range(first_step + 1, config.max_steps + 1), unit="step", disable=writer is None)
    flag.begin()
    with closing(writer) if writer else nullcontext():
        for step in bar:
            losses = _step(sides, next(batches)["input_ids"].to(_device()), optimizer=state.optimizer)
            bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()}, refresh=False)
            is_due = step % config.save_every == 0 or step == config.max_steps
            is_asked = any_rank(flag.is_set())
            if writer:
                # Not measured where it stops, so that metrics do not depend on that.
                for row in _rows(sides, losses, heldout=heldout if is_due else None):
                    writer.write({"step": step, **row})
                if is_due or is_asked:
                    _save(run_dir / STATE_FILE, state, step=step)
            if is_asked and step < config.max_steps:
                raise Stopped(
                    f"Stopped at step {step} of {config.max_steps}; run the same command to resume."
                )
    return True


def _step(
    sides: dict[str, AlignedRows], input_ids: Tensor, *, optimizer: torch.optim.Optimizer
) -> dict[str, float]:
    """Take one step of Adam on sequences (B, S); return the loss of each space."""
    optimizer.zero_grad()
    losses = {name: loss_and_gradient(side, input_ids) for name, side in sides.items()}
    optimizer.step()
    # As CLIP does: a scale that grows without bound makes the loss unstable.
    for side in sides.values():
        side.log_scale.data.clamp_(max=math.log(MAX_SCALE))
    return losses


def _rows(
    sides: dict[str, AlignedRows], losses: dict[str, float], *, heldout: Heldout | None
) -> Iterator[MetricsRow]:
    """Yield each space's loss, and its retrieval among held-out pairs if they are given."""
    for name, side in sides.items():
        yield {"rows": name, "loss": losses[name], "temperature": side.temperature}
        if heldout is not None:
            yield {"split": "heldout", "rows": name, **heldout.retrieval(heldout.hits(side))}


def _save(path: Path, state: _State, *, step: int) -> None:
    values = {"modules": state.modules.state_dict(), "optimizer": state.optimizer.state_dict()}
    # A kill halfway must leave the save before it.
    with whole_file(path) as written:
        torch.save({**values, "loader": state.loader.state_dict(), "step": step}, written)


def _restore(path: Path, state: _State) -> int:
    """Load the last save, if there is one; return the steps done."""
    dist.barrier()  # no rank may look before the first one has opened the folder
    if not path.is_file():
        return 0
    saved = torch.load(path, weights_only=True, map_location=_device())
    state.modules.load_state_dict(saved["modules"])
    state.optimizer.load_state_dict(saved["optimizer"])
    state.loader.load_state_dict(saved["loader"])
    logger.warning("resuming from step %d", saved["step"])
    return int(saved["step"])


def _saved_step(path: Path) -> int:
    """Read how many steps a save holds; 0 where there is none that can be read."""
    with suppress(OSError, RuntimeError, pickle.UnpicklingError):
        return int(torch.load(path, weights_only=True, map_location="cpu", mmap=True)["step"])
    return 0


def _all_rows(sides: dict[str, AlignedRows], *, start: Start, config: AlignConfig) -> dict[str, Tensor]:
    """Put the aligned image embeddings among the other new ones, which are made as grow_vocabulary makes them."""
    layout, generator = start.layout, torch.Generator().manual_seed(config.seed)
    at_zero = config.placement == "zero"
    place = layout.first_image_id - start.num_kept
    rows = {}
    for name, side in sides.items():
        count = layout.vocab_size - start.num_kept
        rows[name] = new_rows(
            side.get_buffer("text_rows").cpu(),
            count=count,
            kind="random" if at_zero else "uniform",
            generator=generator,
        )
        rows[name][place : place + layout.codebook_size] = (
            side.scaled() if at_zero else side.around_text()
        ).cpu()
    return rows


def _placed(rows: dict[str, Tensor], *, start: Start, sequences: Tensor, seed: int) -> dict[str, Tensor]:
    """Grow start.model by new rows, and shift them until an image code costs what a uniform guess does."""
    grow_vocabulary(start.model, vocab_size=start.layout.vocab_size, rows=rows, seed=seed)
    shift_to_uniform(start.model, Probe.of(sequences, layout=start.layout, num_old=start.num_kept))
    return {name: weight.detach()[start.num_kept :].clone() for name, weight in ends_of(start.model).items()}


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu")
