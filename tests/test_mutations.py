"""The table of changes that tests must notice is one that still applies."""

import sys
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "mutations"))

from changes import CHANGES

from anchorvec.recipe.settings import sections

PACKAGE = Path(__file__).parents[1] / "src" / "anchorvec"


def test_each_text_that_is_changed_is_there_once():
    """In the file that is named; and it becomes another one."""
    texts = {file: (PACKAGE / file).read_text(encoding="utf-8") for _, file, _, _ in CHANGES}
    assert [change for change in CHANGES if texts[change[1]].count(change[2]) != 1] == []
    assert all(old != new for _, _, old, new in CHANGES)
    assert len(set(CHANGES)) == len(CHANGES)


def test_each_key_of_a_recipe_and_each_kind_of_code_is_changed():
    """At least once; sampling, objectives and export 20 times."""
    keys = {f"{place}.{name}".removeprefix(".") for place, section in sections() for name in section["properties"]}
    keys -= {"model", "data", "data.train", "evaluation"}
    assert keys - {kind.removeprefix("key ") for kind, *_ in CHANGES} == set()
    kinds = Counter(kind for kind, *_ in CHANGES)
    assert min(kinds[kind] for kind in ("sampling", "objectives", "export")) >= 20
    assert len(CHANGES) >= 120
