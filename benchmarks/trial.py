"""A variant of the quickstart's recipe, trained for a given time, against those that were tried before.

    python benchmarks/trial.py RESULTS NAME --minutes 28 --seed 0 [--stage-one-share 0.1] [--no-stage-one] [KEY=VALUE]

Its model learns nothing of scipy and scikit-learn, on whose documentation it is scored: 1,500 queries over 1,500
documents. Nor of pandas and networkx, which the quickstart's score is for. The minutes are those of training alone. A
run leaves its folder in RESULTS, with its figures in `trial.json`; the table compares it with all others there. To try
two variants at the same time, give each the same cores of its own: `OMP_NUM_THREADS=1 taskset -c 0 python ...`.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anchorvec.data.docstrings import quickstart_data, write_beir
from anchorvec.evaluation.bootstrap import paired_bootstrap
from anchorvec.files import write_json
from anchorvec.quickstarting import STAGE_ONE_SHARE, contrastive_alone, embedder_scores, steps_run, with_pairs
from anchorvec.recipe import Recipe, load_recipe, save_recipe
from anchorvec.stages import train_stage_one, train_stage_two
from anchorvec.training import build_base, new_run_folder
from common import describe_machine

SCORED = ("scipy", "sklearn")
LEFT_OUT = ("pandas", "networkx")
PAIRS = 1_500


def run(recipe: Recipe, minutes: float, stage_one_share: float) -> dict[str, Any]:
    """Train the stages of `recipe` by the clock and score the result; the figures are also written to its folder."""
    folder = new_run_folder(recipe)
    data = quickstart_data(seed=0, held_out=SCORED, n_queries=PAIRS, n_documents=PAIRS)
    write_beir(data, folder / "score_set")
    data = replace(data, train=[pair for pair in data.train if pair.package not in LEFT_OUT])
    recipe, pairs = with_pairs(recipe, data, folder / "pairs.jsonl")
    save_recipe(recipe, folder / "recipe.yaml")
    stage = build_base(recipe, folder / "base")
    began = time.monotonic()
    share = 1.0 if recipe.stage_two is None else stage_one_share
    if recipe.stage_one is not None:
        deadline = began + 60 * minutes * share
        stage = train_stage_one(recipe, stage, folder / "stage_one", pairs, deadline=deadline)
    if recipe.stage_two is not None:
        stage = train_stage_two(recipe, stage, folder / "stage_two", pairs, deadline=began + 60 * minutes)
    trained = (time.monotonic() - began) / 60
    scores = embedder_scores(recipe, stage, folder / "score_set")
    found = {
        "minutes": minutes,
        "minutes_trained": trained,
        "seed": recipe.seed,
        "steps": steps_run(folder / "log.jsonl"),
        "train_pairs": len(data.train),
        "fingerprint": data.fingerprint,
        "machine": describe_machine(recipe.model.precision),
        "ndcg_at_10": scores.metrics["ndcg_at_10"].mean,
        "per_query": scores.per_query,
    }
    write_json(folder / "trial.json", found)
    return found


def compare(found: Mapping[str, Mapping[str, Any]], name: str) -> Table:
    """All trials, the best last, and by how much each is above `name`, paired over queries, where both had the same."""
    table = Table("trial", "minutes", "seed", "steps", "nDCG@10", f"minus {name}", "machine")
    for other, figures in sorted(found.items(), key=lambda item: item[1]["ndcg_at_10"]):
        same = figures["fingerprint"] == found[name]["fingerprint"]
        machine = figures["machine"]
        table.add_row(
            other,
            f"{figures['minutes']:g}",
            str(figures["seed"]),
            " + ".join(map(str, figures["steps"].values())),
            f"{figures['ndcg_at_10']:.3f}",
            str(paired_bootstrap(found[name]["per_query"], figures["per_query"])) if same else "other test data",
            f"{machine['device']}, {machine['threads']} threads, {machine['precision']}",
        )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the trial if it is not there yet, and show it beside the others."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("results", type=Path, metavar="RESULTS")
    options.add_argument("name", metavar="NAME")
    options.add_argument("--minutes", type=float, default=28)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--stage-one-share", type=float, default=STAGE_ONE_SHARE)
    options.add_argument("--no-stage-one", action="store_true")
    options.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe `quickstart`")
    chosen = options.parse_intermixed_args(arguments)
    folder = chosen.results / chosen.name
    if not (folder / "trial.json").exists():
        own = [f"output={json.dumps(str(folder))}", f"seed={chosen.seed}"]
        recipe = load_recipe("quickstart", [*own, *chosen.overrides])
        run(contrastive_alone(recipe) if chosen.no_stage_one else recipe, chosen.minutes, chosen.stage_one_share)
    files = chosen.results.glob("*/trial.json")
    found = {file.parent.name: json.loads(file.read_text(encoding="utf-8")) for file in files}
    Console().print(compare(found, chosen.name))


if __name__ == "__main__":
    main()
