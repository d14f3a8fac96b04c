"""The only module that imports mteb: its registry, its encoder, and a run of one task."""

import hashlib
import json
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mteb
from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import EncoderProtocol, ModelMeta, SearchEncoderWrapper, SentenceTransformerEncoderWrapper
from sentence_transformers import SentenceTransformer

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation.task_kind import LocalData, SubsetScores, TaskKind
from anchorvec.evaluation.tasks import kind_of_mteb_type

_LOCAL = "local"


@dataclass(frozen=True)
class Outcome:
    """What mteb says of one task."""

    mteb_type: str
    main_score: float
    subsets: list[SubsetScores]
    """One for each subset and split; none where no kind reads tasks of this type back."""


def run(model: Any, task: Any, *, batch_size: int = 32, show_progress_bar: bool = False) -> Outcome:
    """The outcome of `model` (an encoder or a searcher in mteb's sense) on `task`; nothing is cached.

    `batch_size` texts are encoded at a time; `show_progress_bar` shows bars on stderr.
    """
    kind = kind_of_mteb_type(task.metadata.type)
    subsets = [] if kind is None else kind.record(task)
    with _quiet_datasets():
        result = mteb.evaluate(
            model,
            task,
            cache=None,
            co2_tracker=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": show_progress_bar},
            show_progress_bar=show_progress_bar,
        )
    return Outcome(task.metadata.type, float(result.task_results[0].get_score()), subsets)


def named_task(name: str) -> Any:
    """The task called `name` in mteb's registry. Raises AnchorvecError, with mteb's suggestion, if there is none."""
    try:
        return mteb.get_task(name)
    except KeyError as error:
        raise AnchorvecError(f"mteb has no task {name!r} ({error.args[0].removeprefix('KeyError: ')})") from error


def local_task(kind: TaskKind, data: LocalData) -> Any:
    """`data` as a task of mteb, of the class that `kind` names; it is loaded already."""
    metadata = TaskMetadata(
        name=data.name,
        description="A local folder.",
        dataset={"path": _LOCAL, "revision": data.fingerprint},
        type=kind.name,
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],  # mteb wants one; it changes no score
        main_score=kind.main_score,
    )
    base = getattr(mteb.abstasks, kind.mteb_class)
    task = type(f"Local{kind.name}", (base,), {"metadata": metadata})()
    kind.fill(task, data)
    task.data_loaded = True
    return task


def fingerprint(task: Any, *part: str) -> str:
    """A hash of what `task` is scored on, as 64 hexadecimal digits; `part` names the split and subset that is meant.

    A local task's is that of its data, whatever it is called, one of the registry's that of its name and of the
    repository and revision that its data are from.
    """
    source = dict(task.metadata.dataset)
    name = "" if source["path"] == _LOCAL else task.metadata.name
    return hashlib.sha256(json.dumps([name, source, part], sort_keys=True, default=str).encode()).hexdigest()


def encoder(model: SentenceTransformer, instruction: str | None) -> Any:
    """`model` as mteb calls it, with the model's own prompts for queries and documents.

    mteb drops each stored prompt whose key is neither a task in its registry nor a task or prompt type. Here
    all are kept, so that a prompt stored as `NAME-query` reaches the local folder NAME as well.
    `instruction` stands in for every query prompt.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the prompts that are put back below
        wrapped = SentenceTransformerEncoderWrapper(model)
    wrapped.model_prompts = {name: prompt for name, prompt in model.prompts.items() if prompt is not None}
    if instruction is not None:
        wrapped.model_prompts = {"document": wrapped.model_prompts.get("document", ""), "query": instruction}
    return wrapped


def searcher(model: Any) -> Any:
    """`model`, which has `index` and `search`, with the description of itself that mteb wants of a searcher."""
    model.mteb_model_meta = ModelMeta.create_empty()
    return model


def without_own(model: Any, own: Collection[str]) -> Any:
    """`model`, an encoder or a searcher, that ranks no document for the query of the same id where `own` has this id.

    mteb's `ignore_identical_ids` would go by the id alone, for all queries of a task.
    """
    if not own:
        return model
    return searcher(_WithoutOwn(SearchEncoderWrapper(model) if isinstance(model, EncoderProtocol) else model, own))


class _WithoutOwn:
    def __init__(self, ranks: Any, own: Collection[str]) -> None:
        self._ranks = ranks
        self._own = own

    def index(self, corpus: Any, **options: Any) -> None:
        self._ranks.index(corpus, **options)

    def search(self, queries: Any, **options: Any) -> dict[str, dict[str, float]]:
        rankings: dict[str, dict[str, float]] = self._ranks.search(queries, **options)
        for query in self._own:
            rankings.get(query, {}).pop(query, None)
        return rankings


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No bars for the copying of rows that mteb does before it encodes."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
