"""What others build on: typed, importable from one place, and no import against the layers."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import anchorvec

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "anchorvec"
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


OF_LIBRARIES = {"on_train_begin", "on_step_end", "on_log", "create_scheduler", "training_step", "log"}
OF_LIBRARIES |= {"add_model_card_callback", "evaluate", "on_evaluate"}
"""Methods that stand in for one of a library's, which says what its parameters are."""


def public_functions(tree, of_class=""):
    """Each public function and method in a module's syntax tree, with its docstring and that of its class."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node, ast.get_docstring(node) or "")
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node) or ""
            if node.name in ("__init__", "__call__"):
                yield node, f"{docstring} {of_class}"
            elif not node.name.startswith("_") and node.name not in OF_LIBRARIES:
                yield node, docstring


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_public_functions_docstring_names_its_parameters(path):
    """Each of them, as the code spells it; those of the command line have their help."""
    if path.name == "cli.py":
        return
    left_out = []
    for node, docstring in public_functions(ast.parse(path.read_text(encoding="utf-8"))):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        names = {argument.arg for argument in arguments} - {"self", "cls"}
        left_out += [f"{node.name}: {name}" for name in names if not re.search(rf"\b{name}\b", docstring)]
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


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks"])
def test_files_and_functions_stay_short(folder):
    """At most 400 lines in a file, and 50 in a function beside its docstring."""
    for file in (ROOT / folder).rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        assert lines <= 400, f"{file}: {lines} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                described = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
                lines = node.end_lineno - node.lineno + 1 - described
                assert lines <= 50, f"{file}: {node.name} has {lines} lines"
