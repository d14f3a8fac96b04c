"""What both stages of a run have in common: from an embedder folder to a trained one."""

import json
import os
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PrinterCallback, set_seed

from anchorvec.data.stage_inputs import StageInputs, rows_with_places
from anchorvec.device import default_device, resolve_precision
from anchorvec.errors import AnchorvecError
from anchorvec.files import write_json, write_json_lines
from anchorvec.interrupts import Interrupts
from anchorvec.processes import PATIENCE
from anchorvec.ranks import rank, ranks, ranks_here
from anchorvec.recipe import Recipe, StageOne, StageTwo
from anchorvec.run import STAGE_TITLES, Run, StageName
from anchorvec.terminal import say
from anchorvec.training.budget import Limit
from anchorvec.training.checkpoints import Checkpoints, step_of
from anchorvec.training.engine import Engine, compiling_pays
from anchorvec.training.memory import free_memory, keep_freed_memory
from anchorvec.training.progress import OnLog, StageProgress
from anchorvec.training.scoring import ScoresOnTheWay, Scoring
from anchorvec.training.trackers import end_trackers, place_trackers
from anchorvec.training.trainers import TimedTrainer

PROBE_TOKENS = 64
"""Tokens of each part of the texts from which the memory of a token is estimated, if the limit is not lower."""

_ENGINE, _COMPUTED = "engine.json", "computed.safetensors"

_NAMED_ROWS = 8

_NO_LIMIT = 10_000_000
"""Steps of a stage that ends at a limit, where the trainer wants a number."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its `recipe`, the embedder folder `start`, and what it reads.

    With a `limit` it lasts until that is used, however many steps that are: the recipe's `steps` say only which share
    of it the warm-up has. `on_log` is called with every record of its log. It goes on from the `checkpoint`, or else
    from what it kept when it started, if it did before. `interrupts` end it early, with a checkpoint. `spent` gives the
    seconds of the whole run. `scoring` says when its model is scored on the way.
    """

    name: StageName
    recipe: Recipe
    run: Run
    start: Path
    inputs: StageInputs
    limit: Limit | None = None
    on_log: OnLog | None = None
    checkpoint: Path | None = None
    interrupts: Interrupts = field(default_factory=lambda: Interrupts(""))
    spent: Callable[[], float] = lambda: 0.0
    scoring: Scoring | None = None

    @property
    def checkpoints(self) -> Checkpoints:
        """Its checkpoints, which are there while it is under way."""
        return Checkpoints(self.run.checkpoints(self.name), self.settings.save_total_limit)

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
        if self.limit is None:
            return compiling_pays(self.settings.steps * self.settings.pairs_per_step, None)
        # of a pair two texts are read, and two written; most are shorter
        pairs = (self.limit.tokens or 0) // (4 * self.recipe.longest_read)
        return compiling_pays(pairs, self.limit.seconds_left())

    def progress(self) -> StageProgress:
        """Its bar and log."""
        return StageProgress(
            self.name,
            self.run.log,
            limit=self.limit,
            on_log=self.on_log,
            save_steps=self.settings.save_steps,
            interrupts=self.interrupts,
        )

    def engine_before(self, model: PreTrainedModel, packed: bool) -> Engine | None:
        """The engine that it was started with before, on a device of this kind, taken up by `model`; None: none was.

        Another one would cut its steps otherwise, and round otherwise. So it is none, and that is said, where texts
        were packed then and are not now, or the other way round.
        """
        start = self.checkpoints.start
        if start is None:
            return None
        kept = json.loads((start / _ENGINE).read_text(encoding="utf-8"))
        if (kept["device"], kept["engine"]["packed"]) != (default_device().type, packed):
            before = f"on {kept['device']} with {'packed' if kept['engine']['packed'] else 'padded'} texts"
            say(f"{STAGE_TITLES[self.name]}: it was started {before}, and does not go on bit for bit here")
            return None
        engine = Engine(**kept["engine"] | {"slower": tuple(kept["engine"]["slower"])})
        if engine.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return engine

    def take_up(self, computed: nn.Module) -> None:
        """Put what it was started with before into the buffers of `computed`, which is a part of its objective.

        They were computed once; on another processor they would differ in their last bits.
        """
        start = self.checkpoints.start
        if start is not None:
            for name, value in load_file(start / _COMPUTED).items():
                computed.get_buffer(name).copy_(value)

    def begin(self, engine: Engine, computed: nn.Module | None) -> None:
        """Note the `engine`; keep it, and the buffers of `computed`, to go on with where the stage is interrupted.

        Of several processes the first one does.
        """
        if rank() > 0:
            return
        self.note(engine)
        if self.checkpoints.start is not None:
            return
        with self.checkpoints.writing_start() as folder:
            write_json(folder / _ENGINE, {"device": default_device().type, "engine": asdict(engine)})
            if computed is not None:
                # the token embeddings are those of the start
                kept = {name: value for name, value in computed.named_buffers() if name != "embeddings"}
                save_file({name: value.contiguous() for name, value in kept.items()}, folder / _COMPUTED)

    def explain(self, what: str, step: int, rows: Sequence[int]) -> str:
        """The error of a step in which `what` is no finite number; its `rows` by their numbers over all data sets.

        All rows are written into the run's folder, with their places and texts, by the first of several processes.
        """
        if rank() > 0:
            return f"{self.name}: {what} is no finite number any more at step {step}"
        named = rows_with_places(self.recipe, self.inputs, self.name, rows)
        write_json_lines(self.run.not_finite, named)
        places = ", ".join(row["place"] for row in named[:_NAMED_ROWS])
        more = f" and {len(named) - _NAMED_ROWS} more" if len(named) > _NAMED_ROWS else ""
        return (
            f"{self.name}: {what} is no finite number any more at step {step}, whose rows are {places}{more} (all of "
            f"them: {self.run.not_finite}); lower {self.name}.learning_rate, or take out a row that does it; "
            f"{self.checkpoints.last_good()}"
        )

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
        settings, device = self.settings, default_device()
        # On a GPU the texts of the next steps are tokenized while it works; a CPU has no core left for that.
        workers = min(4, max(1, (os.cpu_count() or 1) // ranks_here() - 1)) if device.type == "cuda" else 0
        endless = 1 if self.limit is None else max(1, _NO_LIMIT // settings.steps)
        return {
            "output_dir": str(self.checkpoints.folder),
            "max_steps": endless * settings.steps,
            "per_device_train_batch_size": settings.pairs_per_step,  # of the whole step, which `SharedSteps` share out
            "ddp_find_unused_parameters": False,
            "ddp_broadcast_buffers": False,  # they are the same everywhere, and stay so
            "ddp_timeout": round(PATIENCE.total_seconds()),
            "learning_rate": settings.learning_rate,
            "warmup_steps": endless * settings.warmup_steps,
            "lr_scheduler_type": "constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
            "weight_decay": settings.weight_decay,
            "max_grad_norm": settings.max_grad_norm,
            "bf16": self.bf16,
            "use_cpu": device.type == "cpu",
            "logging_steps": settings.log_every,
            "logging_first_step": True,
            "logging_nan_inf_filter": False,  # training stops there
            "save_strategy": "no",  # StageProgress says when
            "log_level_replica": "error",
            "report_to": (self.recipe.report_to or "none") if rank() == 0 else "none",
            "run_name": f"{self.run.folder.name} {STAGE_TITLES[self.name]}",
            "disable_tqdm": True,
            "dataloader_drop_last": True,
            "dataloader_num_workers": workers,
            "dataloader_persistent_workers": workers > 0,
            "remove_unused_columns": False,
            "seed": self.recipe.seed,
        }


def run_trainer(stage: Stage, trainer: TimedTrainer, progress: StageProgress, save: Callable[[Path], object]) -> None:
    """Train to the last step, or to the limit of `progress`; either way to the end of the schedule (T13).

    `save` writes the model as it is into a new folder, and leaves it as it is. Raises AnchorvecError where `trainer`
    ends before that, and Interrupted where `stage` was: it has a checkpoint then.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.limit, progress.used = progress.limit, trainer.used
    trainer.checkpoints, trainer.explain, trainer.spent = stage.checkpoints, stage.explain, stage.spent
    progress.rows_hash = lambda: trainer.rows_hash
    place_trackers(trainer, stage.run.tensorboard / stage.name)
    checkpoint, step = stage.checkpoint, 0
    if checkpoint is not None:
        step = step_of(checkpoint)
        say(f"{STAGE_TITLES[stage.name]}: goes on after step {step}")
        trainer.go_on_from(checkpoint)
        progress.seconds = trainer.seconds
    if rank() == 0:
        stage.run.cut_log(stage.name, step)
    if ranks() > 1:
        set_seed(stage.recipe.seed + rank())  # for dropout
    if stage.scoring is not None:
        trainer.add_callback(ScoresOnTheWay(stage.scoring, trainer, progress, save))
    keep_freed_memory()
    with progress, stage.interrupts.deferred():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    end_trackers(stage.recipe.report_to)
    if rank() == 0:
        stage.run.note_rows(stage.name, trainer.row_hashes)
    done, planned = trainer.state.global_step, trainer.args.max_steps
    if progress.interrupted:
        stage.interrupts.received = stage.interrupts.received or signal.SIGTERM  # where another process was asked to
        stage.interrupts.stop(f"{STAGE_TITLES[stage.name]} has a checkpoint after step {done}")
    if done < planned and not progress.at_limit:
        raise AnchorvecError(
            f"{progress.stage}.pairs_per_step: training ended too early, after {done} steps, because the data repeat "
            "texts too often for so many different pairs in a step; lower it, or remove repeated texts"
        )
