"""The keys that decide how a stage is computed, what it starts from, and where its results go."""

import json
import math
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

import anchorvec
from anchorvec.evaluation import bm25_scores
from anchorvec.model import packing
from anchorvec.training.budget import Budget, Measured
from support import decoder_calls, make_model, make_tokenizer, recipe, train, write_rows
from wiring import HARD, PLAIN, TEXTS, WORDS, sources

STAGES = ["stage_one", "stage_two"]

SHORT = {
    f"{stage}.{key}": value
    for stage in STAGES
    for key, value in [("steps", 2), ("warmup_steps", 0), ("pairs_per_step", 4), ("micro_batch_tokens", None)]
}
"""Two steps of either stage."""


@pytest.fixture
def data(tmp_path):
    """The value of `data.train`."""
    return {"data.train": sources(tmp_path / "data")}


@pytest.mark.wires("model.precision")
def test_bf16_is_the_arithmetic_and_not_the_weights(tmp_path, data, texts_run, words_run):
    """Linear layers give bf16 where that is asked for, fp32 else; what is trained and saved is fp32 either way."""
    values = {
        **data,
        **SHORT,
        "model.precision": "bf16",
        "stage_two.lora": {"r": 2},
        "stage_two.bag_of_words_weight": 0.5,
    }
    run = train(tmp_path / "run", values)
    for stage in STAGES:
        assert run.stages[stage].linear_dtypes == {torch.bfloat16}
        assert {weight.dtype for weight in run.stages[stage].start.values()} == {torch.float32}
        [file] = (run.folder / stage).glob("*.safetensors")
        assert {weight.dtype for weight in load_file(file).values()} == {torch.float32}
        for full in (texts_run.run, words_run.run):
            assert full.stages[stage].linear_dtypes == {torch.float32}
            assert full.record["precision"] == "fp32"
    assert run.record["precision"] == "bf16"
    assert anchorvec.plan(recipe({**values, "stage_two": None})).precision == "bf16"


@pytest.mark.wires("model.attention")
def test_the_attention_of_the_recipe_reads_both_stages(tmp_path, data, texts_run, words_run):
    """`auto` packs the texts on any device for fp32 on a CPU; `eager` gives attention weights; `sdpa` neither."""
    short = train(tmp_path / "run", {**data, **SHORT, "model.attention": "sdpa"})
    for run, packed, eager in [(texts_run.run, True, False), (words_run.run, False, True), (short, False, False)]:
        for stage in STAGES:
            assert run.stages[stage].attention_weights == eager
            assert run.record["engine"][stage]["packed"] == packed
            steps = [step.texts for step in run.stages[stage].steps]
            read = sum(len(ids) for step in steps for key in step if "target" not in key for ids in step[key])
            computed = sum(call.tokens for call in run.stages[stage].forwards if not call.again)
            if stage == "stage_two":  # of Stage I it is also what is written and exchanged
                assert (computed == read) == packed


@pytest.mark.wires("gradient_checkpointing", of=STAGES)
def test_checkpointing_computes_activations_again_where_it_is_asked_for(texts_run, words_run):
    """Once more for each pass that is trained; not in the other stage."""
    one, two = (texts_run.run.stages[stage].forwards for stage in STAGES)
    cached = sum(not call.again for call in two)
    assert sum(call.again for call in two) == cached  # by cached gradients alone, which encode every text twice
    assert sum(call.again for call in one) > 0
    one, two = (words_run.run.stages[stage].forwards for stage in STAGES)
    assert not any(call.again for call in one)
    assert sum(call.again for call in two) == sum(not call.again for call in two)  # nothing is cached
    for run, on in [(texts_run.run, "stage_one"), (words_run.run, "stage_two")]:
        engines = run.record["engine"]
        assert {stage: engines[stage]["gradient_checkpointing"] for stage in STAGES} == {s: s == on for s in STAGES}


@pytest.mark.wires("micro_batch_tokens", of=STAGES)
def test_no_more_tokens_are_held_at_a_time_than_asked_for(texts_run, words_run):
    """In all passes over a micro-batch of Stage I, or in an encoding of Stage II; without a limit a step is whole."""
    run = texts_run.run
    again = [call.tokens for call in run.stages["stage_one"].forwards if call.again]
    held = [read + written for read, written in zip(again[::2], again[1::2], strict=True)]
    assert 150 < max(held) <= TEXTS["stage_one.micro_batch_tokens"]
    assert 100 < max(call.tokens for call in run.stages["stage_two"].forwards) <= TEXTS["stage_two.micro_batch_tokens"]
    for stage in STAGES:
        engine = run.record["engine"][stage]
        assert engine["micro_batch_tokens"] == TEXTS[f"{stage}.micro_batch_tokens"]
        assert engine["cached_gradients"] == (stage == "stage_two")
        engine = words_run.run.record["engine"][stage]
        assert engine["micro_batch_tokens"] > 1_000
        assert not engine["cached_gradients"]
    # Padded columns of different numbers of texts go through the decoder one by one.
    assert max(call.texts for call in words_run.run.stages["stage_two"].forwards) == WORDS["stage_two.pairs_per_step"]


@pytest.mark.wires("stage_two.lora.dropout")
@pytest.mark.parametrize("dropout", [0.25, 0.75])
def test_what_adapters_read_is_dropped(tmp_path, data, dropout):
    """So large a share of it; the rest is scaled up. Without dropout nothing is."""
    values = {**data, **SHORT, "stage_one": None, "stage_two.lora": {"dropout": dropout}}
    run = train(tmp_path / "run", {key: value for key, value in values.items() if not key.startswith("stage_one.")})
    seen = run.stages["stage_two"].adapter_inputs
    came, given = (torch.cat([part.flatten() for part in parts]) for parts in zip(*seen, strict=True))
    assert float((given == 0).double().mean()) == pytest.approx(dropout, abs=0.02)
    torch.testing.assert_close(given[given != 0], came[given != 0] / (1 - dropout))


def test_no_dropout_is_none(words_run):
    """With 0 the adapters read all."""
    assert words_run.run.stages["stage_two"].adapter_inputs == []


# What a run starts from


@pytest.mark.wires("model.base", "model.revision")
@pytest.mark.parametrize(("revision", "seed"), [(None, 0), ("other", 1)])
def test_a_revision_of_a_hub_id_is_the_base(tmp_path, data, monkeypatch, revision, seed):
    """The hub's default branch where none is named; here from its cache, without network."""
    repository = tmp_path / "hub" / "models--someone--decoder"
    (repository / "refs").mkdir(parents=True)
    for name, commit, drawn in [("main", "a" * 40, 0), ("other", "b" * 40, 1)]:
        (repository / "refs" / name).write_text(commit)
        make_model(seed=drawn).float().save_pretrained(repository / "snapshots" / commit)
        make_tokenizer().save_pretrained(repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    values = {**data, **SHORT, "model.base": "someone/decoder", "model.revision": revision, "stage_two": None}
    run = train(tmp_path / "run", {key: value for key, value in values.items() if not key.startswith("stage_two.")})
    expected = make_model(seed=seed).float().state_dict()
    saved = load_file(run.folder / "base" / "model.safetensors")
    assert len(saved) > 10
    assert all(torch.equal(weight, expected[name]) for name, weight in saved.items())
    assert torch.equal(run.stages["stage_one"].start["model.model.norm.weight"], expected["model.norm.weight"])


@pytest.mark.wires("stage_one", "stage_two")
@pytest.mark.parametrize("off", STAGES)
def test_a_stage_that_is_null_is_left_out(tmp_path, data, off):
    """The other one starts from the base, and is what is exported."""
    on = STAGES[off == "stage_one"]
    values = {**data, **{key: value for key, value in SHORT.items() if key.startswith(on)}, off: None}
    run = train(tmp_path / "run", {**values, "stage_two.lora": None} if on == "stage_two" else values)
    assert list(run.stages) == list(run.record["engine"]) == [on]
    assert not (run.folder / off).exists()
    base = load_file(run.folder / "base" / "model.safetensors")["model.norm.weight"]
    assert any(
        torch.equal(weight, base) for name, weight in run.stages[on].start.items() if name.endswith("l.norm.weight")
    )
    trained, exported = (load_file(run.folder / name / "model.safetensors") for name in (on, "model"))
    assert all(torch.equal(weight, exported[name]) for name, weight in trained.items())


# Where its results go, and how it is scored


@pytest.mark.wires("output")
def test_everything_is_written_into_output(tmp_path, data, monkeypatch):
    """A relative path counts from the current folder."""
    monkeypatch.chdir(tmp_path)
    run = train(Path("a/run"), {**data, **SHORT})
    assert {path.name for path in tmp_path.iterdir()} == {"a", "data"}
    written = {path.name for path in (tmp_path / "a" / "run").iterdir()}
    assert written == {"base", "stage_one", "stage_two", "model", "log.jsonl", "rows.json", "run.json", "recipe.yaml"}
    asked = {"output": "a/run", "model.precision": "fp32", **data, **SHORT}
    assert anchorvec.load_recipe(run.folder / "recipe.yaml") == recipe(asked)


CORPUS = {
    f"d{i}": f"{animal} and {metal['query']}" for i, (animal, metal) in enumerate(zip(range(8), HARD, strict=True))
}
QUERIES = {f"q{i}": row["query"] for i, row in enumerate(PLAIN[:5])}


@pytest.fixture
def test_collection(tmp_path):
    """A folder in BEIR layout."""
    beir = tmp_path / "animals"
    (beir / "qrels").mkdir(parents=True)
    write_rows(beir / "corpus.jsonl", [{"_id": key, "title": "", "text": text} for key, text in CORPUS.items()])
    write_rows(beir / "queries.jsonl", [{"_id": key, "text": text} for key, text in QUERIES.items()])
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(len(QUERIES)))
    (beir / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{judged}")
    return beir


@pytest.mark.wires("data", "tasks", "batch_size", of=["evaluation"])
def test_each_model_of_a_run_is_scored_on_what_the_recipe_names(tmp_path, data, monkeypatch, test_collection):
    """A folder and a task of MTEB, so many texts at a time; the scores are those of plain calls of each model."""
    mteb = pytest.importorskip("mteb")
    from datasets import Dataset

    pairs = {
        "sentence1": [*CORPUS.values()],
        "sentence2": [*CORPUS.values()][::-1],
        "score": [3.0, 1, 4, 1.5, 9, 2, 6, 5],
    }
    kind = type(mteb.get_task("BIOSSES"))  # in place of a download
    monkeypatch.setattr(kind, "data_loaded", True)
    monkeypatch.setattr(kind, "dataset", {"test": Dataset.from_dict(pairs)})
    values = {**data, **{key: value for key, value in SHORT.items() if key.startswith("stage_one")}, "stage_two": None}
    values |= {"evaluation.data": [str(test_collection)], "evaluation.tasks": ["BIOSSES"], "evaluation.batch_size": 3}
    with decoder_calls() as calls:
        run = train(tmp_path / "run", values)
    scores = json.loads((run.folder / "scores.json").read_text())
    assert list(scores) == ["untrained", "stage_one"]
    for name, folder in [("untrained", "base"), ("stage_one", "stage_one")]:
        model = SentenceTransformer(str(run.folder / folder), device="cpu")
        similarity = model.similarity(*(model.encode(list(texts.values())) for texts in (QUERIES, CORPUS)))
        ranks = (similarity > similarity.diagonal()[:, None]).sum(dim=1).tolist()
        assert scores[name]["animals"]["per_item"]["ndcg_at_10"] == pytest.approx(
            {f"q{i}": 1 / math.log2(rank + 2) for i, rank in enumerate(ranks)}, abs=1e-4
        )
        left, right = (model.encode(pairs[side]) for side in ("sentence1", "sentence2"))
        own = [float(model.similarity(a, b)) for a, b in zip(left, right, strict=True)]
        assert scores[name]["BIOSSES"]["main_score"] == pytest.approx(spearmanr(own, pairs["score"])[0], abs=1e-4)
    # 5 queries, 8 documents, twice 8 sentences, for two models; no step of training has 3 texts
    checks = sum(packing._CHECKED_LENGTHS[:3])  # tokens of the three texts with which packing is checked
    assert sum(call.texts == 3 and call.tokens != checks for call in calls) == 2 * (1 + 2 + 2 + 2)


@pytest.mark.wires("precision", "bm25", of=["evaluation"])
def test_scores_are_taken_in_the_precision_that_is_asked_for_and_bm25s_beside(tmp_path, data, test_collection):
    """fp32 without a word; BM25 where it is asked for, with the scores of a plain call."""
    pytest.importorskip("mteb")
    values = {**data, **{key: value for key, value in SHORT.items() if key.startswith("stage_one")}, "stage_two": None}
    values["evaluation.data"] = [str(test_collection)]
    found = []
    for own in ({}, {"evaluation.precision": "bf16", "evaluation.bm25": True}):
        run = train(tmp_path / f"run{len(own)}", {**values, **own})
        found.append(json.loads((run.folder / "scores.json").read_text()))
    assert [list(scores) for scores in found] == [["untrained", "stage_one"], ["bm25", "untrained", "stage_one"]]
    assert [scores["stage_one"]["animals"]["dtype"] for scores in found] == ["float32", "bfloat16"]
    assert found[1]["bm25"]["animals"]["per_item"] == bm25_scores(test_collection).per_item


# What a plan says of all this


@pytest.mark.wires("steps", "pairs_per_step", "micro_batch_tokens", "gradient_checkpointing", of=STAGES)
@pytest.mark.wires("stage_one.alpha", "stage_one.target", "stage_one.max_target_tokens", "stage_one.end_token_target")
@pytest.mark.wires("stage_two.negatives", "stage_two.bag_of_words_weight", "stage_two.in_batch_negatives")
@pytest.mark.wires("stage_two.lora", "stage_two.lora.r", "data.max_tokens", "seed")
@pytest.mark.parametrize("name", ["texts_run", "words_run"])
def test_a_plan_counts_what_the_run_did(name, request):
    """Rows, trained parameters, and tokens: of an epoch's mean pair, for all pairs of all steps."""
    asked = request.getfixturevalue(name)
    run, values = asked.run, asked.values
    plan = anchorvec.plan(recipe({"stage_two.in_batch_negatives": "similar", **values}))
    assert plan.rows == {"plain": 8, "hard": 8}
    assert plan.rows_with_negatives == {"plain": 0, "hard": 4}
    assert (plan.target, plan.bag_of_words_weight) == (
        values["stage_one.target"],
        values["stage_two.bag_of_words_weight"],
    )
    assert plan.in_batch_negatives == "similar"
    for stage in STAGES:
        assert plan.trained_parameters[stage] == sum(w.numel() for w in run.stages[stage].start.values())
        engine, done = plan.engine[stage], run.record["engine"][stage]
        for key in ("packed", "gradient_checkpointing", "micro_batch_tokens", "cached_gradients"):
            assert getattr(engine, key) == done[key]
    steps = [step.texts for step in run.stages["stage_one"].steps]
    lengths = {key: [len(ids) for step in steps for ids in step[key]] for key in steps[0]}
    mean = {key: sum(found) / len(found) for key, found in lengths.items()}
    written = mean["query_target"] + mean["positive_target"] if values["stage_one.target"] == "text" else 0
    read = mean["query"] + mean["positive"]
    assert plan.tokens_per_pair == pytest.approx(read + written)
    read += values["stage_two.negatives"] * mean["positive"] * 4 / 16
    for stage, tokens in [("stage_one", mean["query"] + mean["positive"] + written), ("stage_two", read)]:
        total = tokens * values[f"{stage}.pairs_per_step"] * values[f"{stage}.steps"]
        assert plan.tokens[stage] == pytest.approx(total, abs=1)


@pytest.mark.wires("stage_one", "stage_two")
def test_a_stage_that_is_alone_has_all_the_time():
    """Of two Stage I has its share, and the last one what is left."""
    budget = Budget(minutes=10, stage_one_share=0.25)
    nothing = Measured(0.0, 1.0)
    both, one = (budget.deadline(stages, nothing)() - time.monotonic() for stages in (2, 1))
    assert both / one == pytest.approx(0.25, abs=0.01)
