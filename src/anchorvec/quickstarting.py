"""The whole job on this machine, in a given time: an ordinary decoder LLM becomes a tested embedder."""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from anchorvec.data import Pairs, docstrings, read_pairs
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import TaskScores, bm25_scores, evaluate, scores_table
from anchorvec.exporting import Exported, export, load_stage
from anchorvec.files import write_json, write_text
from anchorvec.recipe import Recipe, StageOne, StageTwo, load_recipe, save_recipe
from anchorvec.reconstruction import PairTokenizer
from anchorvec.training import (
    build_base,
    describe_run,
    new_run_folder,
    reconstruction_dataset,
    train_stage_one,
    train_stage_two,
)

STAGE_ONE_SHARE = 0.1
"""Of the time for training; the rest is Stage II's."""

PROBE_PAIRS = 8
"""Pairs in each of the two steps by which a stage's speed is measured."""

_FULL_SCORE_SET = {"n_queries": 500, "n_documents": 1200}
_SMALL_SCORE_SET = {"n_queries": 100, "n_documents": 240}

TITLES = {
    "bm25": "BM25",
    "untrained": "untrained",
    "stage_one": "after Stage I",
    "stage_two": "after Stage II",
}


@dataclass(frozen=True)
class QuickstartResult:
    """What `quickstart` made: the run's folder, the exported model, and the scores of each step on the way."""

    output: str
    model: str
    corpus: str
    minutes: float
    steps: dict[str, int]
    scores: dict[str, TaskScores]
    score_set: dict[str, Any]
    export: Exported

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self) | {"scores": {name: scores.to_dict() for name, scores in self.scores.items()}}

    def __rich__(self) -> Table:
        queries, documents = self.score_set["score_queries"], self.score_set["score_documents"]
        packages = " and ".join(self.score_set["held_out"])
        return scores_table(
            {TITLES[name]: scores for name, scores in self.scores.items()},
            title=f"{queries} queries over {documents:,} documents of {packages}; 95% intervals",
        )


def quickstart(
    output: str | Path,
    *,
    minutes: float = 20,
    seed: int = 0,
    stage_one: bool = True,
    overrides: Sequence[str] = (),
) -> QuickstartResult:
    """Train the recipe `quickstart` within `minutes` of wall time, scoring included, and export the result.

    The clock starts with the process. BM25 and the model before training and after each stage are scored on docstrings
    of packages that no training pair comes from: 500 queries over 1,200 documents, a fifth of that if `minutes` is
    below 10. The steps of both stages are planned from the speed measured here
    and saved in the run's recipe. `overrides` replace values of that recipe. Raises AnchorvecError if `output` is in
    use, or if `minutes` are too few for one step of each stage.
    """
    deadline = psutil.Process().create_time() - time.time() + time.monotonic() + 60 * minutes
    say = Console(stderr=True).print
    recipe = load_recipe("quickstart", [f"output={json.dumps(str(output))}", f"seed={seed}", *overrides])
    if not stage_one:
        recipe = recipe.model_copy(update={"stage_one": None})
    folder = new_run_folder(recipe)

    say("reading the docstrings of the installed packages")
    size = _FULL_SCORE_SET if minutes >= 10 else _SMALL_SCORE_SET
    data = docstrings.quickstart_data(seed=seed, **size)
    corpus = folder / "score_set"
    docstrings.write_beir(data, corpus)
    rows = [{"query": pair.query, "positive": pair.document} for pair in data.train]
    write_text(folder / "pairs.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    source = recipe.data.train[0].model_copy(update={"path": str(folder / "pairs.jsonl")})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": [source]})})
    pairs = {source.name: read_pairs(source.path)}
    write_json(folder / "run.json", describe_run(recipe, pairs) | {"score_set": data.description})
    start = build_base(recipe, folder / "base")

    scores: dict[str, TaskScores] = {}

    def score(name: str, system: Callable[[], TaskScores]) -> None:
        say(f"scoring: {TITLES[name]}")
        scores[name] = system()
        say(f"  nDCG@10 {scores[name].metrics['ndcg_at_10']}")
        write_json(folder / "scores.json", {key: {corpus.name: value.to_dict()} for key, value in scores.items()})

    def embedder_scores(stage: Path) -> TaskScores:
        return _only(evaluate(load_stage(stage), data=[corpus], batch_size=recipe.evaluation.batch_size))

    score("bm25", lambda: bm25_scores(corpus))
    score("untrained", lambda: embedder_scores(start))

    # Each later scoring and the export take as long as the first scoring did.
    stages = [stage for stage in (recipe.stage_one, recipe.stage_two) if stage is not None]
    one_scoring = scores["untrained"].seconds
    left = deadline - time.monotonic() - len(stages) * one_scoring - _EXPORT_SECONDS
    recipe = plan_steps(recipe, start, pairs, seconds=left)
    save_recipe(recipe, folder / "recipe.yaml")
    if recipe.stage_one is not None:
        say(f"Stage I: {recipe.stage_one.steps} steps of {recipe.stage_one.pairs_per_step} pairs")
        start = train_stage_one(recipe, start, folder / "stage_one", pairs, deadline=deadline)
        score("stage_one", lambda: embedder_scores(folder / "stage_one"))
    if recipe.stage_two is not None:
        say(f"Stage II: {recipe.stage_two.steps} steps of {recipe.stage_two.pairs_per_step} pairs")
        training_ends = deadline - one_scoring - _EXPORT_SECONDS
        start = train_stage_two(recipe, start, folder / "stage_two", pairs, deadline=training_ends)
        score("stage_two", lambda: embedder_scores(folder / "stage_two"))

    say("exporting, and comparing the export with the run")
    exported = export(folder, folder / "model")
    result = QuickstartResult(
        output=str(folder),
        model=exported.folder,
        corpus=str(corpus),
        minutes=(time.monotonic() - deadline) / 60 + minutes,
        steps={
            name: stage.steps
            for name, stage in (("stage_one", recipe.stage_one), ("stage_two", recipe.stage_two))
            if stage is not None
        },
        scores=scores,
        score_set=data.description,
        export=exported,
    )
    write_json(folder / "result.json", result.to_dict())
    return result


def plan_steps(recipe: Recipe, start: Path, pairs: Mapping[str, Pairs], *, seconds: float) -> Recipe:
    """`recipe` with as many steps in each stage as fit into `seconds`, by the speed of two small steps here."""
    began = time.monotonic()
    speeds = {}
    for name in ("stage_one", "stage_two"):
        if getattr(recipe, name) is not None:
            speeds[name] = _tokens_per_second(recipe, name, start, pairs)
    seconds -= time.monotonic() - began
    tokenize = PairTokenizer(AutoTokenizer.from_pretrained(start))
    rows = reconstruction_dataset(recipe, pairs).shuffle(seed=recipe.seed)
    batch = tokenize(list(rows.select(range(min(256, len(rows))))))["pairs"]
    tokens = {
        "stage_one": statistics.mean(pair.tokens for pair in batch),
        "stage_two": statistics.mean(len(pair.query) + len(pair.document) for pair in batch),
    }
    planned = {}
    for name, speed in speeds.items():  # Stage I first: Stage II gets what it leaves
        stage: StageOne | StageTwo = getattr(recipe, name)
        share = STAGE_ONE_SHARE if name == "stage_one" and len(speeds) > 1 else 1.0
        seconds_per_step = tokens[name] * stage.pairs_per_step / speed
        steps = max(1, int(share * seconds / seconds_per_step))
        planned[name] = stage.model_copy(update={"steps": steps, "warmup_steps": steps // 20})
        seconds -= steps * seconds_per_step
    if seconds < 0:
        raise AnchorvecError(
            f"the time is too short: for one step of each stage {-seconds:.0f} s are missing; give more --minutes"
        )
    return recipe.model_copy(update=planned)


_EXPORT_SECONDS = 30.0


def _tokens_per_second(recipe: Recipe, name: str, start: Path, pairs: Mapping[str, Pairs]) -> float:
    """The speed of a stage's second step; the first one also pays for memory and caches."""
    records: list[Mapping[str, Any]] = []
    changes = {"steps": 2, "warmup_steps": 0, "pairs_per_step": PROBE_PAIRS, "log_every": 1}
    with tempfile.TemporaryDirectory() as scratch:
        probe = recipe.model_copy(
            update={name: getattr(recipe, name).model_copy(update=changes), "output": Path(scratch)}
        )
        train_stage = train_stage_one if name == "stage_one" else train_stage_two
        train_stage(probe, start, Path(scratch) / name, pairs, on_log=records.append)
    first, second = records
    return float(second["tokens"] - first["tokens"]) / float(second["seconds"] - first["seconds"])


def _only(scores: Mapping[str, TaskScores]) -> TaskScores:
    [value] = scores.values()
    return value
