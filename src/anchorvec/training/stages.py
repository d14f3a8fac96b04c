"""The two stages: from an embedder folder to a trained one."""

import copy
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.training_args import (
    MultiDatasetBatchSamplers,
    SentenceTransformerTrainingArguments,
)
from torch import Tensor, nn
from transformers import AutoTokenizer, PrinterCallback, TrainingArguments, set_seed

from anchorvec.data.samplers import DifferentTexts, SimilarPairs
from anchorvec.data.stage_inputs import Rows, StageInputs, large_step, reconstructs, sample_rows, without_prompt_and_end
from anchorvec.data.tokens import PairTokenizer
from anchorvec.device import check_one_device, default_device, keep_frozen_in_bf16, resolve_precision
from anchorvec.errors import AnchorvecError
from anchorvec.files import new_folder, write_json
from anchorvec.model.compiling import compile_decoder_layers
from anchorvec.model.embedder import attention_options, load_causal_lm, save_causal_lm, save_tokenizer
from anchorvec.model.head import head_chunk_bytes
from anchorvec.model.packing import packed_features, unpad
from anchorvec.objectives.bag_of_words import SAMPLE_PAIRS, WordLoss
from anchorvec.objectives.contrastive import contrastive_loss
from anchorvec.objectives.reconstruction import Reconstruction
from anchorvec.recipe import Recipe, StageOne, StageTwo
from anchorvec.training.engine import Engine, choose_engine, compiling_pays, packs_texts
from anchorvec.training.memory import free_memory, keep_freed_memory, release_freed_memory
from anchorvec.training.progress import OnLog, StageProgress
from anchorvec.training.trainers import ContrastiveTrainer, ReconstructionTrainer, TimedTrainer

ORIGIN_PAIRS = 16
"""Pairs whose mean embedding before training is the origin of word reconstruction."""

_NO_LIMIT = 10_000_000
"""Steps of a stage that ends at a time, where the trainer wants a number."""

_PROBE_TOKENS = 64
"""Tokens of each part of the texts from which the memory of a token is estimated, if the limit is not lower."""


def train_stage_one(
    recipe: Recipe,
    start: Path,
    folder: Path,
    inputs: StageInputs,
    *,
    deadline: float | None = None,
    on_log: OnLog | None = None,
) -> Path:
    """Train the embedder in `start` by reconstruction and write it to `folder`: a causal LM still (T12).

    All parameters train, with fp32 master weights (T9). With a `deadline`, a `time.monotonic()`, the stage lasts until
    then, however many steps that are: the recipe's `steps` say only which share of the time its warm-up has.
    """
    stage = recipe.stage_one
    assert stage is not None
    set_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(start)
    progress = _progress(recipe, "stage_one", deadline, on_log)
    collate = pair_tokenizer(recipe, tokenizer)
    objective, engine = stage_one_objective(recipe, start, inputs.reconstruction, collate, deadline)
    _note(recipe, "stage_one", engine)
    trainer = ReconstructionTrainer(
        model=objective,
        # in an order of its own: the pairs at the start of Stage II should be new ones
        args=TrainingArguments(**_arguments(recipe, stage, folder, deadline), data_seed=recipe.seed + 1),
        train_dataset=inputs.reconstruction,
        data_collator=collate,
        callbacks=[progress],
        micro_batch_tokens=engine.micro_batch_tokens,
        exchange_every=stage.log_every,
    )
    _run(trainer, progress)
    with new_folder(folder) as scratch:
        save_causal_lm(objective.model, start, scratch)
    return folder


def train_stage_two(
    recipe: Recipe,
    start: Path,
    folder: Path,
    inputs: StageInputs,
    *,
    deadline: float | None = None,
    on_log: OnLog | None = None,
) -> Path:
    """Train the embedder in `start` contrastively and write it to `folder`.

    With LoRA the folder holds the adapter alone, to be merged over `start` by `export`; without, a whole model.
    `deadline` as in `train_stage_one`.
    """
    stage = recipe.stage_two
    assert stage is not None
    model, engine, words = stage_two_model(recipe, start, inputs, deadline)
    content = without_prompt_and_end(model.tokenizer, recipe)
    _note(recipe, "stage_two", engine)
    batch_sampler: Any = partial(DifferentTexts, hashes=inputs.hashes)  # T16
    if stage.in_batch_negatives == "similar":
        assert words is not None
        vectors = _vectors_of_texts(model.tokenizer, content, words)
        batch_sampler = partial(SimilarPairs, word_vectors=vectors, prompts=inputs.prompts)
    progress = _progress(recipe, "stage_two", deadline, on_log)
    trainer = ContrastiveTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            **_arguments(recipe, stage, folder, deadline),
            batch_sampler=batch_sampler,
            multi_dataset_batch_sampler=MultiDatasetBatchSamplers.PROPORTIONAL,  # one data set a batch
            prompts=inputs.prompts,
        ),
        # copies: the trainer adds its name to each data set in place
        train_dataset={name: copy.copy(rows) for name, rows in inputs.contrastive.items()},
        loss=contrastive_loss(
            model,
            temperature=stage.temperature,
            micro_batch_tokens=engine.micro_batch_tokens if engine.cached_gradients else None,
            words=words if stage.words_weight else None,
            words_weight=stage.words_weight,
            content=content,
            one_pass=default_device().type == "cuda",  # on a CPU, which computes text by text, it brings nothing
        ),
        callbacks=[progress],
    )
    _run(trainer, progress)
    model.max_seq_length = recipe.model.max_tokens
    with new_folder(folder) as scratch:
        model.save_pretrained(str(scratch), create_model_card=False)
        save_tokenizer(model.tokenizer, scratch)
    return folder


def pair_tokenizer(recipe: Recipe, tokenizer: Any) -> PairTokenizer:
    """What Stage I reads and writes of a pair; without a Stage I, what it would by default, or Stage II's words."""
    stage = recipe.stage_one or StageOne()
    return PairTokenizer(
        tokenizer,
        end_token_target=stage.end_token_target,
        max_target_tokens=stage.max_target_tokens,
        max_tokens=recipe.training_tokens,
        content=without_prompt_and_end(tokenizer, recipe) if reconstructs(recipe) == "words" else None,
    )


def stage_one_objective(
    recipe: Recipe, start: Path, rows: Rows, collate: PairTokenizer, deadline: float | None = None
) -> tuple[Reconstruction, Engine]:
    """The objective of Stage I around the embedder in `start`, set up as the engine says."""
    stage = recipe.stage_one
    assert stage is not None
    release_freed_memory()  # of an earlier stage
    model = load_causal_lm(start, attention=recipe.model.attention).train()
    nn.Module.to(model, default_device())  # PreTrainedModel.to is not typed
    objective = Reconstruction(
        model, alpha=stage.alpha, packed=packs_texts(recipe.model.attention, recipe.model.precision)
    )
    if stage.target == "words":
        objective.words = _word_loss(recipe, model, objective.encode, rows, collate)
        head, words = model.get_output_embeddings(), model.get_input_embeddings()
        if head.weight is not words.weight:
            head.requires_grad_(False)  # nothing is written
    vocabulary = model.config.get_text_config().vocab_size
    passes = (2 if 0 < stage.alpha < 1 else 1) * (2 if stage.target == "text" else 1)
    if stage.target == "words":
        scores = 2 * SAMPLE_PAIRS * stage.pairs_per_step
    else:
        scores = min(
            head_chunk_bytes(default_device()) // 4, vocabulary * recipe.training_tokens * stage.pairs_per_step
        )
    part = [vocabulary - 1] * min(_PROBE_TOKENS, recipe.training_tokens // 3)
    engine = choose_engine(
        model,
        lambda n: (objective.encode([part * n]), n * len(part)),
        packed=objective.packed,
        precision=recipe.model.precision,
        gradient_checkpointing=stage.gradient_checkpointing,
        micro_batch_tokens=stage.micro_batch_tokens,
        longest=recipe.training_tokens,
        least_tokens=passes * recipe.training_tokens,
        # logits, their log-softmax and their gradients, in two number formats
        logits_bytes=4 * 4 * scores,
        long_enough=_long_enough(stage, deadline),
    )
    if engine.compiled:
        objective.compile_layers()
    return objective, engine


def _long_enough(stage: StageOne | StageTwo, deadline: float | None) -> bool:
    """Whether compiling pays in a stage that ends at `deadline`, or else with its steps."""
    seconds = None if deadline is None else deadline - time.monotonic()
    return compiling_pays(stage.steps * stage.pairs_per_step, seconds)


def _word_loss(
    recipe: Recipe,
    model: Any,
    encode: Callable[[list[list[int]]], Tensor] | None,
    rows: Rows,
    collate: PairTokenizer,
) -> WordLoss:
    """The loss of words, with candidates drawn from the data; `encode` gives the embeddings before the stage.

    Without `encode` it has no origin, and is there for its word vectors alone.
    """
    sample = sample_rows(rows, SAMPLE_PAIRS, recipe.seed)
    pairs = [pair for i in range(0, len(sample), 256) for pair in collate(sample[i : i + 256])["pairs"]]
    origin = None
    if encode is not None:
        training = model.training
        model.eval()  # without dropout
        bf16 = resolve_precision(recipe.model.precision) == "bf16"
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            origin = encode([text for pair in pairs[:ORIGIN_PAIRS] for text in pair.read()]).mean(dim=0)
        model.train(training)
    try:
        return WordLoss(
            model.get_input_embeddings().weight,
            [pair.query_targets for pair in pairs],
            [pair.document_targets for pair in pairs],
            origin=origin,
        )
    except ValueError as error:
        raise AnchorvecError(
            f"data.train: texts can not be told apart by their words, because {error}; give more pairs, of texts that "
            "differ"
        ) from error


def stage_two_model(
    recipe: Recipe, start: Path, inputs: StageInputs, deadline: float | None = None
) -> tuple[SentenceTransformer, Engine, WordLoss | None]:
    """The embedder in `start` with what Stage II trains in it, set up as the engine says; and the loss of words.

    That is there too where words only choose the negatives. The embedder reads texts up to the limit for training.
    """
    stage = recipe.stage_two
    assert stage is not None
    release_freed_memory()  # of an earlier stage
    set_seed(recipe.seed)  # LoRA's new weights are drawn before the trainer seeds
    model = SentenceTransformer(
        str(start),
        model_kwargs={
            "dtype": torch.float32,
            "use_safetensors": True,
            **attention_options(recipe.model.attention),
        },
        device=str(default_device()),
    ).train()
    model.max_seq_length = recipe.training_tokens
    packed = packs_texts(recipe.model.attention, recipe.model.precision) and unpad(model)
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
        if resolve_precision(recipe.model.precision) == "bf16":
            keep_frozen_in_bf16(model)
    part_tokens = min(_PROBE_TOKENS, recipe.training_tokens // 3)

    def encode(n: int) -> tuple[Tensor, int]:
        ids = torch.ones(1, n * part_tokens, dtype=torch.long, device=model.device)
        features = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return model(packed_features(features) if packed else features)["sentence_embedding"], ids.numel()

    words = None
    if stage.words_weight or stage.in_batch_negatives == "similar":

        def embed(texts: list[list[int]]) -> Tensor:
            features = dict(model.tokenizer.pad({"input_ids": texts}, return_tensors="pt").to(model.device))
            embedding: Tensor = model(packed_features(features) if packed else features)["sentence_embedding"]
            return embedding

        collate = PairTokenizer(
            model.tokenizer,
            max_tokens=recipe.training_tokens,
            content=without_prompt_and_end(model.tokenizer, recipe),
        )
        encoder = embed if stage.words_weight else None
        words = _word_loss(recipe, model[0].model, encoder, inputs.reconstruction, collate)

    step_tokens = max(
        large_step(model, rows, inputs.prompts[name], recipe) for name, rows in inputs.contrastive.items()
    )
    body: Any = model[0].model
    engine = choose_engine(
        body,
        encode,
        packed=packed,
        precision=recipe.model.precision,
        gradient_checkpointing=stage.gradient_checkpointing,
        micro_batch_tokens=stage.micro_batch_tokens,
        longest=recipe.training_tokens,
        least_tokens=recipe.training_tokens,
        step_tokens=step_tokens,
        logits_bytes=4 * 4 * 2 * SAMPLE_PAIRS * stage.pairs_per_step if stage.words_weight else 0,
        long_enough=_long_enough(stage, deadline),
    )
    if engine.compiled:
        compile_decoder_layers(body)
    return model, engine, words


def _vectors_of_texts(
    tokenizer: Any, content: Callable[[list[int]], list[int]], words: WordLoss
) -> Callable[[list[str]], Tensor]:
    """The function that gives the word vectors of texts, (texts, dim) on the CPU, as far as training reads them."""

    def vectors(texts: list[str]) -> Tensor:
        # some at a time: a tokenizer keeps 100 bytes for a character, cut ones too
        parts = (texts[i : i + 256] for i in range(0, len(texts), 256))
        read = (ids for part in parts for ids in tokenizer(part, truncation=True)["input_ids"])
        return words.word_vectors([content(ids) for ids in read]).cpu()

    return vectors


def _note(recipe: Recipe, stage: str, engine: Engine) -> None:
    """Write the engine into the run's `run.json`; warn where the memory may not do."""
    assert recipe.output is not None
    file = recipe.output / "run.json"
    run = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    write_json(file, run | {"engine": {**run.get("engine", {}), stage: asdict(engine)}})
    if not engine.fits:
        warnings.warn(
            f"{stage} may run out of memory, {free_memory(default_device()) / 1e9:.1f} GB are free: lower "
            f"data.max_tokens, and {stage}.micro_batch_tokens if it is set",
            stacklevel=2,
        )


def _arguments(recipe: Recipe, stage: StageOne | StageTwo, folder: Path, deadline: float | None) -> dict[str, Any]:
    """Trainer settings that both stages share."""
    check_one_device()
    # On a GPU the texts of the next steps are tokenized while it works; a CPU has no core left for that.
    workers = min(4, (os.cpu_count() or 1) - 1) if default_device().type == "cuda" else 0
    endless = 1 if deadline is None else max(1, _NO_LIMIT // stage.steps)
    return {
        "output_dir": str(folder.parent),  # nothing is written there: a stage that fails leaves no folder
        "max_steps": endless * stage.steps,
        "per_device_train_batch_size": stage.pairs_per_step,
        "learning_rate": stage.learning_rate,
        "warmup_steps": endless * stage.warmup_steps,
        "lr_scheduler_type": "constant_with_warmup" if stage.schedule == "constant" else stage.schedule,
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "bf16": resolve_precision(recipe.model.precision) == "bf16",
        "use_cpu": default_device().type == "cpu",
        "logging_steps": stage.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # StageProgress stops there
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_drop_last": True,
        "dataloader_num_workers": workers,
        "dataloader_persistent_workers": workers > 0,
        "remove_unused_columns": False,
        "seed": recipe.seed,
    }


def _progress(recipe: Recipe, stage: str, deadline: float | None, on_log: OnLog | None) -> StageProgress:
    assert recipe.output is not None
    return StageProgress(stage, recipe.output / "log.jsonl", deadline=deadline, on_log=on_log)


def _run(trainer: TimedTrainer, progress: StageProgress) -> None:
    """Train to the last step, or to the deadline; either way to the end of the schedule (T13)."""
    trainer.remove_callback(PrinterCallback)
    trainer.deadline = progress.deadline
    keep_freed_memory()
    with progress:
        trainer.train()
    done, planned = trainer.state.global_step, trainer.args.max_steps
    if done < planned and not progress.out_of_time:
        raise AnchorvecError(
            f"{progress.stage}.pairs_per_step: training ended too early, after {done} steps, because the data repeat "
            "texts too often for so many different pairs in a step; lower it, or remove repeated texts"
        )
