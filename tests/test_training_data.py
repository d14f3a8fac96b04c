"""What training reads of its data, and which data it refuses before any work."""

import io
import json

import datasets
import pyarrow
import pytest
from rich.console import Console
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from anchorvec.commands.plan import plan
from anchorvec.data.negatives import text_hashes
from anchorvec.data.reading import without_prompt_and_end
from anchorvec.data.stage_inputs import sample_rows
from anchorvec.errors import AnchorvecError
from anchorvec.model.embedder import build_embedder
from anchorvec.model.packing import token_ids
from anchorvec.objectives.reconstruction import TextReconstruction
from anchorvec.pipeline import load_training_data, train
from anchorvec.recipe import load_recipe
from anchorvec.run import Run
from anchorvec.start import build_base
from anchorvec.training.stage import Stage
from anchorvec.training.stage_one import train_stage_one
from anchorvec.training.stage_two import train_stage_two
from anchorvec.training.trainers import ContrastiveTrainer, ReconstructionTrainer
from support import QUICK, make_model, make_tokenizer, write_rows


def test_several_datasets_with_weights_instructions_and_negatives(tmp_path):
    """Both stages train on a mix; every instruction is stored under the name of its data set."""
    one = write_rows(tmp_path / "one.jsonl", [{"query": f"q{i}", "positive": f"p{i}"} for i in range(40)])
    rows = [{"query": f"a{i}", "positive": f"b{i}", **({"negative": f"c{i}"} if i % 2 else {})} for i in range(40)]
    two = write_rows(tmp_path / "two.jsonl", rows)
    mixed = (
        f"data.train=[{{path: {one}, instruction: 'one ', weight: 0.5}}, "
        f"{{path: {two}, instruction: 'two ', document_instruction: 'doc '}}]"
    )
    sizes = ["stage_one.pairs_per_step=4", "stage_two.pairs_per_step=4", "stage_one.gradient_checkpointing=true"]
    recipe = load_recipe("debug", [f"output={tmp_path / 'run'}", mixed, *QUICK, *sizes])
    train(recipe)
    prompts = SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu").prompts
    assert prompts == {
        **{"query": "", "one-query": "one ", "two-query": "two "},
        **{"document": "", "one-document": "", "two-document": "doc "},
    }


def test_each_stage_orders_the_pairs_anew(tmp_path, monkeypatch):
    """Stage II does not start with the pairs that Stage I has just seen."""
    steps = {ReconstructionTrainer: [], ContrastiveTrainer: []}  # the queries of each

    def record(trainer, queries):
        original = trainer.training_step

        def training_step(self, model, inputs, *rest):
            steps[trainer].append(sorted(queries(inputs)))
            return original(self, model, inputs, *rest)

        monkeypatch.setattr(trainer, "training_step", training_step)

    record(ReconstructionTrainer, lambda inputs: [pair.query for pair in inputs["pairs"]])
    prefix = "query_"
    record(
        ContrastiveTrainer,
        lambda inputs: token_ids({k.removeprefix(prefix): v for k, v in inputs.items() if k.startswith(prefix)}),
    )
    sizes = ["stage_one.pairs_per_step=4", "stage_two.pairs_per_step=4", "stage_two.negatives=0"]
    train(load_recipe("debug", [f"output={tmp_path / 'run'}", *QUICK, *sizes]))
    one, two = steps.values()
    assert len(one) == len(two) == 3
    assert one[0] != two[0]


def test_a_dataset_smaller_than_a_step_is_refused(tmp_path):
    """Too few rows for one step are an error that names the key, not a run that trains nothing."""
    rows = write_rows(tmp_path / "few.jsonl", [{"query": f"q{i}", "positive": f"p{i}"} for i in range(5)])
    for off, stage in [("stage_two", "stage_one"), ("stage_one", "stage_two")]:
        recipe = load_recipe("debug", [f"output={tmp_path / stage}", f"data.train=[{{path: {rows}}}]", f"{off}=null"])
        with pytest.raises(AnchorvecError, match=rf"{stage}.pairs_per_step: 16 is more than the 5 rows"):
            train(recipe)


def test_rows_with_and_without_negatives_train_together(tmp_path, monkeypatch):
    """A step has pairs with and without hard negatives, from the beginning on, and as many negatives as there are."""
    rows = [{"query": f"q{i}", "positive": f"p{i}", **({"negative": f"n{i}"} if i % 2 else {})} for i in range(40)]
    path = write_rows(tmp_path / "half.jsonl", rows)
    steps = []
    training_step = ContrastiveTrainer.training_step

    def recorded(self, model, inputs, *rest):
        columns, _ = self.collect_features(dict(inputs))
        steps.append([{self.model.tokenizer.decode(ids[:-1]) for ids in token_ids(column)} for column in columns])
        return training_step(self, model, inputs, *rest)

    monkeypatch.setattr(ContrastiveTrainer, "training_step", recorded)
    for name, order in [("one", "random"), ("two", "similar")]:
        options = [f"data.train=[{{path: {path}}}]", f"stage_two.in_batch_negatives={order}", "stage_one=null"]
        recipe = load_recipe("debug", [f"output={tmp_path / name}", *options, *QUICK[1::2]])
        assert plan(recipe).rows_with_negatives == {"half": 20}
        train(recipe)
    assert len(steps) == 6
    for queries, positives, negatives in steps:
        numbers = {text[1:] for text in queries}
        assert len(numbers) == 16
        assert positives == {f"p{i}" for i in numbers}
        assert negatives == {f"n{i}" for i in numbers if int(i) % 2}
        assert 0 < len(negatives) < 16


def test_a_step_may_have_no_negatives_at_all(tmp_path):
    """Where one row of many has a hard negative, most steps have none, with cached gradients too."""
    rows = [{"query": f"q{i}", "positive": f"p{i}", **({"negative": "n"} if i == 0 else {})} for i in range(40)]
    path = write_rows(tmp_path / "one.jsonl", rows)
    for tokens in (128, 9_999):
        options = [f"output={tmp_path / str(tokens)}", f"data.train=[{{path: {path}}}]", "stage_one=null"]
        train(load_recipe("debug", [*options, f"stage_two.micro_batch_tokens={tokens}", *QUICK[1::2]]))
        records = [json.loads(line) for line in (tmp_path / str(tokens) / "log.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records] == [1, 2, 3]


def test_texts_stay_on_disk_and_are_hashed_once(tmp_path, monkeypatch):
    """In memory are eight bytes a text; prompts are in no row; both stages read the same and leave no more files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    hashed = []

    def counted(texts):
        hashed.extend(texts.to_pylist())
        return text_hashes(texts)

    monkeypatch.setattr("anchorvec.data.negatives.text_hashes", counted)
    n = 3_000
    rows = [
        {"query": f"q{i} " * 20, "positive": f"p{i} " * 80, "negatives": [f"n{i} " * 80] * (i % 2)} for i in range(n)
    ]
    path = write_rows(tmp_path / "long.jsonl", rows)
    data = f"data.train=[{{path: {path}, instruction: 'Find: ', weight: 1.5}}]"
    recipe = load_recipe("debug", [f"output={tmp_path / 'run'}", data, *QUICK])
    before = pyarrow.total_allocated_bytes()
    inputs = load_training_data(recipe)
    columns = {"query", "positive", "query_prompt", "document_prompt"}
    assert inputs.reconstruction[n // 2].keys() == columns
    assert inputs.hashes["long"].nbytes == 8 * 3 * 1.5 * n
    assert pyarrow.total_allocated_bytes() - before < 50 * n  # which rows are drawn, for each stage
    assert sorted(hashed) == sorted(text for row in rows for text in (row["query"], row["positive"], *row["negatives"]))
    run = Run(tmp_path / "run")
    one = train_stage_one(Stage("stage_one", recipe, run, build_base(recipe, run.base), inputs))
    train_stage_two(Stage("stage_two", recipe, run, one, inputs))
    assert len(hashed) == 2.5 * n
    assert inputs.contrastive["long"][0].keys() == {"query", "positive", "negative_1"}
    assert [path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [".arrow"]


def test_repeated_texts_do_not_end_a_stage_unnoticed(tmp_path):
    """Where no batch without duplicates can be filled, that is said before anything is trained."""
    rows = [{"query": f"q{i * (i % 2)}", "positive": f"p{i * (1 - i % 2)}"} for i in range(64)]  # q0 or p0 in each
    path = write_rows(tmp_path / "same.jsonl", rows)
    few = ["stage_one=null", "stage_two.pairs_per_step=16", "stage_two.steps=2", "stage_two.warmup_steps=0"]
    for command in (train, plan):
        with pytest.raises(AnchorvecError, match="no 16 rows of same were found in which no text is there twice"):
            command(load_recipe("debug", [f"output={tmp_path / 'run'}", f"data.train=[{{path: {path}}}]", *few]))
    assert not list((tmp_path / "run").iterdir())


def test_a_plan_says_how_many_steps_repeated_texts_fill(tmp_path):
    """Before the same rows come again; the stage makes all of its steps all the same."""
    rows = [{"query": f"q{i}", "positive": f"p{i % 20 if i < 40 else 0}"} for i in range(400)]
    path = write_rows(tmp_path / "skewed.jsonl", rows)
    steps = ["stage_one=null", "stage_two.pairs_per_step=18", "stage_two.steps=6", "stage_two.warmup_steps=0"]
    recipe = load_recipe("debug", [f"output={tmp_path / 'run'}", f"data.train=[{{path: {path}}}]", *steps])
    found = plan(recipe)
    assert (found.steps_of_a_pass, found.full_steps) == ({"skewed": 2}, {"skewed": 22})
    console = Console(width=500, file=io.StringIO(), record=True)
    console.print(found)
    assert "a pass over them fills 2 steps of Stage II, not 22" in console.export_text()
    assert train(recipe).steps == {"stage_two": 6}
    every = write_rows(tmp_path / "plain.jsonl", [{"query": f"q{i}", "positive": f"p{i}"} for i in range(100)])
    assert plan(load_recipe("debug", [f"data.train=[{{path: {every}}}]", *steps])).steps_of_a_pass == {"plain": 5}


def test_too_few_different_texts_are_refused_before_training(tmp_path):
    """Many rows over a handful of labels cannot fill a step of Stage II; that is found before Stage I."""
    rows = [{"query": f"q{i}", "positive": f"label {i % 5}"} for i in range(64)]
    path = write_rows(tmp_path / "labels.jsonl", rows)
    recipe = load_recipe("debug", [f"output={tmp_path / 'run'}", f"data.train=[{{path: {path}}}]", *QUICK])
    for refused in (train, plan):
        with pytest.raises(AnchorvecError, match="16 is more than the 5 different texts in the column positive of lab"):
            refused(recipe)
    assert not list((tmp_path / "run").iterdir())


def test_an_instruction_without_room_for_a_text_is_refused(tmp_path):
    """An instruction that fills the limit is an error that names its key."""
    long = f"data.train.0.instruction={'x' * 70}"
    for refused in (train, plan):
        with pytest.raises(AnchorvecError, match=r"data.train.0.instruction: it leaves no room"):
            refused(
                load_recipe(
                    "debug",
                    [
                        f"output={tmp_path / refused.__name__}",
                        long,
                        "model.max_tokens=64",
                        "stage_one=null",
                        *QUICK[1::2],
                    ],
                )
            )
    assert not list((tmp_path / "train").iterdir())  # the mended recipe may use it


def test_training_reads_beginnings_and_the_model_more(tmp_path):
    """`data.max_tokens` cuts the texts of both stages, not those that the trained model reads."""
    tokens = {}
    for name, options in (("whole", []), ("cut", ["data.max_tokens=16"])):
        recipe = load_recipe("debug", [f"output={tmp_path / name}", *QUICK, *options])
        train(recipe)
        records = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        tokens[name] = {record["stage"]: record["tokens"] / record["step"] for record in records}
        card = (tmp_path / name / "model" / "README.md").read_text()
        assert ("In training, texts were cut to 16 tokens." in card) == (name == "cut")
        for folder in ("stage_one", "model"):
            assert SentenceTransformer(str(tmp_path / name / folder)).max_seq_length == recipe.model.max_tokens
        stage_two = AutoTokenizer.from_pretrained(tmp_path / name / "stage_two")
        assert stage_two.model_max_length == recipe.model.max_tokens
        assert all(len(pair.document_read) <= recipe.training_tokens for pair in plan(recipe).pairs)
    pairs, passes = recipe.stage_one.pairs_per_step, {"stage_one": 4, "stage_two": 3}  # with a hard negative
    for stage, most in passes.items():
        assert tokens["cut"][stage] <= 16 * most * pairs < tokens["whole"][stage]


def test_a_length_limit_without_room_for_a_text_is_refused(tmp_path):
    """A limit for training that the end prompt fills is an error that names its key."""
    end = "model.end={before: 'a text with many words: ', after: ' means in one word: '}"
    with pytest.raises(AnchorvecError, match=r"data.max_tokens: 8 leaves no room for a text; the \d+ tokens around it"):
        train(load_recipe("debug", [f"output={tmp_path / 'run'}", end, "data.max_tokens=8", *QUICK]))


def test_content_is_the_text_without_what_stands_around_it(save_base):
    """Without BOS and end, and without the instruction of either side; of a text without any, too."""
    base = save_base(make_model(), make_tokenizer("bos"))
    folder = build_embedder(base, base.parent / "embedder", max_tokens=64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for instructions in ({"instruction": "find: "}, {"document_instruction": "note: "}, {}):
        source = {"path": "pairs.jsonl", **instructions}
        content = without_prompt_and_end(tokenizer, load_recipe("debug", [f"data.train=[{json.dumps(source)}]"]))
        for text in ("words", *(f"{prompt}words" for prompt in instructions.values())):
            assert tokenizer.decode(content(tokenizer(text)["input_ids"])) == "words"


def test_lengths_are_those_of_rows_from_everywhere():
    """A sample is drawn, not the first rows, and the seed decides which."""
    rows = datasets.Dataset.from_dict({"row": range(1000)})
    samples = [[row["row"] for row in sample_rows(rows, 100, seed)] for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]
    assert len(set(samples[0])) == 100
    assert max(samples[0]) > 900


@pytest.mark.parametrize("target", ["text", "bag_of_words"])
def test_a_plan_makes_a_micro_step_of_each_stage(tmp_path, target):
    """Of the longest texts that a micro-batch holds, on the model itself; without `step` none."""
    rows = [{"query": f"q{i}", "positive": f"{i} " * (1 + i % 9), "negatives": [f"n{i}"] * (i % 2)} for i in range(32)]
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    options = [f"stage_one.target={target}", "stage_one.micro_batch_tokens=80", "stage_two.micro_batch_tokens=90"]
    recipe = load_recipe("debug", [f"data.train=[{{path: {path}}}]", *options, "stage_two.negatives=1"])
    steps = plan(recipe).trial_steps
    assert list(steps) == ["stage_one", "stage_two"]
    assert all(0 < step.seconds < 60 for step in steps.values())
    assert 40 < steps["stage_one"].tokens <= 80
    assert 40 < steps["stage_two"].tokens <= 90
    left_out = plan(recipe, step=False).trial_steps["stage_one"]
    assert (left_out.seconds, str(left_out)) == (None, "left out: not asked for")


def test_a_model_that_cannot_make_a_step_is_refused_by_plan(tmp_path, monkeypatch):
    """With the reason, in one line; a step that would take too long is left out, and that is said."""
    recipe = load_recipe("debug", ["stage_two=null"])
    monkeypatch.setattr("anchorvec.training.trial.LONGEST_SECONDS", 0)
    assert "it would take about" in str(plan(recipe).trial_steps["stage_one"])

    def forward(self, pairs):
        raise AttributeError("no router_logits")

    monkeypatch.setattr(TextReconstruction, "forward", forward)
    with pytest.raises(AnchorvecError, match=r"a first step of stage_one fails on this model.*no router_logits"):
        plan(recipe)
