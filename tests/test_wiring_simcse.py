"""SimCSE: each document is its own positive, read twice with other parts of the attention left out."""

import json

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import OPTConfig, OPTForCausalLM

import anchorvec
from anchorvec import build_embedder
from anchorvec.data.stage_inputs import stage_inputs
from anchorvec.errors import AnchorvecError
from anchorvec.model.decoder import layers_with_dropout
from anchorvec.objectives.contrastive import contrastive_loss
from anchorvec.pipeline import load_pairs
from anchorvec.run import Run
from anchorvec.start import build_base
from anchorvec.training.stage import Stage
from anchorvec.training.stage_two import stage_two_model
from formulas import info_nce
from support import make_tokenizer, recipe, write_rows

SIMCSE = {
    "stage_one": None,
    "stage_two.positives": "dropout",
    "stage_two.attention_dropout": 0.3,
    "stage_two.negatives": 0,
    "stage_two.lora": None,
}
ROWS = [
    {"query": f"what is {i}?", "positive": f"{i} is {'a long number ' * (i % 4)}{i}", "negative": "no"}
    for i in range(16)
]
TEXTS = ["a river", "the sea, and what lives there", "mountains", "w"]


@pytest.fixture
def rows(tmp_path):
    return str(write_rows(tmp_path / "rows.jsonl", ROWS))


@pytest.mark.parametrize("micro_batch_tokens", [None, 500], ids=["at once", "cached"])
def test_the_loss_is_its_formula(tmp_path, micro_batch_tokens):
    """-log of the share of a text's other pass among the other passes of all texts; value and gradient in fp64."""
    base = build_embedder("tiny", tmp_path / "base", max_tokens=32, seed=1)
    model = SentenceTransformer(str(base), device="cpu").double().train()
    for layer in layers_with_dropout(model):
        layer.attention_dropout = 0.3
    features = model.preprocess(TEXTS)

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.manual_seed(5)
    one, other = (model(dict(features))["sentence_embedding"] for _ in range(2))
    assert not torch.allclose(one, other)
    expected = info_nce(list(one), list(other), 0.2)
    expected_gradient = gradient(expected)
    loss = contrastive_loss(model, temperature=0.2, micro_batch_tokens=micro_batch_tokens)
    torch.manual_seed(5)
    found = loss([dict(features), dict(features)], torch.empty(0))
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
    assert torch.allclose(gradient(found), expected_gradient, rtol=1e-7, atol=1e-12)


@pytest.mark.wires("stage_two.positives")
def test_the_texts_are_the_documents_twice(rows):
    """With the document's instruction on both sides, and no hard negatives; the plan counts what is read."""
    source = [{"path": rows, "name": "rows", "instruction": "find: ", "document_instruction": "doc: "}]
    asked = recipe({**SIMCSE, "data.train": source})
    inputs = stage_inputs(asked, load_pairs(asked))
    read = inputs.contrastive["rows"][:]
    assert read == {"query": [row["positive"] for row in ROWS], "positive": [row["positive"] for row in ROWS]}
    assert inputs.prompts["rows"] == {"query": "doc: ", "positive": "doc: "}
    assert (inputs.hashes["rows"][:, 0] == inputs.hashes["rows"][:, 1]).all()
    assert len(set(inputs.hashes["rows"][:, 0].tolist())) == len(ROWS)
    plan = anchorvec.plan(asked, step=False)
    tokenizer = make_tokenizer()
    documents = sum(len(tokenizer("doc: " + row["positive"])["input_ids"]) + 1 for row in ROWS) / len(ROWS)
    steps = asked.stage_two.steps * asked.stage_two.pairs_per_step
    assert plan.tokens["stage_two"] == pytest.approx(2 * documents * steps, rel=0.05)
    assert "each document with itself under dropout (SimCSE)" in plan.description["stage_two"]


@pytest.mark.wires("stage_two.attention_dropout")
def test_the_share_arrives_in_every_layer_and_in_no_folder(rows, tmp_path):
    """Two passes differ while it trains; what is saved reads the same text alike."""
    asked = recipe({**SIMCSE, "stage_two.steps": 2, "data.train": [{"path": rows}], "output": str(tmp_path / "run")})
    run = Run(tmp_path / "scratch")
    start = build_base(asked, run.base)
    prepared = stage_two_model(Stage("stage_two", asked, run, start, stage_inputs(asked, load_pairs(asked))))
    layers = layers_with_dropout(prepared.model)
    assert {layer.attention_dropout for layer in layers} == {0.3}
    assert len(layers) == prepared.model[0].model.config.num_hidden_layers
    anchorvec.train(asked)
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["attention_dropout"] == 0.0
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] > 0


def test_it_learns(tmp_path):
    """Texts move apart from each other, and stay near themselves."""
    values = {**SIMCSE, "stage_two.steps": 20, "stage_two.learning_rate": 1e-3, "output": str(tmp_path / "run")}
    anchorvec.train(recipe({**values, "stage_two.pairs_per_step": 8, "stage_two.warmup_steps": 0}))
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert records[-1]["loss"] < records[0]["loss"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"stage_two.attention_dropout": 0.0},
            "positives: both passes over a text would give the same vector",
        ),
        ({"stage_two.negatives": 1}, "stage_two.negatives: each document is its own positive .*; take 0"),
        ({"stage_two.in_batch_negatives": "similar"}, "stage_two.in_batch_negatives: .*; take random"),
        ({"stage_two.bag_of_words_weight": 0.1}, "stage_two.bag_of_words_weight: .*; take 0"),
        ({"stage_two.generation_weight": 0.1}, "stage_two.generation_weight: .*; take 0"),
    ],
)
def test_what_does_not_go_with_it_is_refused(changed, message):
    with pytest.raises(AnchorvecError, match=message):
        recipe({**SIMCSE, **changed})


@pytest.mark.parametrize("command", [anchorvec.plan, anchorvec.train])
def test_a_decoder_without_such_dropout_is_refused_before_the_work(save_base, tmp_path, command):
    """OPT has the value in its configuration, and its layers another name for it."""
    config = OPTConfig(hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=260)
    base = save_base(OPTForCausalLM(config), make_tokenizer())
    values = {**SIMCSE, "model.base": str(base), "output": str(tmp_path / "run")}
    with pytest.raises(AnchorvecError, match=r"stage_two\.attention_dropout: .* no dropout of attention weights"):
        command(recipe(values))
    assert not (tmp_path / "run" / "base").exists()
