"""The benchmarks run, on a model of a few thousand weights, and write the figures that they promise."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import BeirData
from support import write_rows

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


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no RssAnon")
def test_more_pairs_take_no_more_memory(tmp_path):
    """`plan` and the start of both stages; 20,000 pairs of 900 characters are 18 MB of text."""
    file = tmp_path / "figures.json"
    subprocess.run([sys.executable, BENCHMARKS / "data.py", "--rows", "1000", "20000", "--json", file], check=True)
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 4
    assert found["most_added_gb"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "bounds"),
    [
        ("pairs", {"stage_one_512_to_64_pairs": 1.1, "stage_two_512_to_64_pairs": 1.1}),
        ("plan", {"largest_error_of_the_plan": 0.2}),
    ],
)
def test_memory_of_real_runs(part, bounds, tmp_path):
    """512 pairs a step take a tenth more than 64 at most, and six runs what their plan says, within a fifth."""
    file = tmp_path / "figures.json"
    options = ["--shape", "small", "--precision", "fp32", "--part", part, "--json", file]
    subprocess.run([sys.executable, BENCHMARKS / "memory.py", *options], check=True, cwd=tmp_path)
    found = json.loads(file.read_text())
    assert all(found[figure] <= bound for figure, bound in bounds.items()), found["rows"]


@pytest.mark.slow
def test_the_table_of_the_papers_models():
    """A row for each stage, the paper's hours beside those on eight A100; what does not fit says so."""
    options = ["--only", "llama-3.2-1b", "llama-3.1-8b", "--devices", "1", "8"]
    command = [sys.executable, BENCHMARKS / "scaling.py", *options]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table]
    assert [row[-1] for row in cells[2:]] == ["", "", "4", "2", "", "", "45", "13"]
    assert "does not fit" in cells[6][3]
    assert cells[8][3].startswith("parts: ")
    assert all(0 < float(row[6]) < float(row[7]) for row in cells[2:] if row[6])


@pytest.fixture
def common(monkeypatch):
    """What the benchmarks share, as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("common")


@pytest.fixture
def two_arms(monkeypatch):
    """The benchmark as a module; its runs stay in this process."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("two_arms")
    monkeypatch.setattr(module, "in_process", lambda function, *arguments: function(*arguments))
    return module


def arms(gains):
    """By seed and arm the scores of two queries, where reconstruction gains so much on both."""
    return {
        seed: {
            "contrastive": {f"a{seed}": 0.1, f"b{seed}": 0.5},
            "reconstruction": {f"a{seed}": 0.1 + gain, f"b{seed}": 0.5 + gain},
        }
        for seed, gain in gains.items()
    }


def test_arms_are_compared_query_by_query_and_seed_by_seed(two_arms):
    """The difference has the sign of reconstruction's gain; over seeds it is Student's t, over queries a bootstrap."""
    gains = {0: 0.1, 1: 0.2, 2: 0.3}
    scores = arms(gains)
    found = two_arms.compare(scores)
    assert [found["seeds"][seed].mean for seed in gains] == pytest.approx([0.1, 0.2, 0.3])
    assert found["over_queries"].mean == pytest.approx(0.2)
    assert 0.1 < found["over_queries"].low < 0.2 < found["over_queries"].high < 0.3
    over_seeds = found["over_seeds"]  # 4.3027 is t's 97.5% point with 2 degrees of freedom, 0.1 the deviation
    assert (over_seeds.mean, over_seeds.low) == pytest.approx((0.2, 0.2 - 4.302653 * 0.1 / 3**0.5))
    assert over_seeds.high - over_seeds.mean == pytest.approx(over_seeds.mean - over_seeds.low)
    del scores[1]["contrastive"]["b1"]
    with pytest.raises(ValueError, match="seed 1 were scored on different queries"):
        two_arms.compare(scores)


def write_finished(results, scores, **changes):
    """The files of finished runs of 20 minutes with these scores, `changes` in the conditions of reconstruction."""
    for seed, of_seed in scores.items():
        for arm, per_query in of_seed.items():
            found = {
                "planned_minutes": 20.0,
                "conditions": {"device": "a CPU", "threads": 2, "precision": "fp32"},
                "minutes": 19.9,
                "steps": {"stage_two": 60},
                "ndcg_at_10": {"stage_two": 0.6},
                "scores": {"held-out packages": per_query},
                "spearman": {"sts": 0.5 if arm == "contrastive" else 0.7},
            }
            found["conditions"] |= changes if arm == "reconstruction" else {}
            file = results / f"{arm}-{seed}" / "two_arms.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found))


def test_finished_runs_are_not_repeated(two_arms, tmp_path, capsys):
    """From the files of finished runs alone come the tables; a series of another time is not taken for this one."""
    write_finished(tmp_path, arms({0: 0.1, 1: 0.2}))
    two_arms.main([str(tmp_path), "--seeds", "0", "1"])
    shown = capsys.readouterr().out
    assert "0.150 [0.100, 0.200]" in shown  # over queries
    assert "0.200 [0.200, 0.200]" in shown  # over seeds: Spearman's differences
    with pytest.raises(ValueError, match=r"is a run of 20.0 minutes; name another folder"):
        two_arms.main([str(tmp_path), "--seeds", "0", "--minutes", "60"])


def test_arms_from_different_machines_are_not_compared(two_arms, tmp_path):
    """A seed whose second run went on another device would compare machines."""
    write_finished(tmp_path, arms({0: 0.1}), precision="bf16")
    with pytest.raises(ValueError, match="the arms of seed 0 differ in precision: fp32 and bf16"):
        two_arms.main([str(tmp_path)])


def test_sentence_pairs_are_scored_by_rank_correlation(common, tmp_path):
    """Cosine similarity, not the dot product, against the score, on the rows of the test split."""

    class OneWord:
        def encode(self, texts):
            angles = np.array([float(text) for text in texts])
            return (1 + angles[:, None]) * np.stack([np.cos(angles), np.sin(angles)], axis=1)

    rows = [{"sentence1": "0", "sentence2": str(i / 10), "score": (5 - i) ** 3, "split": "test"} for i in range(5)]
    rows.append({"sentence1": "0", "sentence2": "0", "score": -100, "split": "train"})
    path = write_rows(tmp_path / "sts.jsonl", rows)
    assert common.spearman(OneWord(), str(path)) == pytest.approx(1.0)


@pytest.fixture
def trial(monkeypatch):
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("trial")


def test_trials_are_compared_with_the_one_named(trial, tmp_path, capsys, monkeypatch):
    """A trial that is there is not run again; others are above or below it, where they had the same data."""
    trials = [("one-0", 0.0, "a"), ("one-1", 0.0, "a"), ("two-0", 0.2, "a"), ("two-1", 0.1, "a"), ("three-0", 0.1, "b")]
    for name, gain, data in trials:
        found = {"minutes": 28.0, "stage_one_share": 0.1, "no_stage_one": False, "overrides": [], "train_pairs": 9}
        found |= {"steps": {"stage_one": 2, "stage_two": 9}, "fingerprint": data, "ndcg_at_10": 0.375 + gain}
        found |= {"per_query": {"q1": 0.25 + gain, "q2": 0.5 + gain}, "spearman": {"sts": 0.625 + gain}}
        found |= {"scores": {"cacm": {"1": 0.125 + 2 * gain}} if name != "two-0" else {}}
        found |= {"machine": {"device": "a CPU", "threads": 1, "precision": "fp32"}}
        (tmp_path / name).mkdir()
        (tmp_path / name / "trial.json").write_text(json.dumps(found))
    monkeypatch.setenv("COLUMNS", "160")
    trial.main([str(tmp_path), "one"])
    rows = [row.replace("│", " ").split() for row in capsys.readouterr().out.splitlines()]
    shown = [" ".join(row) for row in rows]
    assert "two-0 28 2 + 9 0.575 0.200 [0.200, 0.200] a CPU, 1 threads, fp32" in shown
    assert "three-0 28 2 + 9 0.475 other data a CPU, 1 threads, fp32" in shown
    both = "two 0 1 0.150 [0.150, 0.150] 0.150 [-0.485, 0.785]"  # 12.706, t with 1 degree of freedom, times 0.05
    assert both in shown
    assert "three-0 0.325 0.200 [0.200, 0.200]" in shown  # cacm, which two-0 was not scored on
    assert not [row for row in shown if row.startswith("two-0 0.5")]
    assert "two-0 0.825" in shown  # Spearman
    with pytest.raises(ValueError, match=r"with minutes = 28.0, not 10.0; name another arm"):
        trial.main([str(tmp_path), "one", "--minutes", "10"])
    with pytest.raises(ValueError, match="with no_stage_one = False, not True"):
        trial.main([str(tmp_path), "one", "--no-stage-one"])


def test_other_test_data_are_read_before_training(common, tmp_path):
    """What cannot be scored, or would be confused, is refused at once."""
    good = str(write_rows(tmp_path / "sts.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 1}]))
    (tmp_path / "other").mkdir()
    same_name = str(write_rows(tmp_path / "other" / "sts.jsonl", [{"sentence1": "a", "sentence2": "b", "score": 1}]))
    bad = str(write_rows(tmp_path / "bad.jsonl", [{"sentence1": "a", "score": 1}]))
    empty = str(write_rows(tmp_path / "empty.jsonl", [{"split": "train"}]))
    common.check_scored_elsewhere([], [good])
    for files, message in [
        ([good, same_name], "two of the test data are called sts.jsonl"),
        ([bad], "without 'sentence2'"),
        ([empty], "no rows to score"),
        ([str(tmp_path / "none")], "no such file"),
    ]:
        with pytest.raises(AnchorvecError, match=message):
            common.check_scored_elsewhere([], files)


@pytest.mark.slow
def test_a_trial_on_the_tiny_model(trial, tmp_path):
    """Both stages in the time for training, without the packages that are scored; overrides and options may mix."""
    options = ["--minutes", "0.5", "--stage-one-share", "0.3", "stage_two.in_batch_negatives=similar"]
    trial.main([str(tmp_path), "tiny", "model.base=tiny", *options])
    corpus = tmp_path / "tiny-0" / "score_set"
    rows = [{"sentence1": "a list", "sentence2": f"number {i}", "score": i} for i in range(5)]
    sts = write_rows(tmp_path / "sts.jsonl", rows)
    trial.main([str(tmp_path), "tiny", "--data", str(corpus), "--sts", str(sts)])
    found = json.loads((tmp_path / "tiny-0" / "trial.json").read_text())
    assert set(found["steps"]) == {"stage_one", "stage_two"}
    assert found["minutes_trained"] < 0.7
    assert len(found["per_query"]) == 1_500
    assert found["scores"] == {"score_set": found["per_query"]}
    assert set(found["spearman"]) == {"sts.jsonl"}
    texts = (tmp_path / "tiny-0" / "pairs.jsonl").read_text()
    assert "in_batch_negatives: similar" in (tmp_path / "tiny-0" / "recipe.yaml").read_text()
    assert len(texts.splitlines()) == found["train_pairs"]


def test_a_part_of_the_gpus_benchmark_is_stopped_when_its_time_is_over(monkeypatch):
    """Its result says so, as it does of an error; the others go on."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = importlib.import_module("gpu")

    def swallows():
        while True:
            try:
                time.sleep(60)
            except Exception:  # as libraries do
                continue

    assert "stopped after 1 s" in gpu.result_of(swallows, 1.2)["failed"]
    assert gpu.result_of(dict, 0.5)["failed"] == "no time is left"
    assert gpu.result_of(lambda: {"seconds": 1}, 5) == {"seconds": 1}
    assert "ZeroDivisionError" in gpu.result_of(lambda: 1 / 0, 5)["failed"]


def test_vectors_from_a_gpu_are_scored_elsewhere(monkeypatch, tmp_path):
    """nDCG@10 from fp16 vectors of any length and the ids beside them."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    scores = importlib.import_module("gpu_scores")
    corpus = {f"d{i}": {"title": "", "text": "text"} for i in range(3)}
    data = BeirData(corpus, {"a": "a", "b": "b"}, {"a": {"d0": 1}, "b": {"d2": 1}}, name="set")
    vectors = {"queries": [[2, 0], [1, 0.1]], "corpus": [[1, 0], [3, 3], [0, 1]]}  # b finds d0, d1, then d2
    for side, ids in (("queries", data.queries), ("corpus", corpus)):
        np.save(tmp_path / f"stage_one_{side}.npy", np.array(vectors[side], dtype=np.float16))
        (tmp_path / f"{side}.json").write_text(json.dumps(list(ids)))
    assert scores.ndcg_at_10(tmp_path, "stage_one", data) == pytest.approx((1 + 0.5) / 2)


@pytest.mark.slow
def test_the_gpus_benchmark_on_a_tiny_model(tmp_path):
    """Parts that need no data, and no compiler, give a result each."""
    parts = ["machine", "packs", "stage_two_small"]
    subprocess.run([sys.executable, BENCHMARKS / "gpu.py", tmp_path, "--tiny", "--only", *parts], check=True)
    found = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [part["part"] for part in found] == parts
    assert not [part for part in found if "failed" in part]
