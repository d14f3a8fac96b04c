"""The data sets that come with the package: `builtin:debug` and `builtin:docstrings`."""

import itertools
from collections.abc import Callable, Iterator

from anchorvec.errors import AnchorvecError

PREFIX = "builtin:"

_ANIMALS = ["otter", "heron", "badger", "lynx", "raven", "trout", "hare", "viper"]
_PLACES = ["river", "forest", "harbour", "meadow", "canyon"]
_FOODS = ["fish", "berries", "beetles", "grass", "mice"]


def builtin_rows(name: str) -> Iterator[dict[str, str]]:
    """The rows (query, positive, for some sets negative) of the data set `name`, `builtin:...`; always the same."""
    sets: dict[str, Callable[[], Iterator[dict[str, str]]]] = {"debug": _debug, "docstrings": _docstrings}
    if name.removeprefix(PREFIX) not in sets:
        raise AnchorvecError(
            f"data.train: there is no {name}; the built-in data sets are {', '.join(map(PREFIX.__add__, sets))}"
        )
    return sets[name.removeprefix(PREFIX)]()


def _debug() -> Iterator[dict[str, str]]:
    """200 toy pairs with a negative each: enough to see that both stages learn."""
    for i, (animal, place, food) in enumerate(itertools.product(_ANIMALS, _PLACES, _FOODS)):
        other = _PLACES[(i + 1 + _PLACES.index(place)) % len(_PLACES)]
        yield {
            "query": f"{food} for the {animal} of the {place}",
            "positive": f"By the {place} lives the {animal}. It eats {food}.",
            "negative": f"By the {other} nobody eats {food}.",
        }


def _docstrings() -> Iterator[dict[str, str]]:
    """Docstrings of the installed packages, without what `quickstart` scores on with seed 0."""
    from anchorvec.data.docstrings import quickstart_data

    for pair in quickstart_data().train:
        yield {"query": pair.query, "positive": pair.document}
