"""`comparison.json`: what a comparison was asked for and what it has found so far; written anew after each piece."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anchorvec.comparing.asked import Arm, Asked
from anchorvec.errors import AnchorvecError
from anchorvec.files import write_json
from anchorvec.recipe import Recipe
from anchorvec.reporting.reading import COMPARISON
from anchorvec.start import is_commit

_ASKED = ("recipe", "budget", "seeds", "control", "tries", "settings")
"""Keys that are the comparison's own: with others it is another one."""


@dataclass(frozen=True)
class Record:
    """The comparison in `folder`; `content` is what its file holds, as `reporting.reading.ComparisonFile` reads it."""

    folder: Path
    content: dict[str, Any]

    @property
    def file(self) -> Path:
        """Where it is kept."""
        return self.folder / COMPARISON

    @classmethod
    def opened(cls, asked: Asked, command: Sequence[str], *, resume: bool) -> "Record":
        """The record of the comparison `asked` for; with `resume` that of one that was begun, if it was.

        It is not written yet. `command` is what makes it again. Raises AnchorvecError for a folder in use, or with
        another comparison in it.
        """
        record = cls(asked.folder, _new(asked, command))
        if record.file.is_file():
            if not resume:
                raise AnchorvecError(
                    f"output: {asked.folder} holds a comparison; go on with --resume (in Python: resume=True), or name "
                    "a new folder"
                )
            found = json.loads(record.file.read_text(encoding="utf-8"))
            _check_same(found, record.content, asked.folder)
            return cls(asked.folder, found)
        if asked.folder.exists() and (not asked.folder.is_dir() or any(asked.folder.iterdir())):
            raise AnchorvecError(f"output: {asked.folder} is in use, and no comparison is in it; name a new folder")
        return record

    @property
    def settings(self) -> Recipe:
        """The recipe that the comparison was begun with."""
        return Recipe.model_validate(self.content["settings"])

    def write(self) -> None:
        """Write it down, in one move."""
        write_json(self.file, self.content)

    def of(self, arm: Arm) -> dict[str, Any]:
        """What is kept of `arm`."""
        found: dict[str, Any] = self.content["arms"][arm.name]
        return found

    def entry(self, arm: Arm, seed: int) -> dict[str, Any] | None:
        """What is kept of the run of `arm` with this `seed`; None: it was not begun."""
        return next((run for run in self.of(arm)["runs"] if run["seed"] == seed), None)

    def put(self, arm: Arm, entry: Mapping[str, Any]) -> None:
        """Keep the `entry` of a run of `arm` in place of one with the same seed, and write all."""
        others = [run for run in self.of(arm)["runs"] if run["seed"] != entry["seed"]]
        self.of(arm)["runs"] = sorted([*others, dict(entry)], key=lambda run: run["seed"])
        self.write()


def _new(asked: Asked, command: Sequence[str]) -> dict[str, Any]:
    return {
        "recipe": asked.name,
        "budget": {"kind": asked.budget.kind, "amount": asked.budget.amount},
        "seeds": list(asked.seeds),
        "control": asked.control,
        "tries": asked.tries,
        "settings": settings_of(asked.recipe),
        "arms": {
            arm.name: {"differences": arm.differences, "learning_rate": {}, "tries": [], "runs": []}
            for arm in asked.arms
        },
        "differences": [],
        "command": list(command),
    }


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The values of `recipe` that decide the results."""
    return recipe.model_dump(mode="json", exclude={"output", "report_to"})


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raise AnchorvecError unless a comparison that was begun is the one that is asked for now."""
    pairs: list[tuple[str, Any, Any]] = [(key, before.get(key), now[key]) for key in _ASKED]
    there, here = before.get("arms", {}), now["arms"]
    pairs.append(("arms", list(there), list(here)))
    pairs += [(f"arm {name}", arm["differences"], here.get(name, {}).get("differences")) for name, arm in there.items()]
    for key, one, other in pairs:
        if key == "settings":
            one, other = _differing(one or {}, other)
        if one != other:
            raise AnchorvecError(
                f"output: {folder} holds another comparison: {key} is {_shown(one)} there, and {_shown(other)} here; "
                "name a new folder"
            )


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of two recipes the values that differ, by dotted key; a revision may have been looked up since."""
    flat = [dict(_values(values)) for values in (before, now)]
    pinned = {key for key, value in flat[1].items() if key.endswith(".revision") and not is_commit(value)}
    keys = [key for key in flat[0] | flat[1] if key not in pinned and flat[0].get(key) != flat[1].get(key)]
    one, other = ({key: values.get(key) for key in keys} for values in flat)
    return one, other


def _values(value: Any, key: str = "") -> list[tuple[str, Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        return [(key, value)]
    return [found for name, part in inner for found in _values(part, f"{key}.{name}".lstrip("."))]


def _shown(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
