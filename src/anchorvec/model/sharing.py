"""Who encodes: the model in this process, or copies of it in a process for each of several devices."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from anchorvec.errors import AnchorvecError
from anchorvec.terminal import say

Vectors = np.ndarray[Any, Any]

_BATCHES_AT_ONCE = 4, 256
_SECONDS_AT_ONCE = 1.0
"""Batches are encoded, counted and kept together: a few, and twice as many where those took less than this."""


class Workers(Protocol):
    """What encodes texts, until it is closed."""

    kind: str
    """Of device, such as `cpu` or `cuda`."""

    def encode(self, texts: Sequence[str], **options: Any) -> Iterator[tuple[Sequence[int], Vectors]]:
        """Places in `texts` and their vectors (places, dim), some at a time; `options` are those of the model's."""

    def close(self) -> None:
        """End what was started for it."""


class Alone:
    """`model` in this process, `batch_size` texts at a time, in their order."""

    def __init__(self, model: SentenceTransformer, *, batch_size: int) -> None:
        self.model, self.batch_size, self.kind = model, batch_size, model.device.type
        self.shares = 1

    def encode(self, texts: Sequence[str], **options: Any) -> Iterator[tuple[Sequence[int], Vectors]]:
        """Places in `texts` and their vectors (places, dim), some at a time; `options` are those of the model's."""
        batches, start = _BATCHES_AT_ONCE[0], 0
        while start < len(texts):
            places = range(start, min(start + batches * self.shares * self.batch_size, len(texts)))
            start = places.stop
            began = time.monotonic()
            made = self._encode(texts[places.start : places.stop], batch_size=self.batch_size, **options)
            if time.monotonic() - began < _SECONDS_AT_ONCE:
                batches = min(2 * batches, _BATCHES_AT_ONCE[1])
            yield places, made

    def _encode(self, texts: Sequence[str], **options: Any) -> Vectors:
        return np.asarray(self.model.encode(texts, **options))

    def close(self) -> None:
        """Nothing was started."""


class Processes(Alone):
    """A process for each of `devices` (`cuda:0`, or `cpu` as often as wanted), by sentence-transformers' own pool.

    `model` and `batch_size` as in `Alone`. The model goes to the CPU's memory until they are closed.
    """

    def __init__(self, model: SentenceTransformer, devices: Sequence[str], *, batch_size: int) -> None:
        super().__init__(model, batch_size=batch_size)
        self._device = model.device
        self.kind, self.shares = torch.device(devices[0]).type, len(devices)
        say(f"encoding on {', '.join(devices)}")
        with _threads_shared(devices):
            self._pool = model.start_multi_process_pool(list(devices))

    def _encode(self, texts: Sequence[str], **options: Any) -> Vectors:
        """Raises AnchorvecError where a process has ended."""
        try:
            return np.asarray(self.model.encode(texts, pool=self._pool, chunk_size=self.batch_size, **options))
        except RuntimeError as error:
            if all(process.is_alive() for process in self._pool["processes"]):
                raise
            raise AnchorvecError(
                f"a process that encoded has ended ({error}); the vectors until then are kept, so start again, with "
                "fewer devices if memory was short"
            ) from error

    def close(self) -> None:
        """End the processes."""
        self.model.stop_multi_process_pool(self._pool)
        self.model.to(self._device)


@contextmanager
def _threads_shared(devices: Sequence[str]) -> Iterator[None]:
    """A context in which a process is started for each of `devices`: those on the CPU share its cores out."""
    before = os.environ.get("OMP_NUM_THREADS")
    if devices.count("cpu") > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // devices.count("cpu")))
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = before
