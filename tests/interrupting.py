"""Runs that are interrupted, and how they are compared with one that was not."""

import contextlib
import json

import pytest
import torch
import transformers.trainer
from safetensors.torch import load_file
from transformers import TrainerCallback

import wiring

STEPS = 7
"""Of each stage; checkpoints after 2, 4 and 6, records of the log at 1, 3, 6 and 7."""


def values(folder):
    """Two data sets of which each step is a large part, words, similar pairs, LoRA with dropout; data in `folder`."""
    stages = {
        f"{stage}.{key}": value
        for stage in ("stage_one", "stage_two")
        for key, value in {"steps": STEPS, "pairs_per_step": 4, "log_every": 3, "save_steps": 2}.items()
    }
    return stages | {
        "data.train": wiring.sources(folder),
        "model.precision": "fp32",
        "stage_one.target": "bag_of_words",
        "stage_two.bag_of_words_weight": 0.3,
        "stage_two.in_batch_negatives": "similar",
        "stage_two.lora": {"r": 4, "alpha": 8, "dropout": 0.2},
    }


class Killed(BaseException):
    """What no code catches."""


@contextlib.contextmanager
def at_step(steps, act):
    """A context in which `act` is called after so many steps of all stages that are trained in it."""

    class Act(TrainerCallback):
        done = 0

        def on_step_end(self, *args, **kwargs):
            self.done += 1
            if self.done == steps:
                act()

    callback = Act()
    transformers.trainer.DEFAULT_CALLBACKS.insert(0, callback)
    try:
        yield
    finally:
        transformers.trainer.DEFAULT_CALLBACKS.remove(callback)


@contextlib.contextmanager
def killed_after(steps):
    """A context in which training ends after so many steps, as abruptly as an exception can."""

    def kill():
        raise Killed

    with at_step(steps, kill), pytest.raises(Killed):
        yield


def weights(folder):
    """All weights that a run has written."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    return {f"{file}: {name}": tensor for file in files for name, tensor in load_file(folder / file).items()}


def log(folder):
    """The records of a run, without what the clock decides."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")} for record in records]


def assert_same_run(found, expected):
    """All weights and records of two runs are the same, bit for bit, and no checkpoint is left."""
    found_weights, expected_weights = weights(found), weights(expected)
    assert found_weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        assert torch.equal(found_weights[name], tensor), name
    assert log(found) == log(expected)
    assert not (found / "checkpoints").exists()


BOTH_WAYS = {
    "model.base": "tiny",
    "model.max_tokens": 64,
    "model.attention_direction": "bidirectional",
    "model.pool_prompt": False,
    "model.end": "none",
    "data.train": [{"path": "builtin:debug", "instruction": "find:"}],
    "stage_one": None,
    "stage_two.steps": 4,
    "stage_two.warmup_steps": 0,
    "stage_two.pairs_per_step": 6,
    "stage_two.save_steps": 1,
    "stage_two.log_every": 1,
}
"""The recipe's values of a short Stage II that reads in both directions."""
