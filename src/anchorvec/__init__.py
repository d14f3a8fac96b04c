"""Turn an open decoder LLM into a text embedder.

Each command is a function here: `quickstart`, `train`, `plan`, `evaluate`, `search`, `decode`, `export`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from anchorvec.errors import AnchorvecError

if TYPE_CHECKING:
    from anchorvec.decoding import decode
    from anchorvec.embedder import build_embedder
    from anchorvec.evaluation import evaluate
    from anchorvec.exporting import export
    from anchorvec.planning import plan
    from anchorvec.quickstarting import quickstart
    from anchorvec.recipe import Recipe, load_recipe
    from anchorvec.reconstruction import Reconstruction
    from anchorvec.searching import search
    from anchorvec.training import train

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
    "Reconstruction": "reconstruction",
    "build_embedder": "embedder",
    "decode": "decoding",
    "evaluate": "evaluation",
    "export": "exporting",
    "load_recipe": "recipe",
    "plan": "planning",
    "quickstart": "quickstarting",
    "search": "searching",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: `anchorvec --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'anchorvec' has no attribute {name!r}")
    return getattr(importlib.import_module(f"anchorvec.{_HOMES[name]}"), name)
