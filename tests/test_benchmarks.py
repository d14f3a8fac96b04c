"""The benchmarks run, on a model of a few thousand weights, and write the figures that they promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "figures"),
    [
        ("stage_one", ["--pairs", "4"], {"speedup", "memory_ratio", "share_of_peak", "tokens"}),
        ("stage_one", ["--sweep"], {"memory_512_to_64_pairs", "speed_512_to_64_pairs"}),
        ("stage_two", ["--pairs", "8", "--longest", "64"], {"speedup", "memory_ratio", "tokens"}),
        ("encode", ["--texts", "16"], {"speedup", "memory_ratio", "tokens"}),
    ],
)
def test_a_benchmark_writes_its_figures(name, options, figures, tmp_path):
    """Both sides run and agree; the file holds the figures, the raw rows, the machine and the settings."""
    file = tmp_path / "figures.json"
    command = [sys.executable, BENCHMARKS / f"{name}.py", "--shape", "tiny", "--repeats", "1", "--json", file, *options]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=600)
    found = json.loads(file.read_text())
    assert figures | {"rows", "machine", "settings"} <= found.keys()
    assert all(found[figure] > 0 for figure in figures)
