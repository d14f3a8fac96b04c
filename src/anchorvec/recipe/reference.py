"""`docs/recipe.md`, from the docstrings of the settings."""

from typing import Any

from anchorvec.recipe.reading import SHIPPED, recipe_names
from anchorvec.recipe.settings import sections
from anchorvec.recipe.yaml12 import show


def reference() -> str:
    """`docs/recipe.md`: every key with its type, default and meaning, as the fields' docstrings say."""
    shipped = []
    for name in recipe_names():
        first_line = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
        shipped.append(f"| `{name}` | {first_line.removeprefix('# ')} |")
    parts = [_HEAD.replace("SHIPPED", "\n".join(shipped))]
    for section, schema in sections():
        rows = []
        for name, field in schema["properties"].items():
            if name in schema.get("required", []):
                default = "none: must be written"
            elif "default" not in field:
                default = "from the other keys"
            elif isinstance(field["default"], dict):
                default = "a section with its defaults"
            else:
                default = f"`{show(field['default'])}`"
            meaning = " ".join(field["description"].split())
            rows.append(f"| `{name}` | {_type_name(field)} | {default} | {meaning} |")
        table = "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows])
        title = f"`{section}`" if section else "Top level"
        parts.append(f"## {title}\n\n{schema['description']}\n\n{table}\n")
    return "\n".join(parts)


def _type_name(field: dict[str, Any]) -> str:
    forms = field.get("anyOf") or field.get("oneOf")
    if forms:
        return " or ".join(_type_name(form) for form in forms)
    if "$ref" in field:
        return "section"
    if "enum" in field or "const" in field:
        return " or ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field["type"] == "array":
        noun, *rest = _type_name(field["items"]).split()
        return " ".join([f"list of {noun}s", *rest])
    names = {"string": "text", "boolean": "`true` or `false`", "null": "`null`"}
    name = "path" if field.get("format") == "path" else names.get(field["type"], field["type"])
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {field[bound]}" for bound, sign in signs.items() if bound in field]
    return " ".join([name, " and ".join(bounds)]) if bounds else name


_HEAD = """\
<!-- Generated from the docstrings in src/anchorvec/recipe/settings.py and stages.py. After a change there, run
python -c "from anchorvec.recipe.reference import reference; print(reference(), end='')" > docs/recipe.md -->

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
