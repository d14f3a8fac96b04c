"""`kill -9` at any moment: the run goes on, and ends as the one that nothing interrupted, bit for bit."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anchorvec.recipe import save_recipe
from anchorvec.run import Run
from interrupting import assert_same_run
from support import recipe

KILLS, IN_A_CHECKPOINT = 20, 6


@pytest.mark.slow
def test_twenty_kills_change_nothing(interrupted_values, uninterrupted, tmp_path):
    """At random moments and in the midst of checkpoints, of both stages; a run that got to its end is begun anew."""
    draw = random.Random(0)
    when = ["write"] * IN_A_CHECKPOINT + [f"{draw.uniform(0.1, 4):.2f}" for _ in range(KILLS - IN_A_CHECKPOINT)]
    draw.shuffle(when)
    runs, half_written, stages = [], 0, set()

    def child(moment):
        folder = tmp_path / f"run{len(runs)}"
        save_recipe(recipe({**interrupted_values, "output": str(folder)}), tmp_path / "asked.yaml")
        command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(tmp_path / "asked.yaml"), moment]
        code = subprocess.run(command, check=False, capture_output=True, env=os.environ).returncode
        assert code in (0, -signal.SIGKILL), moment
        if code == 0:
            runs.append(folder)
        return code, folder

    while when:
        code, folder = child(when[-1])
        if code:
            when.pop()
            found = {path.parent for path in Run(folder).folder.glob("checkpoints/*/checkpoint-*")}
            stages |= {path.name for path in found}
            half_written += any(
                not (path / "manifest.json").exists() for path in folder.glob("checkpoints/*/checkpoint-*")
            )
    while child("1000")[0] != 0:
        pass
    assert half_written >= IN_A_CHECKPOINT
    assert stages == {"stage_one", "stage_two"}
    for folder in runs:
        assert_same_run(folder, uninterrupted)
