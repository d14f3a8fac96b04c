"""Variants of the quickstart's recipe, trained for a given time and compared with each other.

    python benchmarks/trial.py RESULTS ARM --minutes 28 --seed 0 [--stage-one-share 0.1] [--no-stage-one] [KEY=VALUE]
    python benchmarks/trial.py RESULTS ARM --seed 0 --data FOLDER... --sts FILE...    on other data too

An arm is a variant, under a name of your choice; a trial is one seed of it. It leaves the folder RESULTS/ARM-SEED, with
its figures in `trial.json`, and is not repeated. The tables compare it with all other trials there, and its arm with
other arms of as many minutes, over the seeds that both have.

A trial's model learns nothing of scipy and scikit-learn, on whose documentation it is scored: 1,500 queries over 1,500
documents. Nor of pandas and networkx, which the quickstart's score is for. The minutes are for training, the set-up of
the stages included. To try two arms at the same time, give each the same cores of its own:
`OMP_NUM_THREADS=1 taskset -c 0 python ...`.
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from anchorvec.commands.quickstart import contrastive_alone, with_pairs
from anchorvec.data.docstrings import quickstart_data
from anchorvec.device import resolve_precision
from anchorvec.evaluation import evaluate
from anchorvec.evaluation.beir import docstring_collection, write_beir
from anchorvec.evaluation.statistics import paired_difference, paired_difference_over_seeds, student_interval
from anchorvec.files import write_json
from anchorvec.model.loading import load_encoder
from anchorvec.pipeline import load_training_data, run_stages
from anchorvec.recipe import load_recipe
from anchorvec.recipe.settings import EvaluationSettings
from anchorvec.run import Run
from anchorvec.training.budget import EXPORT_SECONDS, STAGE_ONE_SHARE, Budget
from common import check_scored_elsewhere, describe_machine, score_more

SCORED = ("scipy", "sklearn")
LEFT_OUT = ("pandas", "networkx")
PAIRS = 1_500


def run(
    own: Sequence[str], *, minutes: float, stage_one_share: float, no_stage_one: bool, overrides: Sequence[str]
) -> None:
    """Train the recipe `quickstart` with `own` and other overrides by the clock, and write the figures."""
    recipe = load_recipe("quickstart", [*own, *overrides])
    recipe = contrastive_alone(recipe) if no_stage_one else recipe
    run = Run.create(recipe.output)
    data = quickstart_data(seed=0, held_out=SCORED, n_queries=PAIRS, n_documents=PAIRS)
    write_beir(docstring_collection(data), run.score_set)
    data = replace(data, train=[pair for pair in data.train if pair.package not in LEFT_OUT])
    recipe = with_pairs(recipe, data, run.pairs)
    unscored = recipe.model_copy(update={"evaluation": EvaluationSettings()})
    budget = Budget(minutes + EXPORT_SECONDS / 60, stage_one_share=stage_one_share)
    trained = run_stages(unscored, run, load_training_data(recipe), [], budget=budget)
    bf16 = resolve_precision(recipe.model.precision) == "bf16"
    model = load_encoder(run.newest(), torch.bfloat16 if bf16 else torch.float32)
    [scores] = evaluate(model, data=[run.score_set], cache=False).values()
    found = {
        "minutes": minutes,
        "stage_one_share": stage_one_share,
        "no_stage_one": no_stage_one,
        "overrides": list(overrides),
        "minutes_trained": trained.minutes,
        "seed": recipe.seed,
        "steps": trained.steps,
        "train_pairs": len(data.train),
        "fingerprint": data.fingerprint,
        "machine": describe_machine(recipe.model.precision),
        "ndcg_at_10": scores.metrics["ndcg_at_10"].mean,
        "per_query": scores.per_item["ndcg_at_10"],
        "scores": {},
        "spearman": {},
    }
    write_json(run.folder / "trial.json", found)


def same_data(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two trials learned from as many pairs, and were scored on the same."""
    return all(one[key] == other[key] for key in ("fingerprint", "train_pairs"))


def compare(found: Mapping[str, Mapping[str, Any]], name: str) -> Table:
    """All trials, the best last, and by how much each is above `name`, paired over queries, where both had the same."""
    table = Table("trial", "minutes", "steps", "nDCG@10", f"minus {name}", "machine")
    for other, figures in sorted(found.items(), key=lambda item: item[1]["ndcg_at_10"]):
        same = same_data(figures, found[name])
        machine = figures["machine"]
        table.add_row(
            other,
            f"{figures['minutes']:g}",
            " + ".join(map(str, figures["steps"].values())),
            f"{figures['ndcg_at_10']:.3f}",
            str(paired_difference(found[name]["per_query"], figures["per_query"])) if same else "other data",
            f"{machine['device']}, {machine['threads']} threads, {machine['precision']}",
        )
    return table


def compare_arms(found: Mapping[str, Mapping[str, Any]], arm: str, minutes: float) -> Table:
    """By how much each other arm is above `arm`, over the seeds that both have with these minutes and the same data."""
    arms: dict[str, dict[str, Mapping[str, Any]]] = {}
    for name, figures in found.items():
        if figures["minutes"] == minutes:
            other, _, seed = name.rpartition("-")
            arms.setdefault(other, {})[seed] = figures
    own = arms.pop(arm)
    table = Table("arm", "seeds", f"minus {arm}, over queries", "over seeds")
    for other, trials in sorted(arms.items()):
        both = sorted(seed for seed in trials.keys() & own.keys() if same_data(trials[seed], own[seed]))
        if both:
            scores = [(own[seed]["per_query"], trials[seed]["per_query"]) for seed in both]
            differences = [trials[seed]["ndcg_at_10"] - own[seed]["ndcg_at_10"] for seed in both]
            over_queries, over_seeds = paired_difference_over_seeds(scores), student_interval(differences)
            table.add_row(other, " ".join(both), str(over_queries), str(over_seeds))
    return table


def compare_on(data: str, found: Mapping[str, Mapping[str, Any]], name: str) -> Table:
    """The trials that were scored on this other test data, the best last, and by how much each is above `name`."""
    table = Table("trial", "nDCG@10", f"minus {name}", title=data)
    scores = {other: figures["scores"][data] for other, figures in found.items() if data in figures["scores"]}
    for other, per_query in sorted(scores.items(), key=lambda item: statistics.mean(item[1].values())):
        mean = statistics.mean(per_query.values())
        table.add_row(other, f"{mean:.3f}", str(paired_difference(scores[name], per_query)))
    return table


def correlations(found: Mapping[str, Mapping[str, Any]], files: Sequence[str]) -> Table:
    """Spearman's rank correlation of the trials on files of scored sentence pairs."""
    table = Table("trial", *files, title="Spearman")
    for other, figures in found.items():
        values = [figures["spearman"].get(file) for file in files]
        table.add_row(other, *("" if value is None else f"{value:.3f}" for value in values))
    return table


def check_same(figures: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError where a trial that is there was run with other options than those `given`."""
    for name, value in given.items():
        if value is not None and value != figures[name]:
            raise ValueError(f"this trial is there with {name} = {figures[name]}, not {value}; name another arm")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run and score what is missing of the trial, and show it beside the others."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("results", type=Path, metavar="RESULTS")
    options.add_argument("arm", metavar="ARM")
    options.add_argument("--minutes", type=float, help="for training (default: 28)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--stage-one-share", type=float, help=f"of the time (default: {STAGE_ONE_SHARE})")
    options.add_argument("--no-stage-one", action="store_true", default=None, help="contrastive learning alone")
    options.add_argument("--data", nargs="+", default=[], metavar="FOLDER", help="test collections in BEIR layout")
    options.add_argument("--sts", nargs="+", default=[], metavar="FILE", help="JSON Lines: sentence1, sentence2, score")
    options.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe `quickstart`")
    chosen = options.parse_intermixed_args(arguments)
    check_scored_elsewhere(chosen.data, chosen.sts)  # before an hour of training
    name = f"{chosen.arm}-{chosen.seed}"
    folder = chosen.results / name
    file = folder / "trial.json"
    given = {key: getattr(chosen, key) for key in ("minutes", "stage_one_share", "no_stage_one")}
    given["overrides"] = chosen.overrides or None
    if not file.exists():
        defaults = {"minutes": 28.0, "stage_one_share": STAGE_ONE_SHARE, "no_stage_one": False, "overrides": []}
        own = [f"output={json.dumps(str(folder))}", f"seed={chosen.seed}"]
        run(own, **defaults | {key: value for key, value in given.items() if value is not None})
    figures = json.loads(file.read_text(encoding="utf-8"))
    check_same(figures, given)
    last_stage = list(figures["steps"])[-1]
    dtype = torch.bfloat16 if figures["machine"]["precision"] == "bf16" else torch.float32
    score_more(figures, file, folder / last_stage, dtype, chosen.data, chosen.sts)
    files = chosen.results.glob("*/trial.json")
    found = {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in files}
    console = Console()
    console.print(compare(found, name))
    console.print(compare_arms(found, chosen.arm, figures["minutes"]))
    for data in figures["scores"]:
        console.print(compare_on(data, found, name))
    if figures["spearman"]:
        console.print(correlations(found, list(figures["spearman"])))


if __name__ == "__main__":
    main()
