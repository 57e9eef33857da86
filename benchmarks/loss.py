"""The loss and its gradients beside torch's own linear_cross_entropy: time and bytes, forward and backward.

1,276 positions of width 256 with a vocabulary of 66,824, fp32, as in training_step.py; a fifth of the labels are text.
torch 2.14 has the function, an older one has not. Where sums are enough, torch's is slightly faster and takes two to
three times the bytes. t2i's own is kept for memory, and because one walk over the logits gives what training records:
the loss of each position and its log-partition, text and image apart.

Examples:
    python benchmarks/loss.py
    python benchmarks/loss.py --memory t2i     peak bytes of one candidate, in its own process
"""

import functools
import statistics
from collections.abc import Callable

import side_by_side
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_step import LAYOUT, WIDTH, peak_bytes

from t2i.env import keep_memory
from t2i.model.loss import summed_loss
from t2i.model.softmax import Head

TEXT, POSITIONS, CHUNK = 256, 1_276, 512
"""Text labels, all labels, and the positions of a chunk: t2i's own on a CPU."""
HAS_OWN = hasattr(F, "linear_cross_entropy")
LEAST_WIN = 1.1
"""The simpler function would be used unless t2i's is faster by this factor."""


def main() -> None:
    parser = side_by_side.parser_of(__doc__)
    parser.add_argument("--memory", choices=list(CANDIDATES))
    options = side_by_side.parse(parser)
    keep_memory()
    torch.set_num_threads(1)
    if options.memory:
        print(peak_bytes(CANDIDATES[options.memory]()))
        return
    if not HAS_OWN:
        raise SystemExit(f"torch {torch.__version__} has no linear_cross_entropy; expected 2.14 or newer.")
    num_processes = 1 if options.quick else 3
    memory = {
        name: [side_by_side.memory_of(__file__, name) for _ in range(num_processes)] for name in CANDIDATES
    }
    candidates = {name: make() for name, make in CANDIDATES.items()}
    seconds = side_by_side.alternate(candidates, rounds=options.rounds)
    rows = []
    for name in CANDIDATES:
        if name == "t2i":
            continue
        # The target is for what gives the loss of each position, as t2i's does. Sums alone are less.
        target = f">= {LEAST_WIN}" if name == PER_POSITION else ""
        rows.append(
            side_by_side.compared(f"loss: {name} / t2i", seconds[name], seconds["t2i"], target=target)
        )
        shares = [a / b for a, b in zip(memory[name], memory["t2i"], strict=True)]
        rows.append(side_by_side.stated(f"loss: bytes of {name} / of t2i", shares, best=statistics.median))
    rows.append(
        side_by_side.stated("loss: relative difference to torch's", [difference()], target="<= 1e-06")
    )
    figures = {
        "least CPU seconds": {name: min(times) for name, times in seconds.items()},
        "bytes above the model": {name: statistics.median(values) for name, values in memory.items()},
    }
    side_by_side.write("loss", rows, figures=figures, is_kept=not options.quick)


@functools.cache
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Make hidden states (N, D), labels (N,) and the head (V, D), the states as large as a norm leaves them."""
    torch.manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, requires_grad=True)
    text = torch.randint(LAYOUT.num_text_tokens, (TEXT,))
    image = LAYOUT.image_ids(torch.randint(LAYOUT.codebook_size, (POSITIONS - TEXT,)))
    head = nn.Parameter(torch.randn(LAYOUT.vocab_size, WIDTH) / WIDTH**0.5)
    return hidden, torch.cat([text, image]), head


def once(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], float]:
    """Prepare a forward and backward pass of a sum over all labels."""
    hidden, labels, head = inputs()

    def run() -> float:
        hidden.grad = head.grad = None
        total = loss(hidden, labels, head)
        total.backward()
        return total.item()

    return run


def own(hidden: Tensor, labels: Tensor, head: Tensor) -> Tensor:
    """Compute t2i's loss."""
    return summed_loss(hidden[None], labels[None], head=Head(head))[0]


def torchs(hidden: Tensor, labels: Tensor, head: Tensor, *, reduction: str = "sum") -> Tensor:
    """Compute torch's, in chunks as large as t2i's; its own choice of a chunk took three times as long here."""
    options = nn.LinearCrossEntropyOptions(chunking_method=None, batch_chunk_size=CHUNK)
    return F.linear_cross_entropy(hidden, head, labels, reduction=reduction, options=options).sum()


def in_two_calls(hidden: Tensor, labels: Tensor, head: Tensor) -> Tensor:
    """Sum text and image apart, which takes a call for each."""
    parts = zip(hidden.split([TEXT, POSITIONS - TEXT]), labels.split([TEXT, POSITIONS - TEXT]), strict=True)
    return torch.stack([torchs(*part, head) for part in parts]).sum()


def plain(hidden: Tensor, labels: Tensor, head: Tensor) -> Tensor:
    """Compute all logits at once."""
    return F.cross_entropy(F.linear(hidden, head), labels, reduction="sum")


PER_POSITION = "torch's, a loss per position"
CANDIDATES: dict[str, Callable[[], Callable[[], float]]] = {
    "t2i": lambda: once(own),
    PER_POSITION: lambda: once(functools.partial(torchs, reduction="none")),
    "torch's, text and image summed in two calls": lambda: once(in_two_calls),
    "torch's, one sum": lambda: once(torchs),
    "logits at once": lambda: once(plain),
}


def difference() -> float:
    """Compare the sums and all gradients of t2i's loss with torch's: the largest relative difference."""
    hidden, _, head = inputs()
    found = []
    for loss in (own, torchs):
        total = once(loss)()
        found.append((torch.tensor(total), hidden.grad, head.grad))
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*found, strict=True))


if __name__ == "__main__":
    main()
