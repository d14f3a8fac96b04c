"""The recipe's keys for several devices; with real processes in `test_processes.py`."""

import pytest

import anchorvec
from support import recipe


@pytest.mark.wires("sharded", of=["stage_one"])
@pytest.mark.parametrize("sharded", [True, False])
def test_one_device_that_holds_all_is_said(sharded, tmp_path, capsys):
    """Where the weights were to be shared out, and there is nobody to share them with."""
    values = {"stage_one.sharded": sharded, "stage_one.steps": 2, "stage_two": None}
    anchorvec.train(recipe({**values, "output": str(tmp_path / "run")}))
    assert ("sharded over one device, which holds all" in capsys.readouterr().err) == sharded
