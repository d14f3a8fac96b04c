"""Ctrl-C and SIGTERM end a run where it can go on from, and say how."""

import os
import re
import shlex
import signal
import sys

import pytest

from anchorvec.cli import main
from anchorvec.errors import Interrupted
from anchorvec.interrupts import Interrupts
from anchorvec.recipe import save_recipe
from interrupting import assert_same_run, at_step
from support import recipe


def send(number):
    """What a user or the system does to this process."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGTERM, 3), (signal.SIGINT, 9)], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_writes_a_checkpoint_and_says_how_to_go_on(
    interrupted_values, uninterrupted, tmp_path, capsys, monkeypatch, number, step
):
    """After the step that is under way; the command it names ends in the run that nothing interrupted."""
    folder = tmp_path / "a run"
    save_recipe(recipe({**interrupted_values, "output": str(folder)}), tmp_path / "asked.yaml")
    monkeypatch.setattr(sys, "argv", ["anchorvec", "train", str(tmp_path / "asked.yaml")])
    with at_step(step, lambda: send(number)), pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 128 + number
    said = capsys.readouterr().err
    stage, own = ("Stage I", step) if step < 7 else ("Stage II", step - 7)
    [line] = [
        line for line in said.splitlines() if line.startswith(f"{stage} has a checkpoint after step {own}; to go on")
    ]
    assert "Traceback" not in said
    command = re.fullmatch(r".*; to go on: (.*)", line)[1]
    assert command == f"anchorvec train {shlex.quote(str(folder / 'recipe.yaml'))} --resume"
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert f"{stage}: goes on after step {own}" in capsys.readouterr().err
    assert_same_run(folder, uninterrupted)


def test_a_second_signal_does_not_wait(capsys):
    """The first one in a step is noted, the next one ends it; outside of a step each one does at once."""
    before = signal.getsignal(signal.SIGINT)
    with Interrupts("again") as interrupts:
        with interrupts.deferred():
            send(signal.SIGTERM)
            assert interrupts.received == signal.SIGTERM
            assert "SIGTERM: a checkpoint is written after this step" in capsys.readouterr().err
            with pytest.raises(Interrupted, match="to go on: again"):
                send(signal.SIGINT)
        with pytest.raises(Interrupted) as stopped:
            send(signal.SIGTERM)
        assert stopped.value.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is before


def test_no_code_takes_it_for_an_error():
    """It is a KeyboardInterrupt, which `except Exception` lets through."""
    assert issubclass(Interrupted, KeyboardInterrupt)
