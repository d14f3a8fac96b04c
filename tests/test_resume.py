"""A run that was killed goes on as if it had not been: same weights, same losses, same rows, bit for bit."""

import contextlib
import json

import pytest
import torch
import transformers.trainer
from safetensors.torch import load_file
from transformers import TrainerCallback

import anchorvec
import wiring
from support import recipe

STEPS = 7
"""Of each stage; checkpoints after 2, 4 and 6."""


class Killed(BaseException):
    """What no code catches."""


@contextlib.contextmanager
def killed_after(steps):
    """A context in which training ends after so many steps of both stages, as abruptly as an exception can."""

    class Kill(TrainerCallback):
        done = 0

        def on_step_end(self, *args, **kwargs):
            self.done += 1
            if self.done == steps:
                raise Killed

    kill = Kill()
    transformers.trainer.DEFAULT_CALLBACKS.append(kill)
    try:
        with pytest.raises(Killed):
            yield
    finally:
        transformers.trainer.DEFAULT_CALLBACKS.remove(kill)


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """Two data sets of which each step is a large part, words, similar pairs, LoRA with dropout."""
    stages = {
        f"{stage}.{key}": value
        for stage in ("stage_one", "stage_two")
        for key, value in {"steps": STEPS, "pairs_per_step": 4, "log_every": 3, "save_steps": 2}.items()
    }
    return stages | {
        "data.train": wiring.sources(tmp_path_factory.mktemp("data")),
        "model.precision": "fp32",
        "stage_one.target": "bag_of_words",
        "stage_two.bag_of_words_weight": 0.3,
        "stage_two.in_batch_negatives": "similar",
        "stage_two.lora": {"r": 4, "alpha": 8, "dropout": 0.2},
    }


@pytest.fixture(scope="module")
def uninterrupted(values, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    anchorvec.train(recipe({**values, "output": str(folder)}))
    return folder


def weights(folder):
    """All weights that a run has written."""
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    return {f"{file}: {name}": tensor for file in files for name, tensor in load_file(folder / file).items()}


def log(folder):
    """The records of a run, without what the clock decides."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in ("seconds", "tokens_per_second")} for record in records]


def assert_same_run(found, expected):
    """All weights and records of two runs are the same, bit for bit."""
    found_weights, expected_weights = weights(found), weights(expected)
    assert found_weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        assert torch.equal(found_weights[name], tensor), name
    assert log(found) == log(expected)
    assert not (found / "checkpoints").exists()


@pytest.mark.parametrize(
    "steps",
    [1, 6, STEPS + 1, STEPS + 5],
    ids=["before a checkpoint", "in Stage I", "at the start of Stage II", "in Stage II"],
)
def test_a_killed_run_goes_on_bit_for_bit(values, uninterrupted, tmp_path, steps):
    """Wherever it was, whatever the random states are then, and in the middle between two lines of the log."""
    asked = recipe({**values, "output": str(tmp_path / "run")})
    with killed_after(steps):
        anchorvec.train(asked)
    torch.manual_seed(steps)
    anchorvec.train(asked, resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)
