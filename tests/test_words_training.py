"""Word reconstruction in both stages, through the trainers."""

import json
import warnings
from itertools import permutations

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from tokenizers.pre_tokenizers import ByteLevel

from anchorvec.commands.decode import decode
from anchorvec.commands.plan import plan
from anchorvec.errors import AnchorvecError
from anchorvec.objectives.bag_of_words import BagOfWordsLoss
from anchorvec.pipeline import train
from anchorvec.recipe import load_recipe
from support import make_model, make_tokenizer

QUICK = ["stage_one.steps=3", "stage_two.steps=3", "stage_one.warmup_steps=1", "stage_two.warmup_steps=1"]


def test_words_in_place_of_texts(tmp_path):
    """Stage I with words as its target learns, logs both directions with their gaps, and reads half the passes."""
    words = [*QUICK, "stage_one.steps=12", "stage_one.target=bag_of_words", "stage_one.log_every=1", "stage_two=null"]
    train(load_recipe("debug", [f"output={tmp_path / 'run'}", *words]))
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["exchange_query_to_document"] > 0
    texts = plan(load_recipe("debug", QUICK))
    told = plan(load_recipe("debug", [*QUICK, "stage_one.target=bag_of_words"]))
    assert told.tokens["stage_one"] < 0.8 * texts.tokens["stage_one"]
    assert told.pairs[0].document_written == texts.pairs[0].document_written[:-1]  # the end token is no word
    without = plan(load_recipe("debug", [*QUICK[1::2], "stage_one=null"]))
    assert (texts.target, told.target, without.target) == ("text", "bag_of_words", None)
    beside = plan(load_recipe("debug", [*QUICK[1::2], "stage_one=null", "stage_two.bag_of_words_weight=1"]))
    assert (beside.target, beside.pairs) == ("bag_of_words", told.pairs)
    quick = plan(load_recipe("quickstart", [*QUICK[1::2], "model.base=tiny", "data.train=[{path: 'builtin:debug'}]"]))
    console = Console(width=200)
    with console.capture() as shown:
        console.print(beside, quick)
    assert shown.get().count("stage_two, bag of words") == 2  # whatever Stage I does
    assert shown.get().count("similar ones in stage_two") == 1


def test_an_untied_head_is_not_trained_by_words(tmp_path, save_base):
    """Nothing is written, so the LM head stays what it was, weight decay or not; the token embeddings learn."""
    base = save_base(make_model(tied=False), make_tokenizer())
    options = [f"model.base={base}", "stage_one.target=bag_of_words", "stage_one.weight_decay=0.1", "stage_two=null"]
    train(load_recipe("debug", [f"output={tmp_path / 'run'}", *QUICK[::2], *options]))
    before, after = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("base", "stage_one"))
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_prompts_and_ends_are_no_words(tmp_path, monkeypatch):
    """Stage II tells the words of the texts alone, whatever instructions its data sets have.

    A text that only shares its first words with an instruction keeps them.
    """
    for name in ("one", "two"):
        rows = [json.dumps({"query": f"{name} {i}", "positive": f"find {i} in {name}"}) for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    sources = [
        {"path": str(tmp_path / "one.jsonl"), "instruction": "find: "},
        {"path": str(tmp_path / "two.jsonl"), "instruction": "what is ", "document_instruction": "text "},
    ]
    options = ["data.train=" + json.dumps(sources), "model.end={before: '<', after: '>'}", "stage_one=null"]
    options += [
        *QUICK[1::2],
        "stage_two.pairs_per_step=4",
        "stage_two.bag_of_words_weight=1",
        "stage_two.log_every=1",
    ]
    told = []
    forward = BagOfWordsLoss.forward

    def recorded(self, embeddings, read, words, *, to):
        told.extend(zip(read, words, strict=True))
        return forward(self, embeddings, read, words, to=to)

    monkeypatch.setattr(BagOfWordsLoss, "forward", recorded)
    run = tmp_path / "run"
    train(load_recipe("debug", [f"output={run}", *options]))
    tokenizer = SentenceTransformer(str(run / "base"), device="cpu").tokenizer
    texts = {tokenizer.decode(ids) for pair in told for ids in pair}
    assert texts <= {
        text for i in range(20) for name in ("one", "two") for text in (f"{name} {i}", f"find {i} in {name}")
    }
    assert {text.split()[0] for text in texts} == {"one", "two", "find"}
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(0 < record["bag_of_words"] < record["loss"] for record in records)


def test_the_words_of_a_step_are_those_of_its_candidates(tmp_path, save_base, monkeypatch):
    """Each text, as it is cut in training, is among the candidates; a tokenizer joins an instruction's space to it."""
    words = ["alpha", "beta", "gamma", "delta", "omega"]
    pairs = [
        {"query": f"{' '.join(order)} {i}", "positive": f"{order[1]} {i} {' '.join(order[2:])} {i}"}
        for i, order in enumerate(permutations(words, 4))
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(
        add_prefix_space=False
    )  # "find: alpha" is "find", ":", " alpha"
    tokenizer = tokenizer.train_new_from_iterator(["find:"] * 9 + [f"{word} {word}" for word in words] * 9, 300)
    assert tokenizer.tokenize("find: alpha")[-1] != tokenizer.tokenize("alpha")[0]
    base = save_base(make_model(vocab_size=len(tokenizer)), tokenizer)
    found = []
    forward = BagOfWordsLoss.forward

    def recorded(self, embeddings, read, told, *, to):
        candidates = self.document_candidates if to == "document" else self.query_candidates
        found.extend((self.vectors(told) @ candidates.T).amax(dim=1).tolist())
        return forward(self, embeddings, read, told, to=to)

    monkeypatch.setattr(BagOfWordsLoss, "forward", recorded)
    limit = "data.max_tokens=8"
    assert max(len(tokenizer("find: " + pair["query"])["input_ids"]) for pair in pairs) > 8
    data = json.dumps([{"path": str(tmp_path / "pairs.jsonl"), "instruction": "find: "}])
    for name, on in [("one", "stage_one.target=bag_of_words"), ("two", "stage_two.bag_of_words_weight=1")]:
        off = "stage_two=null" if name == "one" else "stage_one=null"
        steps = [step for step in QUICK if not step.startswith(off.removesuffix("=null"))]
        train(
            load_recipe(
                "debug",
                [f"output={tmp_path / name}", f"model.base={base}", f"data.train={data}", limit, off, on, *steps],
            )
        )
    assert len(found) > 50
    assert min(found) > 1 - 1e-5


def test_a_cut_step_of_stage_two_trains_the_same(tmp_path):
    """With words beside the contrastive loss, similar pairs and an instruction, in one piece or by cached gradients."""
    losses = []
    for tokens in (9_999, 128):
        output = tmp_path / str(tokens)
        options = ["stage_one=null", "stage_two.bag_of_words_weight=0.5", "stage_two.in_batch_negatives=similar"]
        options += [
            "data.train.0.instruction='Find: '",
            f"stage_two.micro_batch_tokens={tokens}",
            "model.precision=fp32",
        ]
        options += [*QUICK[1::2], "stage_two.log_every=1", "stage_two.lora.dropout=0"]
        train(load_recipe("debug", [f"output={output}", *options]))
        records = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        losses.append([record[key] for record in records for key in ("loss", "bag_of_words", "grad_norm")])
        cached = json.loads((output / "run.json").read_text())["engine"]["stage_two"]["cached_gradients"]
        assert cached == (tokens == 128)
    assert len(losses[0]) == 9
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_folder_that_tells_words_does_not_promise_to_write(tmp_path):
    """Its card says so, and `decode` warns."""
    words = [*QUICK[::2], "stage_one.target=bag_of_words", "stage_two=null"]
    train(load_recipe("debug", [f"output={tmp_path / 'run'}", *words]))
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "not trained to write" in card
    assert "with anchorvec: Stage I, bidirectional reconstruction of bags of words." in card
    with pytest.warns(UserWarning, match="says little of the text"):
        decode(tmp_path / "run" / "stage_one", "text", max_tokens=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(tmp_path / "run" / "base", "text", max_tokens=2)
    (tmp_path / "run" / "recipe.yaml").write_text("- another: [program's")
    with pytest.raises(AnchorvecError, match=r"recipe\.yaml:1: not valid YAML"):
        decode(tmp_path / "run" / "stage_one", "text", max_tokens=2)
    (tmp_path / "run" / "run.json").unlink()
    decode(tmp_path / "run" / "stage_one", "text", max_tokens=2)  # in a folder that is no run's


def test_words_need_two_pairs(tmp_path):
    """Too few pairs to tell apart are refused by name."""
    (tmp_path / "one.jsonl").write_text(json.dumps({"query": "a", "positive": "b"}))
    options = [f"data.train=[{{path: {tmp_path / 'one.jsonl'}}}]", "stage_one.pairs_per_step=1", "stage_two=null"]
    with pytest.raises(AnchorvecError, match=r"data\.train.*give more pairs"):
        train(
            load_recipe("debug", [f"output={tmp_path / 'run'}", *QUICK[::2], *options, "stage_one.target=bag_of_words"])
        )
