"""The recipe: everything that decides a run, typed, validated, and saved beside its result.

A recipe is YAML. It may extend another one; the command line overrides both.
"""

from anchorvec.recipe.reading import dump_recipe, load_arm, load_recipe, recipe_names, save_recipe, stored_recipe
from anchorvec.recipe.settings import (
    DataSettings,
    EndPrompt,
    EvaluationSettings,
    ModelSettings,
    Recipe,
    TrainData,
)
from anchorvec.recipe.stages import Lora, Masking, StageOne, StageTwo

__all__ = [
    "DataSettings",
    "EndPrompt",
    "EvaluationSettings",
    "Lora",
    "Masking",
    "ModelSettings",
    "Recipe",
    "StageOne",
    "StageTwo",
    "TrainData",
    "dump_recipe",
    "load_arm",
    "load_recipe",
    "recipe_names",
    "save_recipe",
    "stored_recipe",
]
