"""What `anchorvec report` cannot read or write: one line that names it, and nothing on disk has changed."""

import json
import sys
from pathlib import Path

import pytest

from anchorvec.cli import main
from anchorvec.commands.report import report
from anchorvec.errors import AnchorvecError
from comparisons import write_comparison


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """The folder of a comparison."""
    folder = tmp_path_factory.mktemp("arms")
    write_comparison(folder, ("e5", "echo"), seeds=1)
    return folder


BROKEN = {
    "nothing in it": ({}, "neither a run nor a comparison; name a folder with run.json or comparison.json in it"),
    "no JSON": ({"comparison.json": '{"recipe": '}, "comparison.json cannot be read: Expecting value"),
    "another schema": (
        {"comparison.json": json.dumps({"models": []})},
        "comparison.json: recipe: Field required; was the file changed by hand?",
    ),
    "an arm that is none": (
        {"comparison.json": json.dumps({"recipe": "a", "budget": {"kind": "steps", "amount": 3}, "seeds": [0],
                                        "control": "a", "arms": {"a": {"runs": [{"seed": "zero"}]}}})},
        "comparison.json: arms.a.runs.0.seed: Input should be a valid integer",
    ),
    "a control that is no arm": (
        {"comparison.json": json.dumps({"recipe": "a", "budget": {"kind": "steps", "amount": 3}, "seeds": [0],
                                        "control": "b", "arms": {"a": {}}})},
        "comparison.json: the whole file: Value error, the control 'b' is none of the arms (a)",
    ),
    "no arms": (
        {"comparison.json": json.dumps({"recipe": "a", "budget": {"kind": "steps", "amount": 3}, "seeds": [0],
                                        "control": "b", "arms": {}})},
        "comparison.json: arms: ",
    ),
    "a comparison that is a list": ({"comparison.json": "[]"}, "comparison.json: the whole file: Input should be"),
    "scores that are none": ({"run.json": "{}", "scores.json": '{"untrained": {"a": 1}}'}, "scores.json: untrained.a:"),
    "an interval that is none": (
        {"run.json": "{}", "scores.json": json.dumps({"untrained": {"a": {"kind": "STS", "main_score": 1, "m": 1,
                                                                          "m_interval": [0]}}})},
        "scores.json: untrained.a: ",
    ),
    "a recipe that is no YAML": ({"run.json": "{}", "recipe.yaml": "a: [\n"}, "recipe.yaml"),
    "a recipe in Latin-1": ({"run.json": "{}", "recipe.yaml": b"a: \xe9"}, "recipe.yaml cannot be read"),
    "a record that is a list": ({"run.json": "[]"}, "run.json: the whole file: Input should be a valid dictionary"),
}  # fmt: skip


def run_command(monkeypatch, capsys, *words):
    """The exit code of `anchorvec report WORDS`, and what is on stderr, on one line."""
    monkeypatch.setattr(sys, "argv", ["anchorvec", "report", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code, " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_run_is_refused(name, tmp_path, monkeypatch, capsys):
    """One line that names the file and the place in it; a page that was there stays."""
    files, message = BROKEN[name]
    folder = tmp_path / "folder"
    folder.mkdir()
    for file, text in files.items():
        (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "page.html").write_text("old")
    code, err = run_command(monkeypatch, capsys, folder, "--output", tmp_path / "page.html")
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert "Traceback" not in err
    assert (tmp_path / "page.html").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "page.html"]


def test_files_that_cannot_be_written_are_named_and_nothing_is(arms, tmp_path, monkeypatch, capsys):
    """None at all, a folder, and the second of two."""
    code, err = run_command(monkeypatch, capsys, arms)
    assert (code, "name a run's folder, and output=FILE.html or markdown=FILE.md" in err) == (2, True)
    with pytest.raises(AnchorvecError, match="no run is named"):
        report([], tmp_path / "page.html")
    for option in ("--output", "--markdown"):
        code, err = run_command(monkeypatch, capsys, arms, option, tmp_path)
        assert (code, err.startswith(f"error: {option}: ")) == (2, True)
    (tmp_path / "file").write_text("")
    words = "--output", tmp_path / "page.html", "--markdown", tmp_path / "file" / "page.md"
    code, err = run_command(monkeypatch, capsys, arms, *words)
    assert (code, "cannot be written" in err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_page_replaces_an_older_one_in_one_move(arms, tmp_path, monkeypatch):
    """Where the move does not succeed the older one is whole, and nothing lies beside it."""
    file = tmp_path / "page.md"
    file.write_text("old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", refuse)
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(AnchorvecError, match=r"page\.md cannot be written: the disk is full"):
            report(arms, markdown=file)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    report(arms, markdown=file)
    assert file.read_text().startswith("# quickstart")


def test_a_missing_package_is_named(arms, tmp_path, monkeypatch):
    """With the extra that has it, before anything is read."""
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "vl_convert" else find(name))
    with pytest.raises(AnchorvecError, match=r"needs the package vl-convert-python: pip install 'anchorvec\[report\]'"):
        report(arms, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_what_it_says(arms, tmp_path, monkeypatch, capsys):
    """Both files, and the result as JSON; the verdict is on the terminal."""
    names = {"--output": "page.html", "--markdown": "page.md", "--json": "result.json"}
    words = [word for option, name in names.items() for word in (option, str(tmp_path / name))]
    monkeypatch.setattr(sys, "argv", ["anchorvec", "report", str(arms), *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    out = " ".join(capsys.readouterr().out.split())
    result = json.loads((tmp_path / "result.json").read_text())
    assert " ".join(result["verdict"][0].split()) in out
    assert result["output"] == str(tmp_path / "page.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names.values())
