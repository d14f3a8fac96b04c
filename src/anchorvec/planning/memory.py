"""Bytes that a stage holds on one device at its peak, part by part."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import psutil

from anchorvec.training.engine import Engine

GAPS = 0.35
"""On a CPU: the heap's gaps, of what comes and goes (docs/planning.md)."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part.

    `weights`: what is frozen, in its own format, and the bf16 copies that layers multiply by; `master_weights`: what
    trains, in fp32; `gradients` of it, in fp32, and twice the token embeddings' while they are summed; `optimizer`: two
    moments; `activations` that are kept for the backward pass; `head`: scores of targets at one time;
    `cached_gradients`: embeddings of a step and their gradients; on a CPU `process`: the program and its libraries, and
    `gaps` in the heap.
    """

    weights: float = 0.0
    master_weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    head: float = 0.0
    cached_gradients: float = 0.0
    process: float = 0.0
    gaps: float = 0.0

    @property
    def peak(self) -> float:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> Mapping[str, float]:
        """Those that are not 0, by name."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name))}


@dataclass(frozen=True)
class Weights:
    """Parameters of a stage by what becomes of them.

    `trained`, of which `trained_linear` are multiplied by in linear layers, and `table` are token embeddings that
    train; `frozen_linear` are in bf16 where the stage is, `frozen_copied` in fp32 beside a bf16 copy, `frozen_other`
    in fp32.
    """

    trained: float
    trained_linear: float
    table: float = 0.0
    frozen_linear: float = 0.0
    frozen_copied: float = 0.0
    frozen_other: float = 0.0

    @property
    def whole(self) -> float:
        """All of them."""
        return self.trained + self.frozen_linear + self.frozen_copied + self.frozen_other


def memory_of_weights(weights: Weights, *, bf16: bool) -> Memory:
    """The parts that do not depend on the texts, of a stage in `bf16` or fp32, with such `weights`."""
    copies = 2 * (weights.trained_linear + weights.frozen_copied) if bf16 else 0
    frozen = (2 if bf16 else 4) * weights.frozen_linear + 4 * (weights.frozen_copied + weights.frozen_other)
    return Memory(
        weights=frozen + copies,
        master_weights=4 * weights.trained,
        gradients=4 * weights.trained + 8 * weights.table,
        optimizer=8 * weights.trained,
    )


def shared_out(weights: Weights, *, devices: int, in_layers: float, layers: int, head: float, bf16: bool) -> Memory:
    """`memory_of_weights` of one of `devices` among which such `weights` are shared out, with what is gathered.

    `in_layers` of those that train are in so many `layers`, of which one is gathered, in `bf16` or fp32, while the next
    one comes, and one layer's gradients. The others stay gathered in fp32 for a micro-batch, with their gradients; the
    LM `head`, so many weights, is copied where it is used in bf16.
    """
    layer, outside = in_layers / layers, weights.trained - in_layers
    size = 2 if bf16 else 4
    frozen = 4 * (weights.frozen_linear + weights.frozen_copied + weights.frozen_other)
    return Memory(
        weights=frozen + 2 * size * layer + 4 * outside + (2 * head if bf16 else 0),
        master_weights=4 * weights.trained / devices,
        gradients=4 * weights.trained / devices + (size + 4) * layer + 4 * outside + 8 * weights.table,
        optimizer=8 * weights.trained / devices,
    )


def memory_of_stage(
    fixed: Memory, engine: Engine, *, held: float, score_bytes: float, embeddings: float, cpu: bool
) -> Memory:
    """`fixed` with what depends on the texts, of which `held` tokens are in memory at one time, by the `engine`.

    `score_bytes`: of the scores of targets; `embeddings`: numbers of those that cached gradients keep. `cpu`: the
    memory is the machine's own.
    """
    activations = engine.bytes_per_token * held
    return Memory(
        weights=fixed.weights,
        master_weights=fixed.master_weights,
        gradients=fixed.gradients,
        optimizer=fixed.optimizer,
        activations=activations,
        head=score_bytes,
        cached_gradients=8 * embeddings if engine.cached_gradients else 0,
        process=psutil.Process().memory_info().rss if cpu else 0,
        gaps=GAPS * (activations + score_bytes) if cpu else 0,
    )
