"""The keys of the stages: what trains in each, and how."""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from pydantic_core import PydanticCustomError

from anchorvec.recipe.checks import check_masking, check_target
from anchorvec.recipe.section import Section


class _Stage(Section):
    steps: PositiveInt
    """Optimizer steps."""
    pairs_per_step: PositiveInt = 512
    """Pairs in one optimizer step, over all devices and micro-batches. 512 is the paper's."""
    learning_rate: PositiveFloat
    """The highest learning rate, reached after the warm-up."""
    warmup_steps: NonNegativeInt = 300
    """Steps over which the learning rate rises from 0; part of `steps`. 300 is the paper's."""
    # The schedule always spans `steps`, never a number of epochs that the run then does not complete (T13).
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls from the warm-up to the last of `steps`: to 0, or not at all
    (`constant`)."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW. 0 is the default of transformers' Trainer."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients of a larger norm are scaled down to it; 0: never. 1 is the default of transformers'
    Trainer."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Compute activations again in the backward pass: less memory, about a third more time. `auto`: only where it
    would not fit otherwise."""
    log_every: PositiveInt = 10
    """Steps from one line of the log to the next."""
    save_steps: PositiveInt | None = 100
    """Steps from one checkpoint to the next, from which `--resume` goes on. null: only where the run is told to stop
    (Ctrl-C, SIGTERM). A checkpoint has the weights that are trained, and twice their size beside them; they are removed
    when the stage is finished."""
    save_total_limit: PositiveInt = 2
    """So many checkpoints are kept, the newest ones. While one is written there is one more."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps > self.steps:
            raise PydanticCustomError(
                "warmup_too_long",
                "{warmup} steps of warm-up do not fit into {steps} steps; set both",
                {"warmup": self.warmup_steps, "steps": self.steps, "keys": [("warmup_steps",), ("steps",)]},
            )
        return self


class Lora(Section):
    """LoRA on all linear layers."""

    r: PositiveInt = 16
    """Rank. 16 is the paper's."""
    alpha: PositiveInt = 32
    """The update is scaled by alpha / r. 32 is the paper's."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout in front of the adapters. 0.05 is the paper's."""


class Masking(Section):
    """Which tokens are masked, with `target: masked`. Names and shares are those of transformers' collator for it."""

    token: str = Field("_", min_length=1)
    """What stands in their place: one token of the vocabulary. Where this is none, the tokenizer's own mask token."""
    mlm_probability: float = Field(0.2, gt=0, lt=1)
    """The share of a text's tokens that are predicted. 0.2 is LLM2Vec's."""
    mask_replace_prob: float = Field(0.8, ge=0, le=1)
    """Of these, the share that is masked."""
    random_replace_prob: float = Field(0.1, ge=0, le=1)
    """Of these, the share that becomes any other token; the rest stays what it is."""

    @model_validator(mode="after")
    def _at_most_all(self) -> Self:
        check_masking(self)
        return self


class StageOne(_Stage):
    """Stage I, bidirectional reconstruction: each text of a pair is written from the other's embedding."""

    target: Literal["text", "bag_of_words", "masked"] = "text"
    """What is reconstructed: `text`, written token by token (the paper's); `bag_of_words`, all at once, to be told
    among those of thousands of texts: words teach from the first steps on, a text only after very many pairs (a word
    is a token of the model); or, without any embedding, `masked` tokens from those around them (LLM2Vec's masked
    next-token prediction), for a decoder that reads in both directions."""

    steps: PositiveInt = 2000
    """Optimizer steps. 2000 is the paper's."""
    learning_rate: PositiveFloat = 4e-5
    """The highest learning rate, reached after the warm-up. All parameters train (an untied LM head only if tokens are
    predicted), unless there is `lora`. 4e-5 is the paper's."""
    alpha: float = Field(0.2, ge=0, le=1)
    """Weight of query_to_document in the loss; document_to_query has 1 - alpha. 1 or 0 trains one direction
    alone. 0.2 is the paper's. No effect with `target: masked`."""
    candidates: Literal["texts", "vocabulary"] = "texts"
    """Among what a bag of words is told: those of thousands of sampled `texts`, or, token by token and through the LM
    head, the `vocabulary` (LLaMA2Vec). No effect but with `target: bag_of_words`."""
    source: Literal["other", "own", "both"] = "other"
    """With `candidates: vocabulary`, whose text an embedding tells: the `other` one of the pair, its `own`, or `both`
    (LLaMA2Vec)."""
    lm_weight: NonNegativeFloat = 1.0
    """With `candidates: vocabulary`, the weight of the language-model loss of the texts that are read, beside the bags.
    1 is LLaMA2Vec's."""
    max_df: float = Field(0.1, gt=0, le=1)
    """With `candidates: vocabulary`, tokens in more than this share of the queries, or of the documents, are no
    targets (stop words; of a sample of the pairs)."""
    end_token_target: bool = True
    """Learn to write the end token too, so that the model knows where to stop. The paper's formula leaves it
    out. No effect but with `target: text`."""
    max_target_tokens: PositiveInt | None = None
    """Write, mask, predict, or tell the words of only the first so many tokens of a text. null: all that the encoder
    reads."""
    masking: Masking = Masking()
    """Which tokens are masked. No effect but with `target: masked`."""
    lora: Lora | None = None
    """Train LoRA adapters, which are merged into the model when the stage ends. null: all parameters, the paper's."""
    sharded: bool = False
    """Of several devices each holds a part of weights, gradients and optimizer state (FSDP2), for a model that one does
    not hold; the layers' weights are bf16 in each pass then, where the stage computes in it. false: each holds them all
    (DDP), which is faster ([devices](devices.md))."""
    micro_batch_tokens: PositiveInt | None = None
    """Tokens in one micro-batch; the result does not depend on it. null: what fits into the free memory, at most
    1,536 on a CPU and 65,536 on a GPU."""

    @model_validator(mode="after")
    def _has_targets(self) -> Self:
        check_target(self)
        return self


class StageTwo(_Stage):
    """Stage II, contrastive learning (InfoNCE): a query finds its document among those of the batch."""

    steps: PositiveInt = 1000
    """Optimizer steps. 1000 is the paper's."""
    pairs_per_step: int = Field(512, ge=2)
    """Pairs in one optimizer step, over all devices; each document is a negative of every other query. 512 is
    the paper's."""
    learning_rate: PositiveFloat = 2e-4
    """The highest learning rate, reached after the warm-up. 2e-4 is the paper's, with LoRA; full fine-tuning
    needs a smaller one."""
    temperature: PositiveFloat = 0.05
    """Cosine similarities are divided by it. 0.05 is the paper's, and that of bags of words, which has no setting."""
    lora: Lora | None = Lora()
    """Train LoRA adapters. null: full fine-tuning."""
    bag_of_words_weight: NonNegativeFloat = 0.0
    """Weight of bag-of-words reconstruction (Stage I's `target: bag_of_words`, both directions alike) in the same step,
    beside the contrastive loss. 0: off, the paper's."""
    generation_weight: NonNegativeFloat = 0.0
    """Weight of generation in the same step, beside the contrastive loss (GritLM): the decoder also writes the document
    after the query, causally, a line break between them. The folder keeps its LM head. 0: off, the paper's."""
    in_batch_negatives: Literal["random", "similar"] = "random"
    """Which pairs make a step: `random`, or pairs that are `similar` by their words, so that a query's wrong documents
    are hard ones. Pairs so similar that one may answer the other's query are kept apart, where there are others. With
    words beside it, models trained so were better on text like their pairs, and worse on other text."""
    negatives: NonNegativeInt = 1
    """Hard negatives per query. A row with fewer is used without any; `anchorvec plan` counts those that have them."""
    positives: Literal["pairs", "dropout"] = "pairs"
    """What a text is to be near: its partner in the `pairs`, or with `dropout` itself in another pass, in which other
    parts are left out at random (SimCSE). The texts are then the documents of the pairs, twice each."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the attention weights that are left out at random while Stage II trains; for decoders whose
    configuration has such a value. SimCSE lives on it: LLM2Vec takes 0.3. Attention runs text by text then."""
    micro_batch_tokens: PositiveInt | None = None
    """Tokens encoded at a time; the result does not depend on it, but for the random draws of dropout. A step
    with more goes through cached gradients, which encode every text twice. null: the whole step if it fits into the
    free memory, else at most 1,536 on a CPU and 65,536 on a GPU."""
