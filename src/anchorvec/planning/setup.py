"""A recipe set up on two small layers of its model's family: whatever does not depend on sizes is that of the run."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from anchorvec.data.stage_inputs import StageInputs, reconstructs, sample_rows
from anchorvec.data.tokens import PairTokenizer
from anchorvec.device import default_device
from anchorvec.errors import AnchorvecError
from anchorvec.model.base import base_without_weights
from anchorvec.model.folders import identify, is_local
from anchorvec.objectives.generation import Generation
from anchorvec.objectives.pairs import TokenPair
from anchorvec.objectives.reconstruction import Reconstruction
from anchorvec.planning.arithmetic import Passes, Scaled
from anchorvec.planning.outline import Outline, save_random
from anchorvec.recipe import Recipe
from anchorvec.run import Run, StageName
from anchorvec.start import build_base
from anchorvec.training.engine import UNPACKABLE, Demand, why_padded
from anchorvec.training.stage import Stage
from anchorvec.training.stage_one import pair_tokenizer, stage_one_demand, stage_one_objective
from anchorvec.training.stage_two import StageTwoModel, stage_two_demand, stage_two_model

SAMPLED_PAIRS = 64
"""From which the tokens of a pair are estimated."""


@dataclass(frozen=True)
class Setup:
    """The stages of `recipe` on `inputs`, as far as they are the same for two small layers of `outline`'s family.

    `base` has the configuration's tokenizer; `run` is the run of the small model.
    """

    recipe: Recipe
    inputs: StageInputs
    outline: Outline
    base_tokenizer: Any
    run: Run

    @cached_property
    def tokenizer(self) -> Any:
        """The embedder's."""
        return AutoTokenizer.from_pretrained(self.run.base)

    @cached_property
    def objective(self) -> Reconstruction:
        """Stage I's, on the small model."""
        return stage_one_objective(self.stage("stage_one", self.recipe), self.tokenize(self.recipe))[0]

    @cached_property
    def two(self) -> StageTwoModel:
        """Stage II's, on the small model: whether it packs its texts, if the device is for it, and what it writes."""
        return stage_two_model(self.stage("stage_two", self.recipe))

    def stage(self, name: StageName, recipe: Recipe) -> Stage:
        """The stage `name` of `recipe`, on the small model."""
        return Stage(name, recipe, self.run, self.run.base, self.inputs)

    def tokenize(self, recipe: Recipe) -> PairTokenizer:
        """What makes pairs of rows, as `recipe` reads them."""
        return pair_tokenizer(recipe, self.tokenizer)

    def sample(self, recipe: Recipe) -> list[TokenPair]:
        """Some pairs, as `recipe` reads them."""
        rows = sample_rows(self.inputs.reconstruction, SAMPLED_PAIRS, recipe.seed)
        return self.tokenize(recipe)(rows)["pairs"]

    def tokens_per_character(self) -> float:
        """Of the texts of some pairs, whole."""
        rows = sample_rows(self.inputs.reconstruction, SAMPLED_PAIRS, self.recipe.seed)
        texts = [str(row[name]) for row in rows for name in ("query", "positive")]
        ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return sum(map(len, ids)) / max(1, sum(map(len, texts)))

    def demand(self, name: StageName, recipe: Recipe, device: torch.device) -> Demand:
        """What the stage `name` of `recipe` wants to hold on `device`."""
        because = why_padded(recipe.model.attention, recipe.model.precision, device)
        here = default_device().type == device.type
        stage = self.stage(name, recipe)
        if name == "stage_one":
            packed = not because and (self.objective.packed or not here)
            return stage_one_demand(stage, self.objective, device, packed, because or UNPACKABLE)
        packed = not because and (self.two.engine.packed or not here)
        return stage_two_demand(stage, self.tokenizer, packed, because or UNPACKABLE, self.two.generation)

    def passes(self, name: StageName, recipe: Recipe) -> Scaled:
        """What an optimizer step of the stage `name` of `recipe` puts through the decoder, by some pairs."""
        pairs = self.sample(recipe)
        if name == "stage_one":
            assert recipe.stage_one is not None
            of_step = _passes_of_stage_one(recipe, self.objective, pairs)
            return of_step.times(recipe.stage_one.pairs_per_step / len(pairs))
        two = recipe.stage_two
        assert two is not None
        rows = sum(report.rows for report in self.inputs.reports.values())
        with_negatives = sum(self.inputs.rows_with_negatives.values()) / rows * two.negatives
        own = two.positives == "dropout"
        read = Passes([len(t) for pair in pairs for t in (pair.document if own else pair.query, pair.document)])
        negatives = Passes([len(pair.document) for pair in pairs])  # taken to be as long as a positive
        written = _written(self.two.generation, pairs)
        factor = two.pairs_per_step / len(pairs)
        return (read.times(1) + negatives.times(with_negatives) + written.times(1)).times(factor)


def _written(generation: Generation | None, pairs: list[TokenPair]) -> Passes:
    """What Stage II passes over to write the documents of `pairs` after their queries."""
    if generation is None:
        return Passes([])
    there = [generation.pair(pair.query, pair.document) for pair in pairs]
    return Passes([len(pair.query) + len(pair.document_targets) for pair in there], sum(generation.targets(there)))


def _passes_of_stage_one(recipe: Recipe, objective: Reconstruction, pairs: list[TokenPair]) -> Passes:
    settings, target = recipe.stage_one, reconstructs(recipe)
    assert settings is not None
    alpha = 0.5 if target == "masked" else settings.alpha
    read = [len(text) for pair in pairs for text in pair.read(alpha)]
    if target == "masked":
        return Passes(read, settings.masking.mlm_probability * sum(read))
    if target == "bag_of_words":
        in_vocabulary = settings.candidates == "vocabulary"
        told = len(read) + (sum(read) if settings.lm_weight else 0)
        return Passes(read, told if in_vocabulary else 0)
    written = [len(text) for pair in pairs for text in pair.written(alpha) if text]
    return Passes([*read, *written], sum(written))


def set_up(recipe: Recipe, inputs: StageInputs, folder: Path) -> Setup:
    """The setup of `recipe` on `inputs`, in `folder`, from the configuration and the tokenizer of its base alone.

    Raises AnchorvecError for a base that the run would refuse too, but for what only its weights tell.
    """
    base, revision = recipe.model.base, recipe.model.revision
    config, tokenizer = base_without_weights(base, revision=revision)
    named = base in ("tiny", "smollm2") or base.endswith(".gguf")
    found = None if named else identify(base, revision=revision)
    outline = Outline(config, has_head=found is None or found.kind == "causal LM" or found.has_head)
    small, run = folder / "small", Run(folder / "run")
    try:
        save_random(outline.small(), tokenizer, small, recipe.seed)
        build_base(on_base(recipe, small), run.base)
    except AnchorvecError as error:
        raise AnchorvecError(str(error).replace(str(small), base)) from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise AnchorvecError(
            f"model.base: {base} ({config.model_type}) cannot be planned without its weights ({reason})"
        ) from error
    return Setup(recipe, inputs, outline, tokenizer, run)


def on_base(recipe: Recipe, folder: Path) -> Recipe:
    """`recipe` with the local `folder` as its base."""
    assert is_local(folder)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": str(folder), "revision": None})})
