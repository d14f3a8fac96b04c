"""What both stages of a run have in common: from an embedder folder to a trained one."""

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from anchorvec.data.stage_inputs import StageInputs
from anchorvec.device import check_one_device, default_device, resolve_precision
from anchorvec.errors import AnchorvecError
from anchorvec.recipe import Recipe, StageOne, StageTwo
from anchorvec.run import STAGE_TITLES, Run, StageName
from anchorvec.terminal import say
from anchorvec.training.engine import Engine, compiling_pays
from anchorvec.training.memory import free_memory, keep_freed_memory
from anchorvec.training.progress import OnLog, StageProgress
from anchorvec.training.trainers import TimedTrainer

PROBE_TOKENS = 64
"""Tokens of each part of the texts from which the memory of a token is estimated, if the limit is not lower."""

_NO_LIMIT = 10_000_000
"""Steps of a stage that ends at a time, where the trainer wants a number."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its `recipe`, the embedder folder `start`, and what it reads.

    With a `deadline`, which gives a `time.monotonic()` and may move, it lasts until then, however many steps that are:
    the recipe's `steps` say only which share of the time its warm-up has. `on_log` is called with every record of its
    log.
    """

    name: StageName
    recipe: Recipe
    run: Run
    start: Path
    inputs: StageInputs
    deadline: Callable[[], float] | None = None
    on_log: OnLog | None = None

    @property
    def one(self) -> StageOne:
        """The settings of Stage I, which this is."""
        assert self.recipe.stage_one is not None
        return self.recipe.stage_one

    @property
    def two(self) -> StageTwo:
        """The settings of Stage II, which this is."""
        assert self.recipe.stage_two is not None
        return self.recipe.stage_two

    @property
    def settings(self) -> StageOne | StageTwo:
        """The settings of this stage."""
        return self.one if self.name == "stage_one" else self.two

    @property
    def bf16(self) -> bool:
        """Whether it computes in bf16, over fp32 weights."""
        return resolve_precision(self.recipe.model.precision) == "bf16"

    @property
    def part_tokens(self) -> int:
        """Tokens of each part of the texts from which the memory of a token is estimated."""
        return min(PROBE_TOKENS, self.recipe.training_tokens // 3)

    @property
    def long_enough(self) -> bool:
        """Whether compiling the decoder layers pays."""
        seconds = None if self.deadline is None else self.deadline() - time.monotonic()
        return compiling_pays(self.settings.steps * self.settings.pairs_per_step, seconds)

    def progress(self) -> StageProgress:
        """Its bar and log."""
        return StageProgress(self.name, self.run.log, deadline=self.deadline, on_log=self.on_log)

    def note(self, engine: Engine) -> None:
        """Write `engine` into the run's record; say which slower ways it takes, warn where the memory may not do."""
        self.run.note("engine", {self.name: asdict(engine)})
        for line in engine.slower:
            say(f"{STAGE_TITLES[self.name]}: {line}")
        if not engine.fits:
            warnings.warn(
                f"{self.name} may run out of memory, {free_memory(default_device()) / 1e9:.1f} GB are free: lower "
                f"data.max_tokens, and {self.name}.micro_batch_tokens if it is set",
                stacklevel=2,
            )

    def arguments(self) -> dict[str, Any]:
        """The trainer's arguments that both stages share."""
        check_one_device()
        settings, device = self.settings, default_device()
        # On a GPU the texts of the next steps are tokenized while it works; a CPU has no core left for that.
        workers = min(4, (os.cpu_count() or 1) - 1) if device.type == "cuda" else 0
        endless = 1 if self.deadline is None else max(1, _NO_LIMIT // settings.steps)
        return {
            "output_dir": str(self.run.folder),  # nothing is written there: a stage that fails leaves no folder
            "max_steps": endless * settings.steps,
            "per_device_train_batch_size": settings.pairs_per_step,
            "learning_rate": settings.learning_rate,
            "warmup_steps": endless * settings.warmup_steps,
            "lr_scheduler_type": "constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
            "weight_decay": settings.weight_decay,
            "max_grad_norm": settings.max_grad_norm,
            "bf16": self.bf16,
            "use_cpu": device.type == "cpu",
            "logging_steps": settings.log_every,
            "logging_first_step": True,
            "logging_nan_inf_filter": False,  # StageProgress stops there
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "dataloader_drop_last": True,
            "dataloader_num_workers": workers,
            "dataloader_persistent_workers": workers > 0,
            "remove_unused_columns": False,
            "seed": self.recipe.seed,
        }


def run_trainer(trainer: TimedTrainer, progress: StageProgress) -> None:
    """Train to the last step, or to the deadline of `progress`; either way to the end of the schedule (T13).

    Raises AnchorvecError where `trainer` ends before that.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.deadline = progress.deadline
    keep_freed_memory()
    with progress:
        trainer.train()
    done, planned = trainer.state.global_step, trainer.args.max_steps
    if done < planned and not progress.out_of_time:
        raise AnchorvecError(
            f"{progress.stage}.pairs_per_step: training ended too early, after {done} steps, because the data repeat "
            "texts too often for so many different pairs in a step; lower it, or remove repeated texts"
        )
