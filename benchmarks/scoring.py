"""Frechet distance on 2,048 features: time and value of t2i's, clean-fid's and torch-fidelity's.

Examples:
    python benchmarks/scoring.py
    python benchmarks/scoring.py --dims 512 --rounds 3
"""

import numpy as np
import side_by_side
import torch
from cleanfid.fid import frechet_distance as clean_fid
from threadpoolctl import threadpool_limits
from torch_fidelity.metric_fid import fid_statistics_to_metric

from t2i.measure.distances import frechet_distance, statistics


def main() -> None:
    parser = side_by_side.parser_of(__doc__)
    parser.add_argument("--dims", type=int, default=2_048)
    options = side_by_side.parse(parser, dims=512)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    # Correlated, as features are: independent ones have a nearly diagonal covariance, whose root is easy.
    mixing = rng.standard_normal((options.dims, options.dims)) / options.dims**0.5
    a, b = (
        statistics(rng.standard_normal((2 * options.dims, options.dims)) @ mixing + shift)
        for shift in (0, 0.1)
    )
    theirs = [{"mu": part.mean, "sigma": part.cov} for part in (a, b)]
    candidates = {
        "t2i": lambda: frechet_distance(a, b),
        "clean-fid": lambda: clean_fid(a.mean, a.cov, b.mean, b.cov),
        "torch-fidelity": lambda: fid_statistics_to_metric(*theirs, verbose=False),
    }
    # torch's own setting does not reach numpy's and scipy's BLAS.
    with threadpool_limits(1):
        seconds = side_by_side.alternate(candidates, rounds=options.rounds)
        ours, other = frechet_distance(a, b), float(clean_fid(a.mean, a.cov, b.mean, b.cov))
    # Equal to clean-fid's, whose number papers report: a faster distance must be the same distance.
    error = abs(ours - other) / other
    case = f"Frechet distance, {options.dims:,} features"
    rows = [
        side_by_side.compared(
            f"{case}: t2i / clean-fid", seconds["t2i"], seconds["clean-fid"], target="<= 0.33"
        ),
        side_by_side.compared(f"{case}: t2i / torch-fidelity", seconds["t2i"], seconds["torch-fidelity"]),
        side_by_side.stated(f"{case}: relative difference to clean-fid", [error], target="<= 1e-06"),
    ]
    side_by_side.write(
        "scoring",
        rows,
        figures={"least seconds": {k: min(v) for k, v in seconds.items()}},
        is_kept=not options.quick,
    )


if __name__ == "__main__":
    main()
