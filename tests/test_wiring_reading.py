"""The keys that decide how a text becomes a vector: what both stages read, what they pool, what the folder does."""

import json

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

import anchorvec
import formulas
from anchorvec.start import build_base
from support import recipe, train, write_rows
from wiring import PLAIN, sources

SHORT = {
    "model.precision": "fp32",
    "stage_one.steps": 1,
    "stage_one.warmup_steps": 0,
    "stage_one.pairs_per_step": 4,
    "stage_one.learning_rate": 1e-12,  # so that the start of Stage II is the base
    "stage_two.steps": 1,
    "stage_two.warmup_steps": 0,
    "stage_two.pairs_per_step": 4,
    "stage_two.negatives": 0,
    "stage_two.lora": None,
}

READINGS = {
    "both-ways": {"model.attention_direction": "bidirectional"},
    "mean": {"model.pooling": "mean"},
    "mean-of-the-text": {"model.pooling": "mean", "model.end": "none", "model.pool_prompt": False},
    "weighted": {"model.pooling": "weightedmean", "model.attention_direction": "bidirectional"},
    "twice": {"model.read": "twice", "model.between": "#"},
}


def plain(folder):
    """The causal LM of a folder in float64, read in one direction; `formulas.embed` has a mask of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").double()
    model.config.is_causal = True
    return model


@pytest.fixture(scope="module", params=READINGS)
def read(request, tmp_path_factory):
    """A run that reads so, its values, and the embedding of a text as the formula has it, from its ids."""
    folder = tmp_path_factory.mktemp(request.param)
    path = write_rows(folder / "pairs.jsonl", [{**row, "positive": row["positive"][:20]} for row in PLAIN])
    values = {**SHORT, **READINGS[request.param], "data.train": [{"path": str(path), "instruction": "ask:"}]}
    run = train(folder / "run", values)
    model = plain(run.folder / "base")
    kept = values.get("model.pool_prompt", True)

    def embed(ids, prompt):
        options = {"pooling": values.get("model.pooling", "lasttoken"), "left_out": 0 if kept else len(prompt)}
        return formulas.embed(
            model, ids, bidirectional=values.get("model.attention_direction") == "bidirectional", **options
        )

    return run, values, embed


@pytest.mark.wires("model.attention_direction", "model.pooling", "model.pool_prompt", "model.read", "model.between")
@pytest.mark.wires("model.end")
def test_both_stages_start_from_the_embeddings_of_the_formula(read):
    """The first losses are those of texts that are read as the recipe says."""
    run, _, embed = read
    model, [step] = plain(run.folder / "base"), run.stages["stage_one"].steps
    with torch.no_grad():
        e = [[embed(ids, p) for ids in step.texts[side]] for side, p in (("query", "ask:"), ("positive", ""))]
        targets = [step.texts["positive_target"], step.texts["query_target"]]
        losses = [
            -sum(formulas.log_likelihood(model, *pair) for pair in zip(e[i], targets[i], strict=True))
            / sum(map(len, targets[i]))
            for i in (0, 1)
        ]
        [record] = run.log["stage_one"]
        found = [record["query_to_document"], record["document_to_query"]]
        assert found == pytest.approx([loss.item() for loss in losses], rel=2e-5)
        [step] = run.stages["stage_two"].steps
        queries, documents = (
            [embed(ids, p) for ids in step.texts[c]] for c, p in (("query", "ask:"), ("positive", ""))
        )
        expected = formulas.info_nce(queries, documents, 0.05).item()
    assert run.log["stage_two"][0]["loss"] == pytest.approx(expected, rel=2e-5)


@pytest.mark.wires("model.read", "model.between", "model.end")
def test_the_texts_of_a_step_stand_there_as_often_as_asked(read):
    """Once, or twice with the words between; closed by the end token or not."""
    run, values, _ = read
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "base")
    end = "" if values.get("model.end") == "none" else "<|end|>"
    for stage in run.stages.values():
        for ids in stage.steps[0].texts["query"]:
            [query] = [row["query"] for row in PLAIN if row["query"] in tokenizer.decode(ids)]
            once = "ask:" + query
            expected = f"{once}#{once}" if values.get("model.read") == "twice" else once
            assert tokenizer.decode(ids) == expected + end


@pytest.mark.wires("model.attention_direction", "model.pooling", "model.pool_prompt", "model.read", "model.between")
def test_the_exported_folder_reads_so(read):
    """Loaded by plain sentence-transformers: the embeddings of the formula from the export's own weights."""
    run, _, _ = read
    exported = SentenceTransformer(str(run.folder / "model"), device="cpu")
    found = exported.encode_query(["why"], convert_to_tensor=True)[0].double()
    model, ids = plain(run.folder / "model"), exported.tokenizer("ask:why")["input_ids"]
    options = json.loads((run.folder / "model" / "1_Pooling" / "config.json").read_text())
    pooling = next(key for key, value in options.items() if key.startswith("pooling_mode_") and value)
    names = {"lasttoken": "lasttoken", "mean_tokens": "mean", "weightedmean_tokens": "weightedmean"}
    direction = json.loads((run.folder / "model" / "config.json").read_text()).get("is_causal", True)
    with torch.no_grad():
        expected = formulas.embed(
            model,
            ids,
            pooling=names[pooling.removeprefix("pooling_mode_")],
            left_out=0 if options["include_prompt"] else 4,
            bidirectional=not direction,
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.wires("model.attention_direction", "model.pooling", "model.pool_prompt", "model.read", "model.between")
@pytest.mark.parametrize("name", READINGS)
def test_another_reading_would_give_another_vector(name, tmp_path):
    """Each of the keys changes what the untrained embedder says of a text."""
    found = []
    for i, values in enumerate(({}, READINGS[name])):
        folder = build_base(recipe({"data.train.0.instruction": "ask:", **values}), tmp_path / str(i))
        found.append(SentenceTransformer(str(folder), device="cpu").encode_query(["why so"], convert_to_tensor=True))
    assert torch.cosine_similarity(*found) < 0.9999


@pytest.mark.wires("about")
def test_what_a_recipe_is_stands_in_its_plan_and_in_its_card(tmp_path):
    """As written."""
    values = {**SHORT, "about": "A [bold] arm.", "data.train": sources(tmp_path / "data"), "stage_one": None}
    values = {key: value for key, value in values.items() if not key.startswith("stage_one.")}
    assert anchorvec.plan(recipe(values), step=False).description["what it is"] == "A [bold] arm."
    run = train(tmp_path / "run", values)
    before_any_code = (run.folder / "model" / "README.md").read_text().split("```")[0]
    assert "A [bold] arm." in before_any_code
