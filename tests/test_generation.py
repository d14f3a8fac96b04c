"""Generation beside the contrastive loss: its formula, in one step on the same weights, and a folder that does both."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, AutoTokenizer

import anchorvec
from anchorvec import AnchorvecError, Generation, Readout, build_embedder
from anchorvec.commands.decode import decode
from anchorvec.model.decoder import decoder_of, read_both_ways
from anchorvec.model.embedder import can_write, load_causal_lm
from anchorvec.model.packing import use_packed_texts
from anchorvec.objectives.contrastive import contrastive_loss
from anchorvec.objectives.generation import generation_loss
from anchorvec.objectives.pairs import micro_batches
from families import config_classes, tiny_model
from formulas import embed, info_nce
from interrupting import BOTH_WAYS, assert_same_run, killed_after
from support import assert_same_gradients, gradients, make_model, make_tokenizer, recipe

SEPARATOR, END, LIMIT = [10], 0, 14
ROWS = [("why", "so it is"), ("what is that?", "a text"), ("who", "nobody whom you know"), ("when?", "now")]
VALUES = {
    **BOTH_WAYS,
    "model.pooling": "mean",
    "stage_two.learning_rate": 1e-3,
    "stage_two.generation_weight": 0.5,
    "stage_two.lora": None,
}


def make_generation(model, **options):
    """Texts of at most 14 tokens have no end of their own; those that have fewer are closed by it."""
    return Generation(model, separator=SEPARATOR, end=END, limit=LIMIT, **options)


def plain_loss(model, queries, documents):
    """The formula, one pair at a time, behind a causal mask."""
    causal, model.config.is_causal = getattr(model.config, "is_causal", True), True
    losses = []
    for query, document in zip(queries, documents, strict=True):
        target = [*document, END] if len(document) < LIMIT else document
        before = [*query, *SEPARATOR]
        logits = model(torch.tensor([[*before, *target]])).logits[0].log_softmax(-1)
        losses += [-logits[len(before) + t - 1, y] for t, y in enumerate(target)]
    model.config.is_causal = causal
    return torch.stack(losses).mean()


def ids_of(texts):
    return [ids[:LIMIT] for ids in make_tokenizer()(texts, add_special_tokens=False)["input_ids"]]


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("both_ways", [False, True], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen3", True), ("gemma2", False)])
def test_equals_the_formula(family, tied, both_ways, packed):
    """In fp64: value, and every parameter's gradient, the LM head's too; a pass that writes is causal (T34)."""
    tolerance = 1e-5 if family.startswith("gemma") else 1e-10
    model, columns = make_model(family, tied=tied), [ids_of(column) for column in zip(*ROWS, strict=True)]
    if both_ways:
        read_both_ways(model, "here", writes=True)
    expected = plain_loss(model, *columns)
    expected_gradients = gradients(model, expected)
    objective = make_generation(model, packed=packed)
    loss, tokens = generation_loss(objective, *columns)
    assert objective.packed == packed
    assert max(map(len, columns[1])) == LIMIT
    assert tokens == sum(len(q) + 1 + len(d) + (len(d) < LIMIT) for q, d in zip(*columns, strict=True))
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    assert_same_gradients(gradients(model, loss), expected_gradients, tolerance)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_any_cut_gives_the_same_gradient(budget):
    """The tokens of all documents of the step are counted, whichever part they are in (T10)."""
    model, columns = make_model(tied=False), [ids_of(column) for column in zip(*ROWS, strict=True)]
    objective = make_generation(model, packed=True)
    whole, _ = generation_loss(objective, *columns)
    expected = gradients(model, whole)
    parts = micro_batches([objective.pair(*pair) for pair in zip(*columns, strict=True)], budget, **objective.cut)
    assert len(parts) in {1: [4], 40: [2, 3], 10_000: [1]}[budget]
    loss, _ = generation_loss(objective, *columns, micro_batch_tokens=budget)
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(model, loss), expected)


def both(folder):
    """The embedder in `folder` and the causal LM around its decoder, in fp64."""
    model, causal_lm = SentenceTransformer(str(folder), device="cpu").double(), load_causal_lm(folder).double()
    model[0].model = decoder_of(causal_lm)
    return model, causal_lm


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("held", [None, 30], ids=["at once", "cached"])
def test_both_losses_are_of_the_same_weights_in_one_step(held, packed, save_base):
    """The contrastive loss of means of both directions, plus so many times the other; value and gradient."""
    readout = Readout(LIMIT, closed=False, pooling="mean", attention_direction="bidirectional")
    base = save_base(make_model(tied=False), make_tokenizer())
    model, causal_lm = both(build_embedder(base, base.parent / "embedder", readout=readout))
    columns = [list(column) for column in zip(*ROWS, strict=True)]
    ids = [ids_of(column) for column in columns]
    causal_lm.config.is_causal = True  # `embed` has a mask of its own
    states = [[embed(causal_lm, text, pooling="mean", bidirectional=True) for text in column] for column in ids]
    expected = info_nce(*states, 0.05) + 0.7 * plain_loss(causal_lm, *ids)
    expected_gradients = gradients(causal_lm, expected)
    causal_lm.config.is_causal = False
    assert not packed or use_packed_texts(model)
    written = partial(generation_loss, make_generation(causal_lm, packed=packed), micro_batch_tokens=held)
    loss = contrastive_loss(model, micro_batch_tokens=held, generation=written, generation_weight=0.7)
    value = loss([dict(model.preprocess(column)) for column in columns], torch.empty(0))
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(causal_lm, value), expected_gradients, 1e-6)
    assert list(loss.beside) == ["generation"]


def test_with_weight_0_it_is_plain_stage_two_to_the_bit(save_base):
    """Loss and gradients."""
    readout = Readout(LIMIT, closed=False, pooling="mean", attention_direction="bidirectional")
    base = save_base(make_model(), make_tokenizer())
    model, causal_lm = both(build_embedder(base, base.parent / "embedder", readout=readout))
    columns = [list(column) for column in zip(*ROWS, strict=True)]
    found = []
    for written in (None, partial(generation_loss, make_generation(causal_lm))):
        loss = contrastive_loss(model, generation=written, generation_weight=0.0)
        value = loss([dict(model.preprocess(column)) for column in columns], torch.empty(0))
        found.append((value, gradients(model, value)))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())


@pytest.mark.parametrize("lora", [None, {"r": 4, "dropout": 0.0}], ids=["all parameters", "LoRA"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_is_a_causal_lm_and_an_embedder(lora, tied, save_base, tmp_path):
    """Its export has the logits and the vectors of the run, in plain transformers and sentence-transformers (T26)."""
    base = save_base(make_model(tied=tied), make_tokenizer())
    values = {**VALUES, "model.base": str(base), "stage_two.lora": lora, "output": str(tmp_path / "run")}
    result = anchorvec.train(recipe(values))
    run = tmp_path / "run"
    assert result.export.can_write
    assert min(result.export.cosines.values()) > 0.9999
    stage, exported = load_causal_lm(run / "stage_two"), AutoModelForCausalLM.from_pretrained(run / "model")
    before = load_causal_lm(run / "base")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(exported(ids).logits, stage(ids).logits, atol=1e-5, rtol=1e-5)
        assert (exported(ids).logits - before(ids).logits).abs().max() > 1e-4
    assert torch.equal(exported.lm_head.weight, before.lm_head.weight) == (lora is not None)
    assert exported.config.tie_word_embeddings == tied
    vectors = SentenceTransformer(str(run / "model"), device="cpu").encode(["a text"])
    torch.testing.assert_close(
        torch.tensor(vectors), torch.tensor(SentenceTransformer(str(run / "model")).encode(["a text"]))
    )
    names = load_file(run / "model" / "model.safetensors").keys()
    assert ("lm_head.weight" in names) == (not tied)
    card = " ".join((run / "model" / "README.md").read_text().split())
    assert (
        "it writes a document after a query, with its prompt, and a line break, where `model.config.is_causal" in card
    )
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert all(record["loss"] > 0.5 * record["generation"] > 0 for record in records)
    with pytest.warns(UserWarning, match="Stage II wrote after queries, not from embeddings"):
        decode(run / "stage_two", "why", max_tokens=2)


def test_a_stage_without_generation_keeps_no_head(run):
    """As ever."""
    assert not can_write(run / "stage_two")
    assert not can_write(run / "model")


def test_what_is_written_after_a_query_is_learned(tmp_path):
    """After training the loss of generation is lower, by the exported folder alone, read causally."""
    values = {**VALUES, "stage_two.steps": 30, "stage_two.save_steps": None, "output": str(tmp_path / "run")}
    anchorvec.train(recipe(values))
    losses = []
    for name in ("base", "model"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / name)
        [row] = [{"query": "find:" + "what do herons eat?", "document": "fish and frogs"}]
        columns = [[tokenizer(row[side])["input_ids"]] for side in ("query", "document")]
        losses.append(float(plain_loss(model, *columns)))
    assert losses[1] < 0.9 * losses[0]


def test_a_killed_stage_goes_on_bit_for_bit(save_base, tmp_path):
    """With a head that trains beside the decoder, and a line of the log that tells of steps before and after."""
    base = save_base(make_model(tied=False), make_tokenizer())
    values = {**VALUES, "model.base": str(base), "stage_two.log_every": 3}
    asked = {name: recipe({**values, "output": str(tmp_path / name)}) for name in ("whole", "killed")}
    anchorvec.train(asked["whole"])
    with killed_after(2):
        anchorvec.train(asked["killed"])
    anchorvec.train(asked["killed"], resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_family_that_cannot_write_when_it_reads_both_ways_is_refused(tmp_path):
    """Before any training, by what it does: Bloom's mask follows its configuration alone."""
    model, folder = tiny_model(config_classes()["bloom"], tmp_path), tmp_path / "bloom"
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(AnchorvecError, match="cannot write any more when it is set to both directions"):
        anchorvec.train(recipe({**VALUES, "model.base": str(folder), "output": str(tmp_path / "run")}))


def test_a_query_and_its_document_must_fit_into_the_positions(save_base, tmp_path):
    """Each may be as long as the limit."""
    base = save_base(make_model(), make_tokenizer())
    values = {**VALUES, "model.base": str(base), "model.max_tokens": 300, "output": str(tmp_path / "run")}
    with pytest.raises(AnchorvecError, match=r"generation_weight: .* may have 601 tokens, more than the 512 positions"):
        anchorvec.train(recipe(values))
