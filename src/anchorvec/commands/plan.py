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

from anchorvec.data.reading import readout_of
from anchorvec.data.stage_inputs import LENGTH_SAMPLE, StageInputs, reconstructs, sample_rows
from anchorvec.data.tokens import PairTokenizer
from anchorvec.device import check_one_device, default_device, resolve_precision
from anchorvec.following import check_shares
from anchorvec.model.base import has_weights_here
from anchorvec.objectives.masked import IGNORED
from anchorvec.objectives.pairs import TokenPair
from anchorvec.pipeline import load_training_data
from anchorvec.planning.estimate import estimate_stage, with_precision
from anchorvec.planning.machines import Machine, find_machine
from anchorvec.planning.setup import Setup, set_up
from anchorvec.planning.whole import RunEstimate, estimate_run
from anchorvec.recipe import Recipe, dump_recipe, load_recipe
from anchorvec.recipe.description import describe_stage_one, describe_stage_two
from anchorvec.run import Run
from anchorvec.start import build_base, with_settings_of_base
from anchorvec.training.engine import Engine
from anchorvec.training.memory import free_memory
from anchorvec.training.stage import Stage
from anchorvec.training.stage_one import masking_of, stage_one_objective
from anchorvec.training.stage_two import StageTwoModel, stage_two_loss, stage_two_model
from anchorvec.training.trial import TrialStep, try_stage_one, try_stage_two

SHOWN_PAIRS = 3


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
    estimate: RunEstimate
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
        table.add_row(
            "disk",
            f"{sum(self.disk.values()) / 1e9:.2f} GB: " + ", ".join(f"{k} {v / 1e9:.2f}" for k, v in self.disk.items()),
        )
        for stage, trial in self.trial_steps.items():
            table.add_row(f"a micro-step of {stage}", str(trial))
        return Group(
            Syntax(self.recipe, "yaml"), table, self.estimate, *(_show_pair(pair, self.target) for pair in self.pairs)
        )


def plan(
    recipe: Recipe | str | Path,
    *,
    step: bool = True,
    machine: str | None = None,
    machines: str | Path | None = None,
) -> Plan:
    """Resolve `recipe`, load its data, decode one batch, and estimate; nothing is trained or kept.

    The estimate needs the configuration of the base model and its tokenizer alone. It is of this machine, or of the
    `machine` that is named as `find_machine` says, from the package's table or the file `machines`. With `step` one
    real micro-step of each stage is made here, of the longest of some texts, where the weights are here, fit into the
    free memory, and it takes at most two minutes; the base model is loaded then, and written into the system's
    temporary folder (TMPDIR) while that lasts.

    `rows_with_negatives` is empty where Stage II wants none. Raises AnchorvecError for a recipe or data that cannot be
    used, and for a machine that nobody knows.
    """
    recipe = with_settings_of_base(recipe if isinstance(recipe, Recipe) else load_recipe(recipe))
    check_one_device()
    of = None if machine is None else _machine_for(recipe, machine, machines)
    inputs = load_training_data(recipe)
    with tempfile.TemporaryDirectory() as scratch:
        setup = set_up(recipe, inputs, Path(scratch))
        estimate = estimate_run(setup, of, Path(scratch) / "probe")
        tokenizer, batch = setup.tokenizer, setup.sample(recipe)
        left_out = _no_step_because(recipe, setup, estimate, of, step)
        trials: dict[str, _Tried] = {}
        if not left_out:
            run = Run(Path(scratch) / "whole")
            build_base(recipe, run.base)
            trials = _tried(recipe, run, inputs, setup.tokenize(recipe))
    here = trials if of is None else {}
    engines = {name: here[name].engine if name in here else stage.engine for name, stage in estimate.stages.items()}
    return Plan(
        recipe=dump_recipe(recipe),
        description=_described(recipe),
        device=str(default_device()) if of is None else str(of),
        precision=resolve_precision(with_precision(recipe, of).model.precision),
        rows={name: report.rows for name, report in inputs.reports.items()},
        rows_with_negatives=inputs.rows_with_negatives,
        steps_of_a_pass=inputs.steps_of_a_pass,
        full_steps=_full_steps(recipe, inputs),
        ignored_columns={name: report.ignored_columns for name, report in inputs.reports.items()},
        rejected_rows={name: sum(report.rejected.values()) for name, report in inputs.reports.items()},
        mended_rows={name: sum(report.mended.values()) for name, report in inputs.reports.items()},
        parameters=estimate.parameters,
        trained_parameters={name: stage.trained for name, stage in estimate.stages.items()},
        disk=estimate.disk,
        tokens_per_pair=_tokens_per_pair(recipe, batch),
        tokens={name: stage.tokens for name, stage in estimate.stages.items()},
        engine=engines,
        estimate=estimate,
        trial_steps={
            name: trials[name].step if name in trials else TrialStep(0, None, left_out) for name in recipe.stages
        },
        target=reconstructs(recipe),
        bag_of_words_weight=recipe.stage_two.bag_of_words_weight if recipe.stage_two else 0.0,
        in_batch_negatives=recipe.stage_two.in_batch_negatives if recipe.stage_two else None,
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


def _machine_for(recipe: Recipe, name: str, own: str | Path | None) -> Machine:
    """The machine `name`, as `find_machine` says. Raises AnchorvecError where `train` could not run `recipe` on it."""
    machine = find_machine(name, own)
    check_shares(recipe, machine.devices)
    return machine


def _no_step_because(recipe: Recipe, setup: Setup, found: RunEstimate, machine: Machine | None, step: bool) -> str:
    """Why no micro-step is made here; empty where one is."""
    if not step:
        return "not asked for"
    if not has_weights_here(recipe.model.base, revision=recipe.model.revision):
        return "the weights are not on this machine"
    here = default_device()
    stages = found.stages
    if machine is not None:
        stages = {name: estimate_stage(setup, recipe, name, None) for name in recipe.stages}
    for name, stage in stages.items():
        held = stage.memory.weights + stage.memory.master_weights
        if held > free_memory(here):
            return f"the weights of {name} take {held / 1e9:.1f} GB, and {free_memory(here) / 1e9:.1f} GB are free here"
    return ""


@dataclass(frozen=True)
class _Tried:
    """The engine that a stage has here on its real weights, and a micro-step of it."""

    engine: Engine
    step: TrialStep


def _tried(recipe: Recipe, run: Run, inputs: StageInputs, tokenize: PairTokenizer) -> dict[str, _Tried]:
    """A micro-step of each stage on the base of `run`, one after the other."""
    tried = {}
    if recipe.stage_two:
        stage = Stage("stage_two", recipe, run, run.base, inputs)
        two = stage_two_model(stage)
        tried["stage_two"] = _Tried(two.engine, _try_two(stage, two))
        del two
    if recipe.stage_one:
        objective, engine = stage_one_objective(Stage("stage_one", recipe, run, run.base, inputs), tokenize)
        pairs = tokenize(sample_rows(inputs.reconstruction, LENGTH_SAMPLE, recipe.seed))["pairs"]
        tried["stage_one"] = _Tried(engine, try_stage_one(objective, engine, pairs, bf16=_bf16(recipe)))
    return tried


def _try_two(stage: Stage, two: StageTwoModel) -> TrialStep:
    """A micro-step of Stage II on the first data set."""
    name, dataset = next(iter(stage.inputs.contrastive.items()))
    rows = sample_rows(dataset, stage.two.pairs_per_step, stage.recipe.seed)
    loss = stage_two_loss(stage, two)
    return try_stage_two(two.model, loss, two.engine, rows, stage.inputs.prompts[name], bf16=_bf16(stage.recipe))


def _bf16(recipe: Recipe) -> bool:
    return resolve_precision(recipe.model.precision) == "bf16"


def _tokens_per_pair(recipe: Recipe, batch: list[TokenPair]) -> float:
    """The mean, over all passes of Stage I, of the pairs of `batch`."""
    target = reconstructs(recipe)
    alpha, writes = (recipe.stage_one.alpha, target == "text") if recipe.stage_one else (0.5, False)
    alpha = 0.5 if target == "masked" else alpha  # both texts are read
    return statistics.mean(pair.tokens(alpha, writes=writes) for pair in batch)


def _full_steps(recipe: Recipe, inputs: StageInputs) -> dict[str, int]:
    """The steps of Stage II that a pass over each data set would fill if no text were there twice; 1,000 at most."""
    if recipe.stage_two is None:
        return {}
    size = recipe.stage_two.pairs_per_step
    return {name: min(1_000, len(rows) // size) for name, rows in inputs.contrastive.items()}


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
