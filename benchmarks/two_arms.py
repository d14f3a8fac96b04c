"""The quickstart with reconstruction against contrastive learning alone, at equal wall time, seed by seed.

    python benchmarks/two_arms.py RESULTS --minutes 20 --seeds 0 1 2
    python benchmarks/two_arms.py RESULTS --minutes 20 --seeds 0 1 2 --data FOLDER... --sts FILE...    on other data too

Each run is a process of its own and leaves its folder in RESULTS, with its figures in `two_arms.json`. Runs that have
this file are not repeated, so that a series may be interrupted; delete the folder of an unfinished one. Nothing else
should run on the machine. Both runs of a seed must have the same machine and the same data; seeds may differ in them.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from anchorvec.commands.quickstart import quickstart
from anchorvec.evaluation.statistics import (
    ItemScores,
    paired_difference,
    paired_difference_over_seeds,
    student_interval,
)
from anchorvec.files import write_json
from common import check_scored_elsewhere, in_process, score_more, survived

ARMS = {"contrastive": False, "reconstruction": True}
"""Whether an arm has Stage I, and words in Stage II."""

HELD_OUT = "held-out packages"


def run(folder: Path, minutes: float, seed: int, stage_one: bool, data: Sequence[str], sts: Sequence[str]) -> Any:
    """The figures of one arm and one seed, from its `two_arms.json`; what is missing there is made first.

    `conditions` are machine, versions and data; `ndcg_at_10` is that of each stage on the held-out packages; `scores`
    has nDCG@10 by data set and query; `spearman` is by file.
    """
    file = folder / "two_arms.json"
    if not file.exists():
        result = quickstart(folder, minutes=minutes, seed=seed, stage_one=stage_one)
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        conditions = {key: about[key] for key in ("device", "threads", "precision", "versions")}
        conditions |= {key: about["score_set"][key] for key in ("train_pairs", "fingerprint")}
        found = {
            "planned_minutes": minutes,
            "conditions": conditions,
            "minutes": result.minutes,
            "steps": result.steps,
            "ndcg_at_10": {name: scores.metrics["ndcg_at_10"].mean for name, scores in result.scores.items()},
            "scores": {HELD_OUT: result.scores["stage_two"].per_item["ndcg_at_10"]},
            "spearman": {},
        }
        write_json(file, found)
    found = read(file, minutes)
    score_more(found, file, folder / "model", torch.float32, data, sts)
    return found


def read(file: Path, minutes: float) -> dict[str, Any]:
    """The figures of a finished run. Raises ValueError if it was given another time."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if found["planned_minutes"] != minutes:
        raise ValueError(f"{file.parent} is a run of {found['planned_minutes']} minutes; name another folder")
    return found


def compare(arms: Mapping[int, Mapping[str, ItemScores]]) -> dict[str, Any]:
    """For one data set: each seed's paired difference over queries, their mean over queries and over seeds.

    Raises ValueError if the arms of a seed have different queries.
    """
    for seed, scores in arms.items():
        if scores["contrastive"].keys() != scores["reconstruction"].keys():
            raise ValueError(f"the arms of seed {seed} were scored on different queries; run both again")
    seeds = {seed: paired_difference(scores["contrastive"], scores["reconstruction"]) for seed, scores in arms.items()}
    return {
        "seeds": seeds,
        "over_queries": paired_difference_over_seeds(
            [(scores["contrastive"], scores["reconstruction"]) for scores in arms.values()]
        ),
        "over_seeds": student_interval([interval.mean for interval in seeds.values()]),
    }


def check_conditions(runs: Mapping[int, Mapping[str, Any]]) -> None:
    """Raise ValueError for a seed whose two runs differ in machine, versions or data."""
    for seed, of_seed in runs.items():
        contrastive, reconstruction = (of_seed[arm]["conditions"] for arm in ARMS)
        for key, value in contrastive.items():
            if reconstruction[key] != value:
                raise ValueError(
                    f"the arms of seed {seed} differ in {key}: {value} and {reconstruction[key]}; run both again"
                )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing of the series and show it."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("results", type=Path, metavar="RESULTS")
    options.add_argument("--minutes", type=float, default=20)
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--data", nargs="+", default=[], metavar="FOLDER", help="test collections in BEIR layout")
    options.add_argument("--sts", nargs="+", default=[], metavar="FILE", help="JSON Lines: sentence1, sentence2, score")
    chosen = options.parse_args(arguments)
    console = Console()
    check_scored_elsewhere(chosen.data, chosen.sts)  # before hours of training
    for file in chosen.results.glob("*/two_arms.json"):
        read(file, chosen.minutes)
    runs: dict[int, dict[str, Any]] = {seed: {} for seed in dict.fromkeys(chosen.seeds)}
    for seed, of_seed in runs.items():
        for arm in list(ARMS) if seed % 2 == 0 else list(ARMS)[::-1]:  # a machine's drift should fall on both
            folder = chosen.results / f"{arm}-{seed}"
            of_seed[arm] = in_process(run, folder, chosen.minutes, seed, ARMS[arm], chosen.data, chosen.sts)
            survived(of_seed[arm])
    check_conditions(runs)
    show(runs, console)


def shared(runs: Mapping[int, Mapping[str, Any]], key: str) -> list[str]:
    """The names of the test data that all runs have figures of."""
    return [
        name
        for name in next(iter(runs.values()))["contrastive"][key]
        if all(name in found[key] for of_seed in runs.values() for found in of_seed.values())
    ]


def show(runs: Mapping[int, Mapping[str, Any]], console: Console) -> None:
    """Tables of the runs, and of their comparison on each data set that all were scored on."""
    table = Table("seed", "arm", "steps", "minutes", "nDCG@10 by stage", "machine")
    for seed, of_seed in runs.items():
        for arm in ARMS:
            found = of_seed[arm]
            conditions = found["conditions"]
            table.add_row(
                str(seed),
                arm,
                " + ".join(map(str, found["steps"].values())),
                f"{found['minutes']:.1f}",
                ", ".join(f"{name} {value:.3f}" for name, value in found["ndcg_at_10"].items()),
                f"{conditions['device']}, {conditions['threads']} threads, {conditions['precision']}",
            )
    console.print(table)
    for name in shared(runs, "scores"):
        scores = {seed: {arm: of_seed[arm]["scores"][name] for arm in ARMS} for seed, of_seed in runs.items()}
        found = compare(scores)
        table = Table("seed", *ARMS, "difference", title=f"{name}, nDCG@10")
        for seed, difference in found["seeds"].items():
            means = [f"{statistics.mean(scores[seed][arm].values()):.3f}" for arm in ARMS]
            table.add_row(str(seed), *means, str(difference))
        table.add_row("all, over queries", "", "", str(found["over_queries"]))
        table.add_row("all, over seeds", "", "", str(found["over_seeds"]))
        console.print(table)
    for name in shared(runs, "spearman"):
        table = Table("seed", *ARMS, "difference", title=f"{name}, Spearman")
        differences = []
        for seed, of_seed in runs.items():
            contrastive, reconstruction = (of_seed[arm]["spearman"][name] for arm in ARMS)
            differences.append(reconstruction - contrastive)
            table.add_row(str(seed), f"{contrastive:.3f}", f"{reconstruction:.3f}", f"{differences[-1]:+.3f}")
        table.add_row("all, over seeds", "", "", str(student_interval(differences)))
        console.print(table)


if __name__ == "__main__":
    main()
