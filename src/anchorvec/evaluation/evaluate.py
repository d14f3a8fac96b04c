"""Scores embedders and BM25 on folders of test data and on MTEB tasks, all through mteb."""

import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation.averages import Averages
from anchorvec.evaluation.baselines import RANKED, check_baselines, score_baselines
from anchorvec.evaluation.comparison import Comparison
from anchorvec.evaluation.scores import Scores
from anchorvec.evaluation.task_kind import LocalData
from anchorvec.evaluation.tasks import kind_of_data, kind_of_mteb_type, load_folder, sets_in
from anchorvec.model.vector_cache import vector_cache
from anchorvec.randomness import randomness_kept
from anchorvec.terminal import Bar, say

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from anchorvec.evaluation._mteb import Encoder
    from anchorvec.evaluation.named import NamedTasks


def evaluate(
    model: "SentenceTransformer | str | Path",
    *,
    data: Sequence[str | Path | LocalData] = (),
    tasks: Sequence[str] = (),
    languages: Sequence[str] = (),
    results: str | Path | None = None,
    batch_size: int = 32,
    instruction: str | None = None,
    seed: int = 0,
    baselines: Sequence[str | Path] = (),
    cache: bool = True,
    devices: Sequence[str] = (),
    ray: bool = False,
    sample: int | None = None,
    index: Literal["exact", "usearch"] | None = None,
    show_progress_bar: bool = False,
) -> "Evaluation":
    """The scores of `model` on every folder of `data` and every MTEB task of `tasks`.

    A registered task leaves out what mteb says, a folder each query's own document (`BeirData.own_documents`).
    The keys are names of folders and tasks; a task of several splits or subsets (languages) has one
    entry for each, `TASK/SPLIT/SUBSET`. A folder is read and scored without network and writes nothing but
    the vectors that are kept; an MTEB task is fetched to the cache of Hugging Face. Tasks whose data cannot be had are
    named in a warning before anything is encoded, and the others are run.

    - `model`: a SentenceTransformer, its folder, or its hub id. Its stored `query` and `document` prompts are used,
      and a prompt stored as `NAME-query` for the task or folder NAME. Texts that are neither queries nor documents, as
      those of STS or classification, have a prompt stored for their task or its type, the model's default prompt, or
      else the query prompt; a warning names the tasks where it is this. Texts are cut by its tokenizer.
    - `data`: test sets of a kind in `tasks.KINDS`, such as a folder in BEIR layout or a file of scored pairs; folders
      of such sets; or what was read of them.
    - `tasks`: names of MTEB tasks, of types of them (`STS`: all of texts alone), of benchmarks (`MTEB(eng, v1)`,
      `BEIR`), or `paper-15`. Each is run on the splits and subsets that it names; the averages of a benchmark or a type
      are in `averages` of what comes back.
    - `languages`: of tasks and types, these alone, such as `eng`; benchmarks name their own.
    - `results`: a folder where results of MTEB tasks are kept as `mteb.ResultCache` keeps them: by the model's name, a
      hash of its folder, and task. One that has a result there is not run again. `model` must be named, not loaded.
    - `batch_size`: texts encoded at a time.
    - `instruction`: replaces the stored query prompts, and all prompts of texts that are no documents either. In it
      `{instruction}` stands for mteb's own instruction of each task.
    - `seed`: of the intervals, and of the `sample`.
    - `baselines`: what it is compared with on the same data, in `comparison` of what comes back: models by folder or
      hub id, which are read with the prompts that are stored with them; `bm25`, on retrieval and re-ranking;
      `untrained`, the folder `base` of the run that `model` is in; an earlier run, or a file that `anchorvec evaluate
      --json` wrote, by the scores that are in it.
    - `cache`: keeps vectors on disk, and encodes no text of which one is kept (`model.vector_cache`).
    - `devices`: share the texts out among as many processes, such as `["cuda:0", "cuda:1"]` or `["cpu", "cpu"]`.
    - `ray`: encodes on the Ray cluster that is found, or one on this machine, with as many workers as `devices` if any.
    - `sample`: of the documents of retrieval, ranks all relevant ones and so many others, which are drawn; its scores
      are marked, and higher than those on all documents.
    - `index`: `exact`, as by default, or `usearch`, which may miss documents; its scores are marked with its recall.
      Neither these nor those of a sample are kept in `results`.
    - `show_progress_bar`: shows a bar over all of it on stderr, with the time left, where that is a terminal.

    Raises AnchorvecError for data that cannot be used, an unknown task, one of more than texts, and if the data of no
    task can be had.
    """
    if not data and not tasks:
        raise AnchorvecError("there is nothing to score on; name a test set or an MTEB task")
    others = check_baselines(baselines, model)
    local = check_test_data(data=data, tasks=tasks, languages=languages)
    if tasks and results is not None and (sample is not None or index == "usearch"):
        say(f"scores of a sample or an approximate search are not kept in {results}, nor are kept ones taken")
        results = None
    kept = vector_cache() if cache else None
    encoding = {"batch_size": batch_size, "cache": kept, "devices": devices, "ray": ray}
    asked = _Asked(local, tasks, languages, results, seed, encoding, show_progress_bar, sample, index)
    found = _evaluate(model, asked, instruction)
    of_others = score_baselines(
        others,
        found,
        score=lambda other: _evaluate(other, asked, None),
        score_bm25=lambda names: _bm25(names, asked),
    )
    named = str(model) if isinstance(model, str | Path) else ""
    found.comparison = Comparison(found, of_others, model=named, seed=seed)
    return found


class Evaluation(dict[str, Scores]):
    """The scores of a model by test set and task.

    `averages` are those of each benchmark and type by name, `comparison` is what the scores are beside those of
    baselines.
    """

    def __init__(self, scores: Mapping[str, Scores]) -> None:
        """`scores` by test set and task."""
        super().__init__(scores)
        self.averages: dict[str, Averages] = {}
        self.comparison = Comparison(self)


@dataclass(frozen=True)
class _Asked:
    """What `evaluate` was asked to score on, and how; `encoding` are options of a TextEncoder."""

    local: Sequence[LocalData]
    tasks: Sequence[str]
    languages: Sequence[str]
    kept_in: str | Path | None
    seed: int
    encoding: Mapping[str, Any]
    show_progress_bar: bool = False
    sample: int | None = None
    index: Literal["exact", "usearch"] | None = None

    @property
    def draw(self) -> tuple[int, int] | None:
        """How many documents are drawn beside the relevant ones, and the seed."""
        return None if self.sample is None else (self.sample, self.seed)


def _evaluate(model: "SentenceTransformer | str | Path", asked: _Asked, instruction: str | None) -> Evaluation:
    """`evaluate` on data that were read already."""
    with _side_effects_undone(), ExitStack() as stack:
        from anchorvec.evaluation import _mteb
        from anchorvec.evaluation.named import NamedTasks
        from anchorvec.model.loading import load_encoder, warn_of_named_prompts
        from anchorvec.model.nearest import check_index
        from anchorvec.model.text_encoder import TextEncoder

        # Names are looked up before anything is loaded or run, so that a misspelt one fails at once.
        own_tasks = {part.name: _mteb.local_task(kind_of_data(part), part) for part in asked.local}
        named = NamedTasks(asked.tasks, asked.languages, model=model, results=asked.kept_in, instruction=instruction)
        encoder, encode, of_model = None, None, {}
        if asked.local or named.to_run:
            stack.enter_context(named.network())
            model = load_encoder(model)
            if instruction is None:
                warn_of_named_prompts(model, [*own_tasks, *named.to_run])
            dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
            check_index(asked.index, model)
            encode = stack.enter_context(TextEncoder(model, **asked.encoding))
            of_model = {"device": encode.device, "dtype": dtype, "model": encode.fingerprint or ""}
            encoder = _mteb.Encoder(encode, instruction)
            for task in named.to_run.values():
                encoder.check(task)
            named.leave_out_without_data(alone=not asked.local)
        sizes = {name: _mteb.characters(task) for name, task in [*own_tasks.items(), *named.to_run.items()]}
        with Bar(sizes, shown=asked.show_progress_bar) as bar:
            if encode is not None:
                encode.on_texts = bar.advance
            results = Evaluation(_scores_of_tasks(asked, own_tasks, named, encoder, of_model, bar))
        results.averages = named.averages()
    if encode is not None:
        encode.say_kept()
    _say_unused(results, asked)
    if encoder is not None and encoder.read_as_queries:
        warnings.warn(
            "the texts of these tasks are neither queries nor documents, and were read with the query prompt that is "
            f"stored with the model: {', '.join(sorted(encoder.read_as_queries))}",
            stacklevel=3,
        )
    return results


def _scores_of_tasks(
    asked: _Asked,
    own_tasks: Mapping[str, Any],
    named: "NamedTasks",
    encoder: "Encoder | None",
    of_model: Mapping[str, str],
    bar: Bar,
) -> dict[str, Scores]:
    """Those of `own_tasks`, which are of the local data, and of the `named` ones, one after the other on `bar`.

    `encoder` reads texts; None: all scores are kept already. `of_model` are fields of the scores that say what read.
    """
    from anchorvec.evaluation import _mteb

    prompts = {} if encoder is None else encoder.prompts  # by task, filled while it runs
    own_documents = {part.name: kind_of_data(part).own_documents(part) for part in asked.local}
    results: dict[str, Scores] = {}
    for name, task in [*own_tasks.items(), *named.tasks.items()]:
        if name in own_tasks or name in named.to_run:
            bar.start(name)
        about = {**of_model, "prompts": prompts.setdefault(name, {})}
        system = encoder if encoder is None else _mteb.ranker(encoder, task, asked.index)
        if name in own_tasks:
            run = partial(_mteb.run, _mteb.without_own(system, own_documents[name]), task, draw=asked.draw)
        else:
            options = {"batch_size": asked.encoding["batch_size"], "draw": asked.draw}
            run = partial(named.outcome, name, system, about, **options)
        of_task = _scores(name, task, run, seed=asked.seed, draw=asked.draw, **about)
        recall = getattr(system, "recall", None)
        results |= {part: replace(scores, recall=recall) for part, scores in of_task.items()}
    return results


def _say_unused(results: Mapping[str, Scores], asked: _Asked) -> None:
    """Name the tasks for which a sample or an approximate search means nothing."""
    whole = [name for name, scores in results.items() if scores.sampled is None]
    if asked.sample is not None and whole:
        say(f"only documents of retrieval are sampled; scored in whole: {', '.join(whole)}")
    exact = [name for name, scores in results.items() if scores.recall is None]
    if asked.index == "usearch" and exact:
        say(f"only documents of retrieval are searched by usearch; scored exactly: {', '.join(exact)}")


def check_test_data(
    *, data: Sequence[str | Path | LocalData] = (), tasks: Sequence[str] = (), languages: Sequence[str] = ()
) -> list[LocalData]:
    """What is read of `data`, folders of test data; `tasks` and `languages` are those of `evaluate`.

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
    names = [part.name for part in local]
    if tasks:
        with _side_effects_undone():
            from anchorvec.evaluation import _mteb_names

            names += _mteb_names.tasks_of(_mteb_names.groups(tasks, languages))
    for name in names:
        if names.count(name) > 1:
            raise AnchorvecError(
                f"two data sets are named {name!r}; rename a folder, the name is the key of the result"
            )
    return local


def bm25_scores(data: str | Path | LocalData, *, seed: int = 0, sample: int | None = None) -> Scores:
    """The scores of BM25, as the module `bm25` says, by the same metrics as `evaluate`'s.

    - `data`: a test set of retrieval or re-ranking, or what was read of it.
    - `seed` and `sample`: as there.

    Raises AnchorvecError for data that cannot be used, or are of another kind.
    """
    require_extra()
    local = load_folder(data) if isinstance(data, str | Path) else data
    if kind_of_data(local) not in RANKED:
        layouts = " or ".join(kind.layout for kind in RANKED)
        raise AnchorvecError(f"{local.name}: BM25 is scored on retrieval and re-ranking; name a set with {layouts}")
    return _bm25([local.name], _Asked([local], (), (), None, seed, {}, sample=sample))[local.name]


def ranking_sets(data: Sequence[LocalData]) -> list[LocalData]:
    """Of `data` the sets that BM25 is scored on; the others are named in a line."""
    found = [part for part in data if kind_of_data(part) in RANKED]
    if others := [part.name for part in data if part not in found]:
        say(f"bm25: it ranks documents, so there are none of {', '.join(others)}")
    return found


def _bm25(names: Sequence[str], asked: _Asked) -> dict[str, Scores]:
    """The scores of BM25 under `names`, of local sets and of tasks of mteb, whose subsets have names of their own."""
    results: dict[str, Scores] = {}
    sets = {part.name: part for part in asked.local}
    with _side_effects_undone():
        from anchorvec.evaluation import _mteb, _mteb_names
        from anchorvec.evaluation.bm25 import Bm25

        named = _mteb_names.tasks_of(_mteb_names.groups(asked.tasks, asked.languages))
        for name in dict.fromkeys(name if name in sets else name.partition("/")[0] for name in names):
            part = sets.get(name)
            task = named[name] if part is None else _mteb.local_task(kind_of_data(part), part)
            own = () if part is None else kind_of_data(part).own_documents(part)
            run = partial(_mteb.run, _mteb.without_own(_mteb.searcher(Bm25()), own), task, draw=asked.draw)
            results |= _scores(name, task, run, seed=asked.seed, draw=asked.draw, device="cpu", dtype="float32")
    return {name: scores for name, scores in results.items() if name in names}


def _scores(
    name: str, task: Any, run: Callable[[], Any], *, seed: int, draw: tuple[int, int] | None = None, **about: Any
) -> dict[str, Scores]:
    """The scores of `task` after a `run`: one entry, or one for each of its subsets; these share the main score.

    `draw` is a sample and its seed, if documents were drawn, which makes them other data. `about` are fields of the
    scores that say what was run.
    """
    from anchorvec.evaluation import _mteb

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
        **outcome.about,
    }
    kind = kind_of_mteb_type(outcome.mteb_type)
    if kind is None or not outcome.subsets:
        return {name: Scores(metrics={}, per_item={}, counts={}, fingerprint=_mteb.fingerprint(task), **common)}
    drawn = []
    if draw is not None and kind.draw_documents is not None:
        common["sampled"] = draw[0]
        drawn = [f"{draw[0]} others, drawn with seed {draw[1]}"]
    several = len(outcome.subsets) > 1
    return {
        f"{name}/{part.split}/{part.subset}" if several else name: Scores(
            metrics=kind.intervals(part.per_item, seed),
            per_item=part.per_item,
            counts=part.counts,
            fingerprint=_mteb.fingerprint(task, part.split, part.subset, *drawn),
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
    own_cache = os.environ.get("MTEB_CACHE")
    os.environ.setdefault("MTEB_CACHE", tempfile.gettempdir())
    try:
        with randomness_kept():
            yield
    finally:
        if own_cache is None:
            del os.environ["MTEB_CACHE"]
