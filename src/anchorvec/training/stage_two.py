"""Stage II of a run: an embedder is trained contrastively."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.training_args import (
    MultiDatasetBatchSamplers,
    SentenceTransformerTrainingArguments,
)
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from anchorvec.data.reading import without_prompt_and_end
from anchorvec.data.samplers import DifferentTexts, SimilarPairs
from anchorvec.data.stage_inputs import large_step
from anchorvec.data.tokens import PairTokenizer
from anchorvec.device import default_device, keep_frozen_in_bf16
from anchorvec.files import new_folder, write_json
from anchorvec.model.compiling import compile_decoder_layers
from anchorvec.model.decoder import decoder_of, layers_with_dropout
from anchorvec.model.embedder import attention_options, load_causal_lm, put_head_back, save_tokenizer
from anchorvec.model.end import template_of
from anchorvec.model.folders import START, weights_fingerprint
from anchorvec.model.loading import load_sentence_transformer
from anchorvec.model.packing import packed_features, use_packed_texts
from anchorvec.model.portable import make_portable
from anchorvec.objectives.bag_of_words import SAMPLE_PAIRS, BagOfWordsLoss
from anchorvec.objectives.contrastive import Loss, contrastive_loss
from anchorvec.objectives.generation import Generation, generation_loss
from anchorvec.ranks import rank, ranks
from anchorvec.training.bag_of_words import bag_of_words_loss
from anchorvec.training.engine import UNPACKABLE, Demand, Engine, agreed, choose_engine, why_padded
from anchorvec.training.lora import fuse_adapters, lora_config
from anchorvec.training.memory import release_freed_memory
from anchorvec.training.stage import Stage, run_trainer
from anchorvec.training.trainers import ContrastiveTrainer


@dataclass(frozen=True)
class StageTwoModel:
    """The embedder with what Stage II trains in it, and the engine it is set up for.

    It reads texts up to the limit for training. `bag_of_words` is there where it is a part of the loss, or chooses the
    negatives, `generation` where documents are written, too.
    """

    model: SentenceTransformer
    engine: Engine
    bag_of_words: BagOfWordsLoss | None
    generation: Generation | None = None


def train_stage_two(stage: Stage) -> Path:
    """Train the embedder that `stage` starts from contrastively; its folder.

    With LoRA the folder holds the adapter alone, to be merged over the start by `export`; without, a whole model.
    """
    inputs = stage.inputs
    prepared = stage_two_model(stage)
    model = prepared.model
    content = without_prompt_and_end(model.tokenizer, stage.recipe)
    stage.begin(prepared.engine, prepared.bag_of_words)
    progress = stage.progress()
    orders: dict[str, Tensor] = {}
    trainer = ContrastiveTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            **stage.arguments(),
            batch_sampler=_batch_sampler(stage, prepared, content, orders),
            multi_dataset_batch_sampler=MultiDatasetBatchSamplers.PROPORTIONAL,  # one data set a batch
            prompts=inputs.prompts,
        ),
        # copies: the trainer adds its name to each data set in place
        train_dataset={name: copy.copy(rows) for name, rows in inputs.contrastive.items()},
        loss=stage_two_loss(stage, prepared),
        callbacks=[progress],
    )
    trainer.orders = orders
    run_trainer(stage, trainer, progress, partial(_save, stage, prepared))
    folder = stage.run.stage("stage_two")
    if rank() == 0:
        _save(stage, prepared, folder)
    return folder


def _save(stage: Stage, prepared: StageTwoModel, folder: Path) -> None:
    """Write the `prepared` model as it is into the new `folder`; of one with adapters these, and what is below."""
    model, generation = prepared.model, prepared.generation
    training_tokens = model.max_seq_length
    model.max_seq_length = stage.recipe.model.max_tokens
    with new_folder(folder) as scratch:
        model.save_pretrained(str(scratch), create_model_card=False)
        save_tokenizer(model.tokenizer, scratch)
        if generation is not None and stage.two.lora is None:
            put_head_back(generation.model, scratch)
        make_portable(scratch)
        if stage.two.lora is not None:
            start = {"folder": stage.start.name, "weights": weights_fingerprint(stage.start)}
            write_json(scratch / START, start | {"writes": generation is not None})
    model.max_seq_length = training_tokens


def stage_two_loss(stage: Stage, prepared: StageTwoModel) -> Loss:
    """The loss of `stage` on the model that is `prepared` for it."""
    settings, engine = stage.two, prepared.engine
    held = engine.micro_batch_tokens if engine.cached_gradients else None
    written = None
    if prepared.generation is not None:
        written = partial(generation_loss, prepared.generation, micro_batch_tokens=held, bf16=stage.bf16)
    return contrastive_loss(
        prepared.model,
        temperature=settings.temperature,
        micro_batch_tokens=held,
        bag_of_words=prepared.bag_of_words if settings.bag_of_words_weight else None,
        bag_of_words_weight=settings.bag_of_words_weight,
        content=without_prompt_and_end(prepared.model.tokenizer, stage.recipe),
        generation=written,
        generation_weight=settings.generation_weight,
        # in fp32 on a CPU, which computes text by text, it brings nothing
        one_pass=(default_device().type == "cuda" or stage.bf16) and stage.recipe.model.pool_prompt,
    )


def stage_two_model(stage: Stage) -> StageTwoModel:
    """The embedder that `stage` starts from, with what it trains, set up as the engine says."""
    recipe, settings = stage.recipe, stage.two
    model, causal_lm = _trained_model(stage)
    padded_because = why_padded(recipe.model.attention, recipe.model.precision)
    packed = not padded_because and use_packed_texts(model)
    generation = None if causal_lm is None else _generation(stage, model, causal_lm, packed)
    _add_lora(stage, model)

    def embed(ids: Tensor, mask: Tensor, prompt: int = 0) -> Tensor:
        features = {"input_ids": ids, "attention_mask": mask, "prompt_length": prompt}
        embedding: Tensor = model(packed_features(features) if packed else features)["sentence_embedding"]
        return embedding

    def encode(n: int) -> tuple[Tensor, int]:
        ids = torch.ones(1, n * stage.part_tokens, dtype=torch.long, device=model.device)
        return embed(ids, torch.ones_like(ids)), ids.numel()

    bag_of_words = None
    if settings.bag_of_words_weight or settings.in_batch_negatives == "similar":
        bag_of_words = _bag_of_words(stage, model, embed)
    body: Any = model[0].model
    engine = stage.engine_before(body, packed)
    if engine is None:
        demand = stage_two_demand(stage, model.tokenizer, packed, padded_because or UNPACKABLE, generation)
        engine = choose_engine(body, encode, demand)
    engine = agreed(engine, body)
    if engine.compiled and generation is not None:
        generation.compile_layers()
    elif engine.compiled:
        compile_decoder_layers(body)
    return StageTwoModel(model, engine, bag_of_words, generation)


def stage_two_demand(
    stage: Stage, tokenizer: Any, packed: bool, padded_because: str, generation: Generation | None = None
) -> Demand:
    """What `stage` wants to hold, of texts that `tokenizer` reads; `packed`, and `padded_because`, why not.

    `generation`: what writes documents beside the contrastive loss, where something does.
    """
    recipe, settings, inputs = stage.recipe, stage.two, stage.inputs
    longest = recipe.longest_read
    share = settings.pairs_per_step // ranks()
    logits_bytes = 4 * 4 * 2 * SAMPLE_PAIRS * share if settings.bag_of_words_weight else 0
    if generation is not None:
        longest = recipe.longest_generated
        logits_bytes += generation.score_bytes(share, recipe.training_tokens, default_device())

    def step_tokens(name: str, rows: Any) -> float:
        prompts = inputs.prompts[name]
        read = large_step(tokenizer, rows, prompts, recipe, packed=packed)
        if generation is None:
            return read
        pair = {column: prompts[column] for column in ("query", "positive")}
        return read + large_step(tokenizer, rows, pair, recipe, packed=packed)

    return Demand(
        packed=packed,
        precision=recipe.model.precision,
        gradient_checkpointing=settings.gradient_checkpointing,
        micro_batch_tokens=settings.micro_batch_tokens,
        longest=longest,
        least_tokens=longest,
        step_tokens=max(step_tokens(name, rows) for name, rows in inputs.contrastive.items()) / ranks(),
        logits_bytes=logits_bytes,
        devices=ranks(),
        long_enough=stage.long_enough and not settings.attention_dropout,
        padded_because=padded_because,
        attention_dropout=settings.attention_dropout,
    )


def _trained_model(stage: Stage) -> tuple[SentenceTransformer, PreTrainedModel | None]:
    """The embedder that `stage` starts from, and the causal LM around its decoder where that is to write, too."""
    release_freed_memory()  # of an earlier stage
    set_seed(stage.recipe.seed)  # LoRA's new weights are drawn before the trainer seeds
    options = attention_options(stage.recipe.model.attention)
    model = load_sentence_transformer(
        str(stage.start),
        model_kwargs={"dtype": torch.float32, "use_safetensors": True, **options},
        device=str(default_device()),
    ).train()
    model.max_seq_length = stage.recipe.training_tokens
    if not stage.two.generation_weight:
        _set_attention_dropout(model, stage.two.attention_dropout)
        return model, None
    causal_lm = load_causal_lm(stage.start, attention=stage.recipe.model.attention).train()
    nn.Module.to(causal_lm, default_device())  # PreTrainedModel.to is not typed
    module: Any = model[0]
    module.model = decoder_of(causal_lm)
    _set_attention_dropout(model, stage.two.attention_dropout)
    return model, causal_lm


def _set_attention_dropout(model: SentenceTransformer, share: float) -> None:
    """Have the layers leave out a `share` of the attention weights in training; what is saved does not tell of it."""
    for layer in layers_with_dropout(model) if share else ():
        layer.attention_dropout = share


def _generation(stage: Stage, model: SentenceTransformer, causal_lm: PreTrainedModel, packed: bool) -> Generation:
    """What writes documents after queries with `causal_lm`, whose decoder is that of `model`; a head trains with it."""
    head: Any = causal_lm.get_output_embeddings()
    embeddings: Any = causal_lm.get_input_embeddings()
    if head.weight is not embeddings.weight:
        head.requires_grad_(stage.two.lora is None)
        model[0].add_module("lm_head", head)  # for optimizer, gradient norm and checkpoints; it is not saved there
    tokenizer: Any = model.tokenizer
    return Generation(
        causal_lm,
        separator=template_of(tokenizer).once(tokenizer("\n", add_special_tokens=False)["input_ids"]),
        end=tokenizer.eos_token_id,
        limit=stage.recipe.training_tokens,
        content=without_prompt_and_end(tokenizer, stage.recipe),
        packed=packed,
    )


def _add_lora(stage: Stage, model: SentenceTransformer) -> None:
    lora = stage.two.lora
    if lora is None:
        return
    body: Any = model[0].model
    model.add_adapter(lora_config(body, r=lora.r, alpha=lora.alpha, dropout=lora.dropout))
    if stage.bf16:
        keep_frozen_in_bf16(model)
        fuse_adapters(model)


def _bag_of_words(
    stage: Stage, model: SentenceTransformer, embed: Callable[[Tensor, Tensor, int], Tensor]
) -> BagOfWordsLoss:
    """The bag-of-words loss; with an origin where it is a part of the stage's loss."""
    tokenizer = model.tokenizer

    def encode(texts: list[list[int]], prompts: list[int]) -> Tensor:
        found = []
        for length in sorted(set(prompts)):  # the library takes one length of the prompts of a batch
            ids = [text for text, prompt in zip(texts, prompts, strict=True) if prompt == length]
            padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt").to(model.device)
            found.append(embed(padded["input_ids"], padded["attention_mask"], length))
        return torch.cat(found)

    tokenize = PairTokenizer(
        tokenizer,
        max_tokens=stage.recipe.training_tokens,
        content=without_prompt_and_end(tokenizer, stage.recipe),
    )
    body: Any = model[0].model
    loss = bag_of_words_loss(
        body,
        stage.inputs,
        tokenize,
        seed=stage.recipe.seed,
        encode=encode if stage.two.bag_of_words_weight else None,
        bf16=stage.bf16,
    )
    stage.take_up(loss)
    return loss


def _batch_sampler(
    stage: Stage, prepared: StageTwoModel, content: Callable[[list[int]], list[int]], orders: dict[str, Tensor]
) -> Any:
    """What makes the batch sampler of a data set; no text is in a batch twice (T16). `orders` as in `SimilarPairs`."""
    if stage.two.in_batch_negatives == "random":
        return partial(DifferentTexts, hashes=stage.inputs.hashes)
    assert prepared.bag_of_words is not None
    loss, tokenizer = prepared.bag_of_words, prepared.model.tokenizer

    def vectors(texts: list[str]) -> Tensor:
        """The bag-of-words vectors of `texts`, as far as training reads them: (texts, dim) on the CPU."""
        # some at a time: a tokenizer keeps 100 bytes for a character, cut ones too
        parts = (texts[i : i + 256] for i in range(0, len(texts), 256))
        read = (ids for part in parts for ids in tokenizer(part, truncation=True)["input_ids"])
        return loss.vectors([content(ids) for ids in read]).cpu()

    return partial(SimilarPairs, word_vectors=vectors, prompts=stage.inputs.prompts, orders=orders)
