"""Several processes are one: same rows, same losses, same weights, on the CPU, with the processes' own exchange."""

import json
from pathlib import Path

import pytest
import torch

import wiring
from anchorvec.evaluation import BeirData, evaluate, write_beir
from interrupting import log, weights
from several import in_processes, launched, train_all
from support import make_model, make_tokenizer

COMMON = {
    "model.max_tokens": 64,
    "model.precision": "fp32",
    **{
        f"{stage}.{key}": value
        for stage in ("stage_one", "stage_two")
        for key, value in {
            "steps": 5, "learning_rate": 0.05, "warmup_steps": 1, "max_grad_norm": 1.0, "log_every": 1
        }.items()
    },
}  # fmt: skip

LORA = {"r": 4, "alpha": 8, "dropout": 0.0}

KINDS = {
    "texts, uneven shares": {
        "stage_one.target": "text",
        "stage_one.pairs_per_step": 5,
        "stage_one.micro_batch_tokens": 150,
        "stage_two.pairs_per_step": 6,
        "stage_two.lora": None,
        "stage_two.negatives": 2,
    },
    "words, a process without a pair": {
        "stage_one.target": "bag_of_words",
        "stage_one.pairs_per_step": 2,
        "stage_two.pairs_per_step": 6,
        "stage_two.bag_of_words_weight": 0.3,
        "stage_two.in_batch_negatives": "similar",
        "stage_two.lora": LORA,
        "stage_two.negatives": 3,
    },
    "sharded": {
        "stage_one.target": "text",
        "stage_one.sharded": True,
        "stage_one.pairs_per_step": 5,
        "stage_one.micro_batch_tokens": 150,
        "stage_two": None,
    },
    "masked, cached gradients": {
        "model.attention_direction": "bidirectional",
        "stage_one.target": "masked",
        "stage_one.pairs_per_step": 4,
        "stage_one.micro_batch_tokens": 100,
        "stage_one.lora": LORA,
        "stage_two.pairs_per_step": 6,
        "stage_two.micro_batch_tokens": 150,
        "stage_two.bag_of_words_weight": 0.3,
        "stage_two.negatives": 3,
        "stage_two.lora": None,
    },
    "untied, padded, cached gradients": {
        "model.attention": "eager",
        "stage_one.target": "text",
        "stage_one.pairs_per_step": 7,
        "stage_one.micro_batch_tokens": 200,
        "stage_two.pairs_per_step": 6,
        "stage_two.micro_batch_tokens": 150,
        "stage_two.negatives": 1,
        "stage_two.lora": LORA,
    },
}


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """A function that gives the values of a run of one of `KINDS` whose folder is `output`."""
    folder = tmp_path_factory.mktemp("given")
    data = [{**source, "weight": 2} for source in wiring.sources(folder / "data")]
    for tied in (True, False):
        base = folder / f"tied-{tied}"
        make_model(tied=tied).float().save_pretrained(base)
        make_tokenizer().save_pretrained(base)

    def of(kind: str, output: Path):
        base = str(folder / f"tied-{'untied' not in kind}")
        found = {"model.base": base, "data.train": data, "output": str(output), **COMMON, **KINDS[kind]}
        off = "stage_two" in found
        return {key: value for key, value in found.items() if not (off and key.startswith("stage_two."))}

    return of


def assert_same(found: Path, expected: Path) -> None:
    """The same rows in each step, the same losses, and the same weights but for rounding."""
    records = log(found), log(expected)
    assert len(records[0]) == len(records[1]) > 0
    for record, other in zip(*records, strict=True):
        assert [record[key] for key in ("stage", "step", "rows")] == [other[key] for key in ("stage", "step", "rows")]
        numbers = other.keys() - {"stage", "rows", "exchange_query_to_document", "exchange_document_to_query"}
        for key in numbers:
            assert record[key] == pytest.approx(other[key], rel=1e-5), (key, other["stage"], other["step"])
    weights_found, weights_expected = weights(found), weights(expected)
    assert weights_found.keys() == weights_expected.keys()
    for name, tensor in weights_expected.items():
        torch.testing.assert_close(weights_found[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def check(kinds, counts, values, folder) -> None:
    """Runs of `kinds` in each of `counts` processes are those of one."""
    outputs = {(kind, n): folder / f"{i}-{n}" for i, kind in enumerate(kinds) for n in (1, *counts)}
    train_all([{"values": values(kind, outputs[kind, 1])} for kind in kinds])
    for n in counts:
        in_processes(n, [{"values": values(kind, outputs[kind, n])} for kind in kinds], folder)
        for kind in kinds:
            assert_same(outputs[kind, n], outputs[kind, 1])


def test_two_processes_are_one(values, tmp_path):
    """Both stages, with shares and micro-batches that differ, and rows that lack negatives."""
    check(["texts, uneven shares"], [2], values, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["texts, uneven shares", "sharded"])
def test_a_run_goes_on_with_another_number_of_processes(kind, values, tmp_path):
    """From its checkpoint, with the same rows in each step, and the losses of one that nothing interrupted."""
    train_all([{"values": values(kind, tmp_path / "whole")}])
    for i, (before, after) in enumerate([(2, 2), (2, 1), (1, 3)]):
        asked = values(kind, tmp_path / f"{i}") | {"stage_one.save_steps": 2}
        first, then = {"values": asked, "killed_after": 3}, {"values": asked, "resume": True}
        for processes, job in ((before, first), (after, then)):
            if processes == 1:
                train_all([job])
            else:
                in_processes(processes, [job], tmp_path)
        assert_same(tmp_path / f"{i}", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_launchers_start_a_run_of_which_one_process_tells(launcher, tmp_path):
    """One line of each kind, one result, and the exit code of the run."""
    command = ["-m", "anchorvec", "train", "debug", "stage_one.steps=2", "stage_two.steps=2"]
    done = launched(launcher, 2, *command, f"output={tmp_path / 'run'}", f"--json={tmp_path / 'result.json'}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("exporting, and comparing the export with the run") == 1
    assert json.loads((tmp_path / "result.json").read_text())["steps"] == {"stage_one": 2, "stage_two": 2}
    refused = launched(launcher, 2, *command, "stage_two.pairs_per_step=7", f"output={tmp_path / 'other'}")
    assert refused.returncode != 0
    expected = "stage_two.pairs_per_step: 7 pairs are not so many for each of 2 devices; set it to 6 or 8"
    assert refused.stderr.count(expected) == 1


@pytest.mark.slow
def test_texts_to_score_are_shared_out_among_the_devices_of_a_run(tmp_path):
    """By two processes of their own; the scores are those that the model has in one."""
    names = ["otter", "heron", "badger", "lynx", "raven", "trout"]
    corpus = {f"d{i}": {"title": "", "text": f"The {name} is an animal."} for i, name in enumerate(names)}
    queries = {f"q{i}": f"what is the {name}" for i, name in enumerate(names)}
    write_beir(BeirData(corpus, queries, {f"q{i}": {f"d{i}": 1} for i in range(6)}), tmp_path / "animals")
    command = ["-m", "anchorvec", "train", "debug", "stage_one=null", "stage_two.steps=2", "stage_two.warmup_steps=0"]
    command += [f"evaluation.data=[{tmp_path / 'animals'}]", f"output={tmp_path / 'run'}"]
    done = launched("torchrun", 2, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["stage_two"]["animals"]["device"] == "cpu"
    alone = evaluate(tmp_path / "run" / "model", data=[tmp_path / "animals"])["animals"]
    assert scores["stage_two"]["animals"]["ndcg_at_10"] == pytest.approx(alone.main_score, abs=1e-5)  # of five digits


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_are_one(kind, values, tmp_path):
    """Every objective, tied and untied heads, full training and LoRA, with two and with three processes."""
    check([kind], [2, 3], values, tmp_path)
