"""Scores embedders and BM25 on local test collections and on MTEB tasks, all through mteb."""

import importlib.util
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation.beir import BeirData, load_beir
from anchorvec.evaluation.scores import METRICS, TaskScores
from anchorvec.evaluation.statistics import bootstrap_interval

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def evaluate(
    model: "SentenceTransformer | str | Path",
    *,
    data: Sequence[str | Path | BeirData] = (),
    tasks: Sequence[str] = (),
    batch_size: int = 32,
    instruction: str | None = None,
    seed: int = 0,
    show_progress_bar: bool = False,
) -> dict[str, TaskScores]:
    """The scores of `model` on every folder of `data` (BEIR layout) and every MTEB task of `tasks`.

    `model` is a SentenceTransformer, its folder, or its hub id. Its stored `query` and `document` prompts are
    used, and a prompt stored as `NAME-query` for the task or folder NAME; `instruction` replaces the query's.
    Texts are cut by the model's tokenizer. `seed` is that of the intervals.

    The keys are names of folders and tasks; a retrieval task of several splits or subsets (languages) has one
    entry for each, `TASK/SPLIT/SUBSET`. A folder is read and scored without network and writes nothing;
    an MTEB task is fetched to the cache of Hugging Face. Raises AnchorvecError for data that cannot be used.
    """
    if not data and not tasks:
        raise AnchorvecError("there is nothing to score on; name a folder in BEIR layout or an MTEB task")
    collections = check_test_data(data=data, tasks=tasks)
    names = [collection.name for collection in collections] + list(tasks)

    results: dict[str, TaskScores] = {}
    with _side_effects_undone():
        from anchorvec.evaluation import _mteb
        from anchorvec.model.loading import load_encoder, warn_of_named_prompts

        # Names are looked up before anything is loaded or run, so that a misspelt one fails at once.
        all_tasks = [_mteb.BeirTask(part) for part in collections] + [_mteb.named_task(name) for name in tasks]
        model = load_encoder(model)
        if instruction is None:
            warn_of_named_prompts(model, names)
        device, dtype = str(model.device), str(next(model.parameters()).dtype).removeprefix("torch.")
        encoder = _mteb.encoder(model, instruction)
        for name, task in zip(names, all_tasks, strict=True):
            start = time.perf_counter()
            try:
                outcome = _mteb.run(encoder, task, batch_size=batch_size, show_progress_bar=show_progress_bar)
            except OSError as error:  # no network, no disk
                reason = str(error).strip().split("\n")[0]
                raise AnchorvecError(f"{name} cannot be fetched or scored: {reason}") from error
            seconds = time.perf_counter() - start
            results |= _scores(name, outcome, device=device, dtype=dtype, seconds=seconds, seed=seed)
    return results


def check_test_data(*, data: Sequence[str | Path | BeirData] = (), tasks: Sequence[str] = ()) -> list[BeirData]:
    """The collections of `data`; raises AnchorvecError for what `evaluate` could not use, tasks included."""
    if not data and not tasks:
        return []
    require_extra()
    collections = [part if isinstance(part, BeirData) else load_beir(part) for part in data]
    names = [collection.name for collection in collections] + list(tasks)
    for name in names:
        if names.count(name) > 1:
            raise AnchorvecError(
                f"two data sets are named {name!r}; rename a folder, the name is the key of the result"
            )
    with _side_effects_undone():
        from anchorvec.evaluation import _mteb

        for name in tasks:
            _mteb.named_task(name)
    return collections


def bm25_scores(data: str | Path | BeirData, *, seed: int = 0) -> TaskScores:
    """The scores of BM25 on a folder in BEIR layout, by the same metrics as `evaluate`'s.

    The library bm25s in its default setting: Lucene's variant, k1 = 1.5, b = 0.75; lower-cased words of two
    and more letters, without bm25s's English stop words, not stemmed; title and text as one field.
    """
    require_extra()
    collection = data if isinstance(data, BeirData) else load_beir(data)
    with _side_effects_undone():
        from anchorvec.evaluation import _mteb

        start = time.perf_counter()
        outcome = _mteb.run(_mteb.Bm25(), _mteb.BeirTask(collection))
        seconds = time.perf_counter() - start
    [scores] = _scores(collection.name, outcome, device="cpu", dtype="float32", seconds=seconds, seed=seed).values()
    return scores


def _scores(name: str, outcome: Any, *, device: str, dtype: str, seconds: float, seed: int) -> dict[str, TaskScores]:
    """One entry for a task, or one for each ranking where it has several; these share the task's seconds."""
    if not outcome.rankings:
        return {name: TaskScores(outcome.main_score, {}, {}, 0, 0, device, dtype, seconds)}
    several = len(outcome.rankings) > 1
    return {
        f"{name}/{ranking.split}/{ranking.subset}" if several else name: TaskScores(
            main_score=outcome.main_score,
            metrics={
                metric: bootstrap_interval(list(getattr(ranking, metric).values()), seed=seed) for metric in METRICS
            },
            per_query=ranking.ndcg_at_10,
            queries=len(ranking.ndcg_at_10),
            documents=ranking.documents,
            device=device,
            dtype=dtype,
            seconds=seconds,
        )
        for ranking in outcome.rankings
    }


def require_extra() -> None:
    """Raise AnchorvecError if the packages for scoring are not installed."""
    for package in ("mteb", "bm25s"):
        if importlib.util.find_spec(package) is None:
            raise AnchorvecError(f"scoring needs the package {package}: pip install 'anchorvec[evaluate]'")


@contextmanager
def _side_effects_undone() -> Iterator[None]:
    """Keep the random state and the home folder as they are while mteb works.

    mteb seeds the global generators of random, numpy and torch with 42 on import and for every task, and its
    import makes a cache folder in the home folder unless MTEB_CACHE names another place (here: the system's
    temporary folder, which exists; nothing is written there).
    """
    import torch

    states = random.getstate(), np.random.get_state()
    own_cache = os.environ.get("MTEB_CACHE")
    os.environ.setdefault("MTEB_CACHE", tempfile.gettempdir())
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if own_cache is None:
            del os.environ["MTEB_CACHE"]
