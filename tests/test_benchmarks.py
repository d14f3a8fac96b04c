"""The benchmarks run, on a model of a few thousand weights, and write the figures that they promise."""

import importlib
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


def test_arms_are_compared_query_by_query_and_seed_by_seed(monkeypatch):
    """The difference has the sign of reconstruction's gain; over seeds it is Student's t, over queries a bootstrap."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    two_arms = importlib.import_module("two_arms")
    gains = {0: 0.1, 1: 0.2, 2: 0.3}
    arms = {
        seed: {"contrastive": {"a": 0.1, "b": 0.5}, "reconstruction": {"a": 0.1 + gain, "b": 0.5 + gain}}
        for seed, gain in gains.items()
    }
    found = two_arms.compare(arms)
    assert [found["seeds"][seed].mean for seed in gains] == pytest.approx([0.1, 0.2, 0.3])
    assert found["over_queries"].mean == pytest.approx(0.2)
    assert found["over_queries"].low > 0.1 - 1e-9
    over_seeds = found["over_seeds"]  # 4.3027 is t's 97.5% point with 2 degrees of freedom, 0.1 the deviation
    assert (over_seeds.mean, over_seeds.low) == pytest.approx((0.2, 0.2 - 4.302653 * 0.1 / 3**0.5))
    assert over_seeds.high - over_seeds.mean == pytest.approx(over_seeds.mean - over_seeds.low)
    del arms[1]["contrastive"]["b"]
    with pytest.raises(ValueError, match="seed 1 were scored on different queries"):
        two_arms.compare(arms)
