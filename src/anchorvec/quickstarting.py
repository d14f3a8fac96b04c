"""The whole job on this machine, in a given time: an ordinary decoder LLM becomes a tested embedder."""

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from anchorvec.data import DocstringData, Pairs, docstrings, read_pairs
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import TaskScores, bm25_scores, evaluate, require_extra, scores_table
from anchorvec.exporting import Exported, export
from anchorvec.files import write_json, write_text
from anchorvec.loading import load_encoder
from anchorvec.memory import release_freed_memory
from anchorvec.precision import resolve_precision
from anchorvec.progress import STAGE_TITLES
from anchorvec.recipe import Recipe, StageOne, StageTwo, load_recipe, save_recipe
from anchorvec.stage_data import reconstruction_dataset
from anchorvec.stages import pair_tokenizer, train_stage_one, train_stage_two
from anchorvec.training import build_base, describe_run, new_run_folder

STAGE_ONE_SHARE = 0.1
"""Of the time for training; the rest is Stage II's."""

_EXPORT_SECONDS = 30.0

_PLANNED_SHARE = 0.92
"""Of a stage's time: a machine may become slower than it was when it was measured, and a schedule should reach its
end (T13)."""

_FULL_SCORE_SET = 500, 1200  # queries, documents
_SMALL_SCORE_SET = 100, 240

TITLES = {
    "bm25": "BM25",
    "untrained": "untrained",
    **{name: f"after {title}" for name, title in STAGE_TITLES.items()},
}


@dataclass(frozen=True)
class QuickstartResult:
    """What `quickstart` made: the run's folder, the exported model, and the scores of each step on the way.

    `steps` are those that were trained, fewer than `planned_steps` where the time was over before.
    """

    output: str
    model: str
    corpus: str
    minutes: float
    steps: dict[str, int]
    planned_steps: dict[str, int]
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
    started: float | None = None,
) -> QuickstartResult:
    """Train the recipe `quickstart` within `minutes` of wall time, scoring included, and export the result.

    BM25 and the model before training and after each stage are scored on docstrings of packages that no training
    pair comes from: 500 queries over 1,200 documents, a fifth of that if `minutes` is below 10. The steps of both
    stages are planned from the speed measured here and saved in the run's recipe. `overrides` replace values of that
    recipe, but for its data, steps, warm-up and score set, which are the quickstart's own. Without `stage_one` the
    contrastive loss is alone: no Stage I, and no words in Stage II. The time counts from `started`, a `time.time()`
    (default: now). Raises AnchorvecError if `output` is in use, on several devices, or if `minutes` are too few for one
    step of each stage.
    """
    if not 0 < minutes < math.inf:
        raise AnchorvecError(f"minutes: {minutes} is no time to train in; give, for example, 20")
    began = time.monotonic() - (time.time() - started if started else 0)
    deadline = began + 60 * minutes
    say = Console(stderr=True).print
    recipe = load_recipe("quickstart", [f"output={json.dumps(str(output))}", f"seed={seed}", *overrides])
    recipe = recipe if stage_one else contrastive_alone(recipe)
    require_extra()
    folder = new_run_folder(recipe)

    say("reading the docstrings of the installed packages")
    n_queries, n_documents = _FULL_SCORE_SET if minutes >= 10 else _SMALL_SCORE_SET
    data = docstrings.quickstart_data(seed=seed, n_queries=n_queries, n_documents=n_documents)
    corpus = folder / "score_set"
    docstrings.write_beir(data, corpus)
    recipe, pairs = _training_pairs(recipe, data, folder / "pairs.jsonl")
    write_json(folder / "run.json", describe_run(recipe, pairs) | {"score_set": data.description})
    stage = build_base(recipe, folder / "base")

    scores: dict[str, TaskScores] = {}

    def score(name: str) -> None:
        say(f"scoring: {TITLES[name]}")
        release_freed_memory()  # of a finished stage
        scores[name] = bm25_scores(corpus) if name == "bm25" else _embedder_scores(recipe, stage, corpus)
        say(f"  nDCG@10 {scores[name].metrics['ndcg_at_10']}")
        write_json(folder / "scores.json", {key: {corpus.name: value.to_dict()} for key, value in scores.items()})

    score("bm25")
    score("untrained")

    # Each later scoring takes as long as the first one of a model did. Stage II gets what Stage I leaves.
    names = [name for name in ("stage_one", "stage_two") if getattr(recipe, name) is not None]
    speeds = {name: measure_step(recipe, name, stage, pairs) for name in names}
    left = deadline - len(names) * scores["untrained"].seconds - _EXPORT_SECONDS - time.monotonic()
    if left < (least := sum(sum(speed) for speed in speeds.values())):
        raise AnchorvecError(
            f"the time is too short: {max(0.0, left):.0f} s are left for training, one step of each stage takes "
            f"{least:.0f} s; give more --minutes"
        )
    for i, name in enumerate(names):
        scorings_ahead = len(names) - i
        ends = deadline - scorings_ahead * scores["untrained"].seconds - _EXPORT_SECONDS
        if name == "stage_one" and "stage_two" in names:
            ends -= (1 - STAGE_ONE_SHARE) * (ends - time.monotonic())
        set_up, step = speeds[name]
        recipe = plan_steps(recipe, name, step, ends - time.monotonic() - set_up)
        save_recipe(recipe, folder / "recipe.yaml")
        settings: StageOne | StageTwo = getattr(recipe, name)
        say(f"{STAGE_TITLES[name]}: {settings.steps} steps of {settings.pairs_per_step} pairs")
        train_stage = train_stage_one if name == "stage_one" else train_stage_two
        stage = train_stage(recipe, stage, folder / name, pairs, deadline=max(ends, time.monotonic() + 1))
        score(name)

    say("exporting, and comparing the export with the run")
    exported = export(folder, folder / "model")
    result = QuickstartResult(
        output=str(folder),
        model=exported.folder,
        corpus=str(corpus),
        minutes=(time.monotonic() - began) / 60,
        steps=steps_run(folder / "log.jsonl"),
        planned_steps={name: getattr(recipe, name).steps for name in names},
        scores=scores,
        score_set=data.description,
        export=exported,
    )
    write_json(folder / "result.json", result.to_dict())
    return result


def contrastive_alone(recipe: Recipe) -> Recipe:
    """`recipe` without Stage I and without words in Stage II.

    Raises AnchorvecError if Stage II is off too.
    """
    if recipe.stage_two is None:
        raise AnchorvecError("both stages are off, so there is nothing to train; leave one on")
    stage_two = recipe.stage_two.model_copy(update={"words_weight": 0.0})
    return recipe.model_copy(update={"stage_one": None, "stage_two": stage_two})


def measure_step(recipe: Recipe, name: str, start: Path, pairs: Mapping[str, Pairs]) -> tuple[float, float]:
    """Seconds that setting up and saving the stage take here, and those of an average step.

    The step is measured on the last two of three; the first one also pays for memory and caches. Smaller steps would
    not do: they are faster by the token.
    """
    stage: StageOne | StageTwo = getattr(recipe, name)
    changes = {"steps": 3, "warmup_steps": 0, "log_every": 1}
    records: list[Mapping[str, Any]] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        probe = recipe.model_copy(update={name: stage.model_copy(update=changes), "output": Path(scratch)})
        train_stage = train_stage_one if name == "stage_one" else train_stage_two
        train_stage(probe, start, Path(scratch) / name, pairs, on_log=records.append)
    first, last = records[0], records[-1]
    set_up = time.monotonic() - began - last["seconds"]
    seconds_per_token = (last["seconds"] - first["seconds"]) / (last["tokens"] - first["tokens"])

    rows = reconstruction_dataset(recipe, pairs).shuffle(seed=recipe.seed)
    tokenize = pair_tokenizer(recipe, AutoTokenizer.from_pretrained(start))
    sample = tokenize(list(rows.select(range(min(256, len(rows))))))["pairs"]
    alpha, writes = (stage.alpha, stage.target == "text") if isinstance(stage, StageOne) else (0.5, False)
    tokens = statistics.mean(pair.tokens(alpha, writes=writes) for pair in sample)
    return set_up, float(seconds_per_token * tokens * stage.pairs_per_step)


def plan_steps(recipe: Recipe, name: str, seconds_per_step: float, seconds: float) -> Recipe:
    """`recipe` with as many steps of the stage as surely fit into `seconds`.

    Stage I always gets one. Raises AnchorvecError if not one step of Stage II fits.
    """
    steps = int(_PLANNED_SHARE * seconds / seconds_per_step)
    if steps < 1 and name == "stage_two":
        raise AnchorvecError(
            f"the time is too short: {max(0.0, seconds):.0f} s are left for {name}, a step takes "
            f"{seconds_per_step:.0f} s; give more --minutes"
        )
    steps = max(1, steps)
    planned = getattr(recipe, name).model_copy(update={"steps": steps, "warmup_steps": steps // 20})
    return recipe.model_copy(update={name: planned})


def steps_run(log: Path) -> dict[str, int]:
    """The last step of each stage in a run's log; below the planned number if the time was over before."""
    records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return {record["stage"]: record["step"] for record in records}


def _training_pairs(recipe: Recipe, data: DocstringData, file: Path) -> tuple[Recipe, dict[str, Pairs]]:
    """The recipe that reads its pairs from `file`, so that a rerun sees the same ones, and these pairs."""
    rows = [{"query": pair.query, "positive": pair.document} for pair in data.train]
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    source = recipe.data.train[0].model_copy(update={"path": str(file)})
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": [source]})})
    return recipe, {source.name: read_pairs(source.path)}


def _embedder_scores(recipe: Recipe, stage: Path, corpus: Path) -> TaskScores:
    # bf16 saves minutes where it is fast; the result names the dtype.
    dtype = torch.bfloat16 if resolve_precision(recipe.model.precision) == "bf16" else torch.float32
    [scores] = evaluate(
        load_encoder(stage, dtype),
        data=[corpus],
        batch_size=recipe.evaluation.batch_size,
        show_progress_bar=sys.stderr.isatty(),
    ).values()
    return scores
