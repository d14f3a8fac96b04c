"""What a model is compared with: other models, BM25, its own start, and earlier results."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation.reranking import RERANKING
from anchorvec.evaluation.retrieval import RETRIEVAL
from anchorvec.evaluation.scores import Scores
from anchorvec.evaluation.tasks import kind_of_mteb_type
from anchorvec.files import user_path
from anchorvec.run import STAGES, Run, is_embedder
from anchorvec.terminal import say

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

BM25, UNTRAINED = "bm25", "untrained"
RANKED = (RETRIEVAL, RERANKING)
"""The kinds of tasks that BM25 is scored on."""


@dataclass(frozen=True)
class Baseline:
    """What a model is compared with: BM25, a model to be scored, or scores that are there already."""

    name: str
    model: str | Path | None = None
    earlier: Sequence[Scores] | None = None


def check_baselines(
    baselines: Sequence[str | Path], model: "SentenceTransformer | str | Path | None"
) -> list[Baseline]:
    """What `baselines` are, for `model`; files are read, models are looked at and not loaded.

    Raises AnchorvecError for a name that is none, one that is named twice, and a file that holds no scores.
    """
    names = [str(name) for name in baselines]
    for name in names:
        if names.count(name) > 1:
            raise AnchorvecError(f"the baseline {name!r} is named twice; name it once")
    return [_baseline(name, model) for name in names]


def _baseline(name: str, model: "SentenceTransformer | str | Path | None") -> Baseline:
    from anchorvec.model.folders import identify, instead

    path = user_path(name)
    if name == BM25:
        return Baseline(name)
    if name == UNTRAINED:
        return Baseline(name, model=_base_of(model))
    if path.is_file() or path.suffix == ".json":
        return Baseline(name, earlier=_read(path))
    found = identify(name)
    if found.kind == "run":
        return Baseline(name, earlier=_read_run(Run(path)))
    if found.kind not in ("embedder", "LoRA stage"):
        raise AnchorvecError(instead(found, wanted=f"an embedder, {BM25}, {UNTRAINED}, a run or a file of results"))
    return Baseline(name, model=name)


def _base_of(model: "SentenceTransformer | str | Path | None") -> Path:
    """The untrained embedder of the run that the folder `model` is in."""
    folder = user_path(model).absolute() if isinstance(model, str | Path) else None
    if folder is None or not is_embedder(Run(folder.parent).base):
        raise AnchorvecError(
            f"{UNTRAINED}: {folder or 'the model'} is in no run with a folder base; name the folder of its start"
        )
    return Run(folder.parent).base


def _read_run(run: Run) -> list[Scores]:
    """The scores of the last stage of a run that was scored."""
    if not run.scores.is_file():
        raise AnchorvecError(f"{run.folder}: this run has no scores; name its folder model, to score it now")
    return _read(run.scores)


def _read(file: Path) -> list[Scores]:
    """The scores in a result of `evaluate`, or of the last stage in the scores of a run."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        stages = [content[stage] for stage in (UNTRAINED, *STAGES) if stage in content]
        of_tasks = stages[-1] if stages else content.get("scores", content)
        return [Scores.from_dict(of_task) for of_task in of_tasks.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AnchorvecError(
            f"{file}: this is neither a result of `anchorvec evaluate --json` nor the scores.json of a run ({error!r})"
        ) from error


def score_baselines(
    baselines: Sequence[Baseline],
    results: Mapping[str, Scores],
    *,
    score: Callable[[str | Path], Mapping[str, Scores]],
    score_bm25: Callable[[Sequence[str]], Mapping[str, Scores]],
) -> dict[str, Mapping[str, Scores]]:
    """The scores of `baselines` on what the model was scored on, by name and task.

    - `results`: the model's, by task.
    - `score`: gives the scores of a model that is named.
    - `score_bm25`: gives those of BM25 on tasks that are named.

    What a baseline has no scores of is said. A model that cannot be scored is left out, with the reason.
    """
    found: dict[str, Mapping[str, Scores]] = {}
    for baseline in baselines:
        if baseline.earlier is not None:
            found[baseline.name] = _on_the_same(baseline.name, baseline.earlier, results)
            continue
        say(f"scoring the baseline {baseline.name}")
        try:
            if baseline.model is not None:
                found[baseline.name] = score(baseline.model)
            else:
                ranked = [task for task, scores in results.items() if kind_of_mteb_type(scores.kind) in RANKED]
                _say_missing(baseline.name, "it ranks documents", results.keys() - set(ranked), results)
                found[baseline.name] = score_bm25(ranked)
        except AnchorvecError as error:  # the model's own scores are there, and stay
            say(f"{baseline.name}: left out: {error}")
    return found


def _on_the_same(name: str, earlier: Sequence[Scores], results: Mapping[str, Scores]) -> dict[str, Scores]:
    """Of `earlier` scores those on the data of `results`, by their tasks."""
    of_data = {(scores.kind, scores.fingerprint): scores for scores in earlier}
    keys = {task: (scores.kind, scores.fingerprint) for task, scores in results.items()}
    found = {task: of_data[key] for task, key in keys.items() if key in of_data}
    _say_missing(name, "its scores are on other data", keys.keys() - found.keys(), results)
    formats = {scores.dtype for scores in found.values()} - {results[task].dtype for task in found}
    if formats:
        say(f"{name}: scored in {', '.join(sorted(formats))}, other than the model")
    return found


def _say_missing(name: str, reason: str, missing: Any, results: Mapping[str, Scores]) -> None:
    """Name the tasks that a baseline has no scores of, in their order."""
    tasks = [f"{task} ({scores.kind})" for task, scores in results.items() if task in missing]
    if tasks:
        say(f"{name}: {reason}, so there are none of {', '.join(tasks)}")
