"""What a recipe would do, before anything is trained."""

import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Group
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import AutoTokenizer

from anchorvec.data.reading import readout_of
from anchorvec.data.stage_inputs import LENGTH_SAMPLE, StageInputs, reconstructs, sample_rows
from anchorvec.data.tokens import PairTokenizer
from anchorvec.device import check_one_device, default_device, resolve_precision
from anchorvec.model.decoder import decoder_of
from anchorvec.model.embedder import can_write, load_causal_lm
from anchorvec.objectives.masked import IGNORED
from anchorvec.objectives.pairs import TokenPair
from anchorvec.pipeline import load_training_data
from anchorvec.recipe import Recipe, dump_recipe, load_recipe
from anchorvec.recipe.description import describe_stage_one, describe_stage_two
from anchorvec.run import Run
from anchorvec.start import build_base, with_settings_of_base
from anchorvec.training.checkpoints import CHECKPOINT_BYTES, most_at_once
from anchorvec.training.engine import Engine
from anchorvec.training.stage import Stage
from anchorvec.training.stage_one import masking_of, pair_tokenizer, stage_one_objective
from anchorvec.training.stage_two import StageTwoModel, stage_two_loss, stage_two_model
from anchorvec.training.trial import TrialStep, try_stage_one, try_stage_two

SHOWN_PAIRS = 3

_SAMPLED_PAIRS = 64
"""From which the tokens of a pair are estimated."""


@dataclass(frozen=True)
class ShownPair:
    """One pair as the tokens' texts: what is read, and what is written (every one a target) or told at once."""

    query_read: list[str]
    document_read: list[str]
    document_written: list[str]
    query_written: list[str]


@dataclass(frozen=True)
class Plan:
    """The resolved recipe and what it costs. Sizes in bytes; tokens counted over all passes of the shown batch."""

    recipe: str
    description: dict[str, str]
    device: str
    precision: str
    rows: dict[str, int]
    rejected_rows: dict[str, int]
    mended_rows: dict[str, int]
    ignored_columns: dict[str, list[str]]
    rows_with_negatives: dict[str, int]
    steps_of_a_pass: dict[str, int]
    full_steps: dict[str, int]
    parameters: int
    trained_parameters: dict[str, int]
    disk: dict[str, int]
    tokens_per_pair: float
    tokens: dict[str, int]
    engine: dict[str, Engine]
    trial_steps: dict[str, TrialStep]
    target: Literal["text", "bag_of_words", "masked"] | None
    bag_of_words_weight: float
    in_batch_negatives: Literal["random", "similar"] | None
    pairs: list[ShownPair]

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return asdict(self)

    def __rich__(self) -> Group:
        table = Table(show_header=False, title="Plan")
        for name, words in self.description.items():
            table.add_row(name, Text(words))
        table.add_row("device", f"{self.device}, {self.precision}")
        for name, rows in self.rows.items():
            shown = f"{rows:,}"
            changes = {"left out": self.rejected_rows[name], "mended": self.mended_rows[name]}
            if any(changes.values()):
                shown += f" ({', '.join(f'{count:,} {what}' for what, count in changes.items() if count)})"
            if name in self.rows_with_negatives:
                shown += f", {self.rows_with_negatives[name]:,} with hard negatives"
            if name in self.steps_of_a_pass and self.steps_of_a_pass[name] < self.full_steps[name]:
                shown += (
                    f"; texts repeat: a pass over them fills {self.steps_of_a_pass[name]:,} steps of Stage II, not "
                    f"{self.full_steps[name]:,}, and the same rows come again after that; for more lower "
                    "stage_two.pairs_per_step"
                )
            if columns := self.ignored_columns[name]:
                shown += f"; not used: {', '.join(columns)}"
            table.add_row(f"pairs of {name}", shown)
        table.add_row("parameters", f"{self.parameters:,}")
        for stage, count in self.trained_parameters.items():
            table.add_row(f"trained in {stage}", f"{count:,} ({count / self.parameters:.1%})")
        for stage, count in self.tokens.items():
            table.add_row(f"tokens in {stage}", f"about {count:,}")
        if self.bag_of_words_weight:
            table.add_row(
                "stage_two, bag of words", f"beside its contrastive loss, weight {self.bag_of_words_weight:g}"
            )
        if self.in_batch_negatives == "similar":
            table.add_row("pairs of a step", "similar ones in stage_two")
        for stage, engine in self.engine.items():
            table.add_row(f"{stage} runs", _show_engine(engine, stage))
            for line in engine.slower:
                table.add_row("", line)
        for stage, trial in self.trial_steps.items():
            table.add_row(f"a micro-step of {stage}", str(trial))
        table.add_row(
            "disk",
            f"{sum(self.disk.values()) / 1e9:.2f} GB: " + ", ".join(f"{k} {v / 1e9:.2f}" for k, v in self.disk.items()),
        )
        return Group(Syntax(self.recipe, "yaml"), table, *(_show_pair(pair, self.target) for pair in self.pairs))


def plan(recipe: Recipe | str | Path, *, step: bool = True) -> Plan:
    """Resolve `recipe`, load its data and base model, decode one batch, and count; nothing is trained or kept.

    With `step` one real micro-step of each stage is made, of the longest of some texts, where it fits into the free
    memory and two minutes.

    The base model is loaded, so a plan needs the memory of one copy, and disk for one in the system's temporary
    folder (TMPDIR) while it works. `rows_with_negatives` is empty where Stage II wants none. Raises AnchorvecError for
    a recipe or data that cannot be used.
    """
    recipe = with_settings_of_base(recipe if isinstance(recipe, Recipe) else load_recipe(recipe))
    check_one_device()
    inputs = load_training_data(recipe)
    target = reconstructs(recipe)
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(Path(scratch))
        base = build_base(recipe, run.base)
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenize = pair_tokenizer(recipe, tokenizer)
        prepared = _prepared(recipe, run, inputs, tokenize, step)
        base_bytes = sum(path.stat().st_size for path in base.rglob("*") if path.is_file())
    batch = tokenize(sample_rows(inputs.reconstruction, _SAMPLED_PAIRS, recipe.seed))["pairs"]
    alpha, writes = (recipe.stage_one.alpha, target == "text") if recipe.stage_one else (0.5, False)
    alpha = 0.5 if target == "masked" else alpha  # both texts are read
    per_pair = statistics.mean(pair.tokens(alpha, writes=writes) for pair in batch)
    stage_two = recipe.stage_two
    trained = {name: stage.trained for name, stage in prepared.stages.items()}
    return Plan(
        recipe=dump_recipe(recipe),
        description=_described(recipe),
        device=str(default_device()),
        precision=resolve_precision(recipe.model.precision),
        rows={name: report.rows for name, report in inputs.reports.items()},
        rows_with_negatives=inputs.rows_with_negatives,
        steps_of_a_pass=inputs.steps_of_a_pass,
        full_steps=_full_steps(recipe, inputs),
        ignored_columns={name: report.ignored_columns for name, report in inputs.reports.items()},
        rejected_rows={name: sum(report.rejected.values()) for name, report in inputs.reports.items()},
        mended_rows={name: sum(report.mended.values()) for name, report in inputs.reports.items()},
        parameters=prepared.parameters,
        trained_parameters=trained,
        disk=_disk(recipe, base_bytes, prepared),
        tokens_per_pair=per_pair,
        tokens=_tokens(recipe, inputs, batch, per_pair),
        engine={name: stage.engine for name, stage in prepared.stages.items()},
        trial_steps={name: stage.trial for name, stage in prepared.stages.items()},
        target=target,
        bag_of_words_weight=stage_two.bag_of_words_weight if stage_two else 0.0,
        in_batch_negatives=stage_two.in_batch_negatives if stage_two else None,
        pairs=[_decoded(pair, tokenizer) for pair in _drawn(recipe, tokenizer, batch[:SHOWN_PAIRS])],
    )


def _described(recipe: Recipe) -> dict[str, str]:
    """What the recipe is, how it reads a text, and what its stages train, by the titles of rows."""
    rows = {"what it is": recipe.about} if recipe.about else {}
    rows["a text is"] = str(readout_of(recipe))
    if recipe.stage_one is not None:
        rows["stage_one"] = describe_stage_one(recipe.stage_one)
    if recipe.stage_two is not None:
        rows["stage_two"] = describe_stage_two(recipe.stage_two)
    return rows


@dataclass(frozen=True)
class _PreparedStage:
    """The engine of a stage, the number of parameters that it trains, and a micro-step of it."""

    engine: Engine
    trained: int
    trial: TrialStep


@dataclass(frozen=True)
class _Prepared:
    """The stages as they would start, the parameters of the causal LM, and those of its decoder."""

    stages: dict[str, _PreparedStage]
    parameters: int
    body_parameters: int


def _prepared(recipe: Recipe, run: Run, inputs: StageInputs, tokenize: PairTokenizer, step: bool) -> _Prepared:
    """Both stages set up on the base of `run`, one after the other, each with a micro-step if `step` says so."""
    stages = {}
    counts = (0, 0)
    if recipe.stage_two:
        stage = Stage("stage_two", recipe, run, run.base, inputs)
        two = stage_two_model(stage)
        body: Any = two.model[0].model
        counts = (_parameters(body), _parameters(body))
        stages["stage_two"] = _PreparedStage(two.engine, _trained(two.model), _try_two(stage, two, step))
        del two, body
    if recipe.stage_one:
        objective, engine = stage_one_objective(Stage("stage_one", recipe, run, run.base, inputs), tokenize)
        model: Any = objective.model
        counts = (_parameters(model), _parameters(decoder_of(model)))
        trial = _NO_STEP
        if step:
            pairs = tokenize(sample_rows(inputs.reconstruction, LENGTH_SAMPLE, recipe.seed))["pairs"]
            trial = try_stage_one(objective, engine, pairs, bf16=_bf16(recipe))
        stages["stage_one"] = _PreparedStage(engine, _trained(model), trial)
    elif can_write(run.base):
        model = load_causal_lm(run.base)
        counts = (_parameters(model), _parameters(decoder_of(model)))
    return _Prepared(dict(sorted(stages.items())), *counts)


def _disk(recipe: Recipe, base_bytes: int, prepared: _Prepared) -> dict[str, int]:
    """Bytes of the base, of what each stage writes, of the most checkpoints at one time, and of the export, in fp32."""
    disk = {"base": base_bytes}
    stages = {name: getattr(recipe, name) for name in prepared.stages}
    disk["checkpoints"] = max(
        most_at_once(settings) * CHECKPOINT_BYTES * prepared.stages[name].trained for name, settings in stages.items()
    )
    if "stage_one" in prepared.stages:
        disk["stage_one"] = 4 * prepared.parameters
    if "stage_two" in prepared.stages:
        disk["stage_two"] = 4 * prepared.stages["stage_two"].trained
    disk["export"] = 4 * (prepared.body_parameters if "stage_two" in prepared.stages else prepared.parameters)
    return disk


_NO_STEP = TrialStep(0, None, "not asked for")


def _try_two(stage: Stage, two: StageTwoModel, step: bool) -> TrialStep:
    """A micro-step of Stage II on the first data set."""
    if not step:
        return _NO_STEP
    name, dataset = next(iter(stage.inputs.contrastive.items()))
    rows = sample_rows(dataset, stage.two.pairs_per_step, stage.recipe.seed)
    loss = stage_two_loss(stage, two)
    return try_stage_two(two.model, loss, two.engine, rows, stage.inputs.prompts[name], bf16=_bf16(stage.recipe))


def _bf16(recipe: Recipe) -> bool:
    return resolve_precision(recipe.model.precision) == "bf16"


def _parameters(model: nn.Module) -> int:
    """Those of the model itself, adapters left out."""
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)


def _full_steps(recipe: Recipe, inputs: StageInputs) -> dict[str, int]:
    """The steps of Stage II that a pass over each data set would fill if no text were there twice; 1,000 at most."""
    if recipe.stage_two is None:
        return {}
    size = recipe.stage_two.pairs_per_step
    return {name: min(1_000, len(rows) // size) for name, rows in inputs.contrastive.items()}


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _tokens(recipe: Recipe, inputs: StageInputs, batch: list[TokenPair], per_pair: float) -> dict[str, int]:
    """Tokens of each stage, from a sample of its pairs and the tokens of a pair in Stage I."""
    tokens = {}
    if one := recipe.stage_one:
        tokens["stage_one"] = round(per_pair * one.pairs_per_step * one.steps)
    if two := recipe.stage_two:
        read = statistics.mean(len(pair.query) + len(pair.document) for pair in batch)
        rows = sum(report.rows for report in inputs.reports.values())
        with_negatives = sum(inputs.rows_with_negatives.values()) / rows
        # a negative is taken to be as long as a positive
        read += with_negatives * two.negatives * statistics.mean(len(pair.document) for pair in batch)
        tokens["stage_two"] = round(read * two.pairs_per_step * two.steps)
    return tokens


def _drawn(recipe: Recipe, tokenizer: Any, pairs: list[TokenPair]) -> list[TokenPair]:
    """The `pairs` as a step has them: where tokens are masked, with masks, and those in place of the targets."""
    if reconstructs(recipe) != "masked":
        return pairs
    drawn = masking_of(recipe, tokenizer).draw(pairs, 0)
    labels = [[[n for n in text if n != IGNORED] for text in (p.query_targets, p.document_targets)] for p in drawn]
    return [replace(p, query_targets=q, document_targets=d) for p, (q, d) in zip(drawn, labels, strict=True)]


def _decoded(pair: TokenPair, tokenizer: Any) -> ShownPair:
    passes = (pair.query, pair.document, pair.document_targets, pair.query_targets)
    return ShownPair(*([tokenizer.decode([token]) for token in ids] for ids in passes))


def _show_engine(engine: Engine, stage: str) -> str:
    whole_step = stage == "stage_two" and not engine.cached_gradients
    ways = [
        "packed" if engine.packed else "padded",
        "a step at once" if whole_step else f"micro-batches of {engine.micro_batch_tokens:,} tokens",
        f"{engine.bytes_per_token / 1e6:.2g} MB a token",
        *["MORE THAN THE FREE MEMORY"] * (not engine.fits),
        *["cached gradients"] * engine.cached_gradients,
        *["gradient checkpointing"] * engine.gradient_checkpointing,
        *["compiled layers"] * engine.compiled,
    ]
    return ", ".join(ways)


def _show_pair(pair: ShownPair, target: str | None) -> Text:
    text = Text()
    verb = {"bag_of_words": "tell words of", "masked": "unmask"}.get(target or "", "write")
    lines = [("read query", pair.query_read, "dim"), ("read document", pair.document_read, "dim")]
    if target is not None:
        lines += [
            (f"{verb} document", pair.document_written, "green"),
            (f"{verb} query", pair.query_written, "green"),
        ]
    for title, tokens, style in lines:
        text.append(f"\n{title:{len(verb) + 11}}", style="bold")
        text.append("[e] " if style == "green" and target != "masked" else "")
        text.append("|".join(token.replace("\n", "\\n") for token in tokens), style=style)
    if target is not None:
        of_embeddings = "" if target == "masked" else "; [e]: the embedding of the other side"
        text.append(f"\n(green: targets{of_embeddings})")
    return text
