"""The commands as a user types them."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import anchorvec
from anchorvec.cli import main


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


def test_the_command_line_starts_without_torch():
    """`anchorvec --help` in a fresh process imports neither torch nor transformers."""
    code = (
        "import sys; from anchorvec.cli import app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
