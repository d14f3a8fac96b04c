"""The part of `gpu.py` that trains a real base model for a minute, and writes vectors that `gpu_scores.py` scores."""

import argparse
import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anchorvec.evaluation.beir import document_text, load_beir
from anchorvec.model.encoding import encode_packed
from anchorvec.model.loading import load_encoder
from anchorvec.model.packing import reads_packed
from anchorvec.run import STAGES, Run

_LARGE_STEPS = [
    "model.max_tokens=256",
    "data.max_tokens=128",
    "stage_one.pairs_per_step=256",
    "stage_one.learning_rate=3e-4",
    "stage_one.log_every=10",
    "stage_two.pairs_per_step=512",
    "stage_two.learning_rate=2e-4",
    "stage_two.lora=null",
    "stage_two.in_batch_negatives=random",
    "stage_two.log_every=10",
]
"""Of the quickstart's recipe, for a GPU."""


def pipeline(chosen: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Words, then words beside the contrastive loss, on a real base for so many `seconds` of training; then vectors.

    Queries and documents of the score set are written as fp16 vectors, with their ids, to be scored elsewhere.
    """
    from anchorvec.pipeline import load_training_data
    from anchorvec.recipe import load_recipe
    from anchorvec.start import build_base
    from anchorvec.training.budget import Limit
    from anchorvec.training.stage import Stage
    from anchorvec.training.stage_one import train_stage_one
    from anchorvec.training.stage_two import train_stage_two

    output = chosen.results / "run"
    asked = load_recipe(
        "quickstart",
        [
            f"model.base={json.dumps(chosen.base)}",
            f"data.train={json.dumps([{'path': chosen.pairs, 'name': 'pairs'}])}",
            f"output={json.dumps(str(output))}",
            *_LARGE_STEPS,
        ],
    )
    inputs = load_training_data(asked)
    run = Run.create(output)
    stage = build_base(asked, run.base)
    found: dict[str, Any] = {}
    for name, share in zip(STAGES, (0.15, 0.85), strict=True):
        records: list[Mapping[str, Any]] = []
        train = train_stage_one if name == "stage_one" else train_stage_two
        start = time.monotonic()
        end = start + share * seconds
        stage = train(Stage(name, asked, run, stage, inputs, Limit(partial(float, end)), records.append))
        last = [record for record in records if "loss" in record][-1]
        found[name] = {key: last[key] for key in ("step", "loss", "tokens")} | {"seconds": time.monotonic() - start}
        encoder = load_encoder(stage, torch.bfloat16)
        found[name]["packs_after_training"] = reads_packed(encoder)
        data = load_beir(Path(chosen.score_set))
        start = time.monotonic()
        for side, texts in (
            ("queries", data.queries),
            ("corpus", {i: document_text(d) for i, d in data.corpus.items()}),
        ):
            vectors = encode_packed(encoder, list(texts.values()))
            np.save(chosen.results / f"{name}_{side}.npy", vectors.cpu().float().numpy().astype(np.float16))
            (chosen.results / f"{side}.json").write_text(json.dumps(list(texts)))
        found[name]["encoding_seconds"] = time.monotonic() - start
    return found
