"""What a stage tells while it runs: a bar on the terminal and a record per logged step in a file."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from anchorvec.files import writing
from anchorvec.interrupts import Interrupts
from anchorvec.processes import any_of
from anchorvec.ranks import rank
from anchorvec.run import STAGE_TITLES, StageName
from anchorvec.terminal import terminal
from anchorvec.training.budget import Limit

OnLog = Callable[[Mapping[str, Any]], None]


class StageProgress(TrainerCallback):
    """Shows loss, tokens per second and time left of `stage`; appends every record to `log_file`, as JSON Lines.

    `on_log` is called with each record. With a `limit` the stage stops within it: where another step, as large as those
    so far, would go beyond, but not before the first. After every `save_steps` steps, and when one of `interrupts`
    came, it has a checkpoint written, but not after the last step. As a context manager it gives the terminal back,
    however the stage ends.
    """

    def __init__(
        self,
        stage: StageName,
        log_file: Path,
        *,
        limit: Limit | None = None,
        on_log: OnLog | None = None,
        save_steps: int | None = None,
        interrupts: Interrupts | None = None,
    ) -> None:
        self.stage = stage
        self.log_file = log_file
        self.limit = limit
        self._listener = on_log
        self.save_steps, self.interrupts = save_steps, interrupts
        self.seconds = 0.0  # of training before, where the stage goes on
        self.rows_hash: Callable[[], int] = lambda: 0
        self.used: Callable[[], float] = lambda: 0.0  # the share of the limit
        self.used_before = 0.0  # the first step
        self.at_limit = self.interrupted = False
        self.bar = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            TextColumn("{task.fields[steps]} {task.fields[status]}"),
            TimeRemainingColumn(),
            console=terminal(stderr=True),
            disable=rank() > 0,
        )

    @property
    def deadline(self) -> Callable[[], float] | None:
        """That of its limit, if this is a time."""
        return None if self.limit is None else self.limit.deadline

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the bar."""
        self.started = time.monotonic() - self.seconds
        self.used_before = self.used() if state.global_step == 0 and self.limit is not None else 0.0
        total = state.max_steps if self.limit is None else 1.0
        self.task = self.bar.add_task(STAGE_TITLES[self.stage], total=total, steps="", status="")
        self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar; stop the stage at its limit; have the last step logged, and checkpoints written."""
        step = state.global_step
        if self.limit is None:
            self.bar.update(self.task, completed=step, steps=f"{step}/{state.max_steps}")
        else:
            used = self.used()
            self.bar.update(self.task, completed=min(1.0, used), steps=f"step {step}")
            self.at_limit = rank() == 0 and used + (used - self.used_before) / step > 1
        signalled = self.interrupts is not None and self.interrupts.received is not None
        self.at_limit, signalled = any_of(self.at_limit, signalled)
        if self.at_limit:
            control.should_training_stop = True
        if control.should_training_stop or step >= state.max_steps:
            control.should_log = True
            return
        if signalled:
            self.interrupted = control.should_training_stop = True
        control.should_save = self.interrupted or (self.save_steps is not None and step % self.save_steps == 0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one record and show its loss."""
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        seconds = time.monotonic() - self.started
        record = {
            "step": state.global_step,
            **{key: value for key, value in logs.items() if key != "epoch"},
            "rows": f"{self.rows_hash():016x}",
            "tokens_per_second": logs["tokens"] / seconds,
            "seconds": seconds,
        }
        status = f"loss {record['loss']:.3f}, {record['tokens_per_second']:.0f} tokens/s"
        self.bar.update(self.task, status=status)
        self.write(record)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record` to the log, with the stage, and have it listened to."""
        record = {"stage": self.stage, **record}
        with writing(self.log_file), self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._listener is not None:
            self._listener(record)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The context of work that shows its own progress."""
        self.bar.stop()
        try:
            yield
        finally:
            self.bar.start()
