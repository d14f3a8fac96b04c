"""What others build on: typed, importable from one place, and no import against the layers."""

import dataclasses
import inspect
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import anchorvec

ROOT = Path(__file__).parents[1]
PUBLIC = [getattr(anchorvec, name) for name in anchorvec.__all__ if name != "__version__"]


def classes_in(annotation):
    """The classes that an annotation is made of."""
    parts = typing.get_args(annotation)
    own = [annotation] if inspect.isclass(annotation) else []
    return own + [found for part in parts for found in classes_in(part)]


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_what_a_public_name_takes_and_gives_is_public(thing):
    """Every class of the package in an annotation is importable from `anchorvec` itself."""
    functions = [thing] if inspect.isfunction(thing) else [thing.__init__]
    if dataclasses.is_dataclass(thing):
        functions.append(thing)
    for function in functions:
        for annotation in typing.get_type_hints(function, localns={"SentenceTransformer": object}).values():
            for found in classes_in(annotation):
                if found.__module__.startswith("anchorvec"):
                    assert found.__name__ in anchorvec.__all__, f"{thing.__name__} takes or gives {found.__name__}"


def test_all_names_are_listed_in_order_and_there_is_a_version():
    """And the package says that it is typed."""
    assert sorted(anchorvec.__all__) == anchorvec.__all__
    assert anchorvec.__version__[0].isdigit()
    assert (Path(anchorvec.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("thing", PUBLIC, ids=lambda thing: thing.__name__)
def test_a_public_functions_docstring_names_its_parameters(thing):
    """Each of them, as the code spells it."""
    if not inspect.isfunction(thing):
        return
    left_out = [name for name in inspect.signature(thing).parameters if name not in (thing.__doc__ or "")]
    assert left_out == []


def test_help_waits_for_no_heavy_library():
    """`anchorvec --help` imports neither torch nor transformers."""
    code = "import sys, anchorvec.cli; raise SystemExit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_imports_go_one_way():
    """The layers of CONTRIBUTING.md, as import-linter reads them from pyproject.toml."""
    pytest.importorskip("importlinter")
    from importlinter.cli import lint_imports

    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0
