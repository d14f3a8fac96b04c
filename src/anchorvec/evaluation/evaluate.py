"""Scores embedders and BM25 on folders of test data and on MTEB tasks, all through mteb."""

import importlib.util
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation.baselines import RANKED, check_baselines, score_baselines
from anchorvec.evaluation.comparison import Comparison
from anchorvec.evaluation.scores import Scores
from anchorvec.evaluation.task_kind import LocalData
from anchorvec.evaluation.tasks import kind_of_data, kind_of_mteb_type, load_folder, sets_in
from anchorvec.terminal import say

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def evaluate(
    model: "SentenceTransformer | str | Path",
    *,
    data: Sequence[str | Path | LocalData] = (),
    tasks: Sequence[str] = (),
    batch_size: int = 32,
    instruction: str | None = None,
    seed: int = 0,
    baselines: Sequence[str | Path] = (),
    show_progress_bar: bool = False,
) -> "Evaluation":
    """The scores of `model` on every folder of `data` and every MTEB task of `tasks`.

    A registered task leaves out what mteb says, a folder each query's own document (`BeirData.own_documents`).
    The keys are names of folders and tasks; a retrieval task of several splits or subsets (languages) has one
    entry for each, `TASK/SPLIT/SUBSET`. A folder is read and scored without network and writes nothing;
    an MTEB task is fetched to the cache of Hugging Face.

    - `model`: a SentenceTransformer, its folder, or its hub id. Its stored `query` and `document` prompts are used,
      and a prompt stored as `NAME-query` for the task or folder NAME. Texts that are neither queries nor documents, as
      those of STS or classification, have a prompt stored for their task or its type, the model's default prompt, or
      else the query prompt; a warning names the tasks where it is this. Texts are cut by its tokenizer.
    - `data`: test sets of a kind in `tasks.KINDS`, such as a folder in BEIR layout or a file of scored pairs; folders
      of such sets; or what was read of them.
    - `tasks`: names of MTEB tasks.
    - `batch_size`: texts encoded at a time.
    - `instruction`: replaces the stored query prompts, and all prompts of texts that are no documents either.
    - `seed`: of the intervals.
    - `baselines`: what it is compared with on the same data, in `comparison` of what comes back: models by folder or
      hub id, which are read with the prompts that are stored with them; `bm25`, on retrieval and re-ranking;
      `untrained`, the folder `base` of the run that `model` is in; an earlier run, or a file that `anchorvec evaluate
      --json` wrote, by the scores that are in it.
    - `show_progress_bar`: shows mteb's bars on stderr.

    Raises AnchorvecError for data that cannot be used, an unknown task, one of more than texts, and one that cannot be
    fetched.
    """
    if not data and not tasks:
        raise AnchorvecError("there is nothing to score on; name a test set or an MTEB task")
    others = check_baselines(baselines, model)
    local = check_test_data(data=data, tasks=tasks)
    options = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    results = Evaluation(_evaluate(model, local, tasks, instruction, seed, options))
    of_others = score_baselines(
        others,
        results,
        score=lambda other: _evaluate(other, local, tasks, None, seed, options),
        score_bm25=lambda names: _bm25(names, local, seed),
    )
    named = str(model) if isinstance(model, str | Path) else ""
    results.comparison = Comparison(results, of_others, model=named, seed=seed)
    return results


class Evaluation(dict[str, Scores]):
    """The scores of a model by test set and task, and in `comparison` what they are beside those of baselines."""

    def __init__(self, scores: Mapping[str, Scores]) -> None:
        """`scores` by test set and task."""
        super().__init__(scores)
        self.comparison = Comparison(self)


def _evaluate(
    model: "SentenceTransformer | str | Path",
    local: Sequence[LocalData],
    tasks: Sequence[str],
    instruction: str | None,
    seed: int,
    options: dict[str, Any],
) -> dict[str, Scores]:
    """`evaluate` on data that were read already; `options` go to each run."""
    results: dict[str, Scores] = {}
    with _side_effects_undone():
        from anchorvec.evaluation import _mteb
        from anchorvec.model.fingerprint import model_fingerprint
        from anchorvec.model.loading import load_encoder, warn_of_named_prompts

        # Names are looked up before anything is loaded or run, so that a misspelt one fails at once.
        all_tasks = {part.name: _mteb.local_task(kind_of_data(part), part) for part in local}
        all_tasks |= {name: _mteb.named_task(name) for name in tasks}
        model = load_encoder(model)
        if instruction is None:
            warn_of_named_prompts(model, list(all_tasks))
        device, dtype = str(model.device), str(next(model.parameters()).dtype).removeprefix("torch.")
        fingerprint = model_fingerprint(model) or ""
        encoder = _mteb.Encoder(model, instruction)
        for task in all_tasks.values():
            encoder.check(task)
        own = {part.name: kind_of_data(part).own_documents(part) for part in local}
        for name, task in all_tasks.items():
            system = _mteb.without_own(encoder, own.get(name, ()))
            run = partial(_mteb.run, system, task, **options)
            about = {
                "device": device,
                "dtype": dtype,
                "model": fingerprint,
                "prompts": encoder.prompts.setdefault(name, {}),
            }
            results |= _scores(name, task, run, seed=seed, **about)
    if encoder.read_as_queries:
        warnings.warn(
            "the texts of these tasks are neither queries nor documents, and were read with the query prompt that is "
            f"stored with the model: {', '.join(sorted(encoder.read_as_queries))}",
            stacklevel=3,
        )
    return results


def check_test_data(*, data: Sequence[str | Path | LocalData] = (), tasks: Sequence[str] = ()) -> list[LocalData]:
    """What is read of `data`, folders of test data; `tasks` are names of MTEB tasks.

    Raises AnchorvecError for what `evaluate` could not use, and where two have the same name.
    """
    if not data and not tasks:
        return []
    require_extra()
    local: list[LocalData] = []
    for part in data:
        if isinstance(part, str | Path):
            local += [load_folder(path) for path in sets_in(part) or [Path(part)]]
        else:
            local.append(part)
    names = [part.name for part in local] + list(tasks)
    for name in names:
        if names.count(name) > 1:
            raise AnchorvecError(
                f"two data sets are named {name!r}; rename a folder, the name is the key of the result"
            )
    with _side_effects_undone():
        from anchorvec.evaluation import _mteb

        for name in tasks:
            _mteb.named_task(name)
    return local


def bm25_scores(data: str | Path | LocalData, *, seed: int = 0) -> Scores:
    """The scores of BM25, as the module `bm25` says, by the same metrics as `evaluate`'s.

    - `data`: a test set of retrieval or re-ranking, or what was read of it.
    - `seed`: of the intervals.

    Raises AnchorvecError for data that cannot be used, or are of another kind.
    """
    require_extra()
    local = load_folder(data) if isinstance(data, str | Path) else data
    if kind_of_data(local) not in RANKED:
        layouts = " or ".join(kind.layout for kind in RANKED)
        raise AnchorvecError(f"{local.name}: BM25 is scored on retrieval and re-ranking; name a set with {layouts}")
    return _bm25([local.name], [local], seed)[local.name]


def ranking_sets(data: Sequence[LocalData]) -> list[LocalData]:
    """Of `data` the sets that BM25 is scored on; the others are named in a line."""
    found = [part for part in data if kind_of_data(part) in RANKED]
    if others := [part.name for part in data if part not in found]:
        say(f"bm25: it ranks documents, so there are none of {', '.join(others)}")
    return found


def _bm25(names: Sequence[str], local: Sequence[LocalData], seed: int) -> dict[str, Scores]:
    """The scores of BM25 under `names`, of `local` sets and of tasks of mteb, whose subsets have names of their own."""
    results: dict[str, Scores] = {}
    sets = {part.name: part for part in local}
    with _side_effects_undone():
        from anchorvec.evaluation import _mteb
        from anchorvec.evaluation.bm25 import Bm25

        for name in dict.fromkeys(name if name in sets else name.partition("/")[0] for name in names):
            part = sets.get(name)
            task = _mteb.named_task(name) if part is None else _mteb.local_task(kind_of_data(part), part)
            own = () if part is None else kind_of_data(part).own_documents(part)
            run = partial(_mteb.run, _mteb.without_own(_mteb.searcher(Bm25()), own), task)
            results |= _scores(name, task, run, device="cpu", dtype="float32", seed=seed)
    return {name: scores for name, scores in results.items() if name in names}


def _scores(name: str, task: Any, run: Callable[[], Any], *, seed: int, **about: Any) -> dict[str, Scores]:
    """The scores of `task` after a `run`: one entry, or one for each of its subsets; these share the main score.

    `about` are fields of the scores that say what was run.
    """
    from anchorvec.evaluation import _mteb

    start = time.perf_counter()
    try:
        outcome = run()
    except OSError as error:  # no network, no disk
        reason = str(error).strip().split("\n")[0]
        raise AnchorvecError(f"{name} cannot be fetched or scored: {reason}") from error
    common = {
        "kind": outcome.mteb_type,
        "main_score": outcome.main_score,
        "seed": seed,
        **about,
        "seconds": time.perf_counter() - start,
    }
    kind = kind_of_mteb_type(outcome.mteb_type)
    if kind is None or not outcome.subsets:
        return {name: Scores(metrics={}, per_item={}, counts={}, fingerprint=_mteb.fingerprint(task), **common)}
    several = len(outcome.subsets) > 1
    return {
        f"{name}/{part.split}/{part.subset}" if several else name: Scores(
            metrics=kind.intervals(part.per_item, seed),
            per_item=part.per_item,
            counts=part.counts,
            fingerprint=_mteb.fingerprint(task, part.split, part.subset),
            **common,
        )
        for part in outcome.subsets
    }


def require_extra() -> None:
    """Raise AnchorvecError if the packages for scoring are not installed."""
    for package in ("mteb", "bm25s", "statsmodels"):
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
