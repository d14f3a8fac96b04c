"""The global random generators, which libraries draw from and seed."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


@contextmanager
def randomness_kept() -> Iterator[None]:
    """A context that leaves the states of Python's, numpy's and torch's generators, on all devices, as they were."""
    import torch  # takes a second, and who only imports this needs none of it

    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
