"""Stage I of a run: an embedder is trained by what can be reconstructed from its embeddings."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, TrainingArguments, set_seed

from anchorvec.data.reading import mask_token, readout_of, text_span, without_prompt_and_end
from anchorvec.data.stage_inputs import reconstructs
from anchorvec.data.tokens import PairTokenizer
from anchorvec.device import default_device
from anchorvec.files import new_folder
from anchorvec.model.decoder import decoder_of
from anchorvec.model.embedder import load_causal_lm, save_causal_lm
from anchorvec.model.end import template_of
from anchorvec.objectives.bag_of_tokens import BagOfTokensReconstruction
from anchorvec.objectives.bag_of_words import BagOfWordsReconstruction
from anchorvec.objectives.masked import MaskedReconstruction, TokenMasking
from anchorvec.objectives.reconstruction import Reconstruction, TextReconstruction
from anchorvec.ranks import rank, ranks
from anchorvec.recipe import Recipe, StageOne
from anchorvec.run import STAGE_TITLES
from anchorvec.terminal import say
from anchorvec.training.bag_of_words import bag_of_tokens, bag_of_words_loss
from anchorvec.training.engine import UNPACKABLE, Demand, Engine, agreed, choose_engine, why_padded
from anchorvec.training.lora import add_lora, merged
from anchorvec.training.memory import release_freed_memory
from anchorvec.training.sharding import copy_whole, is_sharded, shard
from anchorvec.training.stage import Stage, run_trainer
from anchorvec.training.trainers import ReconstructionTrainer


def train_stage_one(stage: Stage) -> Path:
    """Train the embedder that `stage` starts from by reconstruction; its folder, a causal LM still (T12).

    All parameters train, with fp32 master weights (T9), or adapters, which are merged when it ends.
    """
    recipe = stage.recipe
    set_seed(recipe.seed)
    tokenize = pair_tokenizer(recipe, AutoTokenizer.from_pretrained(stage.start))
    progress = stage.progress()
    objective, engine = stage_one_objective(stage, tokenize)
    stage.begin(engine, objective.computed)
    if isinstance(objective, BagOfTokensReconstruction):
        _note_stop_tokens(stage, objective, tokenize.tokenizer)
    trainer = ReconstructionTrainer(
        model=objective,
        # in an order of its own: the pairs at the start of Stage II should be new ones
        args=TrainingArguments(**stage.arguments(), data_seed=recipe.seed + 1),
        train_dataset=stage.inputs.reconstruction,
        data_collator=tokenize,
        callbacks=[progress],
        micro_batch_tokens=engine.micro_batch_tokens,
        exchange_every=stage.one.log_every,
    )

    def save(model: PreTrainedModel, folder: Path) -> None:
        with new_folder(folder) as scratch:
            save_causal_lm(merged(model), stage.start, scratch)

    def save_on_the_way(folder: Path) -> None:
        save(objective.model if stage.one.lora is None else copy.deepcopy(objective.model), folder)

    run_trainer(stage, trainer, progress, save_on_the_way)
    folder = stage.run.stage("stage_one")
    model = objective.model
    if is_sharded(objective):
        whole = load_causal_lm(stage.start) if rank() == 0 else None
        copy_whole(model, whole)
        model = whole or model
    if rank() == 0:
        save(model, folder)
    return folder


def pair_tokenizer(recipe: Recipe, tokenizer: Any) -> PairTokenizer:
    """What Stage I of `recipe` reads and writes of a pair; without one, what it would by default, or Stage II's words.

    `tokenizer` is the embedder's.
    """
    settings, target = recipe.stage_one or StageOne(), reconstructs(recipe)
    return PairTokenizer(
        tokenizer,
        end_token_target=settings.end_token_target,
        max_target_tokens=None if target == "masked" else settings.max_target_tokens,
        max_tokens=recipe.training_tokens,
        content=without_prompt_and_end(tokenizer, recipe) if target in ("bag_of_words", "masked") else None,
    )


def stage_one_objective(stage: Stage, tokenize: PairTokenizer) -> tuple[Reconstruction, Engine]:
    """The objective of `stage` around the embedder that it starts from, set up as the engine says.

    `tokenize` makes pairs of rows.
    """
    recipe, settings = stage.recipe, stage.one
    release_freed_memory()  # of an earlier stage
    model = load_causal_lm(stage.start, attention=recipe.model.attention).train()
    nn.Module.to(model, default_device())  # PreTrainedModel.to is not typed
    if settings.lora is not None:
        add_lora(model, decoder_of(model), settings.lora.model_dump(), key="stage_one.lora")
    padded_because = why_padded(recipe.model.attention, recipe.model.precision)
    objective = OBJECTIVES[settings.target](stage, model, tokenize, not padded_because)
    part = [model.config.get_text_config().vocab_size - 1] * stage.part_tokens
    engine = stage.engine_before(model, objective.packed)
    if engine is None:
        demand = stage_one_demand(stage, objective, default_device(), objective.packed, padded_because or UNPACKABLE)
        engine = choose_engine(model, lambda n: (objective.encode([part * n]), n * len(part)), demand)
    engine = agreed(engine, model)
    if engine.compiled:
        objective.compile_layers()
    if settings.sharded:
        _shard(objective, bf16=stage.bf16)
    return objective, engine


def _shard(objective: Reconstruction, *, bf16: bool) -> None:
    if ranks() == 1:
        say(f"{STAGE_TITLES['stage_one']}: sharded over one device, which holds all: as without")
        return
    shard(objective, objective.model, bf16=bf16)


def stage_one_demand(
    stage: Stage, objective: Reconstruction, device: torch.device, packed: bool, padded_because: str
) -> Demand:
    """What `stage` wants to hold on `device`: `objective` tells its passes and its scores.

    `packed`, and `padded_because`, why not.
    """
    recipe, settings = stage.recipe, stage.one
    share = math.ceil(settings.pairs_per_step / ranks())
    return Demand(
        packed=packed,
        precision=recipe.model.precision,
        gradient_checkpointing=settings.gradient_checkpointing,
        micro_batch_tokens=settings.micro_batch_tokens,
        longest=recipe.longest_read,
        least_tokens=objective.passes * recipe.longest_read,
        devices=ranks(),
        shards=ranks() if settings.sharded else 1,
        logits_bytes=objective.score_bytes(share, recipe.training_tokens, device),
        long_enough=stage.long_enough,
        padded_because=padded_because,
    )


def _text(stage: Stage, model: PreTrainedModel, tokenize: PairTokenizer, packed: bool) -> Reconstruction:
    return TextReconstruction(model, alpha=stage.one.alpha, packed=packed, readout=readout_of(stage.recipe))


def _bag_of_words(stage: Stage, model: PreTrainedModel, tokenize: PairTokenizer, packed: bool) -> Reconstruction:
    if stage.one.candidates == "vocabulary":
        return _bag_of_tokens(stage, model, tokenize, packed)
    options: dict[str, Any] = {"packed": packed, "readout": readout_of(stage.recipe)}
    objective = BagOfWordsReconstruction(model, alpha=stage.one.alpha, **options)
    objective.bag_of_words = bag_of_words_loss(
        model, stage.inputs, tokenize, seed=stage.recipe.seed, encode=objective.encode, bf16=stage.bf16
    )
    stage.take_up(objective.bag_of_words)
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if head.weight is not embeddings.weight:
        head.requires_grad_(False)  # nothing is written
    return objective


def _bag_of_tokens(stage: Stage, model: PreTrainedModel, tokenize: PairTokenizer, packed: bool) -> Reconstruction:
    settings, recipe = stage.one, stage.recipe
    bag = bag_of_tokens(model, stage.inputs, tokenize, seed=recipe.seed, max_df=settings.max_df)
    stage.take_up(bag)
    return BagOfTokensReconstruction(
        model,
        bag=bag,
        source=settings.source,
        lm_weight=settings.lm_weight,
        span=text_span(tokenize.tokenizer, recipe),
        alpha=settings.alpha,
        packed=packed,
        readout=readout_of(recipe),
    )


def _note_stop_tokens(stage: Stage, objective: BagOfTokensReconstruction, tokenizer: Any) -> None:
    """Write the tokens that no bag has into the run's record, and say how many there are."""
    ids = sorted(objective.bag.stop_tokens)
    stage.run.note("stop_tokens", {"ids": ids, "tokens": [tokenizer.decode([token]) for token in ids]})
    say(f"Stage I: {len(ids)} tokens stand in more than {stage.one.max_df:.0%} of the texts, and are never told")


def masking_of(recipe: Recipe, tokenizer: Any) -> TokenMasking:
    """Which tokens Stage I of `recipe` masks in the texts that `tokenizer` reads."""
    assert recipe.stage_one is not None
    settings = recipe.stage_one.masking
    return TokenMasking(
        token=mask_token(tokenizer, settings.token),
        vocabulary=len(tokenizer),
        after=len(template_of(tokenizer).after),
        mlm_probability=settings.mlm_probability,
        mask_replace_prob=settings.mask_replace_prob,
        random_replace_prob=settings.random_replace_prob,
        most=recipe.stage_one.max_target_tokens,
        seed=recipe.seed,
    )


def _masked(stage: Stage, model: PreTrainedModel, tokenize: PairTokenizer, packed: bool) -> Reconstruction:
    masking = masking_of(stage.recipe, tokenize.tokenizer)
    return MaskedReconstruction(model, alpha=0.5, packed=packed, readout=readout_of(stage.recipe), masking=masking)


OBJECTIVES: dict[str, Callable[[Stage, PreTrainedModel, PairTokenizer, bool], Reconstruction]] = {
    "text": _text,
    "bag_of_words": _bag_of_words,
    "masked": _masked,
}
"""`stage_one.target` -> the objective of a stage around a model."""
