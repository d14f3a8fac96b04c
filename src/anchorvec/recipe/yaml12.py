"""YAML as recipes are written in it: plain words are read as in YAML 1.2, and a key stands once."""

import re
from typing import Any

import yaml

from anchorvec.errors import AnchorvecError


def parse(text: str, source: str) -> Any:
    """The value that `text` says; raises AnchorvecError with the line, after the name `source`."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise AnchorvecError(f"{source}:{line}: not valid YAML: {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise AnchorvecError(f"{source}:{line}: not valid YAML: {error.problem}") from None


def dump(value: Any, **options: Any) -> str:
    """`value` as YAML on lines of any length, its keys in their order."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"), **options)
    return text


def show(value: Any) -> str:
    """The value as one would write it in a recipe, on one line and cut."""
    text = dump(value, default_flow_style=True)
    line = text.partition("\n")[0]
    return line if len(line) <= 60 else line[:57] + "..."


# Plain words are read as in YAML 1.2; PyYAML has 1.1, where 4e-5 is a text, and no and 2024-01-01 are not.
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  # PyYAML's way: `add_implicit_resolver` fills it below

    def fetch_tag(self) -> None:
        raise yaml.scanner.ScannerError(
            problem="a tag, such as !!int, has no place in a recipe; text that starts with ! goes in quotes",
            problem_mark=self.get_mark(),
        )

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
