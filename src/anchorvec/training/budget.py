"""How long a run lasts: its steps, decoder tokens, or a time in which its scorings and the export must fit too."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from anchorvec.device import pace
from anchorvec.errors import AnchorvecError

STAGE_ONE_SHARE = 0.1
"""Of the time for training, or of the tokens, where a budget is one of these; the rest is Stage II's."""

EXPORT_SECONDS = 30.0
"""Of a time that are kept for the export."""

_AGAIN_SECONDS = 20.0
"""Between two looks at how fast the machine is."""

_LOOKS = 3
"""The latest ones, of which the fastest counts: what slows the machine down for a while ends no stage."""

_SMALL_PART = 0.25
"""Of a time, for what a run can do without."""

_NOISE = 1.2
"""Times as slow or as fast; less is taken for noise."""

_LEAST_SECONDS = 60.0
"""For training, set-up of the stages included."""


@dataclass(frozen=True)
class Measured:
    """The `seconds` that something took, and the `pace` of the machine then, as `device.pace` measures it."""

    seconds: float
    pace: float

    def slowdown(self, now: float | None = None) -> float:
        """How many times as long it would take at a pace of `now`, more or less; 1 where that is about the same.

        None: the pace of this moment.
        """
        times = (pace() if now is None else now) / self.pace
        return 1.0 if 1 / _NOISE <= times <= _NOISE else times

    def now(self) -> float:
        """The seconds that it would take now."""
        return self.seconds * self.slowdown() if self.seconds else 0.0


def pace_now() -> float:
    """Seconds that a fixed piece of arithmetic takes at this moment (`device.pace`)."""
    return pace()


@dataclass(frozen=True)
class Limit:
    """What a stage may use in place of its recipe's steps: the time until `deadline`, or so many decoder `tokens`.

    `deadline` gives a `time.monotonic()`, and may move.
    """

    deadline: Callable[[], float] | None = None
    tokens: int | None = None

    def used(self, began: float, tokens: int, kept_seconds: Callable[[], float] = lambda: 0.0) -> float:
        """The share of it that a stage has used which `began` at a `time.monotonic()`, and trained on so many `tokens`.

        It may be more than 1. `kept_seconds` gives those before the deadline that are not for training.
        """
        if self.tokens is not None:
            return tokens / self.tokens
        assert self.deadline is not None
        return (time.monotonic() - began) / max(1e-9, self.deadline() - kept_seconds() - began)

    def seconds_left(self) -> float | None:
        """Until the deadline; None: there is none."""
        return None if self.deadline is None else self.deadline() - time.monotonic()


@dataclass(frozen=True)
class Budget:
    """How long a run lasts: the steps of its recipe, or one of two others, which each stage spends to its end.

    `minutes` of wall time from `began`, a `time.monotonic()`: what scoring and the export leave of them is for
    training. Or so many decoder `tokens` in the forward passes of training, of reading and of writing, whatever is
    computed again in the backward pass. `stage_one_share` of either is for Stage I. A stage then makes as many steps as
    fit, and its learning rate follows what is used.
    """

    minutes: float | None = None
    began: float = field(default_factory=time.monotonic)
    stage_one_share: float = STAGE_ONE_SHARE
    tokens: int | None = None

    def __post_init__(self) -> None:
        """Raise AnchorvecError for a time, or a number of tokens, in which nothing can be trained."""
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise AnchorvecError(f"minutes: {self.minutes} is no time to train in; give, for example, 20")
        if self.tokens is not None and self.tokens < 1:
            raise AnchorvecError(f"tokens: {self.tokens} is nothing to train on; give, for example, 300000")
        if self.tokens is not None and self.minutes is not None:
            raise AnchorvecError("a budget is a time or tokens, not both; leave minutes or tokens out")

    @property
    def is_limited(self) -> bool:
        """Whether something other than the recipe's steps says how long a stage lasts."""
        return self.minutes is not None or self.tokens is not None

    def tokens_of_stage(self, stages: int, used: int) -> int | None:
        """The tokens of the first of so many `stages` that are left, after `used` ones; None: it has no such limit."""
        if self.tokens is None:
            return None
        left = self.tokens - used
        return max(1, round(self.stage_one_share * left) if stages > 1 else left)

    def check(self, stages: int, scoring: Measured, whole_seconds: float = 0.0) -> None:
        """Raise AnchorvecError where less than a minute is left to train so many `stages`.

        `scoring` and `whole_seconds` as in `deadline`.
        """
        if self.minutes is None:
            return
        left = self._end(self.minutes, stages, scoring, whole_seconds, scoring.slowdown()) - time.monotonic()
        if left < _LEAST_SECONDS:
            raise AnchorvecError(
                f"the time is too short: {max(0.0, left):.0f} s are left for training, since a scoring takes "
                f"{scoring.now():.0f} s here; give {math.ceil(self.minutes + (_LEAST_SECONDS - left) / 60)} minutes or "
                "more"
            )

    def deadline(
        self, stages: int, scoring: Measured, whole_seconds: float = 0.0, start: float | None = None
    ) -> Callable[[], float] | None:
        """When the first of so many `stages` that are left must end, a `time.monotonic()`; None: with its steps.

        It began after `start` seconds of this budget; None: now.

        After each of them comes a `scoring`, after the last one also what takes `whole_seconds` and can be left out,
        and the export. If the machine slows down these will take longer, and the deadline moves: it is computed again
        every 20 seconds, by the fastest of the last three looks at the pace. What can be left out is given no more than
        a quarter of the time however slow the machine is.
        """
        minutes = self.minutes
        if minutes is None:
            return None
        begin = time.monotonic() if start is None else self.began + start
        share = self.stage_one_share if stages > 1 else 1.0

        def at_pace(now: float) -> float:
            return begin + share * (self._end(minutes, stages, scoring, whole_seconds, scoring.slowdown(now)) - begin)

        return _Moving(at_pace)

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

    def _end(self, minutes: float, stages: int, scoring: Measured, whole_seconds: float, slowdown: float) -> float:
        """When training must end to keep within `minutes` on a machine that is so many times slower than it was."""
        needed = slowdown * (EXPORT_SECONDS + stages * scoring.seconds)
        return self.began + 60 * minutes - needed - min(slowdown * whole_seconds, _SMALL_PART * 60 * minutes)


class _Moving:
    """A time that is computed again, of the fastest pace of the latest looks, 20 seconds after the last one."""

    def __init__(self, at_pace: Callable[[float], float]) -> None:
        self._at_pace = at_pace
        self._looks: deque[float] = deque(maxlen=_LOOKS)
        self._look()

    def __call__(self) -> float:
        if time.monotonic() > self._again:
            self._look()
        return self._at

    def _look(self) -> None:
        self._looks.append(pace())
        self._at = self._at_pace(min(self._looks))
        self._again = time.monotonic() + _AGAIN_SECONDS
