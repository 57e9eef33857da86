"""Contrastive alignment of image rows to a frozen language model's text rows (paper, Figure 7).

A caption is the mean of its text rows, a picture the mean of its codes' rows; only the latter learn, and a temperature,
under CLIP's loss over N pairs. An untied model has two spaces of rows, embedding and head; each is aligned in itself.
"""

import logging
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from t2i.config import AlignRun, ModelConfig, RunConfig
from t2i.data.dataset import caption_ids_of, stack_sequences, tokenizer_to_apply
from t2i.data.loader import StepLoader, num_trained_on
from t2i.data.shards.reader import read_split
from t2i.errors import UserError
from t2i.files import write_json
from t2i.model.resize import INPUT_ROWS, OUTPUT_ROWS, new_rows
from t2i.runs.run_folder import open_run, write_status
from t2i.tokens.text import TextTokenizer
from t2i.tokens.vocab import VocabLayout
from t2i.train.build import Start, starting_model
from t2i.train.inputs import manifest_of, with_found_start
from t2i.train.metrics import MetricsWriter

logger = logging.getLogger(__name__)

ROWS_FILE, STATE_FILE, SUMMARY = "rows.safetensors", "training_state.pt", "align.json"
MAX_SCALE = 100.0
"""Largest inverse temperature, as in CLIP."""


class AlignedRows(nn.Module):
    """One space of rows: text rows that stay, image rows and a temperature that learn."""

    def __init__(self, text_rows: Tensor, *, layout: VocabLayout, temperature: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        rows = new_rows(text_rows, count=layout.codebook_size, kind="random", generator=generator)
        self.register_buffer("text_rows", text_rows, persistent=False)
        self.image_rows = nn.Parameter(rows)
        self.log_scale = nn.Parameter(torch.tensor(1 / temperature).log())
        self.layout = layout

    def bags(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Average the rows of sequences (B, S): image and text features, (B, D) each, of length one."""
        is_text = input_ids < self.layout.num_text_rows
        codes = input_ids - self.layout.first_image_id
        is_image = (codes >= 0) & (codes < self.layout.codebook_size)
        image = _bag(self.image_rows, codes, is_image)
        text = _bag(self.get_buffer("text_rows"), input_ids, is_text)
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    @property
    def temperature(self) -> float:
        """What similarities are divided by."""
        return float((-self.log_scale.detach()).exp())

    def scaled(self) -> Tensor:
        """Return image rows (codebook, D) as long, on average, as text rows: CLIP's loss sees no length."""
        rows = self.image_rows.detach()
        return rows * (self.get_buffer("text_rows").norm(dim=-1).mean() / rows.norm(dim=-1).mean())


def contrastive_loss(image: Tensor, text: Tensor, *, log_scale: Tensor) -> Tensor:
    """Compute CLIP's loss of features (N, D) of length one: pictures find their texts, texts their pictures."""
    logits = log_scale.exp() * image @ text.T  # (N, N)
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def gathered(features: Tensor) -> Tensor:
    """Stack this rank's features (B, D) with all others' (N, D); a gradient flows to this rank's own alone."""
    if dist.get_world_size() == 1:
        return features
    parts = [torch.empty_like(features) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, features.detach().contiguous())
    parts[dist.get_rank()] = features
    return torch.cat(parts)


def loss_and_gradient(side: AlignedRows, input_ids: Tensor) -> float:
    """Add the gradient of the loss over all ranks' pairs to `side` on every rank; return the loss.

    Each rank knows the whole loss, but differentiates it through its own pictures; the sum over ranks is the gradient
    of the rows. The temperature's gradient is whole on each rank already.
    """
    image, text = side.bags(input_ids)
    loss = contrastive_loss(gathered(image), gathered(text), log_scale=side.log_scale)
    loss.backward()  # type: ignore[no-untyped-call]
    assert side.image_rows.grad is not None
    dist.all_reduce(side.image_rows.grad)
    return float(loss.detach())


@torch.no_grad()
def retrieval_accuracy(image: Tensor, text: Tensor) -> dict[str, float]:
    """Count how often the nearest of N is the right one, both ways; k equal nearest count 1 / k each."""
    similarities = image @ text.T
    return {
        "image_to_text": _top_one(similarities),
        "text_to_image": _top_one(similarities.T),
        "chance": 1 / len(image),
    }


def align(run: AlignRun) -> dict[str, Any]:
    """Align, write rows.safetensors for model.rows, and return the held-out retrieval of each space.

    Needs torch.distributed. Goes on from its last save.

    Raises:
        UserError: more pairs a step than the data has, or a model that knows the codes already.
    """
    manifest = manifest_of(run.data)
    count = num_trained_on(manifest, keep_every=run.data.keep_every)
    if count < run.align.num_pairs:
        raise UserError(
            f"align.num_pairs is {run.align.num_pairs}; {run.data.shards} has {count} training pairs."
        )
    is_first = dist.get_rank() == 0
    lock = open_run(run, ds_config={}) if is_first else None
    run = replace(run, data=replace(run.data, mode="text-to-image", caption_dropout=0.0))
    config = with_found_start(RunConfig(run.run_dir, data=run.data, model=ModelConfig(init=run.model)))
    tokenizer = TextTokenizer.load(Path(config.model.init))
    start = starting_model(config, manifest=manifest, text_tokenizer=tokenizer)
    if start.num_kept >= start.layout.vocab_size:
        raise UserError(f"model is {run.model}, which knows the codes of {run.data.shards} already.")
    sides = make_sides(start, run=run)
    _train(sides, run=run, layout=start.layout, tokenizer=tokenizer)
    summary = {
        name: heldout_retrieval(side, run=run, tokenizer=tokenizer) | {"temperature": side.temperature}
        for name, side in sides.items()
    }
    if is_first:
        save_file(_all_rows(sides, start=start, seed=run.align.seed), run.run_dir / ROWS_FILE)
        write_json(run.run_dir / SUMMARY, {**summary, "settings": asdict(run.align)})
        write_status(run.run_dir, state="done", step=run.align.max_steps, code=0)
    if lock is not None:
        lock.close()
    return summary


def make_sides(start: Start, *, run: AlignRun) -> dict[str, AlignedRows]:
    """Make the spaces to align: that of the embedding, and that of the head where it is another."""
    model: Any = start.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = {INPUT_ROWS: embedding.weight}
    if head.weight is not embedding.weight:
        rows[OUTPUT_ROWS] = head.weight
    return {
        name: AlignedRows(
            value.detach()[: start.layout.num_text_rows].clone(),
            layout=start.layout,
            temperature=run.align.temperature,
            seed=run.align.seed,
        ).to(_device())
        for name, value in rows.items()
    }


def heldout_retrieval(side: AlignedRows, *, run: AlignRun, tokenizer: TextTokenizer) -> dict[str, float]:
    """Measure retrieval among at most num_pairs held-out pairs."""
    samples = list(read_split(run.data.shards, "heldout", remote=run.data.remote))[: run.align.num_pairs]
    apply = tokenizer_to_apply(run.data, tokenizer=tokenizer)
    captions = [caption_ids_of(sample, tokenizer=apply) for sample in samples]
    ids = stack_sequences(samples, layout=side.layout, config=run.data, captions=captions).to(_device())
    with torch.no_grad():
        return retrieval_accuracy(*side.bags(ids)) | {"num_pairs": len(samples)}


def _train(
    sides: dict[str, AlignedRows], *, run: AlignRun, layout: VocabLayout, tokenizer: TextTokenizer
) -> None:
    modules = nn.ModuleDict(sides)
    optimizer = torch.optim.Adam(modules.parameters(), lr=run.align.lr)
    loader = StepLoader(
        run.data,
        layout=layout,
        global_batch=run.align.num_pairs,
        world_size=dist.get_world_size(),
        seed=run.align.seed,
        tokenizer=tokenizer,
    )
    first_step = _restore(run.run_dir / STATE_FILE, modules, optimizer, loader)
    if first_step == run.align.max_steps:
        return
    writer = MetricsWriter(run.run_dir) if dist.get_rank() == 0 else None
    if writer:
        writer.start(step=first_step if first_step else -1)
    batches = iter(loader)
    bar = tqdm(range(first_step + 1, run.align.max_steps + 1), unit="step", disable=writer is None)
    for step in bar:
        input_ids = next(batches)["input_ids"].to(_device())
        optimizer.zero_grad()
        losses = {name: loss_and_gradient(side, input_ids) for name, side in sides.items()}
        optimizer.step()
        for side in sides.values():
            side.log_scale.data.clamp_(max=torch.tensor(MAX_SCALE).log().item())
        bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()})
        is_due = step % run.align.save_every == 0 or step == run.align.max_steps
        if writer:
            for name, loss in losses.items():
                writer.write(
                    {"step": step, "rows": name, "loss": loss, "temperature": sides[name].temperature}
                )
                if is_due:
                    found = heldout_retrieval(sides[name], run=run, tokenizer=tokenizer)
                    writer.write({"step": step, "split": "heldout", "rows": name, **found})
            if is_due:
                _save(run.run_dir / STATE_FILE, modules, optimizer, loader, step=step)
    if writer:
        writer.close()


def _save(
    path: Path, modules: nn.Module, optimizer: torch.optim.Optimizer, loader: StepLoader, *, step: int
) -> None:
    state = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
    temporary = path.with_suffix(".tmp")
    torch.save({**state, "loader": loader.state_dict(), "step": step}, temporary)
    temporary.replace(path)


def _restore(path: Path, modules: nn.Module, optimizer: torch.optim.Optimizer, loader: StepLoader) -> int:
    """Load the last save, if there is one; return the steps done."""
    dist.barrier()
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True, map_location=_device())
    modules.load_state_dict(state["modules"])
    optimizer.load_state_dict(state["optimizer"])
    loader.load_state_dict(state["loader"])
    logger.warning("going on from step %d", state["step"])
    return int(state["step"])


def _all_rows(sides: dict[str, AlignedRows], *, start: Start, seed: int) -> dict[str, Tensor]:
    """Put aligned image rows among the other new rows, which are random as grow_vocabulary makes them."""
    layout, generator = start.layout, torch.Generator().manual_seed(seed)
    place = layout.first_image_id - start.num_kept
    rows = {}
    for name, side in sides.items():
        count = layout.vocab_size - start.num_kept
        rows[name] = new_rows(
            side.get_buffer("text_rows").cpu(), count=count, kind="random", generator=generator
        )
        rows[name][place : place + layout.codebook_size] = side.scaled().cpu()
    return rows


def _bag(rows: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Average rows (V, D) of the marked ids (B, S): (B, D); zero where none is marked."""
    weights = mask / mask.sum(-1, keepdim=True).clamp(min=1)
    return F.embedding_bag(ids.where(mask, 0), rows, per_sample_weights=weights.to(rows.dtype), mode="sum")


def _top_one(similarities: Tensor) -> float:
    best = similarities.amax(-1, keepdim=True)
    is_best = similarities == best
    return float((is_best.diagonal() / is_best.sum(-1)).mean())


def _device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device("cpu")
