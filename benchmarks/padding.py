"""The cost of padding: full width against trimmed micro-batches of similar lengths, with equal losses.

Captions have about 30 tokens, as COCO's do. The paper's layout has 1,024 codes, sequences of 1,152 tokens, and 14
sequences per rank in micro-batches of 7. The small one has 256 codes, 320 tokens, and 32 sequences in micro-batches
of 8.

Examples:
    python benchmarks/padding.py
"""

import statistics
from dataclasses import dataclass

import side_by_side
import torch
from torch import Tensor

from t2i.data.batching import micro_batches
from t2i.model.open_lm.configuration_open_lm import OpenLMConfig
from t2i.model.open_lm.modeling_open_lm import OpenLMForCausalLM
from t2i.tokens.sequence import encode_sequence, next_token_labels
from t2i.tokens.vocab import VocabLayout
from t2i.train.engine import Learner

LAYOUT = VocabLayout(2_048, num_text_tokens=2_000, codebook_size=1_024)
MOST_CAPTION, MEAN_CAPTION, SPREAD = 122, 30.0, 0.35
"""Caption tokens: the most that the paper's layout holds, the mean, and the deviation of the logarithm."""


@dataclass(frozen=True)
class Layout:
    """The shape of a rank's step."""

    name: str
    seq_len: int
    num_codes: int
    sequences: int
    micro_batch: int


PAPER = Layout("the paper's layout", 1_152, num_codes=1_024, sequences=14, micro_batch=7)
SMALL = Layout("a small layout", 320, num_codes=256, sequences=32, micro_batch=8)


def main() -> None:
    parser = side_by_side.parser_of(__doc__)
    options = side_by_side.parse(parser)
    torch.set_num_threads(1)
    rows = []
    for layout in (PAPER, SMALL):
        # A hundred steps: which captions meet in one step is chance, and padding is set by the longest.
        shares = [waste(batch(layout, seed=seed), layout) for seed in range(10 if options.quick else 100)]
        for name, values in zip(("full width", "trimmed and sorted"), zip(*shares, strict=True), strict=True):
            target = "" if name == "full width" else "<= 0.02"
            what = f"padding, {layout.name}: share of positions, {name}"
            rows.append(side_by_side.stated(what, values, best=statistics.fmean, target=target))
    rows += timed(SMALL, rounds=options.rounds)
    side_by_side.write("padding", rows, is_kept=not options.quick)


def batch(layout: Layout, *, seed: int) -> Tensor:
    """Build one rank's step (B, S) with captions of log-normal length."""
    generator = torch.Generator().manual_seed(seed)
    # Log-normal, as lengths of captions are; the shift keeps the mean at MEAN_CAPTION.
    logs = torch.randn(layout.sequences, generator=generator) * SPREAD - SPREAD**2 / 2
    room = layout.seq_len - layout.num_codes - 6
    lengths = (MEAN_CAPTION * logs.exp()).round().clamp(4, min(MOST_CAPTION, room)).int().tolist()
    return torch.stack(
        [
            encode_sequence(
                torch.randint(LAYOUT.num_text_tokens, (length,), generator=generator),
                torch.randint(LAYOUT.codebook_size, (layout.num_codes,), generator=generator),
                layout=LAYOUT,
                mode="text-to-image",
                seq_len=layout.seq_len,
            )
            for length in lengths
        ]
    )


def waste(input_ids: Tensor, layout: Layout) -> tuple[float, float]:
    """Compute the share of positions that are padding: at full width, and in the micro-batches that are computed."""
    labels = next_token_labels(input_ids, layout=LAYOUT)
    real = int((input_ids != LAYOUT.pad_id).sum())
    # By the run's own function, so that this measures what training does.
    computed = sum(ids.numel() for ids, _ in micro_batches(input_ids, labels, size=layout.micro_batch))
    return 1 - real / input_ids.numel(), 1 - min(1.0, real / computed)


def timed(layout: Layout, *, rounds: int) -> list[side_by_side.Row]:
    """Time a step's forward and backward passes both ways, and compare their losses."""
    config = OpenLMConfig(LAYOUT.vocab_size, 128, 4, 4, max_position_embeddings=layout.seq_len)
    learner = Learner(OpenLMForCausalLM(config).train(), layout=LAYOUT)
    input_ids = batch(layout, seed=0)
    labels = next_token_labels(input_ids, layout=LAYOUT)
    whole = list(zip(input_ids.split(layout.micro_batch), labels.split(layout.micro_batch), strict=True))
    parts = micro_batches(input_ids, labels, size=layout.micro_batch)

    def step(batches: list[tuple[Tensor, Tensor]]) -> float:
        learner.zero_grad()
        losses = [learner(*pair)[0] for pair in batches]
        torch.stack(losses).sum().backward()
        return float(sum(loss.item() for loss in losses))

    seconds = side_by_side.alternate(
        {"whole": lambda: step(whole), "parts": lambda: step(parts)}, rounds=rounds
    )
    # Faster is worth nothing if the sum is another: only the order of float32 sums may differ.
    error = abs(step(parts) / step(whole) - 1)
    what = f"padding, {layout.name}:"
    return [
        side_by_side.compared(
            f"{what} time of a step, trimmed / full width", seconds["parts"], seconds["whole"], target="<= 1"
        ),
        side_by_side.stated(f"{what} relative difference of the loss", [error], target="<= 1e-06"),
    ]


if __name__ == "__main__":
    main()
