"""Encoding on a Ray cluster, where a corpus outgrows one machine: Ray Data shares the texts out among its workers.

A worker that is lost is started again, and its texts go to another one; this is Ray's doing.
"""

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from sentence_transformers import SentenceTransformer

from anchorvec.errors import AnchorvecError
from anchorvec.model.sharing import Vectors
from anchorvec.terminal import say

_BATCHES_IN_BLOCK = 4
"""What a worker is sent at a time, and what is lost with it."""


class RayWorkers:
    """The workers of a cluster that encode as `model` does, `batch_size` texts at a time.

    It is the cluster that Ray finds, by `RAY_ADDRESS` or on this machine; where there is none, one is started here, and
    ended by `close`. There is a worker for each GPU or, without any, for each machine, with all its cores; `count` sets
    another number. Raises AnchorvecError where Ray is not installed, and for a cluster without a free core.
    """

    def __init__(self, model: SentenceTransformer, *, batch_size: int, count: int | None = None) -> None:
        check_ray()
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would tell its makers
        import ray

        self.batch_size = batch_size
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(log_to_driver=False, logging_level="ERROR")
        self.count, self._resources = _shares([node["Resources"] for node in ray.nodes() if node["Alive"]], count)
        self.kind = "cuda" if "num_gpus" in self._resources else "cpu"
        say(f"encoding with Ray, workers: {self.count}, {_shown(self._resources)}")
        device = model.device
        self._model = ray.put(model.to("cpu"))  # a worker may have no such device
        model.to(device)

    def encode(self, texts: Sequence[str], **options: Any) -> Iterator[tuple[Sequence[int], Vectors]]:
        """Places in `texts` and their vectors (places, dim), as they are done; `options` are those of the model's."""
        import pyarrow as pa
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars, shown = False, context.enable_progress_bars
        size = _BATCHES_IN_BLOCK * self.batch_size
        blocks = [
            pa.table({"place": list(range(start, min(start + size, len(texts)))), "text": texts[start : start + size]})
            for start in range(0, len(texts), size)
        ]
        try:
            encoded = ray.data.from_arrow(blocks).map_batches(
                _Worker,
                fn_constructor_args=(self._model, {**options, "batch_size": self.batch_size}),
                batch_size=size,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=self.count),
                **self._resources,
            )
            for batch in encoded.iter_batches(batch_size=None, batch_format="numpy"):
                yield batch["place"].tolist(), batch["vector"]
        finally:
            context.enable_progress_bars = shown

    def close(self) -> None:
        """Leave the cluster, and end one that was started here."""
        import ray

        if self._started:
            with suppress(Exception):
                ray.shutdown()


class _Worker:
    """A copy of the model on a worker's own device."""

    def __init__(self, model: Any, options: Mapping[str, Any]) -> None:
        import ray

        self.model: SentenceTransformer = ray.get(model)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.options = options

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        vectors = self.model.encode(batch["text"].tolist(), **self.options)
        return {"place": batch["place"], "vector": vectors}


def check_ray() -> None:
    """Raise AnchorvecError where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise AnchorvecError("encoding on a cluster needs Ray: pip install 'anchorvec[ray]'")


def _shares(nodes: Sequence[Mapping[str, float]], count: int | None) -> tuple[int, dict[str, float]]:
    """How many workers machines with these resources have, and what each of them takes."""
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if gpus:
        return min(count or gpus, gpus), {"num_gpus": 1}
    if not cores:
        raise AnchorvecError("the Ray cluster has no machine with a core; start Ray on one: ray start --address=...")
    count = min(count or len(cores), sum(cores))
    each = max(1, min(cores) * len(cores) // count if count > len(cores) else min(cores))
    return count, {"num_cpus": each}


def _shown(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{name.removeprefix('num_')} each: {value:g}" for name, value in resources.items())
