"""The processes of a run, one for each device, as a launcher numbers them in the environment (torchrun, accelerate)."""

import os


def rank() -> int:
    """The number of this process among all of the run; 0 where it is alone, and of the one that writes and prints."""
    return int(os.environ.get("RANK", "0"))


def ranks() -> int:
    """How many processes there are, on all machines; 1: this one is alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def ranks_here() -> int:
    """How many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
