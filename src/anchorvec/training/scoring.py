"""Scores of the model of a stage while it trains, which change nothing in the training.

The model is written as the stage would write it if it ended here, and scored from that folder, as any other: nothing of
the model that trains is touched, and the score after a step is the one that a stage of so many steps ends with.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from anchorvec.randomness import randomness_kept
from anchorvec.recipe import Recipe
from anchorvec.run import STAGE_TITLES, StageName
from anchorvec.terminal import say
from anchorvec.training.memory import release_freed_memory
from anchorvec.training.progress import StageProgress

if TYPE_CHECKING:
    from anchorvec.training.trainers import TimedTrainer


@dataclass(frozen=True)
class Scoring:
    """When the model of a stage is scored while it trains, and how.

    It is after the steps `at`, and after `every` so many, but not after those that are `done`. `score` gives the scores
    by test set, from the step and the new `folder` of the step with the model, of which it disposes. `seconds`: what
    that takes, about.
    """

    at: Sequence[int]
    every: int | None
    done: Callable[[], Collection[int]]
    folder: Callable[[int], Path]
    score: Callable[[int, Path], Mapping[str, float]]
    seconds: float

    def is_due(self, step: int) -> bool:
        """Whether the model after `step` is to be scored, and was not yet."""
        asked = step in self.at or (self.every is not None and step % self.every == 0)
        return asked and step not in self.done()

    def times(self, step: int, left: float, step_seconds: float, seconds: float) -> int:
        """How many scorings come after `step` in the `left` seconds, if a step takes `step_seconds`, and one `seconds`.

        One that would not end before these are over, with one more step, is none.
        """
        times, at = 0, sorted(at for at in self.at if at > step)
        while True:
            following = [*at[:1], *([] if self.every is None else [(step // self.every + 1) * self.every])]
            if not following:
                return times
            next_ = min(following)
            left -= (next_ - step) * step_seconds + seconds
            if left < step_seconds or seconds <= 0:
                return times
            step, at, times = next_, [later for later in at if later > next_], times + 1


def is_scored_on_the_way(recipe: Recipe, name: StageName) -> bool:
    """Whether `recipe` asks for scores of the stage `name` while it trains."""
    return recipe.evaluation.every is not None or (name == "stage_two" and bool(recipe.evaluation.at))


def models_at_once(recipe: Recipe, name: StageName) -> int:
    """How many models of the stage `name` of `recipe` on its way are on the disk at one time, at most.

    One that is scored; where the best is kept that one, and the best until the newest checkpoint.
    """
    kept = 2 if recipe.evaluation.keep_best and name == recipe.stages[-1] else 0
    return 1 + kept if is_scored_on_the_way(recipe, name) else 0


class ScoresOnTheWay(TrainerCallback):
    """Has the model of a stage scored as `scoring` says; `save` writes it, as it is, into a new folder.

    The time that this takes is no training time: the clocks of `trainer` and `progress` stand still. Of a stage that
    ends at a time, it is a part nevertheless: scorings to come are kept their time, so that the learning rate falls
    over what is left for steps, and one that would not end before is left out, which is said.
    """

    def __init__(
        self, scoring: Scoring, trainer: "TimedTrainer", progress: StageProgress, save: Callable[[Path], object]
    ) -> None:
        self.scoring, self.trainer, self.progress, self.save = scoring, trainer, progress, save
        self.seconds = scoring.seconds  # that the last one took
        self._left_out = False
        trainer.kept_seconds = self._to_come

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score the step that a stage goes on from, where it was interrupted before that."""
        if state.global_step and self.scoring.is_due(state.global_step):
            self._score(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have the trainer come to `on_evaluate`, after the log and before a checkpoint; not after the last step."""
        step = state.global_step
        if control.should_training_stop or step >= state.max_steps or not self.scoring.is_due(step):
            return
        control.should_evaluate = self._is_time(step)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Score the model as it is."""
        self._score(state.global_step)

    def _is_time(self, step: int) -> bool:
        """Whether a scoring, and one more step, would end before the stage must."""
        deadline = self.progress.deadline
        now = time.monotonic()
        if deadline is None or now + self.seconds + (now - self.progress.started) / step <= deadline():
            return True
        if not self._left_out:
            self._left_out = True
            say(f"{STAGE_TITLES[self.progress.stage]}: no time is left for scores after step {step}, nor later ones")
        return False

    def _to_come(self) -> float:
        """Seconds of the scorings that will be made before the stage must end."""
        deadline = self.progress.deadline
        if deadline is None or self.trainer.state.global_step == 0:
            return 0.0
        step = self.trainer.state.global_step + 1  # it is counted after the schedule has looked
        now = time.monotonic()
        left, step_seconds = deadline() - now, (now - self.progress.started) / step
        own = self.scoring.is_due(step) and self.seconds + step_seconds <= left  # as `_is_time` will say
        times = own + self.scoring.times(step, left - own * self.seconds, step_seconds, self.seconds)
        return self.seconds * times

    def _score(self, step: int) -> None:
        started = time.monotonic()
        with self.progress.paused(), randomness_kept():
            folder = self.scoring.folder(step)
            self.save(folder)
            release_freed_memory()
            found = self.scoring.score(step, folder)
            release_freed_memory()
        self.seconds = time.monotonic() - started
        self.trainer.began += self.seconds
        self.progress.started += self.seconds
        record = {"step": step, "scores": dict(found), "scoring_seconds": self.seconds}
        self.progress.write(record | {"seconds": time.monotonic() - self.progress.started})
        self.trainer.log({f"eval_{name}": value for name, value in found.items()})  # for trackers
