"""Runs a recipe: from a base model to a folder per stage, scores, and an export.

A run folder holds `recipe.yaml` (resolved), `run.json` (versions, device, data), and `base/`, `stage_one/`,
`stage_two/`: embedder folders, each the start of the next. Both stages go through transformers' Trainer.
"""

import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from transformers import AutoTokenizer

from anchorvec.data import read_pairs
from anchorvec.data.stage_inputs import StageInputs, check_instructions, stage_inputs
from anchorvec.device import check_one_device, device_name, resolve_precision
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import Scores, check_test_data, evaluate, scores_table
from anchorvec.exporting.folder import Exported, export
from anchorvec.files import write_json
from anchorvec.model.embedder import build_embedder
from anchorvec.model.loading import load_encoder
from anchorvec.recipe import Recipe, load_recipe, save_recipe
from anchorvec.training.progress import OnLog
from anchorvec.training.stages import train_stage_one, train_stage_two


@dataclass(frozen=True)
class TrainResult:
    """What a run made: its folder, the exported model, and the scores that its recipe asked for, by stage."""

    output: str
    export: Exported
    scores: dict[str, dict[str, Scores]]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self) | {"scores": _plain(self.scores)}

    def __rich__(self) -> Group:
        tables = [scores_table(of_stage, title=stage) for stage, of_stage in self.scores.items()]
        return Group(*tables, self.export)


def train(recipe: Recipe | str | Path, *, on_log: OnLog | None = None) -> TrainResult:
    """Run the stages that `recipe` switches on, score them, and export the last one to `model` in the run folder.

    The run folder is `recipe.output`. `on_log` is called with every record that is also appended to `log.jsonl`.
    Raises AnchorvecError if the folder already holds a run, or if the recipe or its data cannot be used.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    output = new_run_folder(recipe)
    settings = recipe.evaluation
    check_test_data(data=settings.data, tasks=settings.tasks)
    inputs = load_training_data(recipe)
    stage = build_base(recipe, output / "base")
    save_recipe(recipe, output / "recipe.yaml")
    write_json(output / "run.json", describe_run(recipe, inputs))

    scores: dict[str, dict[str, Scores]] = {}

    def score(name: str) -> None:
        if settings.data or settings.tasks:
            model = load_encoder(stage, torch.float32)
            scores[name] = evaluate(
                model, data=settings.data, tasks=settings.tasks, batch_size=settings.batch_size, show_progress_bar=True
            )
            write_json(output / "scores.json", _plain(scores))

    score("untrained")  # before training, so that a task that cannot be fetched costs nothing
    if recipe.stage_one is not None:
        stage = train_stage_one(recipe, stage, output / "stage_one", inputs, on_log=on_log)
        score("stage_one")
    if recipe.stage_two is not None:
        stage = train_stage_two(recipe, stage, output / "stage_two", inputs, on_log=on_log)
        score("stage_two")
    return TrainResult(str(output), export(output, output / "model"), scores)


def new_run_folder(recipe: Recipe) -> Path:
    """Create `recipe.output` and return it.

    Raises AnchorvecError rather than write into a used folder, and where a run could not train: on several devices.
    """
    check_one_device()
    output = recipe.output
    if output is None:
        raise AnchorvecError("output: the recipe names no folder for the run; add output=FOLDER")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        help_ = "name a new folder"
        if (output / "base").is_dir() and not (output / "model").is_dir():
            help_ = "it holds a run that did not finish; delete it, or name a new folder"
            if (output / "stage_one").is_dir():
                help_ += f" and go on from its Stage I with model.base={output / 'stage_one'} stage_one=null"
        raise AnchorvecError(f"output: {output} is in use; {help_}")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AnchorvecError(f"output: {output} cannot be made: {error.strerror}") from error
    return output


def load_training_data(recipe: Recipe) -> StageInputs:
    """What the stages read of the recipe's data sets; what was left out of one is said on stderr.

    Raises AnchorvecError for data that cannot be read, or that have fewer pairs than a step of a stage.
    """
    loaded = {}
    for source in recipe.data.train:
        loaded[source.name] = read_pairs(
            source.path, strict=recipe.data.strict, split=source.split, subset=source.subset
        )
        report = loaded[source.name].report
        if report.rejected or report.dropped_negatives or report.ignored_columns:
            Console(stderr=True).print(report.summary(), highlight=False, markup=False)
    return stage_inputs(recipe, loaded)


def stored_prompts(recipe: Recipe) -> dict[str, str]:
    """The prompts that are stored with the model (T15).

    `query` and `document` are the instructions that all data sets share. Where data sets differ there is none by
    default, and each one's are stored as `NAME-query` and `NAME-document`, the keys that mteb looks up too.
    """
    sources = recipe.data.train
    instructions = {"query": [s.instruction for s in sources], "document": [s.document_instruction for s in sources]}
    prompts = {}
    for side, values in instructions.items():
        same = len(set(values)) == 1
        prompts[side] = values[0] if same else ""
        if not same:
            prompts |= {f"{s.name}-{side}": value for s, value in zip(sources, values, strict=True)}
    return prompts


def build_base(recipe: Recipe, folder: Path) -> Path:
    """The untrained embedder of the recipe's base model, written into `folder`.

    Raises AnchorvecError for a base that cannot be used, and for an instruction that leaves no room for a text.
    """
    settings = recipe.model
    build_embedder(
        settings.base,
        folder,
        max_tokens=settings.max_tokens,
        end_prompt=None if settings.end == "token" else (settings.end.before, settings.end.after),
        prompts=stored_prompts(recipe),
        revision=settings.revision,
        seed=recipe.seed,
    )
    try:
        check_instructions(recipe, AutoTokenizer.from_pretrained(folder))
    except AnchorvecError:
        shutil.rmtree(folder)  # so that the mended recipe may use the run's folder
        raise
    return folder


def describe_run(recipe: Recipe, inputs: StageInputs) -> dict[str, Any]:
    """What a reader needs to repeat the run, beside the recipe: versions, machine, seed, data."""
    packages = [
        "anchorvec",
        "torch",
        "transformers",
        "sentence-transformers",
        "peft",
        "accelerate",
        "datasets",
    ]
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "precision": resolve_precision(recipe.model.precision),
        "seed": recipe.seed,
        "data": {name: asdict(report) for name, report in inputs.reports.items()},
    }


def _plain(scores: Mapping[str, Mapping[str, Scores]]) -> dict[str, Any]:
    return {stage: {task: value.to_dict() for task, value in tasks.items()} for stage, tasks in scores.items()}
