"""Comparisons as files: what `anchorvec compare` leaves, with figures that are drawn, for the tests of the report."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from anchorvec.recipe import load_recipe
from anchorvec.recipe.yaml12 import dump

KINDS = {
    "scifact": ("Retrieval", "ndcg_at_10"),
    "cranfield": ("Retrieval", "ndcg_at_10"),
    "stsbenchmark": ("STS", "cosine_spearman"),
    "banking": ("Classification", "accuracy"),
}
"""Test set -> its kind and metric."""

ITEMS = 20
"""Of each test set."""


def write_comparison(
    folder: Path,
    arms: Sequence[str] = ("e5", "echo", "anchor"),
    *,
    seeds: int = 3,
    failing: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write a comparison of `arms` into `folder` and give back its file's content; `failing` arms have a reason."""
    draw = random.Random(len(arms))
    content: dict[str, Any] = {
        "recipe": "quickstart",
        "budget": {"kind": "tokens", "amount": 300_000},
        "seeds": list(range(seeds)),
        "control": arms[0],
        "arms": {},
        "differences": [],
    }
    for i, arm in enumerate(arms):
        failed = (failing or {}).get(arm)
        entries = []
        for seed in range(seeds):
            if failed and seed == seeds - 1:
                entries.append({"seed": seed, "failed": failed})
            else:
                entries.append(_run(folder, f"{i}/{seed}", seed, better=0.02 * i, stage_one=i % 3 == 2, draw=draw))
        content["arms"][arm] = {
            "differences": {} if i % 3 == 2 else {"stage_one": None},
            "learning_rate": {"stage_two": 2e-4},
            "tries": [{"learning_rate": rate, "score": 0.3 + rate, "tokens": 30_000} for rate in (1e-4, 2e-4, 4e-4)],
            "runs": entries,
        }
    for i, arm in enumerate(arms[1:], start=1):
        content["differences"] += [
            _difference(arm, kind, i, draw) for kind in ("all", "Retrieval", "STS", "Classification")
        ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(content))
    return content


def _difference(arm: str, kind: str, place: int, draw: random.Random) -> dict[str, Any]:
    mean, reach = 0.012 * place - 0.02 + draw.gauss(0, 0.004), 0.017 + 0.005 * draw.random()
    verdict = "higher" if mean > reach else "lower" if mean < -reach else "no difference shown"
    p_value = min(1.0, math.erfc(abs(mean) / reach * 1.96 / math.sqrt(2)))
    ends = {"mean": mean, "low": mean - reach, "high": mean + reach}
    return {
        "arm": arm, "kind": kind, **ends, "p_value": p_value, "p_holm": min(1.0, 2 * p_value), "method": "Student",
        "verdict": verdict, "detectable": 1.4 * reach,
    }  # fmt: skip


def _scores(better: float, draw: random.Random) -> dict[str, Any]:
    found = {}
    for task, (kind, metric) in KINDS.items():
        items = {f"{task}{i}": 0.45 + better + draw.gauss(0, 0.1) for i in range(ITEMS)}
        value = fmean(items.values())
        per_item: dict[str, dict[str, float]] = {metric: items}
        if kind == "STS":
            per_item = {"similarity": items, "score": {item: float(i) for i, item in enumerate(items)}}
        found[task] = {
            "kind": kind, "main_score": round(value, 5), metric: value,
            f"{metric}_interval": [value - 0.031, value + 0.029], f"{metric}_method": "BCa", "items": ITEMS,
            "seed": 0, "fingerprint": task, "device": "cpu", "dtype": "float32", "seconds": 1.0, "per_item": per_item,
        }  # fmt: skip
    return found


def _run(
    comparison: Path, name: str, seed: int, *, better: float, stage_one: bool, draw: random.Random
) -> dict[str, Any]:
    """Write a run's folder and give back what the comparison's file says of it."""
    folder = comparison / name
    folder.mkdir(parents=True)
    log, tokens = _log(stage_one, draw)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
    recipe = load_recipe("debug", [f"seed={seed}", *([] if stage_one else ["stage_one=null"])])
    (folder / "recipe.yaml").write_text(dump(recipe.model_dump(mode="json")))
    engine = {"micro_batch_tokens": 1536, "bytes_per_token": 410_000}
    record = {
        "versions": {"python": "3.11.7", "anchorvec": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "device": "AMD EPYC", "threads": 2, "precision": "bf16", "seed": seed,
        "data": {"nq": {"path": "nq.jsonl", "read": 1010, "rows": 1000, "rejected": {"empty": 10}, "mended": {},
                        "examples": [], "dropped_negatives": 2, "ignored_columns": []}},
        "engine": dict.fromkeys(tokens, engine),
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))
    scores = _scores(better, draw)
    by_system = {"untrained": _scores(-0.2, random.Random(0)), "stage_two": scores}
    (folder / "scores.json").write_text(json.dumps(by_system))
    curve = [
        {"stage": "stage_two", "step": step,
         "scores": {task: 0.45 + better - 0.3 * math.exp(-step / (20 if stage_one else 45)) for task in KINDS}}
        for step in range(0, 126, 25)
    ]  # fmt: skip
    steps = {stage: max(record["step"] for record in log if record["stage"] == stage) for stage in tokens}
    return {
        "seed": seed, "folder": name, "tokens": tokens, "steps": steps, "minutes": 9.5 + draw.random(),
        "rows_hash": f"hash{seed}", "scores": scores, "curve": curve,
    }  # fmt: skip


def _log(stage_one: bool, draw: random.Random) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The records of a log, and the tokens of each stage."""
    records, tokens = [], {}
    if stage_one:
        for step in range(1, 41):
            loss = 3 + 2 * math.exp(-step / 12) + draw.gauss(0, 0.05)
            gap = 0.8 * (1 - math.exp(-step / 15))
            records.append({
                "stage": "stage_one", "step": step, "loss": loss, "query_to_document": loss + 0.3,
                "document_to_query": loss - 0.1, "exchange_query_to_document": gap,
                "exchange_document_to_query": 1.4 * gap, "tokens": 1500 * step, "tokens_per_second": 480.0,
                "seconds": 1500 * step / 480,
            })  # fmt: skip
        tokens["stage_one"] = 60_000
    total = 240_000 if stage_one else 300_000
    for step in range(1, 201):
        loss = (0.4 if stage_one else 0.7) + 2 * math.exp(-step / (10 if stage_one else 40)) + abs(draw.gauss(0, 0.05))
        records.append({
            "stage": "stage_two", "step": step, "loss": loss, "learning_rate": 1e-4, "tokens": total * step // 200,
            "tokens_per_second": 520.0, "seconds": total * step / 200 / 520,
        })  # fmt: skip
    tokens["stage_two"] = total
    return records, tokens
