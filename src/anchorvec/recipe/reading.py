"""Reads a recipe, with its parents and the command line over it, and writes one.

Every value is traced back to the file that set it, so that an error can name the place to mend.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from anchorvec.errors import AnchorvecError
from anchorvec.files import write_text
from anchorvec.recipe.settings import END_FORM_TAGS, Key, Recipe, dotted, sections
from anchorvec.recipe.yaml12 import dump, parse, show
from anchorvec.run import Run

RENAMED = {
    "stage_two.words_weight": "stage_two.bag_of_words_weight",
    "stage_one.target=words": "stage_one.target: bag_of_words",
}
"""What keys and values were called before, and what they are called now."""

SHIPPED = Path(__file__).parent / "shipped"
_COMMAND_LINE = "command line"
_SHARED = {"data", "evaluation", "seed", "output"}
"""What the arms of a comparison have in common."""
_Layer = tuple[str, dict[Any, Any]]  # what to call the source in a message, and what it sets


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, or the shipped one of that name (`name_or_path`), with the overrides applied.

    One of the `overrides` is `key=value` with a dotted key and a YAML value: `stage_one=null`,
    `stage_one.learning_rate=1e-4`, `data.train.0.path=pairs.jsonl`. A shipped name wins over a file of the
    same name; a `Path` is always a file.

    Raises AnchorvecError, one line that names the file, the key, and what to write instead.
    """
    files = _read_with_parents(name_or_path)
    return _resolved(files + [(_COMMAND_LINE, _parse_override(override)) for override in overrides], files[-1][0])


def load_arm(name_or_path: str | Path, arm: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe `name_or_path` with the `overrides` laid over it, and what an `arm` of a comparison changes over both.

    An arm is a recipe, a file or a shipped one such as `arms/echo`, of which the recipe that it extends first of all is
    left out, as `name_or_path` stands in its place; the recipe itself, which changes nothing; or `key=value`.

    Raises AnchorvecError as `load_recipe` does, and for an arm that changes data, evaluation, seed or output, which all
    arms share.
    """
    files = _read_with_parents(name_or_path)
    own = _layers_of_arm(arm, files)
    for source, layer in own:
        if shared := _SHARED.intersection(layer):
            raise AnchorvecError(
                f"{source}: {sorted(shared)[0]}: all arms of a comparison share it; change the recipe instead"
            )
    # a stage that an arm leaves out stays out, whatever the others have in it
    layers = files + [(_COMMAND_LINE, _parse_override(override)) for override in overrides] + own
    return _resolved(layers, files[-1][0])


def _layers_of_arm(arm: str | Path, files: list[_Layer]) -> list[_Layer]:
    if "=" in str(arm) and not Path(arm).is_file():
        return [(f"arm {arm}", _parse_override(str(arm)))]
    own = _read_with_parents(arm)
    if own[-1] == files[-1]:
        return []
    return own[1:] if len(own) > 1 else own


def _resolved(layers: list[_Layer], recipe: str) -> Recipe:
    """The recipe of all `layers`, each laid over those before; `recipe` is what to call it in a message."""
    values: Any = {}
    for source, layer in layers:
        values = _overlay(values, layer, source)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise AnchorvecError(_explain_first(error, layers, recipe=recipe)) from None


def recipe_names() -> list[str]:
    """The names of the shipped recipes, sorted, such as `debug` and `paper/llama-3.2-1b`."""
    return sorted(path.relative_to(SHIPPED).with_suffix("").as_posix() for path in SHIPPED.rglob("*.yaml"))


def dump_recipe(recipe: Recipe, *, output: bool = True) -> str:
    """The `recipe` as YAML with every default written out; `load_recipe` gives back an equal one.

    `output`: whether with the folder of the run, a path of the machine that trains.
    """
    return dump(recipe.model_dump(mode="json", exclude=None if output else {"output"}))


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write `dump_recipe` of `recipe` to the file `path`, atomically; its folder is made if need be."""
    write_text(Path(path), dump_recipe(recipe))


def stored_recipe(run: Run) -> Recipe | None:
    """The recipe that was saved in the folder of `run`; None where that folder is no run's.

    Raises AnchorvecError for a recipe that cannot be read, as `load_recipe` does.
    """
    return load_recipe(run.recipe) if run.record.is_file() and run.recipe.is_file() else None


def _read_with_parents(name_or_path: str | Path) -> list[_Layer]:
    """One layer per file, from the last parent to the recipe itself."""
    source, path = _find(name_or_path, folder=Path())
    layers: list[_Layer] = []
    seen: list[Path] = []
    while True:
        seen.append(path.resolve())
        layer = _read(path, source)
        layers.insert(0, (source, layer))
        if "extends" not in layer:
            return layers
        parent = layer.pop("extends")
        if not isinstance(parent, str):
            raise AnchorvecError(f"{source}: extends: should be one recipe, by name or path, not {show(parent)}")
        try:
            parent_source, path = _find(parent, folder=path.parent)
        except AnchorvecError as error:
            raise AnchorvecError(f"{source}: extends: {error}") from None
        if path.resolve() in seen:
            chain = " -> ".join([*(name for name, _ in reversed(layers)), parent_source])
            raise AnchorvecError(f"{source}: extends: goes in a circle, {chain}; take one of them out")
        source = parent_source


def _find(name_or_path: str | Path, folder: Path) -> tuple[str, Path]:
    names = recipe_names()
    if isinstance(name_or_path, str) and name_or_path in names:
        return f"shipped recipe {name_or_path}", SHIPPED / f"{name_or_path}.yaml"
    path = folder / name_or_path
    if path.is_file():
        return str(path), path
    near = difflib.get_close_matches(re.sub(r"\.ya?ml$", "", str(name_or_path)), names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the shipped recipes are {', '.join(names)}"
    raise AnchorvecError(f"{path}: no such file, and no shipped recipe; {hint}")


def _read(path: Path, source: str) -> dict[Any, Any]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise AnchorvecError(f"{source}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise AnchorvecError(f"{source}:{line}: not UTF-8; save the file as UTF-8 text") from None
    values = parse(text, source)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise AnchorvecError(f"{source}: a recipe is keys and values, such as `seed: 0`, not {show(values)}")
    return values


def _parse_override(override: str) -> dict[Any, Any]:
    """`a.b.0=x` as the layer `{"a": {"b": {0: "x"}}}`; a whole number is a place in a list."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise AnchorvecError(f"{_COMMAND_LINE}: {show(override)}: write key=value, such as stage_one.steps=100")
    try:
        layer = parse(text, source=_COMMAND_LINE)
    except AnchorvecError:
        hint = _quotes_hint(_COMMAND_LINE, key)
        raise AnchorvecError(f"{_COMMAND_LINE}: {key}: {show(text)} is not valid YAML; {hint}") from None
    for part in reversed(parts):
        layer = {int(part) if part.isdecimal() else part: layer}
    return layer  # type: ignore[no-any-return]  # parts is never empty, so this is the outermost mapping


def _overlay(below: Any, above: Any, source: str, key: Key = ()) -> Any:
    """`above` laid over `below`: mappings are merged, everything else is replaced; neither is changed."""
    if not isinstance(above, dict):
        return above
    if key and above and all(type(part) is int for part in above):
        entries = list(below) if isinstance(below, list) else []
        for index, value in above.items():
            if not 0 <= index <= len(entries):
                here, following = dotted((*key, index)), dotted((*key, len(entries)))
                raise AnchorvecError(f"{source}: {here}: the list is shorter; its next entry is {following}")
            old = entries[index] if index < len(entries) else None
            entries[index : index + 1] = [_overlay(old, value, source, (*key, index))]
        return entries
    merged = dict(below) if isinstance(below, dict) else {}
    for part, value in above.items():
        merged[part] = _overlay(merged.get(part), value, source, (*key, part))
    return merged


# -- explaining errors


def _explain_first(error: ValidationError, layers: list[_Layer], recipe: str) -> str:
    """`source: key: what is wrong`, for the first error; unknown keys come first, as they cause others."""
    errors = [details for details in error.errors() if details["type"] != "default_factory_not_called"]
    errors.sort(key=lambda details: details["type"] not in ("extra_forbidden", "invalid_key"))
    details = errors[0]
    place = tuple(part for part in details["loc"] if part not in END_FORM_TAGS)
    keys = [(*place, *key) for key in details.get("ctx", {}).get("keys", [()])]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    source = _source(keys, layers, recipe)
    return f"{source}: {', '.join(map(dotted, keys))}: {_explain(details, source, keys[0])}{more}"


def _explain(details: ErrorDetails, source: str, key: Key) -> str:
    message, found = details["msg"], show(details["input"])
    match details["type"]:
        case "extra_forbidden" | "invalid_key":
            if (new := RENAMED.get(dotted(key))) is not None:
                return f"this key is called {new} now"
            return f"unknown key; {_nearest(key)}"
        case "missing" | "too_short" if key in (("data",), ("data", "train")):
            return "no training data; name some, for example data.train.0.path=pairs.jsonl on the command line"
        case "missing":
            return "missing, and it has no default"
        case "model_type":
            return f"should be a section of keys and values, not {found}"
        case "string_type" | "path_type" if details["input"] is not None:
            return f"should be text, not {found}; {_quotes_hint(source, dotted(key))}"
        case "string_too_short":
            return "should not be empty"
    if (new := RENAMED.get(f"{dotted(key)}={details['input']}")) is not None:
        return f"this is written {new} now"
    if message.startswith("Input "):
        return f"{message.removeprefix('Input ')}, not {found}"
    return message


def _quotes_hint(source: str, key: str) -> str:
    # The shell takes away the outer quotes, YAML the inner ones.
    return f"write '{key}=\"...\"', with both quotes" if source == _COMMAND_LINE else "put it in quotes"


def _source(keys: list[Key], layers: list[_Layer], recipe: str) -> str:
    """What set one of the keys last, or else what set the closest section around them; or else the recipe."""
    for length in range(max(map(len, keys)), 0, -1):
        for source, layer in reversed(layers):
            if any(_sets(layer, key[:length]) for key in keys):
                return source
    return recipe


def _sets(layer: Any, key: Key) -> bool:
    for part in key:
        if isinstance(layer, list):
            layer = dict(enumerate(layer))
        if not isinstance(layer, dict) or part not in layer:
            return False
        layer = layer[part]
    return True


def _nearest(key: Key) -> str:
    """The valid key that was probably meant: a similar one beside it, or its namesake in another section."""
    section, name = dotted(tuple(0 if isinstance(part, int) else part for part in key[:-1])), str(key[-1])
    fields = {place: list(schema["properties"]) for place, schema in sections()}
    near = difflib.get_close_matches(name, fields[section], n=1)
    if near:
        return f"did you mean {dotted((*key[:-1], near[0]))}?"
    namesakes = [dotted((place, name)) for place, names in fields.items() if name in names]
    if namesakes:
        return f"did you mean {' or '.join(namesakes)}?"
    return f"the keys here are {', '.join(fields[section])}"
