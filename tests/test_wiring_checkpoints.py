"""The keys that decide when checkpoints are written, what of the hub is read, and who gets the log."""

import json
from pathlib import Path

import pytest
import torch
import transformers.trainer
from safetensors.torch import load_file
from transformers import TrainerCallback

import anchorvec
from anchorvec.start import build_base
from support import make_model, make_tokenizer, recipe, write_rows
from wiring import sources

STAGES = ["stage_one", "stage_two"]


class Watch(TrainerCallback):
    """The steps of the checkpoints that are there when one was written, and when a stage ends."""

    def __init__(self):
        self.seen = []

    def on_save(self, args, *_, **__):
        folder = Path(args.output_dir)
        self.seen.append(sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")))

    def on_train_end(self, *args, **kwargs):
        self.on_save(*args, **kwargs)


@pytest.mark.wires("save_steps", "save_total_limit", of=STAGES)
def test_checkpoints_are_written_and_kept_as_each_stage_says(tmp_path, monkeypatch):
    """After every so many steps but not after the last one; so many are kept; null: none but at a signal."""
    watch = Watch()
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, watch])
    values = {f"{stage}.{key}": 7 if key == "steps" else 4 for stage in STAGES for key in ("steps", "pairs_per_step")}
    values |= {"data.train": sources(tmp_path / "data"), "output": str(tmp_path / "run"), "model.precision": "fp32"}
    values |= {"stage_one.save_steps": 3, "stage_one.save_total_limit": 1}
    values |= {"stage_two.save_steps": 2, "stage_two.save_total_limit": 2}
    anchorvec.train(recipe(values))
    assert watch.seen == [[3], [6], [6], [2], [2, 4], [4, 6], [4, 6]]
    assert not (tmp_path / "run" / "checkpoints").exists()
    watch.seen.clear()
    none = {"output": str(tmp_path / "none"), "stage_one.save_steps": None, "stage_two": None}
    anchorvec.train(recipe({k: v for k, v in (values | none).items() if not k.startswith("stage_two.")}))
    assert watch.seen == [[]]


@pytest.mark.wires("report_to")
def test_a_tracker_gets_what_the_log_gets(tmp_path):
    """TensorBoard, a run for each stage; the log is there too."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    short = {f"{stage}.{key}": 3 if key == "steps" else 4 for stage in STAGES for key in ("steps", "pairs_per_step")}
    values = {**short, "data.train": sources(tmp_path / "data"), "output": str(tmp_path / "run")}
    anchorvec.train(recipe({**values, "report_to": "tensorboard", "stage_two.in_batch_negatives": "similar"}))
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    for stage in STAGES:
        shown = EventAccumulator(str(tmp_path / "run" / "tensorboard" / stage)).Reload()
        logged = {record["step"]: record["loss"] for record in records if record["stage"] == stage}
        assert {event.step: event.value for event in shown.Scalars("train/loss")} == pytest.approx(logged)
        assert list(logged) == [1, 2, 3]


@pytest.mark.wires("revision", of=["data.train.0"])
def test_a_revision_of_a_data_set_is_read(hub, tmp_path):
    """The newest commit where none is named; of a folder or a file there is none."""
    commits = []
    for word in ("owl", "fox"):
        rows = [{"query": f"{word} {i}", "positive": f"{i} {word}"} for i in range(16)]
        files = {"train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}
        commits.append(hub.add("datasets/someone/pairs", files))
    for revision, word in ((None, "fox"), (commits[0], "owl"), (commits[1], "fox")):
        source = {"path": "someone/pairs"} | ({"revision": revision} if revision else {})
        plan = anchorvec.plan(recipe({"data.train": [source], "stage_two": None}), step=False)
        assert all(word in "".join(pair.query_read) for pair in plan.pairs)
    source = {"path": "builtin:debug", "revision": "main"}
    with pytest.raises(anchorvec.AnchorvecError, match="builtin:debug has no revisions"):
        anchorvec.plan(recipe({"data.train": [source]}), step=False)


@pytest.mark.wires("model.revision")
def test_a_revision_of_a_base_is_read(hub, tmp_path):
    """That of its name, else the newest one."""
    commits = []
    for seed in (0, 1):
        folder = tmp_path / f"decoder{seed}"
        make_model(seed=seed).float().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        commits.append(hub.add("models/someone/decoder", {f.name: f.read_bytes() for f in folder.iterdir()}))
    for revision, seed in ((None, 1), (commits[0], 0), (commits[1], 1)):
        values = {"model.base": "someone/decoder", "model.max_tokens": 64, "model.revision": revision}
        base = build_base(recipe(values), tmp_path / f"base-{revision}")
        expected = make_model(seed=seed).float().get_input_embeddings().weight
        assert torch.equal(load_file(base / "model.safetensors")["model.embed_tokens.weight"], expected)


@pytest.mark.wires("at", "every", "keep_best", of=["evaluation"])
def test_models_on_the_way_are_scored_and_the_best_is_kept_as_the_recipe_says(tmp_path, monkeypatch):
    """After the steps of Stage II that are named, and every so many of either; exported is the last, or the best."""
    pytest.importorskip("mteb")
    beir = tmp_path / "beir"
    (beir / "qrels").mkdir(parents=True)
    write_rows(beir / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": f"text {i}"} for i in range(5)])
    write_rows(beir / "queries.jsonl", [{"_id": "q", "text": "text 1"}])
    (beir / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td1\t1\n")
    scores = iter([0.1, 0.2, 0.3, 9.0, 0.5, 0.1])
    monkeypatch.setattr("anchorvec.pipeline.score_on_the_way", lambda *_: {"beir": next(scores)})
    short = {f"{stage}.{key}": 5 if key == "steps" else 4 for stage in STAGES for key in ("steps", "pairs_per_step")}
    values = {**short, "data.train": sources(tmp_path / "data"), "evaluation.data": [str(beir)]}
    asked = {"evaluation.at": [3, 1], "evaluation.every": 2, "evaluation.keep_best": True}
    result = anchorvec.train(recipe({**values, **asked, "output": str(tmp_path / "best")}))
    places = [(point["stage"], point["step"]) for point in result.curve]
    assert places == [*((STAGES[0], step) for step in (2, 4, 5)), *((STAGES[1], step) for step in (1, 2, 3, 4, 5))]
    assert Path(result.export.stage).name == "stage_two_step_2"
    for own, found in (({"evaluation.at": [0]}, [0, 5]), ({}, [])):
        result = anchorvec.train(recipe({**values, **own, "output": str(tmp_path / f"run{len(own)}")}))
        assert [point["step"] for point in result.curve] == found
        assert Path(result.export.stage).name == "stage_two"
