"""Both stages through the trainers, on the tiny model and the toy corpus."""

import copy
import json
import shutil

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import TrainingArguments

from anchorvec.commands.decode import decode
from anchorvec.commands.plan import plan
from anchorvec.errors import AnchorvecError
from anchorvec.objectives.contrastive import contrastive_loss
from anchorvec.objectives.reconstruction import TextReconstruction
from anchorvec.pipeline import train
from anchorvec.recipe import load_recipe
from anchorvec.training.trainers import ReconstructionTrainer
from support import QUICK, make_model, make_pairs, write_rows


def test_a_run_leaves_every_stage_and_can_be_rerun(run, tmp_path):
    """A run folder holds recipe, versions, log, each stage and the export; its recipe gives the same weights again."""
    for name in ["recipe.yaml", "run.json", "log.jsonl", "base", "stage_one", "stage_two", "model"]:
        assert (run / name).exists(), name
    again = tmp_path / "again"
    train(load_recipe(run / "recipe.yaml", [f"output={again}"]))
    for weights in [
        "stage_one/model.safetensors",
        "stage_two/adapter_model.safetensors",
        "model/model.safetensors",
    ]:
        first, second = load_file(run / weights), load_file(again / weights)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), weights


def test_the_log_has_both_directions_and_the_exchange_gap(run):
    """From the first step of Stage I each record shows both losses and how much they need the embedding."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    first = records[0]
    assert first["stage"] == "stage_one"
    assert first["step"] == 1
    for key in [
        "query_to_document",
        "document_to_query",
        "exchange_query_to_document",
        "exchange_document_to_query",
    ]:
        assert isinstance(first[key], float)
    assert first["loss"] == pytest.approx(0.2 * first["query_to_document"] + 0.8 * first["document_to_query"], rel=1e-4)
    assert records[-1]["stage"] == "stage_two"


def test_a_used_output_folder_is_refused(run):
    """A second run into the same folder fails and changes nothing."""
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(AnchorvecError, match="is in use; name a new folder"):
        train(load_recipe("debug", [f"output={run}"]))
    assert sorted(path.name for path in run.iterdir()) == before


def test_an_unfinished_run_says_how_to_go_on(run, tmp_path):
    """It goes on with --resume; a new run on its Stage I ends in the weights of an uninterrupted one, too."""
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("model", "stage_two"))
    recipe = run / "recipe.yaml"
    go_on = [f"model.base={unfinished / 'stage_one'}", "stage_one=null"]
    with pytest.raises(AnchorvecError, match=r"it holds a run that did not finish: go on with --resume"):
        train(load_recipe(recipe, [f"output={unfinished}"]))
    train(load_recipe(recipe, [f"output={tmp_path / 'rest'}", *go_on]))
    expected = load_file(run / "stage_two" / "adapter_model.safetensors")
    found = load_file(tmp_path / "rest" / "stage_two" / "adapter_model.safetensors")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_several_devices_are_refused_before_any_work(tmp_path, monkeypatch):
    """Neither a plan nor a run begins on them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for refused in (plan, train):
        with pytest.raises(AnchorvecError, match=r"2 devices, .* start with torchrun --nproc-per-node 2"):
            refused(load_recipe("debug", [f"output={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["stage_one", "stage_two"])
def test_a_loss_that_is_no_number_ends_the_run(tmp_path, stage):
    """A diverged stage is an error that names its key, at the next record of the log."""
    options = [f"{stage}.learning_rate=1e30", f"{stage}.log_every=1", f"{stage}.warmup_steps=0"]
    with pytest.raises(AnchorvecError, match=rf"{stage}: the loss .* lower {stage}.learning_rate"):
        train(load_recipe("debug", [f"output={tmp_path / 'run'}", *QUICK, *options]))
    assert not (tmp_path / "run" / stage).exists()


def test_the_last_step_is_logged(tmp_path):
    """The log ends with the last step, however seldom it is written."""
    train(load_recipe("debug", [f"output={tmp_path / 'run'}", *QUICK, "stage_one.log_every=2", "stage_two=null"]))
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3]


@pytest.mark.parametrize("off", ["stage_one", "stage_two"])
def test_either_stage_can_be_switched_off(off, tmp_path):
    """With one stage null the other runs alone, and its model is exported."""
    steps = [part for part in QUICK if not part.startswith(off)]
    train(load_recipe("debug", [f"output={tmp_path / 'run'}", f"{off}=null", *steps]))
    assert not (tmp_path / "run" / off).exists()
    SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu").encode(["text"])


def test_the_micro_batch_budget_does_not_change_training(tmp_path):
    """Five steps of fp32 SGD end in the same weights to 1e-5, whatever the token budget."""
    start = make_model().float()
    ends = []
    for budget in (30, 100, 100_000):
        model = copy.deepcopy(start)
        trainer = ReconstructionTrainer(
            model=TextReconstruction(model),
            args=TrainingArguments(
                output_dir=str(tmp_path),
                max_steps=5,
                per_device_train_batch_size=4,
                learning_rate=0.1,
                optim="sgd",
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
                use_cpu=True,
            ),
            train_dataset=Dataset.from_dict({"index": list(range(20))}),
            data_collator=lambda rows: {"pairs": [make_pairs(20)[row["index"]] for row in rows]},
            micro_batch_tokens=budget,
        )
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert (ends[0] - torch.cat([p.detach().flatten() for p in start.parameters()])).abs().max() > 1e-3
    torch.testing.assert_close(ends[1], ends[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(ends[2], ends[0], atol=1e-5, rtol=0)


def test_training_on_packed_and_on_padded_texts_is_the_same(tmp_path):
    """`attention: auto` packs texts on a CPU and `sdpa` pads them; both stages log the same losses."""
    losses = {}
    for attention in ("auto", "sdpa"):
        output = tmp_path / attention
        options = [f"model.attention={attention}", "stage_one.log_every=1", "stage_two.log_every=1"]
        options += ["stage_two.bag_of_words_weight=0.5", "model.precision=fp32"]  # bf16 would round 1e-3 off
        train(load_recipe("debug", [f"output={output}", *QUICK, *options]))
        records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        losses[attention] = [record["loss"] for record in records]
    assert len(losses["auto"]) == 6
    assert losses["auto"] == pytest.approx(losses["sdpa"], rel=1e-4)


@pytest.mark.parametrize(("attention", "tokens", "cached"), [("auto", 256, 256), ("auto", 9999, None), ("sdpa", 9, 9)])
def test_a_step_that_fits_goes_without_cached_gradients(tmp_path, monkeypatch, attention, tokens, cached):
    """Only a step of Stage II with more tokens than a micro-batch encodes its texts twice."""
    asked = []

    def recorded(model, **options):
        asked.append(options["micro_batch_tokens"])
        return contrastive_loss(model, **options)

    monkeypatch.setattr("anchorvec.training.stage_two.contrastive_loss", recorded)
    options = ["stage_one=null", f"model.attention={attention}", f"stage_two.micro_batch_tokens={tokens}"]
    train(load_recipe("debug", [f"output={tmp_path / 'run'}", *QUICK[1::2], *options]))
    assert asked == [cached]


def test_the_seed_decides_new_lora_weights(tmp_path):
    """Stage II alone: the same seed gives the same adapter, another seed another one."""
    found = {}
    for name, seed in [("a", 0), ("b", 0), ("c", 1)]:
        few = ["stage_one=null", "stage_two.steps=2", "stage_two.warmup_steps=0", "stage_two.lora.r=4"]
        train(load_recipe("debug", [f"output={tmp_path / name}", f"seed={seed}", *few]))
        found[name] = load_file(tmp_path / name / "stage_two" / "adapter_model.safetensors")
    key = next(key for key in found["a"] if "lora_A" in key)
    assert torch.equal(found["a"][key], found["b"][key])
    assert not torch.equal(found["a"][key], found["c"][key])


def test_scores_are_taken_when_the_recipe_asks(tmp_path):
    """`evaluation.data` scores every stage; a missing folder fails before anything is trained."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write_rows(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": f"text {i}"} for i in range(5)])
    write_rows(folder / "queries.jsonl", [{"_id": "q", "text": "text 1"}])
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td1\t1\n")
    result = train(load_recipe("debug", [f"output={tmp_path / 'run'}", f"evaluation.data=[{folder}]", *QUICK]))
    assert list(result.scores) == ["untrained", "stage_one", "stage_two"]
    assert "| stage_two | beir |" in (tmp_path / "run" / "model" / "README.md").read_text()
    with pytest.raises(AnchorvecError, match="nowhere"):
        train(load_recipe("debug", [f"output={tmp_path / 'other'}", "evaluation.data=[/nowhere]", *QUICK]))
    assert not list((tmp_path / "other").iterdir())


def test_scores_that_cannot_be_taken_end_a_run_before_training(tmp_path, monkeypatch):
    """The untrained model is scored first, so that a task that cannot be fetched costs no training."""
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    write_rows(folder / "corpus.jsonl", [{"_id": "d", "text": "text"}])
    write_rows(folder / "queries.jsonl", [{"_id": "q", "text": "text"}])
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")

    def no_network(*_, **__):
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr("anchorvec.evaluation._mteb.run", no_network)
    with pytest.raises(AnchorvecError, match=r"beir cannot be fetched or scored: no network$"):
        train(load_recipe("debug", [f"output={tmp_path / 'run'}", f"evaluation.data=[{folder}]", *QUICK]))
    assert not (tmp_path / "run" / "stage_one").exists()


@pytest.mark.slow
def test_stage_one_learns_to_write_documents_back(tmp_path):
    """After some hundred steps on the toy corpus, the model writes the document from the query's embedding alone."""
    train(
        load_recipe(
            "debug",
            [f"output={tmp_path / 'run'}", "stage_two=null", "stage_one.steps=600", "stage_one.alpha=0.5"],
        )
    )
    written = decode(tmp_path / "run" / "stage_one", "mice for the lynx of the canyon")
    assert written.text == "By the canyon lives the lynx. It eats mice."


def test_one_batch_overfits():
    """Adam on a single batch drives the loss towards zero: the embeddings carry whole texts."""
    model, pairs = make_model().float().train(), make_pairs(4)
    objective = TextReconstruction(model, alpha=0.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss = objective(pairs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
