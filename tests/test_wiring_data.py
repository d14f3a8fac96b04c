"""The keys that decide what is read: data sets, prompts, limits, negatives, the pairs of a step, and the seed."""

import json
import random
import string
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

import anchorvec
import formulas
from anchorvec import AnchorvecError
from anchorvec.pipeline import load_training_data
from support import make_model, make_tokenizer, recipe, train, write_rows
from wiring import HARD, PLAIN, expected, sources

BOTH = pytest.mark.parametrize("name", ["texts_run", "words_run"])
STAGES = ["stage_one", "stage_two"]


def text_of(ids):
    """The text that a byte tokenizer made these ids of."""
    return make_tokenizer().decode(ids)


# Texts as they are read


@pytest.mark.wires("instruction", "document_instruction", "path", of=("data.train.0",))
@pytest.mark.wires("model.end", "model.end.before", "model.end.after", "data.max_tokens")
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("name", "before", "room", "after"), [("texts_run", "", 29, "<|end|>"), ("words_run", 'Say "', 30, '" as:')]
)
def test_training_reads_a_text_behind_its_instruction_up_to_the_limit(name, before, room, after, stage, request):
    """Of the data set and side; the text is cut to fit, what ends it never is."""
    known = {"ask: " + row["query"] for row in PLAIN} | {"metal: " + row["query"] for row in HARD}
    known |= {row["positive"] for row in PLAIN} | {"text: " + row["positive"] for row in HARD}
    known |= {"text: " + negative for row in HARD for negative in row["negatives"]}
    assert {len(text) > room for text in known} == {True, False}
    columns = [step.texts for step in request.getfixturevalue(name).run.stages[stage].steps]
    seen = {text_of(ids) for texts in columns for key in texts if "target" not in key for ids in texts[key]}
    assert len(seen) > 20
    assert seen <= {before + text[:room] + after for text in known}


@pytest.mark.wires("model.max_tokens", "model.end.before", "model.end.after")
@BOTH
def test_the_trained_model_reads_up_to_its_own_limit(name, request):
    """Whatever the limit for training: the exported model's vector is the state at the end of so many tokens."""
    asked = request.getfixturevalue(name)
    limit = asked.values["model.max_tokens"]
    ids = asked.but({"data.max_tokens": None}).reading.read("", "long " * 30)
    assert len(ids) == limit > asked.values["data.max_tokens"]
    folder = asked.run.folder / "model"
    body = AutoModelForCausalLM.from_pretrained(folder).base_model
    with torch.no_grad():
        found = body(torch.tensor([ids])).last_hidden_state[0, -1]
    for folder in (asked.run.folder / "model", *[asked.run.folder / "stage_two"] * (name == "texts_run")):
        model = SentenceTransformer(str(folder), device="cpu")
        assert model.max_seq_length == model.tokenizer.model_max_length == limit
        torch.testing.assert_close(model.encode("long " * 30, convert_to_tensor=True), found, rtol=1e-4, atol=1e-4)
    assert SentenceTransformer(str(asked.run.folder / "base")).max_seq_length == limit


@pytest.mark.wires("name", "instruction", "document_instruction", of=("data.train.0",))
@BOTH
def test_instructions_are_stored_under_the_names_of_their_data_sets(name, request):
    """In the export, and what was read is told by the same names in `run.json`."""
    run = request.getfixturevalue(name).run
    assert SentenceTransformer(str(run.folder / "model"), device="cpu").prompts == {
        **{"query": "", "plain-query": "ask: ", "hard-query": "metal: "},
        **{"document": "", "plain-document": "", "hard-document": "text: "},
    }
    assert {name: data["rows"] for name, data in run.record["data"].items()} == {"plain": 8, "hard": 8}


def test_an_instruction_that_all_data_sets_share_is_the_default(tmp_path):
    """It is the prompt of any query, or of any document, without a name."""
    data = [{**source, "instruction": "ask: "} for source in sources(tmp_path / "data")]
    values = {"data.train": data, "stage_two": None, "stage_one.steps": 1, "stage_one.warmup_steps": 0}
    run = train(tmp_path / "run", {**values, "stage_one.pairs_per_step": 2})
    prompts = SentenceTransformer(str(run.folder / "model"), device="cpu").prompts
    assert (prompts["query"], prompts["document"]) == ("ask: ", "")


# The pairs of a step


@pytest.mark.wires("data.train.0.weight")
@pytest.mark.parametrize("stage", STAGES)
def test_an_epoch_draws_each_row_as_often_as_its_weight_says(texts_run, words_run, stage):
    """Weight 0.5: a half of the rows once; 2: each row twice. The steps of these runs are an epoch, but one."""
    for asked, all_seen in [(texts_run, True), (words_run, stage == "stage_one")]:
        drawn = Counter(row["query"] for step in asked.seen[stage] for _, row in step)
        plain, hard = ([drawn[row["query"]] for row in rows] for rows in (PLAIN, HARD))
        assert sorted(plain) == [0] * 4 + [1] * 4
        assert set(hard) == {2} if all_seen else max(hard) <= 2


@pytest.mark.wires("stage_two.negatives")
@BOTH
def test_a_query_has_as_many_hard_negatives_as_asked_for(name, request):
    """Its row's first ones; a row with fewer has none. A batch is of one data set, rows of both kinds mixed."""
    asked = request.getfixturevalue(name)
    wanted = asked.values["stage_two.negatives"]
    names = [f"negative_{n + 1}" for n in range(wanted)]
    with_negatives = []
    for step, rows in zip(asked.run.stages["stage_two"].steps, asked.seen["stage_two"], strict=True):
        assert len({source["path"] for source, _ in rows}) == 1
        assert len({row["query"] for _, row in rows}) == len(rows)  # though each row is drawn twice
        listed = [row["negatives"] for _, row in rows if row.get("negatives")]
        assert [len(step.texts.get(name, [])) for name in names] == [len(listed)] * wanted
        prompt = rows[0][0].get("document_instruction", "")
        for n, column in enumerate(names[: len(names) if listed else 0]):
            assert step.texts[column] == [asked.reading.read(prompt, texts[n]) for texts in listed]
        with_negatives.append(len(listed))
    assert any(0 < n < asked.values["stage_two.pairs_per_step"] for n in with_negatives)
    assert any(len({source["path"] for source, _ in rows}) == 2 for rows in asked.seen["stage_one"])  # it mixes them


@pytest.mark.wires("stage_two.negatives")
def test_no_negatives_are_used_where_none_are_asked_for(tmp_path):
    """With 0 all rows of a data set are of one kind."""
    values = {"data.train": sources(tmp_path / "data")[1:], "stage_one": None, "stage_two.negatives": 0}
    values |= {"stage_two.steps": 2, "stage_two.warmup_steps": 0, "stage_two.pairs_per_step": 8}
    run = train(tmp_path / "run", values)
    assert [sorted(step.texts) for step in run.stages["stage_two"].steps] == [["positive", "query"]] * 2


def topical_rows():
    """Pairs of four topics with letters of their own; some pairs of a topic share nearly all of theirs."""
    draw = random.Random(2)
    letters = string.ascii_letters + string.digits
    topics = [letters[12 * topic : 12 * topic + 12] for topic in range(4)]
    rows = [
        {side: "".join(draw.sample(topic, 6)) for side in ("query", "positive")} for topic in topics for _ in range(14)
    ]
    draw.shuffle(rows)
    return rows


@pytest.mark.wires("stage_two.in_batch_negatives")
@pytest.mark.parametrize("kind", ["similar", "random"])
def test_the_pairs_of_a_step_are_similar_but_not_too_similar(tmp_path, kind):
    """By the words of their texts as they are read, but for the instruction; above a cosine of 0.7 they stay apart."""
    rows = topical_rows()
    data = [{"path": str(write_rows(tmp_path / "topics.jsonl", rows)), "instruction": "find: "}]
    values = {"data.train": data, "stage_one": None, "stage_two.in_batch_negatives": kind}
    values |= {"stage_two.steps": 14, "stage_two.pairs_per_step": 4, "stage_two.warmup_steps": 0, "data.max_tokens": 12}
    run = train(tmp_path / "run", values)
    assert not any("bag_of_words" in record for record in run.log["stage_two"])  # they have no part in the loss
    tokenizer = make_tokenizer()
    cut = [{**row, "query": row["query"][: 12 - len("find: ") - 1]} for row in rows]
    texts = [[tokenizer(row[side])["input_ids"] for row in cut] for side in ("query", "positive")]
    embeddings = AutoModelForCausalLM.from_pretrained(run.folder / "base").double().get_input_embeddings().weight
    words = formulas.Words(embeddings, *texts, torch.zeros(embeddings.shape[1], dtype=torch.float64))
    q, d = (torch.stack(words.candidates[side]) for side in ("query", "document"))
    most = torch.stack([q @ q.T, q @ d.T, d @ q.T, d @ d.T]).amax(0)  # (pairs, pairs)
    rows_of = {text_of(ids): i for i, ids in enumerate(texts[0])}
    batches = [
        [rows_of[text_of(ids).removeprefix("find: ").removesuffix("<|end|>")] for ids in step.texts["query"]]
        for step in run.stages["stage_two"].steps
    ]
    together = torch.tensor([float(most[i, j]) for batch in batches for i in batch for j in batch if i < j])
    if kind == "random":
        assert together.mean() < 0.2
    else:
        assert together.mean() > 0.4
        assert 0.69 < together.max() < 0.7
        assert (most.triu(1) > 0.7).sum() > 50
        assert ((most.triu(1) > 0.7) & (most.triu(1) < 0.71)).any()


# What is read of a path


@pytest.fixture
def hub_folder(tmp_path):
    """A data set with two subsets of two splits each; its texts say which."""
    folder = tmp_path / "animals"
    folder.mkdir()
    configs = []
    for subset in ("big", "small"):
        files = []
        for split in ("train", "extra"):
            rows = [{"query": f"{subset} {split} {i}", "positive": f"{i} {subset} {split}"} for i in range(4)]
            write_rows(folder / f"{subset}-{split}.jsonl", rows)
            files.append({"split": split, "path": f"{subset}-{split}.jsonl"})
        configs.append({"config_name": subset, "data_files": files})
    (folder / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    return folder


@pytest.mark.wires("path", "split", "subset", "name", of=("data.train.0",))
@pytest.mark.parametrize(("split", "subset"), [(None, "big"), ("extra", "big"), ("extra", "small")])
def test_a_split_of_a_subset_is_read(hub_folder, split, subset):
    """`train` where none is named."""
    source = {"path": str(hub_folder), "subset": subset, "name": "mine", **({"split": split} if split else {})}
    shown = anchorvec.plan(recipe({"data.train": [source], "stage_two": None, "stage_one.pairs_per_step": 2}))
    assert shown.rows == {"mine": 4}
    for pair in shown.pairs:
        assert "".join(pair.query_read).startswith(f"{subset} {split or 'train'} ")
        assert f"{subset} {split or 'train'}" in "".join(pair.document_read)


@pytest.mark.wires("split", "subset", of=("data.train.0",))
def test_each_data_set_has_a_split_and_a_subset_of_its_own(hub_folder):
    """Two of one folder."""
    sources = [
        {"path": str(hub_folder), "subset": subset, "split": split, "name": f"{subset}-{split}"}
        for subset, split in (("big", "train"), ("small", "extra"))
    ]
    values = {"data.train": sources, "stage_two": None, "stage_one.pairs_per_step": 2}
    rows = load_training_data(recipe(values)).reconstruction
    assert [row["query"][:9] for row in rows] == ["big train"] * 4 + ["small ext"] * 4


@pytest.mark.wires("data.strict")
@pytest.mark.parametrize("run", [anchorvec.plan, anchorvec.train])
def test_a_bad_row_is_left_out_or_refused(tmp_path, run):
    """Left out and counted; with `strict` an error that names its line."""
    path = write_rows(tmp_path / "pairs.jsonl", [PLAIN[0], {"query": "no document"}, *PLAIN[1:]])
    values = {"data.train": [{"path": str(path)}], "stage_two": None, "stage_one.pairs_per_step": 8}
    values |= {"stage_one.steps": 1, "stage_one.warmup_steps": 0}
    with pytest.raises(AnchorvecError, match=r"pairs.jsonl:2: "):
        run(recipe({"output": str(tmp_path / "strict"), "data.strict": True, **values}))
    found = run(recipe({"output": str(tmp_path / "run"), **values}))
    if run is anchorvec.plan:
        assert (found.rows, found.rejected_rows, found.mended_rows) == ({"pairs": 8}, {"pairs": 1}, {"pairs": 0})
    else:
        assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["pairs"]["rows"] == 8


# The seed


@pytest.mark.wires("seed")
def test_another_seed_is_another_run(tmp_path, save_base):
    """Other rows of a data set, another order in both stages, other adapters and dropout; the same base."""
    base = save_base(make_model(), make_tokenizer())
    values = {"model.base": str(base), "data.train": sources(tmp_path / "data"), "stage_two.lora": {"dropout": 0.5}}
    for stage, pairs, steps in [("stage_one", 5, 4), ("stage_two", 4, 5)]:
        values |= {f"{stage}.pairs_per_step": pairs, f"{stage}.steps": steps}
    samples, orders, adapters, kept, bases = [], [], [], [], []
    for seed in (5, 6):
        run = train(tmp_path / f"run{seed}", {**values, "seed": seed})
        assert run.record["seed"] == seed
        seen = expected(run, {**values, "model.max_tokens": 64, "data.max_tokens": None}).seen
        queries = {stage: [[row["query"] for _, row in step] for step in steps] for stage, steps in seen.items()}
        drawn = [{q for step in steps for q in step} & {row["query"] for row in PLAIN} for steps in queries.values()]
        assert drawn[0] == drawn[1]  # in both stages
        samples.append(drawn[0])
        orders.append({stage: [sorted(step) for step in steps] for stage, steps in queries.items()})
        start, dropped = run.stages["stage_two"].start, run.stages["stage_two"].adapter_inputs
        adapters.append({name: weight for name, weight in start.items() if ".lora_A." in name})
        kept.append([(given != 0).flatten()[:200].tolist() for _, given in dropped])
        bases.append(load_file(run.folder / "base" / "model.safetensors"))
    assert samples[0] != samples[1]
    assert kept[0] != kept[1]
    for stage in STAGES:
        assert orders[0][stage] != orders[1][stage]
    assert orders[0]["stage_one"][0] != orders[0]["stage_two"][0]
    assert len(adapters[0]) == 14
    assert not any(torch.equal(weight, adapters[1][name]) for name, weight in adapters[0].items())
    assert all(torch.equal(weight, bases[1][name]) for name, weight in bases[0].items())


@pytest.mark.wires("seed")
@BOTH
def test_stage_one_sees_the_pairs_in_an_order_of_its_own(name, request):
    """That of a generator whose seed is one higher: what Stage II begins with should be other pairs."""
    asked = request.getfixturevalue(name)
    seen = [row["query"] for step in asked.seen["stage_one"] for _, row in step]
    rows = [row["query"] for row in PLAIN if row["query"] in seen] + 2 * [row["query"] for row in HARD]
    generator = torch.Generator().manual_seed(asked.values["seed"] + 1)
    assert seen == [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


@pytest.mark.wires("seed")
@BOTH
def test_the_seed_decides_the_weights_of_tiny(name, request):
    """They are what that model draws after this seed."""
    asked = request.getfixturevalue(name)
    saved = load_file(asked.run.folder / "base" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(asked.run.folder / "base")
    model.config.pad_token_id = 0  # its row is not drawn
    with torch.random.fork_rng():
        torch.manual_seed(asked.values["seed"])
        drawn = type(model)(model.config).state_dict()
    assert all(torch.equal(weight, drawn[key]) for key, weight in saved.items())
