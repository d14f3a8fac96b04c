"""No key of the recipe is without a test that follows its value to where it acts."""

import importlib
from pathlib import Path

import pytest

from anchorvec.recipe.settings import sections

MODULES = sorted(path.stem for path in Path(__file__).parent.glob("test_wiring_*.py"))


def keys():
    """The dotted keys that hold a value, those of sections that may be `null` too."""
    places = {place: section["properties"] for place, section in sections()}
    for place, properties in places.items():
        for name, form in properties.items():
            key = f"{place}.{name}".lstrip(".")
            may_be_null = {"type": "null"} in form.get("anyOf", ())
            if may_be_null or not {key, f"{key}.0"} & places.keys():
                yield key


def wired():
    """The test functions by the keys that their marks name."""
    found = {}
    for module in MODULES:
        for name, function in vars(importlib.import_module(module)).items():
            for mark in getattr(function, "pytestmark", []) if name.startswith("test_") else []:
                if mark.name == "wires":
                    for section in mark.kwargs.get("of", [""]):
                        for key in mark.args:
                            found.setdefault(f"{section}.{key}".lstrip("."), []).append(name)
    return found


@pytest.mark.parametrize("key", sorted(keys()))
def test_a_key_has_a_test_of_its_wiring(key):
    """A new key needs one too: a test in `test_wiring_*.py` with `@pytest.mark.wires` and its name."""
    assert wired().get(key), f"no test follows {key} to where it acts"


def test_marks_name_keys_of_the_recipe():
    """A key that is renamed or gone is so in the marks, too."""
    assert set(wired()) - set(keys()) <= {place for place, _ in sections()}
