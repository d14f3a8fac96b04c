"""A run that was killed goes on as if it had not been: same weights, same losses, same rows, bit for bit."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import anchorvec
from anchorvec.errors import AnchorvecError
from anchorvec.files import write_json
from anchorvec.recipe import save_recipe
from anchorvec.run import Run
from anchorvec.training.budget import Budget
from anchorvec.training.checkpoints import Checkpoints
from interrupting import STEPS, assert_same_run, killed_after, log
from support import Clock, recipe, write_rows


@pytest.fixture
def asked(interrupted_values, tmp_path):
    """A function that gives the recipe with other values; its run goes to `tmp_path / "run"`."""
    return lambda **values: recipe({**interrupted_values, "output": str(tmp_path / "run"), **values})


@pytest.fixture(scope="module")
def killed_run(interrupted_values, tmp_path_factory):
    """The folder of a run that was killed after step 5 of Stage I, with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    with killed_after(5):
        anchorvec.train(recipe({**interrupted_values, "output": str(folder)}))
    return folder


@pytest.fixture
def killed(killed_run, tmp_path):
    """A copy of it in `tmp_path / "run"`."""
    return shutil.copytree(killed_run, tmp_path / "run")


def everything(folder):
    """Every file below `folder` with what is in it."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("steps", [1, STEPS + 1, STEPS + 5], ids=["before a checkpoint", "between", "in Stage II"])
def test_a_killed_run_goes_on_bit_for_bit(asked, uninterrupted, tmp_path, steps):
    """Wherever it was, whatever the random states are then, and in the middle between two lines of the log."""
    with killed_after(steps):
        anchorvec.train(asked())
    torch.manual_seed(steps)
    anchorvec.train(asked(), resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_process_that_is_killed_with_minus_nine_goes_on(asked, uninterrupted, tmp_path):
    """A real one, by the system, once its first checkpoint is there."""
    save_recipe(asked(), tmp_path / "asked.yaml")
    command = [sys.executable, "-m", "anchorvec", "train", str(tmp_path / "asked.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    until = time.monotonic() + 600
    while Checkpoints(Run(tmp_path / "run").checkpoints("stage_one"), 2).last_good().startswith("there is no"):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    anchorvec.train(asked(), resume=True)
    assert_same_run(tmp_path / "run", uninterrupted)


def test_where_nothing_is_to_go_on_with_it_begins(asked, tmp_path, capsys):
    """One command for a machine that may be taken back at any time."""
    anchorvec.train(asked(**{"stage_one.steps": 2, "stage_two": None}), resume=True)
    assert "there is no run in" in capsys.readouterr().err
    assert (tmp_path / "run" / "model").is_dir()


def test_a_checkpoint_that_was_cut_off_or_altered(asked, killed, uninterrupted, capsys):
    """One is passed over, the other one is an error until it is removed; both lead to the same run from an older one.

    What changes nothing in the result may be another value then.
    """
    newest = killed / "checkpoints" / "stage_one" / "checkpoint-4"
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:-1] + b"?")
    before = everything(killed)
    with pytest.raises(AnchorvecError, match=r"checkpoint-4: .*optimizer.pt is not what was written; remove"):
        anchorvec.train(asked(), resume=True)
    assert everything(killed) == before
    (newest / "manifest.json").unlink()
    anchorvec.train(asked(**{"stage_one.save_steps": 3, "stage_two.save_total_limit": 1}), resume=True)
    assert "Stage I: goes on after step 2" in capsys.readouterr().err
    assert_same_run(killed, uninterrupted)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (
            {"stage_one.learning_rate": 0.5},
            {},
            "stage_one.learning_rate is 0.001 there, and 0.5 here; go on with its own",
        ),
        ({"seed": 3, "stage_two.lora": None}, {}, r"is .* there, and .* here \(and \d+ more\); go on with its own"),
        ({}, {"budget": Budget(5.0)}, "minutes: .*run was begun with the steps of its recipe, not with 5 minutes"),
        ({}, {"resume": False}, "is in use; it holds a run that did not finish: go on with --resume"),
    ],
    ids=["learning rate", "several", "time", "a new run"],
)
def test_another_run_is_refused(asked, killed, values, options, message):
    """One line says what differs; nothing is changed."""
    before = everything(killed)
    with pytest.raises(AnchorvecError, match=message):
        anchorvec.train(asked(**values), **{"resume": True, **options})
    assert everything(killed) == before


def test_other_data_and_what_is_no_run_are_refused(asked, killed, tmp_path, monkeypatch):
    """Pairs that changed since the run began, and a folder with something else in it."""
    record = json.loads((killed / "run.json").read_text())
    record["data"]["hard"]["fingerprint"] = "of other pairs"
    (killed / "run.json").write_text(json.dumps(record))
    with pytest.raises(AnchorvecError, match=r"data.train: .*more.jsonl has other pairs than when .* began; put them"):
        anchorvec.train(asked(), resume=True)
    (killed / "recipe.yaml").unlink()
    with pytest.raises(AnchorvecError, match="is in use, and no run is in it"):
        anchorvec.train(asked(), resume=True)


def test_another_machine_is_said(asked, killed, capsys):
    """Its versions, device and threads are in the record; bit for bit is promised on the same ones."""
    record = json.loads((killed / "run.json").read_text())
    record["versions"]["torch"] = "1.0"
    (killed / "run.json").write_text(json.dumps(record))
    anchorvec.train(asked(), resume=True)
    assert f"does not go on bit for bit: torch 1.0, now {torch.__version__}" in capsys.readouterr().err


def test_what_a_stage_computed_at_its_start_is_what_it_goes_on_with(asked, killed, uninterrupted):
    """Origin and candidates of words, and the engine: with others, written here, the run is another one."""
    checkpoints = Checkpoints(killed / "checkpoints" / "stage_one", limit=2)
    kept = load_file(checkpoints.start / "computed.safetensors")
    engine = json.loads((checkpoints.start / "engine.json").read_text())
    engine["engine"]["micro_batch_tokens"] = 77
    with checkpoints.writing_start() as folder:
        save_file({name: tensor + (name == "origin") for name, tensor in kept.items()}, folder / "computed.safetensors")
        write_json(folder / "engine.json", engine)
    anchorvec.train(asked(**{"stage_one.save_steps": 3}), resume=True)
    found = json.loads((killed / "run.json").read_text())["engine"]["stage_one"]
    assert found["micro_batch_tokens"] == 77
    assert log(killed)[:2] == log(uninterrupted)[:2]
    assert log(killed)[2]["loss"] != pytest.approx(log(uninterrupted)[2]["loss"], rel=1e-3)
    assert log(killed)[2]["rows"] == log(uninterrupted)[2]["rows"]


def test_what_is_finished_is_not_done_again(asked, tmp_path, monkeypatch):
    """Stages, scores and the export; a finished run gives its result once more."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write_rows(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": f"text {i}"} for i in range(5)])
    write_rows(folder / "queries.jsonl", [{"_id": "q", "text": "text 1"}])
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td1\t1\n")
    scored, evaluate = [], anchorvec.run_scores.evaluate

    def recorded(model, **options):
        scored.append(model)
        return evaluate(model, **options)

    monkeypatch.setattr("anchorvec.run_scores.evaluate", recorded)
    scoring = {"evaluation.data": [str(folder)], "evaluation.bm25": True}
    with killed_after(STEPS + 3):
        anchorvec.train(asked(**scoring))
    assert len(scored) == 2
    first = anchorvec.train(asked(**scoring), resume=True)
    assert list(first.scores) == ["bm25", "untrained", "stage_one", "stage_two"]
    assert len(scored) == 3
    before = everything(tmp_path / "run")
    again = anchorvec.train(asked(**scoring), resume=True)
    assert len(scored) == 3
    assert again.scores == first.scores
    assert again.export == first.export
    assert again.steps == first.steps
    assert {path for path, content in everything(tmp_path / "run").items() if before[path] != content} == set()


def test_a_run_that_ends_by_a_time_goes_on_with_the_time_it_had_left(tmp_path, monkeypatch):
    """What passes while nothing runs does not count, nor what the kill has cost; the rate does not jump."""
    clock = Clock()
    monkeypatch.setattr("anchorvec.training.budget.pace", lambda: 1.0)
    for module in (
        "training.progress",
        "training.trainers",
        "training.budget",
        "pipeline",
        "resuming",
    ):
        monkeypatch.setattr(f"anchorvec.{module}.time", clock)
    overrides = [f"output={tmp_path / 'run'}", "stage_one=null", "stage_two.warmup_steps=0", "stage_two.save_steps=3"]
    asked = anchorvec.load_recipe("debug", overrides)
    with killed_after(8):
        anchorvec.train(asked, budget=Budget(3.0, began=0.0))
    clock.now += 10_000
    with pytest.raises(AnchorvecError, match="was begun with 3 minutes, not with 4 minutes"):
        anchorvec.train(asked, budget=Budget(4.0), resume=True)
    result = anchorvec.train(asked, resume=True)
    assert 2.3 < result.minutes < 2.6  # as in test_any_recipe_runs_for_a_time
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, result.steps["stage_two"] + 1))
    rates = [record["learning_rate"] for record in records]
    falls = [before - after for before, after in itertools.pairwise(rates)]
    assert max(falls) < 3 * sorted(falls)[len(falls) // 2]
    assert min(falls) >= 0
    assert rates[-1] < 0.15 * asked.stage_two.learning_rate


@pytest.mark.parametrize("stage", ["stage_one", "stage_two"])
def test_a_loss_that_is_no_number_names_its_rows(asked, interrupted_values, tmp_path, stage):
    """The step, its rows by file and line, and the last good checkpoint; the weights before that step are in it."""
    rate = {f"{stage}.learning_rate": 1e30, f"{stage}.save_steps": 1, f"{stage}.warmup_steps": 0}
    with pytest.raises(AnchorvecError) as stopped:
        anchorvec.train(asked(**rate, **{"model.attention": "sdpa"}))
    said = str(stopped.value)
    rows = [json.loads(line) for line in (tmp_path / "run" / "not_finite.jsonl").read_text().splitlines()]
    step = int(said.partition(" at step ")[2].partition(",")[0])
    places = ", ".join(row["place"] for row in rows)
    assert f"{stage}: the loss" in said
    assert f"whose rows are {places} (all of them: {tmp_path / 'run' / 'not_finite.jsonl'})" in said
    assert said.endswith(f"the last good checkpoint is {tmp_path}/run/checkpoints/{stage}/checkpoint-{step - 1}")
    assert len(rows) == 4
    for row in rows:
        file, _, line = row["place"].rpartition(":")
        stored = json.loads(open(file).read().splitlines()[int(line) - 1])  # noqa: PTH123, SIM115
        assert (row["query"], row["positive"]) == (stored["query"], stored["positive"])
    folder = tmp_path / "run" / "checkpoints" / stage / f"checkpoint-{step - 1}"
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


def test_too_little_disk_is_said_before_training(asked, tmp_path):
    """With what the run needs and what is free; where room is made it goes on."""
    many = {"stage_one.steps": 10**9, "stage_one.save_steps": 1, "stage_one.save_total_limit": 10**8}
    with pytest.raises(
        AnchorvecError, match=r"output: .*run is on a disk with .* GB free, and the run needs .* GB at once"
    ):
        anchorvec.train(asked(**many))
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "log.jsonl").exists()
