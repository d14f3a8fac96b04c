"""What a terminal shows: texts and names as they stand, whatever it can show; and who may read what is written."""

import os
import subprocess
import sys

import pytest

import anchorvec
from anchorvec.files import new_folder
from anchorvec.terminal import Bar, say, terminal
from support import QUICK, write_rows

NAMES = ["[/b]", "[bold]x", "[v1]x", "a[red", ":smile:"]


@pytest.mark.parametrize("name", NAMES)
def test_brackets_are_no_markup(tmp_path, capsys, name):
    """In names of columns, data sets, folders, and in texts; a run's folder is found where its name says."""
    rows = [{"query": f"{name} {i}", "positive": f"{i} {name}", f"{name}-column": i} for i in range(16)]
    folder = tmp_path / name.replace("/", "")
    folder.mkdir()
    data = write_rows(folder / "rows.jsonl", rows)
    source = f'data.train=[{{path: "{data}", name: "{name}"}}]'
    recipe = anchorvec.load_recipe("debug", [f'output="{folder / "run"}"', *QUICK, "stage_one=null", source])
    terminal().print(anchorvec.plan(recipe), soft_wrap=True)
    trained = anchorvec.train(recipe)
    terminal().print(trained, soft_wrap=True)
    say(name)
    out, err = capsys.readouterr()
    assert f"pairs of {name}" in out
    assert f"{name}-column" in out
    assert str(folder / "run" / "model") in out
    assert err.endswith(f"{name}\n")


def test_a_terminal_that_knows_ascii_alone_shows_replacements(tmp_path):
    """Not a traceback: what it cannot show becomes a question mark."""
    rows = [{"query": f"où {i} 水", "positive": f"là {i} \ud83d"} for i in range(16)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "anchorvec", "plan", "debug", f"data.train=[{{path: {data}}}]"]
    command += ["stage_one.pairs_per_step=2", "stage_two.pairs_per_step=2", "--no-step", "--machine", "h100"]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"?" in done.stdout
    assert b"U+FFFD" in done.stderr


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_what_is_written_has_the_modes_of_new_files(tmp_path, umask, mode):
    """Whatever a library gave it, those who may read new files may read a model."""
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "model") as scratch:
            (scratch / "deep").mkdir(mode=0o700)
            (scratch / "deep" / "weights").touch(mode=0o600)
            (scratch / "config").touch(mode=0o777)
    finally:
        os.umask(before)
    for name in ("deep/weights", "config"):
        assert (tmp_path / "model" / name).stat().st_mode & 0o777 == mode
    assert (tmp_path / "model" / "deep").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("is_terminal", [True, False])
def test_one_bar_goes_over_all_pieces_of_work(capsys, monkeypatch, is_terminal):
    """It names the piece, and its share of all; a size that is not known is the mean of the others."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    with Bar({"[b]": 100, "other": None, "last": 300}, shown=True) as bar:
        bar.start("[b]")
        bar.advance(1_000)  # no more than its size
        bar.start("last")
        bar.advance(150)
    out, err = capsys.readouterr()
    assert out == ""
    shown = "75%" in err and "last (3 of 3)" in err and "left" in err
    assert (shown, err == "") == (is_terminal, not is_terminal)
