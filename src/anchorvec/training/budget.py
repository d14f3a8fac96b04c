"""How long a run lasts: its steps, or a time in which its scorings and the export must fit too."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from anchorvec.device import pace
from anchorvec.errors import AnchorvecError

STAGE_ONE_SHARE = 0.1
"""Of the time for training, where a budget is a time; the rest is Stage II's."""

EXPORT_SECONDS = 30.0
"""Of a time that are kept for the export."""

_AGAIN_SECONDS = 20.0
"""Between two looks at how fast the machine is."""

_SMALL_PART = 0.25
"""Of a time, for what a run can do without."""

_NOISE = 1.2
"""A slowdown of less is taken for noise."""

_LEAST_SECONDS = 60.0
"""For training, set-up of the stages included."""


@dataclass(frozen=True)
class Measured:
    """The `seconds` that something took, and the `pace` of the machine then, as `device.pace` measures it."""

    seconds: float
    pace: float = field(default_factory=lambda: pace())

    def slowdown(self) -> float:
        """How many times as long it would take now; 1 where that is about the same, or less."""
        times = pace() / self.pace
        return times if times > _NOISE else 1.0

    def now(self) -> float:
        """The seconds that it would take now."""
        return self.seconds * self.slowdown() if self.seconds else 0.0


@dataclass(frozen=True)
class Budget:
    """How long a run lasts: the steps of its recipe, or `minutes` of wall time from `began`, a `time.monotonic()`.

    What scoring and the export leave of the time is for training, `stage_one_share` of it for Stage I. A stage then
    makes as many steps as fit, and its learning rate follows the clock.
    """

    minutes: float | None = None
    began: float = field(default_factory=time.monotonic)
    stage_one_share: float = STAGE_ONE_SHARE

    def __post_init__(self) -> None:
        """Raise AnchorvecError for a time in which nothing can be trained."""
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise AnchorvecError(f"minutes: {self.minutes} is no time to train in; give, for example, 20")

    def check(self, stages: int, scoring: Measured, last: Measured) -> None:
        """Raise AnchorvecError where less than a minute is left to train so many `stages`.

        `scoring` and `last` as in `deadline`.
        """
        left = self._end(stages, scoring, last) - time.monotonic()
        if self.minutes is not None and left < _LEAST_SECONDS:
            raise AnchorvecError(
                f"the time is too short: {max(0.0, left):.0f} s are left for training, since a scoring takes "
                f"{scoring.now():.0f} s here; give {math.ceil(self.minutes + (_LEAST_SECONDS - left) / 60)} minutes or "
                "more"
            )

    def deadline(
        self, stages: int, scoring: Measured, last: Measured, start: float | None = None
    ) -> Callable[[], float] | None:
        """When the first of so many `stages` that are left must end, a `time.monotonic()`; None: with its steps.

        It began after `start` seconds of this budget; None: now.

        After each of them comes a `scoring`, after the last one the scoring `last`, and the export. If the machine
        slows down these will take longer, and the deadline moves: it is computed again every 20 seconds.
        """
        if self.minutes is None:
            return None
        begin = time.monotonic() if start is None else self.began + start
        share = self.stage_one_share if stages > 1 else 1.0
        return _Moving(lambda: begin + share * (self._end(stages, scoring, last) - begin))

    def spent(self) -> float:
        """Seconds since its beginning."""
        return time.monotonic() - self.began

    def affords(self, seconds: float) -> bool:
        """Whether so many `seconds` are a small enough part of its time, for what a run can do without."""
        return self.minutes is None or seconds <= _SMALL_PART * 60 * self.minutes

    def left(self) -> float:
        """Seconds until its end, with the export still to come."""
        minutes = math.inf if self.minutes is None else self.minutes
        return self.began + 60 * minutes - EXPORT_SECONDS - time.monotonic()

    def _end(self, stages: int, scoring: Measured, last: Measured) -> float:
        """When training must end, as the machine is now."""
        minutes = math.inf if self.minutes is None else self.minutes
        reserved = EXPORT_SECONDS + (stages - 1) * scoring.seconds + last.seconds
        return self.began + 60 * minutes - reserved * scoring.slowdown()


class _Moving:
    """A time that is computed again when 20 seconds have passed since the last computation."""

    def __init__(self, compute: Callable[[], float]) -> None:
        self._compute, self._at, self._again = compute, compute(), time.monotonic() + _AGAIN_SECONDS

    def __call__(self) -> float:
        if time.monotonic() > self._again:
            self._at, self._again = self._compute(), time.monotonic() + _AGAIN_SECONDS
        return self._at
