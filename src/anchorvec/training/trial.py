"""One real micro-step of a stage, of its longest texts: whether it runs on this model, and how long it takes."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from anchorvec.device import default_device
from anchorvec.errors import AnchorvecError
from anchorvec.model.packing import token_ids
from anchorvec.objectives.pairs import TokenPair, micro_batches, tokens_at_once
from anchorvec.objectives.reconstruction import Reconstruction
from anchorvec.training.engine import Engine

LONGEST_SECONDS = 120
"""A micro-step that would take longer is left out."""

Row = Mapping[str, str | None]


@dataclass(frozen=True)
class TrialStep:
    """What a micro-step of so many `tokens` took, in `seconds`, forward and backward; None: it was left out.

    `left_out`: why; empty where it was not.
    """

    tokens: int
    seconds: float | None
    left_out: str = ""

    def __str__(self) -> str:
        if self.seconds is None:
            return f"left out: {self.left_out}"
        return f"{self.seconds:.2g} s for {self.tokens:,} tokens"


def try_stage_one(objective: Reconstruction, engine: Engine, pairs: Sequence[TokenPair], *, bf16: bool) -> TrialStep:
    """A micro-step of `objective` over the longest of `pairs`, as many as `engine` holds, in `bf16` or not.

    Raises AnchorvecError where it fails.
    """
    longest = micro_batches(objective.draw(pairs, 0), engine.micro_batch_tokens, **objective.cut)[0]
    least = longest[: 2 if len(longest) > 1 else 1]
    cut = objective.cut

    def loss(group: Sequence[TokenPair]) -> Tensor:
        found: Tensor = objective(group).loss
        return found

    return _timed("stage_one", objective, loss, least, longest, lambda g: tokens_at_once(g, **cut), engine, bf16)


def try_stage_two(
    model: SentenceTransformer,
    loss: nn.Module,
    engine: Engine,
    rows: Sequence[Row],
    prompts: Mapping[str, str],
    *,
    bf16: bool,
) -> TrialStep:
    """A step of `loss` on `model` over the longest of `rows`: those of a micro-batch of `engine`, or all.

    `rows` have the columns of `prompts`, which are put before their texts. In `bf16` or not. Raises AnchorvecError
    where it fails.
    """
    step, tokens = contrastive_step(model, loss, prompts)
    longest = sorted(rows, key=lambda row: sum(len(row[column] or "") for column in prompts), reverse=True)
    while engine.cached_gradients and len(longest) > 2 and tokens(longest) > engine.micro_batch_tokens:
        longest = longest[: max(2, len(longest) // 2)]
    return _timed("stage_two", loss, step, longest[:2], longest, tokens, engine, bf16)


def contrastive_step(
    model: SentenceTransformer, loss: nn.Module, prompts: Mapping[str, str]
) -> tuple[Callable[[Sequence[Row]], Tensor], Callable[[Sequence[Row]], int]]:
    """Two functions of rows: `loss` on `model` of their texts, and the tokens of these; `prompts` are their columns."""

    def features(group: Sequence[Row]) -> list[dict[str, Any]]:
        columns = []
        for column, prompt in prompts.items():
            texts = [text for row in group if (text := row[column]) is not None]
            if texts:
                columns.append(model.preprocess(texts, prompt=prompt))
        return columns

    def tokens(group: Sequence[Row]) -> int:
        return sum(len(ids) for column in features(group) for ids in token_ids(column))

    def step(group: Sequence[Row]) -> Tensor:
        columns = [
            {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in column.items()}
            for column in features(group)
        ]
        found: Tensor = loss(columns, torch.zeros(len(group), dtype=torch.long, device=model.device))
        return found

    return step, tokens


def _timed(
    stage: str,
    module: nn.Module,
    loss: Callable[[Any], Tensor],
    least: Sequence[Any],
    longest: Sequence[Any],
    tokens: Callable[[Any], int],
    engine: Engine,
    bf16: bool,
) -> TrialStep:
    """`loss` forward and backward over `longest`, if `least` says that it takes less than `LONGEST_SECONDS`."""
    n = tokens(longest)
    if not engine.fits:
        return TrialStep(n, None, "the least that must be held at one time is more than the free memory")

    def run(group: Sequence[Any]) -> float:
        start = time.monotonic()
        with torch.autocast(default_device().type, torch.bfloat16, enabled=bf16):
            value = loss(group)
        value.backward()  # type: ignore[no-untyped-call]
        if not value.isfinite():
            raise AnchorvecError(f"{stage}: the loss of a first step is {float(value)}; the model has broken weights")
        module.zero_grad()
        return time.monotonic() - start

    with refusing(stage):
        seconds = run(least) * n / tokens(least)
        if len(least) < len(longest):
            if seconds > LONGEST_SECONDS:
                return TrialStep(n, None, f"it would take about {seconds:.0f} s")
            seconds = run(longest)
    return TrialStep(n, seconds)


@contextmanager
def refusing(stage: str) -> Iterator[None]:
    """A context in which `stage` makes a step; what a model raises there becomes an AnchorvecError with the reason."""
    try:
        yield
    except (AnchorvecError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        line = str(error).strip().split("\n")[0]
        raise AnchorvecError(
            f"model.base: a first step of {stage} fails on this model; name another one "
            f"({type(error).__name__}: {line})"
        ) from error
