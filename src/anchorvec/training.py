"""Runs the stages of a recipe: from a base model to a folder per stage.

A run folder holds `recipe.yaml` (resolved), `run.json` (versions, device, data), and `base/`, `stage_one/`,
`stage_two/`: embedder folders, each the start of the next. Both stages go through transformers' Trainer.
"""

import math
import os
import platform
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from rich.console import Console, Group
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.training_args import (
    BatchSamplers,
    MultiDatasetBatchSamplers,
    SentenceTransformerTrainingArguments,
)
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainingArguments, set_seed

from anchorvec.contrastive import contrastive_datasets, contrastive_loss
from anchorvec.data import Pairs, read_pairs, weighted
from anchorvec.embedder import attention_options, build_embedder, load_causal_lm, save_causal_lm, save_tokenizer
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import TaskScores, check_test_data, evaluate, scores_table
from anchorvec.exporting import Exported, export
from anchorvec.files import new_folder, write_json
from anchorvec.loading import load_model
from anchorvec.packing import reads_packed, unpad
from anchorvec.precision import default_device, resolve_precision
from anchorvec.progress import OnLog, StageProgress
from anchorvec.recipe import Recipe, StageOne, StageTwo, load_recipe, save_recipe
from anchorvec.reconstruction import PairTokenizer, Reconstruction
from anchorvec.trainers import ContrastiveTrainer, ReconstructionTrainer, default_micro_batch_tokens

LENGTH_SAMPLE = 256
"""Rows from which the tokens of a step are estimated."""


@dataclass(frozen=True)
class TrainResult:
    """What a run made: its folder, the exported model, and the scores that its recipe asked for, by stage."""

    output: str
    export: Exported
    scores: dict[str, dict[str, TaskScores]]

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
    pairs = load_training_data(recipe)
    stages = {"untrained": build_base(recipe, output / "base")}
    save_recipe(recipe, output / "recipe.yaml")
    write_json(output / "run.json", describe_run(recipe, pairs))
    if recipe.stage_one is not None:
        stages["stage_one"] = train_stage_one(recipe, stages["untrained"], output / "stage_one", pairs, on_log=on_log)
    if recipe.stage_two is not None:
        start = stages.get("stage_one", stages["untrained"])
        stages["stage_two"] = train_stage_two(recipe, start, output / "stage_two", pairs, on_log=on_log)
    scores: dict[str, dict[str, TaskScores]] = {}
    if settings.data or settings.tasks:
        for name, stage in stages.items():
            model = load_model(stage).float()
            scores[name] = evaluate(
                model, data=settings.data, tasks=settings.tasks, batch_size=settings.batch_size, show_progress_bar=True
            )
            write_json(output / "scores.json", _plain(scores))
    return TrainResult(str(output), export(output, output / "model"), scores)


def new_run_folder(recipe: Recipe) -> Path:
    """Create `recipe.output` and return it; raise AnchorvecError rather than write into a used folder."""
    if recipe.output is None:
        raise AnchorvecError("output: the recipe names no folder for the run; add output=FOLDER")
    if recipe.output.exists() and (not recipe.output.is_dir() or any(recipe.output.iterdir())):
        raise AnchorvecError(f"output: {recipe.output} is in use; name a new folder")
    recipe.output.mkdir(parents=True, exist_ok=True)
    return recipe.output


def load_training_data(recipe: Recipe) -> dict[str, Pairs]:
    """Every data set of the recipe by its name, before weights; what was left out of one is said on stderr."""
    loaded = {}
    for source in recipe.data.train:
        loaded[source.name] = read_pairs(
            source.path, strict=recipe.data.strict, split=source.split, subset=source.subset
        )
        report = loaded[source.name].report
        if report.rejected or report.dropped_negatives:
            Console(stderr=True).print(report.summary(), highlight=False, markup=False)
    return loaded


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
    """The untrained embedder of the recipe's base model, written into `folder`."""
    settings = recipe.model
    return build_embedder(
        settings.base,
        folder,
        max_tokens=settings.max_tokens,
        end_prompt=None if settings.end == "token" else (settings.end.before, settings.end.after),
        prompts=stored_prompts(recipe),
        revision=settings.revision,
        seed=recipe.seed,
    )


def train_stage_one(
    recipe: Recipe,
    start: Path,
    folder: Path,
    pairs: Mapping[str, Pairs],
    *,
    deadline: float | None = None,
    on_log: OnLog | None = None,
) -> Path:
    """Train the embedder in `start` by reconstruction and write it to `folder`: a causal LM still (T12).

    All parameters train, with fp32 master weights (T9). `deadline` is a `time.monotonic()` at which training
    ends early.
    """
    stage = recipe.stage_one
    assert stage is not None
    set_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(start)
    _check_instructions(recipe, tokenizer)
    dataset = reconstruction_dataset(recipe, pairs)
    _check_rows(recipe, "stage_one", {"the data": dataset})
    progress = _progress(recipe, "stage_one", deadline, on_log)
    model = load_causal_lm(start, attention=recipe.model.attention)
    trainer = ReconstructionTrainer(
        model=Reconstruction(model, alpha=stage.alpha, packed=_packs(recipe)),
        args=TrainingArguments(**_arguments(recipe, stage, folder)),
        train_dataset=dataset,
        data_collator=PairTokenizer(
            tokenizer,
            end_token_target=stage.end_token_target,
            max_target_tokens=stage.max_target_tokens,
        ),
        callbacks=[progress],
        micro_batch_tokens=stage.micro_batch_tokens,
        exchange_every=stage.log_every,
    )
    if stage.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    _run(trainer, progress, "stage_one")
    with new_folder(folder) as scratch:
        save_causal_lm(model, start, scratch)
    return folder


def train_stage_two(
    recipe: Recipe,
    start: Path,
    folder: Path,
    pairs: Mapping[str, Pairs],
    *,
    deadline: float | None = None,
    on_log: OnLog | None = None,
) -> Path:
    """Train the embedder in `start` contrastively and write it to `folder`.

    With LoRA the folder holds the adapter alone, to be merged over `start` by `export`; without, a whole model.
    """
    stage = recipe.stage_two
    assert stage is not None
    set_seed(recipe.seed)  # LoRA's new weights are drawn before the trainer seeds
    options = attention_options(recipe.model.attention)
    model = SentenceTransformer(
        str(start),
        model_kwargs={"dtype": torch.float32, "use_safetensors": True, **options},
        device=str(default_device()),
    )
    if _packs(recipe):
        unpad(model)
    if stage.lora is not None:
        model.add_adapter(
            LoraConfig(
                r=stage.lora.r,
                lora_alpha=stage.lora.alpha,
                lora_dropout=stage.lora.dropout,
                target_modules="all-linear",
                task_type="FEATURE_EXTRACTION",
            )
        )
    datasets: dict[str, Dataset] = {}
    for source in recipe.data.train:
        parts = contrastive_datasets(source.name, pairs[source.name].dataset, negatives=stage.negatives)
        datasets |= {name: weighted(part, source.weight, recipe.seed) for name, part in parts.items()}
    _check_rows(recipe, "stage_two", datasets)
    prompts = _prompts_by_dataset(recipe, datasets)
    micro_batch_tokens = stage.micro_batch_tokens or default_micro_batch_tokens(default_device())
    fits = max(_large_step(model, datasets[name], prompts[name], recipe) for name in datasets) <= micro_batch_tokens
    progress = _progress(recipe, "stage_two", deadline, on_log)
    trainer = ContrastiveTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            **_arguments(recipe, stage, folder),
            batch_sampler=BatchSamplers.NO_DUPLICATES,  # T16
            multi_dataset_batch_sampler=MultiDatasetBatchSamplers.PROPORTIONAL,  # one data set a batch
            prompts=prompts,
        ),
        train_dataset=datasets,
        loss=contrastive_loss(
            model, temperature=stage.temperature, micro_batch_tokens=None if fits else micro_batch_tokens
        ),
        callbacks=[progress],
    )
    if stage.gradient_checkpointing:
        body: Any = model[0].model
        body.gradient_checkpointing_enable({"use_reentrant": False})
    _run(trainer, progress, "stage_two")
    with new_folder(folder) as scratch:
        model.save_pretrained(str(scratch), create_model_card=False)
        save_tokenizer(model.tokenizer, scratch)
    return folder


def reconstruction_dataset(recipe: Recipe, pairs: Mapping[str, Pairs]) -> Dataset:
    """All data sets, weighted, as rows of query, positive and the two instructions."""
    parts = []
    for source in recipe.data.train:
        part = weighted(pairs[source.name].dataset, source.weight, recipe.seed).select_columns(["query", "positive"])
        part = part.add_column("query_prompt", [source.instruction] * len(part))
        parts.append(part.add_column("document_prompt", [source.document_instruction] * len(part)))
    return concatenate_datasets(parts)


def describe_run(recipe: Recipe, pairs: Mapping[str, Pairs]) -> dict[str, Any]:
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "precision": resolve_precision(recipe.model.precision),
        "seed": recipe.seed,
        "data": {name: asdict(p.report) for name, p in pairs.items()},
    }


def _plain(scores: Mapping[str, Mapping[str, TaskScores]]) -> dict[str, Any]:
    return {stage: {task: value.to_dict() for task, value in tasks.items()} for stage, tasks in scores.items()}


def _arguments(recipe: Recipe, stage: StageOne | StageTwo, folder: Path) -> dict[str, Any]:
    """Trainer settings that both stages share."""
    device = default_device()
    if torch.cuda.device_count() > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise AnchorvecError("several devices are not supported yet; show one, with CUDA_VISIBLE_DEVICES=0")
    return {
        "output_dir": str(folder),
        "max_steps": stage.steps,
        "per_device_train_batch_size": stage.pairs_per_step,
        "learning_rate": stage.learning_rate,
        "warmup_steps": stage.warmup_steps,
        "lr_scheduler_type": "constant_with_warmup" if stage.schedule == "constant" else stage.schedule,
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "bf16": resolve_precision(recipe.model.precision) == "bf16",
        "use_cpu": device.type == "cpu",
        "logging_steps": stage.log_every,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
        "seed": recipe.seed,
    }


def _packs(recipe: Recipe) -> bool:
    """Whether texts are packed: on a CPU attention text by text costs nothing extra; a GPU wants one kernel for all."""
    return recipe.model.attention == "auto" and default_device().type == "cpu"


def _progress(recipe: Recipe, stage: str, deadline: float | None, on_log: OnLog | None) -> StageProgress:
    assert recipe.output is not None
    return StageProgress(stage, recipe.output / "log.jsonl", deadline=deadline, on_log=on_log)


def _run(trainer: Trainer, progress: StageProgress, stage: str) -> None:
    """Train to the last planned step (T13), or to the deadline."""
    trainer.remove_callback(PrinterCallback)
    with progress:
        trainer.train()
    done, planned = trainer.state.global_step, trainer.args.max_steps
    if done < planned and not progress.stopped_early:
        raise AnchorvecError(
            f"{stage}.pairs_per_step: training ended after {done} of {planned} steps, because the data repeat texts "
            "too often for so many different pairs in a step; lower it, or remove repeated texts"
        )


def _check_rows(recipe: Recipe, stage: str, datasets: Mapping[str, Dataset]) -> None:
    """Raise AnchorvecError for a data set that is smaller than one step: it would be skipped without a word."""
    pairs_per_step = getattr(recipe, stage).pairs_per_step
    for name, dataset in datasets.items():
        if len(dataset) < pairs_per_step:
            raise AnchorvecError(
                f"{stage}.pairs_per_step: {pairs_per_step} is more than the {len(dataset)} rows of {name}; lower it"
            )


def _check_instructions(recipe: Recipe, tokenizer: Any) -> None:
    """Raise AnchorvecError for an instruction that leaves no room for a text."""
    for i, source in enumerate(recipe.data.train):
        for key in ("instruction", "document_instruction"):
            tokens = len(tokenizer(getattr(source, key))["input_ids"])
            if tokens >= recipe.model.max_tokens:
                raise AnchorvecError(
                    f"data.train.{i}.{key}: it leaves no room for a text within model.max_tokens = "
                    f"{recipe.model.max_tokens}; shorten it, or raise the limit"
                )


def _large_step(model: SentenceTransformer, dataset: Dataset, prompts: Mapping[str, str], recipe: Recipe) -> float:
    """Tokens of a large step of Stage II on the data set: their mean and three standard deviations.

    With padding, what the longest text makes of each column.
    """
    assert recipe.stage_two is not None
    pairs = recipe.stage_two.pairs_per_step
    sample = dataset.shuffle(seed=recipe.seed).select(range(min(LENGTH_SAMPLE, len(dataset))))
    columns = [
        model.tokenizer([prompts[column] + text for text in sample[column]], truncation=True)["input_ids"]
        for column in sample.column_names
    ]
    if not reads_packed(model):
        return pairs * sum(max(map(len, column)) for column in columns)
    tokens = [sum(map(len, row)) for row in zip(*columns, strict=True)]
    return pairs * statistics.mean(tokens) + 3 * math.sqrt(pairs) * statistics.pstdev(tokens)


def _prompts_by_dataset(recipe: Recipe, datasets: Mapping[str, Dataset]) -> dict[str, dict[str, str]]:
    """For each data set of Stage II, the instruction of each of its columns."""
    prompts = {}
    for source in recipe.data.train:
        for name in (source.name, f"{source.name}+negatives"):
            if name in datasets:
                prompts[name] = {
                    column: source.instruction if column == "query" else source.document_instruction
                    for column in datasets[name].column_names
                }
    return prompts
