"""A run that is killed by the system: `python killed.py RECIPE SECONDS|write`.

SECONDS after training could begin, or in the midst of the first checkpoint that it writes, the process ends by SIGKILL.
Steps and checkpoints are slowed down, so that there is time to be killed in.
"""

import os
import signal
import sys
import threading
import time

import transformers.trainer
from transformers import TrainerCallback

import anchorvec
from anchorvec import files
from anchorvec.training import checkpoints

STEP_SECONDS, WRITE_SECONDS = 0.1, 0.4


def kill() -> None:
    """What `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


class Slow(TrainerCallback):
    """Each step takes a little longer; the time to the kill counts from where training begins."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        """Set the clock."""
        if self.seconds is not None:
            threading.Timer(self.seconds, kill).start()
            self.seconds = None

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        """Wait."""
        time.sleep(STEP_SECONDS)


def main(recipe: str, when: str) -> None:
    """Train `recipe`, going on where it was left, and be killed."""
    sync_folder = files.sync_folder

    def slow(folder: os.PathLike[str]) -> None:
        if when == "write" and "checkpoint-" in str(folder):
            kill()
        time.sleep(WRITE_SECONDS)
        sync_folder(folder)

    checkpoints.sync_folder = slow
    transformers.trainer.DEFAULT_CALLBACKS.append(Slow(None if when == "write" else float(when)))
    anchorvec.train(recipe, resume=True)
    os._exit(0)  # it was faster


if __name__ == "__main__":
    main(*sys.argv[1:])
