"""Training goes the way it went at b98c275, whose losses are stored in trajectory.json.

They are written again with `python benchmarks/trajectory.py --store tests/trajectory.json`, which runs that commit.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from anchorvec import load_recipe, train

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from trajectory import CASES, RENAMED, given_rows, losses, overrides

STORED = json.loads((Path(__file__).parent / "trajectory.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_those_that_are_stored(tmp_path, case):
    """Five steps of both stages on the same rows, to 1e-4: another processor rounds differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with given_rows():
            train(load_recipe("debug", overrides(case, "tiny", tmp_path, RENAMED)))
    finally:
        torch.set_num_threads(threads)
    found = losses(tmp_path / "run")
    assert {stage: len(values) for stage, values in found.items()} == {"stage_one": 5, "stage_two": 5}
    for stage, values in STORED[case].items():
        assert found[stage] == pytest.approx(values, rel=1e-4), stage
