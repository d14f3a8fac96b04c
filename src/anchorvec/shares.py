"""The pairs of an optimizer step, shared out among the processes of a run (T23).

Every process draws the whole step, with the same sampler and seed, and reads its own share of it. So a step has the
pairs that it has with one process: of one data set, none twice, in any number.
"""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import BatchSampler


def share(pairs: int, rank: int, ranks: int) -> range:
    """The places in a step of so many `pairs` that the process `rank` of `ranks` takes; empty where they are too few.

    The sizes of two shares differ by one at most.
    """
    return range(pairs * rank // ranks, pairs * (rank + 1) // ranks)


class SharedSteps(BatchSampler):
    """The share of the process `rank` of `ranks` in each of `steps`, a sampler of batches of row numbers.

    A process without a share is given the first row of the step, as each must have something to compute.
    """

    def __init__(self, steps: Any, rank: int, ranks: int) -> None:
        self.steps, self.rank, self.ranks = steps, rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield [step[place] for place in share(len(step), self.rank, self.ranks)] or step[:1]

    def __len__(self) -> int:
        return len(self.steps)

    def set_epoch(self, epoch: int) -> None:
        """Have the steps be those of `epoch`."""
        (self.steps if hasattr(self.steps, "set_epoch") else self.steps.sampler).set_epoch(epoch)
