"""By how much the arms are above the control: paired over items and over seeds, corrected for their number."""

from collections.abc import Mapping, Sequence
from typing import Any

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import Difference, Scores, difference_over_seeds
from anchorvec.evaluation.figures import Pair
from anchorvec.evaluation.scores import paired
from anchorvec.reporting.differences import corrected, groups
from anchorvec.reporting.reading import Change
from anchorvec.terminal import say

Entry = Mapping[str, Any]
"""A run of an arm as a comparison's file has it."""


def arm_differences(arms: Mapping[str, Sequence[Entry]], control: str) -> list[Change]:
    """Each arm's difference to the `control`, over all test sets and over each, or of many sets over each kind.

    `arms` are the runs of each arm. Seeds count that both have finished. What could not be compared is said. P-values
    over all test sets are corrected for the number of arms, the others for the number of them all (Holm).
    """
    found: list[tuple[str, str, Difference]] = []
    for name in arms:
        if name != control:
            found += [(name, kind, of_kind) for kind, of_kind in _of_arm(name, arms[control], arms[name]).items()]
    return corrected(found)


def _of_arm(name: str, control: Sequence[Entry], arm: Sequence[Entry]) -> dict[str, Difference]:
    """The differences of an arm by what they are taken over."""
    by_seed = [{entry["seed"]: entry["scores"] for entry in runs if entry.get("scores")} for runs in (control, arm)]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    if not seeds:
        say(f"{name}: not compared, as it has no seed in common with the control")
        return {}
    if missing := [str(seed) for seed in sorted(by_seed[0].keys() ^ by_seed[1].keys())]:
        say(f"{name}: compared without seed {', '.join(missing)}, which only one of the two has finished")
    pairs: dict[str, list[Pair]] = {}
    kinds: dict[str, str] = {}
    for task, scores in by_seed[1][seeds[0]].items():
        try:
            systems = [[Scores.from_dict(of_system[seed][task]) for of_system in by_seed] for seed in seeds]
            pairs[task] = [paired(first, second) for first, second in systems]
            kinds[task] = scores["kind"]
        except AnchorvecError as error:
            say(f"{name}: {task}: not compared: {error}")
        except KeyError:
            say(f"{name}: {task}: not compared, as not all of its runs have scores of it")
    return {
        kind: difference_over_seeds([[pairs[task][i] for task in tasks] for i in range(len(seeds))])
        for kind, tasks in groups(kinds).items()
        if tasks
    }
