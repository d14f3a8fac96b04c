"""How often each test over seeds and items shows a difference: where there is none, and one of a known size.

    python benchmarks/seeds_and_items.py --runs 1000 --json figures.json

Scores are simulated: the difference of two systems is the sum of normal errors of a seed, of an item, and of both.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import bootstrap, ttest_1samp

from anchorvec.evaluation import difference_over_seeds
from anchorvec.evaluation.figures import mean_pair
from anchorvec.evaluation.statistics import NO_DIFFERENCE, difference
from anchorvec.files import write_json

DEVIATIONS = [
    (0.0, 0.2, 0.1),
    (0.0, 0.05, 0.3),
    (0.01, 0.2, 0.1),
    (0.03, 0.2, 0.1),
    (0.05, 0.1, 0.1),
    (0.2, 0.02, 0.02),
]
"""Of the errors of seeds, of items, and of a seed in an item."""


def seeds_and_items(differences: NDArray[np.float64]) -> bool:
    """Ours: `difference_over_seeds`. All take differences (seeds, items), and say whether one is shown."""
    zeros = dict.fromkeys(map(str, range(differences.shape[1])), 0.0)
    pairs = [[mean_pair(zeros, dict(zip(zeros, of_seed, strict=True)))] for of_seed in differences]
    return difference_over_seeds(pairs, resamples=500).verdict != NO_DIFFERENCE


def hierarchical_bootstrap(differences: NDArray[np.float64]) -> bool:
    """BCa of scipy, which draws seeds and items again."""
    seeds, items = differences.shape

    def mean(of_seeds: NDArray[np.intp], of_items: NDArray[np.intp], axis: int) -> NDArray[np.float64]:
        return differences[of_seeds[..., :, None], of_items[..., None, :]].mean(axis=(-2, -1))

    found = bootstrap(
        (np.arange(seeds), np.arange(items)), mean, vectorized=True, n_resamples=500, rng=np.random.default_rng(0)
    ).confidence_interval
    return not found.low <= 0 <= found.high


def items_alone(differences: NDArray[np.float64]) -> bool:
    """The permutation test over items, of their means over seeds."""
    zeros = dict.fromkeys(map(str, range(differences.shape[1])), 0.0)
    pair = mean_pair(zeros, dict(zip(zeros, differences.mean(axis=0), strict=True)))
    return difference([pair], resamples=500).verdict != NO_DIFFERENCE


def seeds_alone(differences: NDArray[np.float64]) -> bool:
    """Student's test of the seeds' means."""
    return bool(ttest_1samp(differences.mean(axis=1), 0).pvalue <= 0.05)


TESTS = [seeds_and_items, hierarchical_bootstrap, items_alone, seeds_alone]


def shares(seeds: int, items: int, deviations: tuple[float, float, float], mean: float, runs: int) -> dict[str, float]:
    """In which share of `runs` each test shows a difference whose true size is `mean`."""
    draw = np.random.default_rng(0)
    of_seed, of_item, of_both = deviations
    counts = dict.fromkeys((test.__name__ for test in TESTS), 0)
    for _ in range(runs):
        errors = draw.normal(0, of_seed, (seeds, 1)) + draw.normal(0, of_item, (1, items))
        differences = mean + errors + draw.normal(0, of_both, (seeds, items))
        for test in TESTS:
            counts[test.__name__] += test(differences)
    return {name: count / runs for name, count in counts.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, show, and write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--runs", type=int, default=1_000)
    options.add_argument("--seeds", type=int, nargs="+", default=[3, 5, 10])
    options.add_argument("--items", type=int, default=100)
    options.add_argument("--means", type=float, nargs="+", default=[0.0, 0.1], help="true differences")
    options.add_argument("--json", type=Path, metavar="FILE")
    chosen = options.parse_args(arguments)
    rows = [
        {"mean": mean, "seeds": seeds, "deviations": deviations}
        | shares(seeds, chosen.items, deviations, mean, chosen.runs)
        for mean in chosen.means
        for seeds in chosen.seeds
        for deviations in DEVIATIONS
    ]
    table = Table(*rows[0], title=f"differences shown, of {chosen.runs}; {chosen.items} items")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if chosen.json:
        write_json(chosen.json, {"settings": json.loads(json.dumps(vars(chosen), default=str)), "rows": rows})


if __name__ == "__main__":
    main()
