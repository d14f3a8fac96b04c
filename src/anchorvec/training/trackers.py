"""Trackers that get the log beside the run's own: those that transformers knows."""

import importlib
from collections.abc import Sequence
from pathlib import Path

from transformers import Trainer
from transformers.integrations.integration_utils import TensorBoardCallback, get_reporting_integration_callbacks

from anchorvec.errors import AnchorvecError


def check_trackers(names: Sequence[str]) -> None:
    """Raise AnchorvecError for one of `names` that transformers does not know, or that is not installed."""
    for name in names:
        try:
            [tracker] = get_reporting_integration_callbacks([name])
            tracker()
        except ValueError as error:
            raise AnchorvecError(f"report_to: {error}") from error
        except (ImportError, RuntimeError) as error:
            said = str(error).split(". ")[0]
            raise AnchorvecError(f"report_to: {name} is not installed here: pip install {name} ({said})") from error


def place_trackers(trainer: Trainer, folder: Path) -> None:
    """Have TensorBoard write below `folder`, unless its variable TENSORBOARD_LOGGING_DIR names another one.

    The trackers of `trainer` would write beside its checkpoints, which are removed.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder)


def end_trackers(names: Sequence[str]) -> None:
    """End the run of a stage in those of `names` that would put the next stage into it, too."""
    if "wandb" in names:
        importlib.import_module("wandb").finish()
