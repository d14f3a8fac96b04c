"""The commands as a user types them."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest

import anchorvec
from anchorvec.cli import main, show_warning


@pytest.fixture
def anchorvec_command(monkeypatch, capsys):
    """A function that runs `anchorvec WORDS` and returns its exit code and what it printed."""

    def run(*words: str) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["anchorvec", *words])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=end.value.code or 0, stdout=out, stderr=err)

    return run


def test_a_whole_session(anchorvec_command, tmp_path):
    """Plan, train, decode, search and export follow each other; --json holds each result."""
    run = tmp_path / "run"
    steps = ["stage_one.steps=2", "stage_one.warmup_steps=1", "stage_two.steps=2", "stage_two.warmup_steps=1"]
    done = anchorvec_command("plan", "debug", *steps, "--json", str(tmp_path / "plan.json"))
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["trained_parameters"] == {"stage_one": plan["parameters"], "stage_two": plan["parameters"]}
    assert plan["pairs"][0]["query_written"][-1] == "<|end|>"
    assert not run.exists()

    done = anchorvec_command("train", "debug", f"output={run}", *steps, "--json", str(tmp_path / "train.json"))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "train.json").read_text())["export"]["folder"] == str(run / "model")

    done = anchorvec_command("decode", str(run / "stage_one"), "fish", "--max-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert "first token" in done.stdout

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("one document\nanother document\n")
    done = anchorvec_command("search", str(run / "model"), str(corpus), "--query", "[one]", "--top-k", "1")
    assert done.returncode == 0, done.stderr
    assert "[one]" in done.stdout
    assert "document" in done.stdout

    done = anchorvec_command("export", str(run / "stage_one"), str(tmp_path / "one"))
    assert done.returncode == 0, done.stderr
    assert "can still write" in " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "debug"], "output: the recipe names no folder"),
        (["train", "debug", "stage_one.step=3"], "did you mean stage_one.steps?"),
        (["train", "no-such-recipe"], "no such file"),
        (["plan", "debug", "data.train.0.path=missing.jsonl"], "missing.jsonl does not exist"),
        (["decode", "/nowhere", "text"], "no config.json"),
        (["evaluate", "./nowhere", "--data", "/nowhere"], "/nowhere"),
        (["search", "./nowhere", "/nowhere"], "/nowhere"),
        (["export", "/nowhere", "out"], "no model in this folder"),
        (["quickstart", "--output", "/nowhere/run", "--minutes", "-5"], "minutes: -5.0 is no time"),
        (["plan", "debug", "--json", "/"], "--json: / cannot be written"),
        (["evaluate", "./nowhere", "--task", "SciFact", "--baseline", "untrained"], "untrained: "),
        (["train", "debug", "output=/dev/null/run"], "output: /dev/null/run cannot be made: Not a directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(anchorvec_command, words, message):
    """What a user can mend ends with one line on stderr, exit code 2 and no traceback."""
    done = anchorvec_command(*words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["quickstart", "train", "plan", "evaluate", "search", "decode", "export"])
def test_each_command_is_a_function_with_help_and_an_example(anchorvec_command, command):
    """Every command has `--help` with an example, and the package a function of its name."""
    done = anchorvec_command(command, "--help")
    assert done.returncode == 0
    assert f"Example: anchorvec {command}" in " ".join(done.stdout.split())
    assert callable(getattr(anchorvec, command))


def test_the_version_is_that_of_the_package(anchorvec_command):
    """`--version` names it and ends."""
    done = anchorvec_command("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"anchorvec {version('anchorvec')}")


@pytest.mark.parametrize(
    "words",
    [["search", "m", "c", "--top-k", "0"], ["decode", "m", "t", "--beams", "0"], ["evaluate", "--batch-size=0"]],
)
def test_a_number_below_one_is_refused(anchorvec_command, words):
    """The options that count something say which numbers they take."""
    done = anchorvec_command(*words)
    assert done.returncode == 2
    assert "greater than or equal to 1" in done.stderr


def test_warnings_are_one_line(capsys):
    """What a function warns of is shown without the line of code it comes from."""
    show_warning(UserWarning("mind the gap"), UserWarning, "file.py", 3)
    assert capsys.readouterr().err == "warning: mind the gap\n"


def test_the_command_line_starts_without_torch():
    """`anchorvec --help` in a fresh process imports neither torch nor transformers."""
    code = (
        "import sys; from anchorvec.cli import app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_threads_that_wait_give_the_processor_to_others(monkeypatch):
    """Set before torch is loaded, which reads it once; a user's own value stays."""
    for given, expected in ((None, "10000"), ("7", "7")):
        monkeypatch.setattr(os, "environ", {"GOMP_SPINCOUNT": given} if given else {})
        monkeypatch.setattr(sys, "argv", ["anchorvec", "--version"])
        with pytest.raises(SystemExit):
            main()
        assert os.environ["GOMP_SPINCOUNT"] == expected
