"""Turn an open decoder LLM into a text embedder.

Each command is a function here: `quickstart`, `train`, `plan`, `evaluate`, `search`, `decode`, `export`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from anchorvec.errors import AnchorvecError

if TYPE_CHECKING:
    from anchorvec.commands.decode import decode
    from anchorvec.commands.plan import plan
    from anchorvec.commands.quickstart import quickstart
    from anchorvec.commands.search import search
    from anchorvec.evaluation import evaluate
    from anchorvec.exporting.folder import export
    from anchorvec.model.embedder import build_embedder
    from anchorvec.objectives.reconstruction import Reconstruction
    from anchorvec.pipeline import train
    from anchorvec.recipe import Recipe, load_recipe

__all__ = [
    "AnchorvecError",
    "Recipe",
    "Reconstruction",
    "build_embedder",
    "decode",
    "evaluate",
    "export",
    "load_recipe",
    "plan",
    "quickstart",
    "search",
    "train",
]

_HOMES = {
    "Recipe": "recipe",
    "Reconstruction": "objectives.reconstruction",
    "TextReconstruction": "objectives.reconstruction",
    "build_embedder": "model.embedder",
    "decode": "commands.decode",
    "evaluate": "evaluation",
    "export": "exporting.folder",
    "load_recipe": "recipe",
    "plan": "commands.plan",
    "quickstart": "commands.quickstart",
    "search": "commands.search",
    "train": "pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: `anchorvec --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'anchorvec' has no attribute {name!r}")
    return getattr(importlib.import_module(f"anchorvec.{_HOMES[name]}"), name)
