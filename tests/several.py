"""Runs in several processes on the CPU: this file is what each of them runs, started by torchrun.

    torchrun --nproc-per-node 2 tests/several.py JOBS.json

JOBS.json is a list of runs, each the values of a recipe; they are trained one after another.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def train_all(jobs: Sequence[dict[str, Any]]) -> None:
    """Train each of `jobs` with SGD, so that gradients are compared, not their signs."""
    import pytest
    from torch.distributed.tensor import DTensor

    import anchorvec
    from anchorvec.training import stage_one
    from anchorvec.training.stage import Stage
    from interrupting import killed_after
    from support import recipe

    arguments, shard = Stage.arguments, stage_one.shard

    def asserted(objective: Any, model: Any, **options: Any) -> None:
        shard(objective, model, **options)
        assert all(isinstance(weight, DTensor) for weight in objective.parameters())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "arguments", lambda stage: arguments(stage) | {"optim": "sgd"})
        patch.setattr(stage_one, "shard", asserted)
        for job in jobs:
            steps = job.get("killed_after")
            with killed_after(steps) if steps else contextlib.nullcontext():
                anchorvec.train(recipe(job["values"]), resume=job.get("resume", False))


def environment() -> dict[str, str]:
    """That of a process of several."""
    paths = [str(Path(sys.modules["anchorvec"].__file__ or "").parents[1]), str(HERE)]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "ANCHORVEC_CACHE": ""}


def torchrun(processes: int, *command: str) -> "subprocess.CompletedProcess[str]":
    """The end of `command` in so many processes."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([*start, *command], env=environment(), capture_output=True, text=True, timeout=900)


def launched(launcher: str, processes: int, *command: str) -> "subprocess.CompletedProcess[str]":
    """The end of `command` in so many processes, by `torchrun` or `accelerate`."""
    if launcher == "torchrun":
        return torchrun(processes, *command)
    # as on several GPUs of one machine; on a CPU alone accelerate starts one process, whatever it is asked for
    options = ["--multi_gpu", "--num_processes", str(processes), "--num_machines", "1", "--main_process_port", "0"]
    start = [sys.executable, "-m", "accelerate.commands.launch", *options, "--mixed_precision", "no"]
    return subprocess.run([*start, *command], env=environment(), capture_output=True, text=True, timeout=900)


def in_processes(processes: int, jobs: Sequence[dict[str, Any]], folder: Path) -> None:
    """Train `jobs` in so many processes; what they need is written into `folder`."""
    file = folder / f"jobs-{processes}.json"
    file.write_text(json.dumps(jobs))
    done = torchrun(processes, str(HERE / "several.py"), str(file))
    assert done.returncode == 0, done.stderr[-6000:]


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    train_all(json.loads(Path(sys.argv[1]).read_text()))
