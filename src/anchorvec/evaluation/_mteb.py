"""What we ask of mteb for one task: a run of it, local data as one, our model as mteb calls it. See `_mteb_*` too."""

import hashlib
import json
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mteb
import torch
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta, SearchEncoderWrapper, SentenceTransformerEncoderWrapper
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation.reranking import RERANKING
from anchorvec.evaluation.retrieval import RETRIEVAL
from anchorvec.evaluation.task_kind import LocalData, SubsetScores, TaskKind
from anchorvec.evaluation.tasks import kind_of_mteb_type
from anchorvec.model.nearest import ExactIndex, IndexKind, UsearchIndex, recall, scratch_array
from anchorvec.model.text_encoder import TextEncoder, side_prompt

_LOCAL = "local"


@dataclass(frozen=True)
class Outcome:
    """What mteb says of one task."""

    mteb_type: str
    main_score: float
    subsets: list[SubsetScores]
    """One for each subset and split; none where no kind reads tasks of this type back, or the task averages others."""
    result: Any = None
    """mteb's own result of the task."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else scores say of the run: `seconds`, and what was kept with it."""


def run(model: Any, task: Any, *, draw: tuple[int, int] | None = None) -> Outcome:
    """The outcome of `model` (an encoder or a searcher in mteb's sense) on `task`; mteb caches and shows nothing.

    `draw`: of its documents, if it ranks some, the relevant ones and so many others, drawn with this seed.
    """
    # A task made of others (CQADupstackRetrieval) only averages their scores.
    kind = None if isinstance(task, AbsTaskAggregate) else kind_of_mteb_type(task.metadata.type)
    subsets = [] if kind is None else kind.record(task)
    if draw is not None and kind is not None and kind.draw_documents is not None:
        kind.draw_documents(task, *draw)
    start = time.perf_counter()
    with _quiet_datasets(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The task .* is superseded")  # said where it is named
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")  # after the 100 steps that mteb gives it
        result = mteb.evaluate(
            model,
            task,
            cache=None,
            co2_tracker=False,
            encode_kwargs={"show_progress_bar": False},
            show_progress_bar=False,
        )
    [result] = result.task_results
    seconds = time.perf_counter() - start
    return Outcome(task.metadata.type, float(result.get_score()), subsets, result, {"seconds": seconds})


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


def characters(task: Any) -> int | None:
    """Of all texts of `task`; None where that is not known before it is fetched."""
    if task.data_loaded:
        return _characters(task.dataset)
    of_splits = task.metadata.descriptive_stats or {}
    parts = [part for split in task.eval_splits for part in of_splits.get(split, {}).values() if isinstance(part, dict)]
    return sum(part.get("total_text_length", 0) for part in parts) or None


def _characters(data: Any) -> int:
    """Of the texts in data sets, in mappings of whatever depth."""
    if isinstance(data, Dataset):
        columns = [name for name, feature in data.features.items() if getattr(feature, "dtype", None) == "string"]
        return sum(len(text or "") for name in columns for text in data[name])
    return sum(map(_characters, data.values())) if isinstance(data, Mapping) else 0


def fingerprint(task: Any, *part: str) -> str:
    """A hash of what `task` is scored on, as 64 hexadecimal digits; `part` names the split and subset that is meant.

    A local task's is that of its data, whatever it is called, one of the registry's that of its name and of the
    repository and revision that its data are from.
    """
    source = dict(task.metadata.dataset)
    name = "" if source["path"] == _LOCAL else task.metadata.name
    return hashlib.sha256(json.dumps([name, source, part], sort_keys=True, default=str).encode()).hexdigest()


class Encoder(SentenceTransformerEncoderWrapper):  # type: ignore[misc]  # mteb is not typed here
    """The model of `encode` as mteb calls it, with its own prompts; `instruction` stands in for those of queries.

    In it `{instruction}` is replaced by mteb's own instruction of the task.

    mteb drops each stored prompt whose key is neither a task in its registry nor a task or prompt type. Here all are
    kept, so that a prompt stored as `NAME-query` reaches the local folder NAME as well. And mteb has a prompt for the
    texts of STS, classification, clustering and the like, which are neither queries nor documents, only where one is
    stored for the task or its type. Here they have the instruction, or else the model's default prompt, or else what
    a query has.
    """

    def __init__(self, encode: TextEncoder, instruction: str | None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the prompts that are put back below
            super().__init__(encode.model)
        self._encode = encode
        self._stored = {name: prompt for name, prompt in encode.model.prompts.items() if prompt is not None}
        self._instruction = instruction
        self.read_as_queries: set[str] = set()
        """Tasks with texts that are neither queries nor documents, and had the query prompt that the model stores."""
        self.prompts: dict[str, dict[str, str]] = {}
        """What stood before the texts of each task, by their side: `query`, `document`, or `text` that is neither."""

    def check(self, task: Any) -> None:
        """Raise AnchorvecError for a task of images, say, that the model does not read."""
        unread = sorted(set(task.metadata.modalities) - set(self.mteb_model_meta.modalities))
        if unread:
            raise AnchorvecError(
                f"{task.metadata.name}: a task with {' and '.join(unread)}, which this model cannot read"
            )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **options: Any,
    ) -> Any:
        """The vectors of `inputs`: (texts, dim).

        `task_metadata`, `hf_split`, `hf_subset` and `prompt_type` are what mteb says of them, `options` go on to it.
        """
        prompt = self._prompt(task_metadata, prompt_type)
        side = None if prompt_type is None else prompt_type.value
        read = side_prompt(self.model, side) if prompt is None else prompt
        self.prompts.setdefault(task_metadata.name, {})[side or "text"] = read or ""
        if not {"image", "audio", "video"} & set(inputs.dataset.features):
            texts = [text for batch in inputs for text in batch["text"]]
            return self._encode(texts, prompt=prompt, side=side, allocate=scratch_array)
        self.model_prompts = {} if prompt is None else {task_metadata.name: prompt}  # where mteb looks it up
        return super().encode(
            inputs,
            task_metadata=task_metadata,
            hf_split=hf_split,
            hf_subset=hf_subset,
            prompt_type=prompt_type,
            **options,
        )

    def _prompt(self, task: TaskMetadata, prompt_type: PromptType | None) -> str | None:
        """None: the one that the model has for such texts by default."""
        if self._instruction is not None and prompt_type != PromptType.document:
            return self._instruction.replace("{instruction}", self._instruction_of(task, prompt_type))
        self.model_prompts = self._stored
        name = self.get_prompt_name(task, prompt_type)
        if name is None and prompt_type is None and self.model.default_prompt_name is None:
            name = self.get_prompt_name(task, PromptType.query)
            if name is not None and self._stored[name]:
                self.read_as_queries.add(task.name)
        return None if name is None else self._stored[name]

    def _instruction_of(self, task: TaskMetadata, prompt_type: PromptType | None) -> str:
        """The instruction that mteb has for queries of `task`, or for all texts; of a local one that of its kind."""
        instruction = self.get_instruction(task, prompt_type)
        return str(instruction.get("query", "") if isinstance(instruction, dict) else instruction)


def searcher(model: Any) -> Any:
    """`model`, which has `index` and `search`, with the description of itself that mteb wants of a searcher."""
    model.mteb_model_meta = ModelMeta.create_empty()
    return model


def ranker(encoder: Encoder, task: Any, index: IndexKind | None) -> Any:
    """`encoder` as `task` takes it: for one that ranks documents with the search in it, by `index`."""
    ranks = task.metadata.type in (*RETRIEVAL.mteb_types, *RERANKING.mteb_types)
    return _Ranker(encoder, index) if ranks else encoder


class _Ranker(SearchEncoderWrapper):  # type: ignore[misc]  # mteb is not typed here
    """mteb's exact search, block by block, or one by usearch; candidates that are given are ranked exactly."""

    def __init__(self, encoder: Encoder, index: IndexKind | None) -> None:
        super().__init__(encoder, index_backend=_Approximate(encoder.model) if index == "usearch" else None)
        self.recall: float | None = None
        self.corpus_chunk_size: int

    def search(self, queries: Any, *, top_ranked: Any = None, **options: Any) -> Any:
        if top_ranked is not None:
            self.index_backend = None
        # the scores of a block, of all queries, in a gigabyte
        self.corpus_chunk_size = min(self.corpus_chunk_size, max(1_000, 2**28 // max(1, len(queries))))
        found = super().search(queries, top_ranked=top_ranked, **options)
        if self.index_backend is not None:
            self.recall = min(self.index_backend.recalls)  # of the subsets
        return found


class _Approximate:
    """usearch as an index of documents in mteb's sense, compared with an exact search on some of the queries."""

    def __init__(self, model: SentenceTransformer) -> None:
        self._model = model
        self.recalls: list[float] = []

    def add_documents(self, embeddings: Any, idxs: Any) -> None:
        self._exact, self._index = ExactIndex(embeddings, self._model), UsearchIndex(embeddings, self._model)

    def search(self, embeddings: Any, top_k: int, *_: Any, **__: Any) -> tuple[list[list[float]], list[list[int]]]:
        queries = torch.as_tensor(embeddings)
        self.recalls.append(recall(self._index, self._exact, queries[:100]))
        found = self._index.search(queries, top_k)
        return [[score for _, score in hits] for hits in found], [[row for row, _ in hits] for hits in found]

    def clear(self) -> None:
        del self._exact, self._index


def without_own(model: Any, own: Collection[str]) -> Any:
    """`model`, a searcher, that ranks no document for the query of the same id where `own` has this id.

    mteb's `ignore_identical_ids` would go by the id alone, for all queries of a task.
    """
    if not own:
        return model
    return searcher(_WithoutOwn(model, own))


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
