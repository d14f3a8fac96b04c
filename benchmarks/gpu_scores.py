"""nDCG@10 of the vectors that `gpu.py` brought back, by exact search, after each stage; on any machine.

python benchmarks/gpu_scores.py RESULTS --score-set FOLDER
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import pytrec_eval
import torch
from rich.console import Console
from torch.nn.functional import normalize

from anchorvec.evaluation.beir import BeirData, load_beir
from anchorvec.run import STAGES


def ndcg_at_10(results: Path, stage: str, data: BeirData) -> float:
    """The mean over the queries of `data`; one that stands in the corpus itself is left out of its own ranking."""
    ids, vectors = {}, {}
    for side in ("queries", "corpus"):
        ids[side] = json.loads((results / f"{side}.json").read_text(encoding="utf-8"))
        rows = torch.from_numpy(np.load(results / f"{stage}_{side}.npy")).float()
        if len(rows) != len(ids[side]):
            raise SystemExit(f"{results}: {len(rows)} vectors of {len(ids[side])} {side}; copy the folder again")
        vectors[side] = normalize(rows, dim=1)
    found = {}
    for query, vector in zip(ids["queries"], vectors["queries"], strict=True):
        top = (vectors["corpus"] @ vector).topk(min(11, len(ids["corpus"])))
        ranked = {ids["corpus"][i]: score for score, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)}
        if query in data.own_documents:
            ranked.pop(query, None)
        found[query] = ranked
    qrels = {query: dict(grades) for query, grades in data.qrels.items()}
    scores = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(found)
    return statistics.mean(score["ndcg_cut_10"] for score in scores.values())


def main() -> None:
    """Print the score after each stage, and add it to the results."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("results", type=Path)
    options.add_argument("--score-set", required=True, help="a folder in BEIR layout, the one that was encoded")
    chosen = options.parse_args()
    data = load_beir(chosen.score_set)
    for stage in STAGES:
        if not (chosen.results / f"{stage}_corpus.npy").exists():
            Console().print(f"{stage}: no vectors", highlight=False)
            continue
        score = ndcg_at_10(chosen.results, stage, data)
        line = json.dumps({"part": "score", "stage": stage, "score_set": data.name, "ndcg_at_10": score})
        with (chosen.results / "gpu.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        Console().print(line, soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    main()
