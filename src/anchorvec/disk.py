"""Whether the disk has room for a run, which is known before anything is trained."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from anchorvec.errors import AnchorvecError
from anchorvec.recipe import Recipe, StageOne, StageTwo
from anchorvec.run import Run, StageName, is_embedder
from anchorvec.training.checkpoints import CHECKPOINT_BYTES, WEIGHT_BYTES, most_at_once
from anchorvec.training.scoring import models_at_once


def check_disk(recipe: Recipe, run: Run, *, timed: bool) -> None:
    """Raise AnchorvecError where the disk of `run`, whose base is there, has too little room for the rest of `recipe`.

    Stages that are finished need none any more. `timed`: they end by a time, after any number of steps.
    """
    needed, at_once = _needed(recipe, run, timed)
    free = shutil.disk_usage(run.folder).free
    if at_once > free:
        parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in needed.items())
        raise AnchorvecError(
            f"output: {run.folder} is on a disk with {_gigabytes(free)} GB free, and the run needs "
            f"{_gigabytes(at_once)} GB at once ({parts}); make room, name a folder on another disk, or lower "
            "save_total_limit of a stage"
        )


def _needed(recipe: Recipe, run: Run, timed: bool) -> tuple[dict[str, int], int]:
    """Bytes of what is not written yet, and the most of it that is there at one time.

    The checkpoints of a stage are removed when its folder is whole.
    """
    shapes = dict(_shapes(run.base))
    parameters = sum(map(math.prod, shapes.values()))
    needed: dict[str, int] = {}
    kept = at_once = 0
    for name in recipe.stages:
        if is_embedder(run.stage(name)):
            continue
        settings: StageOne | StageTwo = getattr(recipe, name)
        trained = parameters
        if isinstance(settings, StageTwo) and settings.lora is not None:
            trained = sum(settings.lora.r * sum(shape) for shape in shapes.values() if len(shape) == 2)
        needed[f"checkpoints of {name}"] = most_at_once(settings, timed=timed) * CHECKPOINT_BYTES * trained - _written(
            run, name
        )
        needed[name] = WEIGHT_BYTES * trained
        on_the_way = models_at_once(recipe, name) * WEIGHT_BYTES * trained
        if on_the_way:
            needed[f"scored models of {name}"] = on_the_way
        at_once = max(at_once, kept + needed[f"checkpoints of {name}"] + on_the_way + needed[name])
        kept += needed[name]
        if recipe.evaluation.keep_best and name == recipe.stages[-1]:
            kept += WEIGHT_BYTES * trained
    if not run.model.is_dir():
        needed["export"] = WEIGHT_BYTES * parameters
        at_once = max(at_once, kept + needed["export"])
    return needed, at_once


def _shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """The names and shapes of the weights in `folder`."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no mapping
                yield name, weights.get_slice(name).get_shape()


def _written(run: Run, name: StageName) -> int:
    """Bytes of the checkpoints of a stage that are there."""
    return sum(path.stat().st_size for path in run.checkpoints(name).rglob("*") if path.is_file())


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g}"
