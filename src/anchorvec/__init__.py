"""Turn an open decoder LLM into a text embedder.

Each command is a function here: `quickstart`, `train`, `compare`, `plan`, `evaluate`, `search`, `decode`, `export`,
`report`. What they take and give back is here too, and what other training code can build on: the objectives of Stage I
and their pairs.
"""

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

from anchorvec.errors import AnchorvecError

if TYPE_CHECKING:
    from anchorvec.commands.decode import Decoded, decode
    from anchorvec.commands.plan import Plan, ShownPair, plan
    from anchorvec.commands.plan_comparison import ArmPlan, ComparisonPlan, plan_comparison
    from anchorvec.commands.quickstart import QuickstartResult, quickstart
    from anchorvec.commands.report import ReportResult, report
    from anchorvec.commands.search import Hit, Index, search
    from anchorvec.comparing.compare import compare
    from anchorvec.comparing.result import CompareResult
    from anchorvec.data.passages import Passage
    from anchorvec.data.tokens import PairTokenizer
    from anchorvec.evaluation import (
        Averages,
        BeirData,
        Compared,
        Comparison,
        Difference,
        Evaluation,
        Interval,
        LocalData,
        Scores,
        bm25_scores,
        difference,
        evaluate,
    )
    from anchorvec.exporting.folder import Exported, export
    from anchorvec.model.embedder import build_embedder
    from anchorvec.model.readout import Readout
    from anchorvec.objectives.bag_of_tokens import BagOfTokens, BagOfTokensReconstruction
    from anchorvec.objectives.bag_of_words import BagOfWordsLoss, BagOfWordsReconstruction
    from anchorvec.objectives.generation import Generation
    from anchorvec.objectives.masked import MaskedReconstruction, TokenMasking
    from anchorvec.objectives.pairs import TokenPair
    from anchorvec.objectives.reconstruction import Reconstruction, ReconstructionOutput, TextReconstruction
    from anchorvec.pipeline import TrainResult, train
    from anchorvec.planning.estimate import StageEstimate
    from anchorvec.planning.memory import Memory
    from anchorvec.planning.whole import RunEstimate
    from anchorvec.recipe import (
        DataSettings,
        EndPrompt,
        EvaluationSettings,
        Lora,
        Masking,
        ModelSettings,
        Recipe,
        StageOne,
        StageTwo,
        TrainData,
        load_recipe,
    )
    from anchorvec.run import Run
    from anchorvec.training.budget import Budget
    from anchorvec.training.engine import Engine
    from anchorvec.training.trial import TrialStep

    __version__: str

__all__ = [
    "AnchorvecError",
    "ArmPlan",
    "Averages",
    "BagOfTokens",
    "BagOfTokensReconstruction",
    "BagOfWordsLoss",
    "BagOfWordsReconstruction",
    "BeirData",
    "Budget",
    "CompareResult",
    "Compared",
    "Comparison",
    "ComparisonPlan",
    "DataSettings",
    "Decoded",
    "Difference",
    "EndPrompt",
    "Engine",
    "Evaluation",
    "EvaluationSettings",
    "Exported",
    "Generation",
    "Hit",
    "Index",
    "Interval",
    "LocalData",
    "Lora",
    "MaskedReconstruction",
    "Masking",
    "Memory",
    "ModelSettings",
    "PairTokenizer",
    "Passage",
    "Plan",
    "QuickstartResult",
    "Readout",
    "Recipe",
    "Reconstruction",
    "ReconstructionOutput",
    "ReportResult",
    "Run",
    "RunEstimate",
    "Scores",
    "ShownPair",
    "StageEstimate",
    "StageOne",
    "StageTwo",
    "TextReconstruction",
    "TokenMasking",
    "TokenPair",
    "TrainData",
    "TrainResult",
    "TrialStep",
    "__version__",
    "bm25_scores",
    "build_embedder",
    "compare",
    "decode",
    "difference",
    "evaluate",
    "export",
    "load_recipe",
    "plan",
    "plan_comparison",
    "quickstart",
    "report",
    "search",
    "train",
]

_HOMES = {
    "Decoded": "commands.decode",
    "decode": "commands.decode",
    "Plan": "commands.plan",
    "ShownPair": "commands.plan",
    "plan": "commands.plan",
    "ArmPlan": "commands.plan_comparison",
    "ComparisonPlan": "commands.plan_comparison",
    "plan_comparison": "commands.plan_comparison",
    "QuickstartResult": "commands.quickstart",
    "quickstart": "commands.quickstart",
    "ReportResult": "commands.report",
    "report": "commands.report",
    "Hit": "commands.search",
    "Index": "commands.search",
    "search": "commands.search",
    "CompareResult": "comparing.result",
    "compare": "comparing.compare",
    "Passage": "data.passages",
    "PairTokenizer": "data.tokens",
    "Averages": "evaluation",
    "BeirData": "evaluation",
    "Compared": "evaluation",
    "Comparison": "evaluation",
    "Difference": "evaluation",
    "Evaluation": "evaluation",
    "Interval": "evaluation",
    "LocalData": "evaluation",
    "Scores": "evaluation",
    "bm25_scores": "evaluation",
    "difference": "evaluation",
    "evaluate": "evaluation",
    "Exported": "exporting.folder",
    "export": "exporting.folder",
    "build_embedder": "model.embedder",
    "Readout": "model.readout",
    "BagOfTokens": "objectives.bag_of_tokens",
    "BagOfTokensReconstruction": "objectives.bag_of_tokens",
    "BagOfWordsLoss": "objectives.bag_of_words",
    "BagOfWordsReconstruction": "objectives.bag_of_words",
    "Generation": "objectives.generation",
    "MaskedReconstruction": "objectives.masked",
    "TokenMasking": "objectives.masked",
    "TokenPair": "objectives.pairs",
    "Reconstruction": "objectives.reconstruction",
    "ReconstructionOutput": "objectives.reconstruction",
    "TextReconstruction": "objectives.reconstruction",
    "TrainResult": "pipeline",
    "train": "pipeline",
    "DataSettings": "recipe",
    "EndPrompt": "recipe",
    "EvaluationSettings": "recipe",
    "Lora": "recipe",
    "Masking": "recipe",
    "ModelSettings": "recipe",
    "Recipe": "recipe",
    "StageOne": "recipe",
    "StageTwo": "recipe",
    "TrainData": "recipe",
    "load_recipe": "recipe",
    "Run": "run",
    "Budget": "training.budget",
    "Engine": "training.engine",
    "Memory": "planning.memory",
    "RunEstimate": "planning.whole",
    "StageEstimate": "planning.estimate",
    "TrialStep": "training.trial",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: `anchorvec --help` need not wait for torch."""
    if name == "__version__":
        return metadata.version("anchorvec")
    if name not in _HOMES:
        raise AttributeError(f"module 'anchorvec' has no attribute {name!r}")
    return getattr(importlib.import_module(f"anchorvec.{_HOMES[name]}"), name)
