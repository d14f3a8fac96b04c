"""The quickstart with reconstruction against contrastive learning alone, at equal wall time, seed by seed.

    python benchmarks/two_arms.py RESULTS --minutes 20 --seeds 0 1 2
    python benchmarks/two_arms.py RESULTS --minutes 20 --seeds 0 1 2 --data FOLDER...    and on data in BEIR layout

Each run is a process of its own and leaves its folder in RESULTS. Finished runs are not repeated, so that a series may
be interrupted; delete the folder of an unfinished one. Nothing else should run on the machine.
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from anchorvec.evaluation import evaluate
from anchorvec.evaluation.bootstrap import Interval, paired_bootstrap
from anchorvec.files import write_json
from anchorvec.loading import load_encoder
from anchorvec.quickstarting import quickstart
from common import in_process, survived

ARMS = {"contrastive": False, "reconstruction": True}
"""Whether an arm has Stage I, and words in Stage II."""

Scores = Mapping[str, float]
"""Query id -> nDCG@10."""


def run(folder: Path, minutes: float, seed: int, stage_one: bool, data: Sequence[str]) -> dict[str, Any]:
    """What one arm made of one seed: its `machine`, `minutes`, `steps`, `ndcg_at_10` by stage, `scores` by data set."""
    file = folder / "two_arms.json"
    if not file.exists():
        result = quickstart(folder, minutes=minutes, seed=seed, stage_one=stage_one)
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        write_json(
            file,
            {
                "planned_minutes": minutes,
                "machine": f"{about['device']}, {about['threads']} threads, {about['precision']}",
                "minutes": result.minutes,
                "steps": result.steps,
                "ndcg_at_10": {name: scores.metrics["ndcg_at_10"].mean for name, scores in result.scores.items()},
                "scores": {"held-out packages": result.scores["stage_two"].per_query},
            },
        )
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if found["planned_minutes"] != minutes:
        raise ValueError(f"{folder} is a run of {found['planned_minutes']} minutes; name another folder for RESULTS")
    if new := [name for name in data if name not in found["scores"]]:
        model = load_encoder(folder / "model", torch.float32)
        for name in new:
            [scores] = evaluate(model, data=[name], show_progress_bar=True).values()
            found["scores"][name] = scores.per_query
            write_json(file, found)
    return found


def over_seeds(differences: Sequence[float]) -> Interval:
    """The mean of one difference a seed, with its 95% interval by Student's t; without bounds for a single seed."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return Interval(mean, -math.inf, math.inf)
    n = len(differences)
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def compare(arms: Mapping[int, Mapping[str, Scores]]) -> dict[str, Any]:
    """For one data set: each seed's paired difference over queries, their mean over queries and over seeds."""
    for seed, scores in arms.items():
        if scores["contrastive"].keys() != scores["reconstruction"].keys():
            raise ValueError(f"the arms of seed {seed} were scored on different queries; run both again")
    pooled = [
        {f"{seed}/{query}": value for seed, scores in arms.items() for query, value in scores[arm].items()}
        for arm in ARMS
    ]
    seeds = {seed: paired_bootstrap(scores["contrastive"], scores["reconstruction"]) for seed, scores in arms.items()}
    return {
        "seeds": seeds,
        "over_queries": paired_bootstrap(*pooled),
        "over_seeds": over_seeds([interval.mean for interval in seeds.values()]),
    }


def main() -> None:
    """Run what is missing of the series and show it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("results", type=Path, metavar="RESULTS")
    options.add_argument("--minutes", type=float, default=20)
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--data", nargs="+", default=[], metavar="FOLDER")
    chosen = options.parse_args()
    console = Console()
    runs: dict[int, dict[str, Any]] = {seed: {} for seed in dict.fromkeys(chosen.seeds)}
    for seed, of_seed in runs.items():
        for arm, stage_one in ARMS.items():
            folder = chosen.results / f"{arm}-{seed}"
            of_seed[arm] = in_process(run, folder, chosen.minutes, seed, stage_one, chosen.data)
            survived(of_seed[arm])
            console.print(f"{folder}: {of_seed[arm]['steps']}, {of_seed[arm]['minutes']:.1f} minutes", highlight=False)
    console.print("; ".join(sorted({of_arm["machine"] for of_seed in runs.values() for of_arm in of_seed.values()})))
    for name in ["held-out packages", *chosen.data]:
        scores = {seed: {arm: of_seed[arm]["scores"][name] for arm in ARMS} for seed, of_seed in runs.items()}
        found = compare(scores)
        table = Table("seed", *ARMS, "difference", title=f"{name}, nDCG@10")
        for seed, difference in found["seeds"].items():
            means = [f"{statistics.mean(scores[seed][arm].values()):.3f}" for arm in ARMS]
            table.add_row(str(seed), *means, str(difference))
        table.add_row("all, over queries", "", "", str(found["over_queries"]))
        table.add_row("all, over seeds", "", "", str(found["over_seeds"]))
        console.print(table)


if __name__ == "__main__":
    main()
