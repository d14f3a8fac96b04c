"""Tasks of mteb by name (of a task, a type, a benchmark), whether their data can be had, and their averages."""

import difflib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, get_args

import datasets.config
import huggingface_hub.constants
import mteb
from huggingface_hub import get_session, is_offline_mode
from mteb.abstasks.task_metadata import TaskType
from mteb.get_tasks import TASK_LIST
from mteb.results import ModelResult

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation.averages import Averages
from anchorvec.terminal import say

PAPER_15 = "paper-15"
"""The name of the 15 tasks of MTEB(eng, v1) that LLM2Vec, and the paper after it, try their choices on."""
_PAPER_15_TASKS = (
    *("ArguAna", "NFCorpus", "SciFact"),
    *("StackOverflowDupQuestions", "SciDocsRR"),
    *("BiorxivClusteringS2S", "MedrxivClusteringS2S", "TwentyNewsgroupsClustering"),
    "SprintDuplicateQuestions",
    *("Banking77Classification", "EmotionClassification", "MassiveIntentClassification"),
    *("STS17", "SICK-R", "STSBenchmark"),
)
_PING_SECONDS = 10


def groups(names: Iterable[str], languages: Sequence[str] = ()) -> list[Any]:
    """Each of `names` as a benchmark of mteb: a task by itself, all text tasks of a type, one of mteb's, or `paper-15`.

    `languages` (ISO 639-3, such as `eng`) are those that tasks and types are cut to; benchmarks name their own. Raises
    AnchorvecError, with the nearest names, for one that mteb does not know, and for what has no task in these
    languages.
    """
    try:
        return [_group(name, list(languages)) for name in dict.fromkeys(names)]
    except ValueError as error:
        if isinstance(error, AnchorvecError):
            raise
        raise AnchorvecError(f"languages: {str(error).rstrip('.')}; write them as in eng, deu, kor") from error


def _group(name: str, languages: list[str]) -> Any:
    if name in get_args(TaskType):
        options = {"modalities": ["text"], "exclusive_modality_filter": True}
        tasks = mteb.get_tasks(task_types=[name], languages=languages or None, **options)
        if not tasks:
            raise AnchorvecError(f"mteb has no task of the type {name} for texts in these languages; name another type")
        return mteb.Benchmark(name=name, tasks=tasks)
    if name == PAPER_15:
        of_name = {task.metadata.name: task for task in mteb.get_benchmark("MTEB(eng, v1)").tasks}
        return mteb.Benchmark(name=name, tasks=[of_name[task] for task in _PAPER_15_TASKS])
    with suppress(KeyError):
        return mteb.get_benchmark(name)
    try:
        return mteb.Benchmark(name=name, tasks=[mteb.get_task(name, languages=languages or None)])
    except KeyError:
        raise AnchorvecError(f"mteb has no task, type or benchmark {name!r}; {_nearest(name)}") from None


def notes(groups: Iterable[Any], languages: Sequence[str]) -> list[str]:
    """What is to be said of `groups`: a task that has a newer version, a benchmark that `languages` do not act on."""
    found = []
    for group in groups:
        names = [task.metadata.name for task in group.tasks]
        if names == [group.name] and group.tasks[0].superseded_by:
            found.append(f"{group.name}: mteb has a newer version of it, {group.tasks[0].superseded_by}")
        if languages and names != [group.name] and group.name not in get_args(TaskType):
            found.append(f"{group.name}: a benchmark names its own languages; --language does not act on it")
    return found


def _nearest(name: str) -> str:
    known = [PAPER_15, *get_args(TaskType), *(task.metadata.name for task in TASK_LIST)]
    for benchmark in mteb.get_benchmarks():
        known += [benchmark.name, *(benchmark.aliases or ())]
    by_lower = {found.lower(): found for found in known}
    close = difflib.get_close_matches(name.lower(), by_lower)
    lists = "`mteb available-tasks` and `mteb available-benchmarks` list them"
    return f"nearest: {', '.join(by_lower[found] for found in close)}" if close else lists


def tasks_of(groups: Iterable[Any]) -> dict[str, Any]:
    """Each task of `groups` by its name, once, with all splits and subsets that any of them names."""
    tasks: dict[str, Any] = {}
    for task in (task for group in groups for task in group.tasks):
        name = task.metadata.name
        tasks[name] = fresh(task, [tasks[name], task] if name in tasks else [task])
    return tasks


def fresh(task: Any, like: Sequence[Any] = ()) -> Any:
    """`task` as new, with its own splits and subsets, or those of all `like`: it draws as if it were the first one.

    The tasks of a benchmark are the same objects in the whole process, each with generators of its own.
    """
    like = like or [task]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is in beta, which mteb said when it was named
        new = type(task)()
    new.hf_subsets = list(dict.fromkeys(subset for one in like for subset in one.hf_subsets))
    return new.filter_eval_splits(list(dict.fromkeys(split for one in like for split in one.eval_splits)))


def parts(task: Any) -> list[Any]:
    """The tasks whose data `task` is scored on: itself, or those that it averages."""
    return list(task.metadata.tasks) if task.is_aggregate else [task]


def without_data(tasks: Iterable[Any]) -> dict[str, str]:
    """Of `tasks` those whose data cannot be had, and why; the others' are in the cache of Hugging Face afterwards."""
    reasons = {}
    for task in tasks:
        try:
            task.load_data()
        except (MemoryError, AnchorvecError):
            raise
        except Exception as error:  # whatever a library says of a host, a file, a format
            line = str(error).strip().split("\n")[0].replace(repr(task.metadata.dataset["path"]), "it")
            reasons[task.metadata.name] = f"{type(error).__name__}: {line}"
        else:
            task.unload_data()
    return reasons


@contextmanager
def offline_unless_reachable() -> Iterator[None]:
    """A context without network if Hugging Face cannot be reached, which a line says.

    Each file of each task would be asked for five times, with pauses: a minute a task, even where all is in the cache.
    """
    if is_offline_mode() or _reachable():
        yield
        return
    say(f"{huggingface_hub.constants.ENDPOINT} cannot be reached; of MTEB's data those that are in its cache are used")
    before = datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = False, before


def _reachable() -> bool:
    try:
        get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_PING_SECONDS)
    except Exception:  # of whichever HTTP library it stands on
        return False
    return True


def averages(group: Any, results: Mapping[str, Any]) -> Averages:
    """What mteb averages for the benchmark `group`: by type and over all, or whatever the benchmark names.

    Over those of its tasks that have one of `results`, mteb's own, by task.
    """
    scored = [task for task in group.tasks if task.metadata.name in results]
    if not scored:
        return Averages(0, len(group.tasks), {})
    of_scored = [results[task.metadata.name] for task in scored]
    model = ModelResult(model_name="this/model", model_revision="0", task_results=of_scored)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        [means] = replace(group, tasks=scored).get_score(mteb.BenchmarkResults(model_results=[model])).values()
    means.pop("Rank", None)
    return Averages(len(scored), len(group.tasks), {name: mean for name, mean in means.items() if mean is not None})
