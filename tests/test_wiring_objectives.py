"""The keys of Stage I's other objectives and of its adapters, step by step against the formulas."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import formulas
from anchorvec import MaskedReconstruction
from anchorvec.objectives.masked import IGNORED
from support import make_tokenizer, train, write_rows
from wiring import HARD, PLAIN, TEXTS, adapters, expected, model_before, sources

MASKED = {
    "seed": 5,
    "model.attention_direction": "bidirectional",
    "model.pooling": "mean",
    "stage_one.target": "masked",
    "stage_one.steps": 3,
    "stage_one.warmup_steps": 0,
    "stage_one.pairs_per_step": 8,
    "stage_one.learning_rate": 1e-3,
    "stage_one.log_every": 1,
    "stage_one.masking": {"token": "%", "mlm_probability": 0.5, "mask_replace_prob": 0.6, "random_replace_prob": 0.0},
    "stage_two": None,
}


@pytest.mark.wires("stage_one.target", "stage_one.masking.token", "stage_one.masking.mlm_probability", "seed")
@pytest.mark.wires("stage_one.masking.mask_replace_prob", "stage_one.masking.random_replace_prob")
@pytest.mark.parametrize("random", [0.0, 0.3])
def test_masks_are_drawn_as_the_recipe_says(tmp_path, monkeypatch, random):
    """Half of the tokens of each text, 60% of them masked with this sign, and other draws at each step."""
    seen = []
    sums = MaskedReconstruction.sums

    def recorded(self, pairs, read):
        seen.extend(pairs)
        return sums(self, pairs, read)

    monkeypatch.setattr(MaskedReconstruction, "sums", recorded)
    path = write_rows(tmp_path / "pairs.jsonl", [*PLAIN, *HARD])
    values = {**MASKED, "data.train": [{"path": str(path)}], "stage_one.masking.random_replace_prob": random}
    run = train(tmp_path / "run", values)
    labels = np.concatenate([text for p in seen for text in (p.query_targets, p.document_targets)])
    read = np.concatenate([text for p in seen for text in (p.query, p.document)])
    chosen = labels != IGNORED
    texts = [ids for step in run.stages["stage_one"].steps for key in ("query", "positive") for ids in step.texts[key]]
    length = sum(len(ids) - 2 for ids in texts)  # without the first token and the end
    assert chosen.sum() / length == pytest.approx(0.5, abs=0.05)
    assert (read[chosen] == make_tokenizer()("%")["input_ids"][0]).mean() == pytest.approx(0.6, abs=0.05)
    assert (read[chosen] == labels[chosen]).mean() == pytest.approx(0.4 - random, abs=0.05)
    assert len({str(p.query_targets) for p in seen}) > 20
    model = model_before(run, "stage_one")
    model.config.is_causal = False
    with torch.no_grad():
        losses = [
            -model(torch.tensor([ids])).logits[0, i - 1].log_softmax(-1)[y]
            for p in seen[:8]
            for ids, text in ((p.query, p.query_targets), (p.document, p.document_targets))
            for i, y in enumerate(text)
            if y != IGNORED
        ]
    assert run.log["stage_one"][0]["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=2e-5)


@pytest.mark.wires("stage_one.lora", "stage_one.lora.r", "stage_one.lora.alpha", "stage_one.lora.dropout")
def test_adapters_of_stage_one_follow_the_formula(tmp_path):
    """Texts are written; adapters of this rank and scale alone learn, as in the formula, and are merged."""
    lora = {"r": 3, "alpha": 5, "dropout": 0.0}
    values = {**TEXTS, "stage_one.lora": lora, "stage_one.gradient_checkpointing": False, "stage_two": None}
    values = {key: value for key, value in values.items() if not key.startswith("stage_two.")}
    values["data.train"] = sources(tmp_path / "data")
    run = train(tmp_path / "run", values)
    [stage] = run.stages.values()
    assert {weight.shape[0 if "lora_A" in name else 1] for name, weight in stage.start.items()} == {3}
    assert stage.adapter_inputs == []
    model, base = model_before(run, "stage_one"), model_before(run, "stage_one")
    weights = adapters(model, stage.start, 5 / 3)
    found = []

    def recorded(loss):
        found.append(loss()[0])
        return found[-1]

    losses = [lambda loss=loss: recorded(loss) for loss in expected(run, values).losses("stage_one", model)]
    rates = [formulas.rate(3e-3, "cosine", step, warmup=1, steps=4) for step in range(1, 5)]
    list(formulas.descend(weights, losses, rates, max_grad_norm=0.5, weight_decay=0.3))
    assert run.log["stage_one"][-1]["loss"] == pytest.approx(found[3].item(), rel=1e-4)
    saved = load_file(run.folder / "stage_one" / "model.safetensors")
    for name, weight in base.state_dict().items():
        layer = name.removeprefix("model.").removesuffix(".weight")
        change = 5 / 3 * weights[f"{layer}.B"] @ weights[f"{layer}.A"] if f"{layer}.A" in weights else 0 * weight
        if name in saved:
            assert (saved[name].double() - weight - change).norm() <= 1e-3 * change.norm() + 1e-6, name


@pytest.mark.wires("stage_one.lora.dropout")
def test_what_adapters_of_stage_one_read_is_dropped(tmp_path):
    """So large a share of it."""
    values = {**TEXTS, "stage_one.lora": {"r": 2, "dropout": 0.6}, "stage_two": None}
    values = {key: value for key, value in values.items() if not key.startswith("stage_two.")}
    run = train(tmp_path / "run", {**values, "data.train": sources(tmp_path / "data")})
    dropped = torch.cat([given.flatten() for _, given in run.stages["stage_one"].adapter_inputs])
    assert float((dropped == 0).double().mean()) == pytest.approx(0.6, abs=0.03)


TOKENS = {
    "seed": 4,
    "stage_one.target": "bag_of_words",
    "stage_one.candidates": "vocabulary",
    "stage_one.source": "own",
    "stage_one.lm_weight": 0.7,
    "stage_one.max_df": 0.4,
    "stage_one.alpha": 0.3,
    "stage_one.max_target_tokens": 9,
    "stage_one.steps": 1,
    "stage_one.warmup_steps": 0,
    "stage_one.pairs_per_step": 8,
    "stage_one.log_every": 1,
    "stage_two": None,
}


@pytest.mark.wires("candidates", "source", "lm_weight", "max_df", "alpha", "max_target_tokens", of=["stage_one"])
def test_bags_are_told_over_the_vocabulary_as_the_recipe_says(tmp_path):
    """Own bags of the first nine tokens, without those in more than 40% of a side's texts, and the texts predicted."""
    rows, ids = [*PLAIN, *HARD], make_tokenizer()
    path = write_rows(tmp_path / "pairs.jsonl", rows)
    run = train(tmp_path / "run", {**TOKENS, "data.train": [{"path": str(path), "instruction": "ask: "}]})
    texts = {"query": [row["query"] for row in rows], "document": [row["positive"] for row in rows]}
    first = {side: [ids(text)["input_ids"][:9] for text in listed] for side, listed in texts.items()}
    stop = {t for listed in first.values() for t in range(257) if sum(t in text for text in listed) > 0.4 * len(rows)}
    assert set(run.record["stop_tokens"]["ids"]) == stop
    assert stop
    model, bags, lm = model_before(run, "stage_one"), [], []
    for side, column, prompt in (("query", "query", "ask: "), ("document", "positive", "")):
        losses = []
        for read in run.stages["stage_one"].steps[0].texts[column]:
            logits = model(torch.tensor([read])).logits[0].detach()
            bag = set(read[len(prompt) : -1][:9]) - stop
            losses.append(-sum(logits[-1].log_softmax(-1)[t] for t in bag) / len(bag))
            places = range(max(1, len(prompt)), len(read) - 1)[: 9 if prompt else 8]
            lm += [-logits[i - 1].log_softmax(-1)[read[i]] for i in places]
        bags.append(torch.stack(losses).mean())
        [record] = run.log["stage_one"]
        assert record[f"{side}_to_{side}"] == pytest.approx(float(bags[-1]), rel=2e-5)
    expected = 0.3 * bags[0] + 0.7 * bags[1] + 0.7 * torch.stack(lm).mean()
    assert record["loss"] == pytest.approx(float(expected), rel=2e-5)
    assert record["language_model"] == pytest.approx(float(torch.stack(lm).mean()), rel=2e-5)


@pytest.mark.wires("stage_two.generation_weight")
def test_documents_are_written_after_queries_with_this_weight(tmp_path):
    """Beside the contrastive loss, behind a line break, closed by the end token."""
    path = write_rows(tmp_path / "pairs.jsonl", [*PLAIN, *HARD])
    values = {"model.max_tokens": 64, "stage_one": None, "stage_two.steps": 1, "stage_two.warmup_steps": 0}
    values |= {
        "stage_two.pairs_per_step": 4,
        "stage_two.generation_weight": 0.3,
        "stage_two.temperature": 0.2,
        "stage_two.negatives": 0,
    }
    run = train(tmp_path / "run", {**values, "seed": 2, "data.train": [{"path": str(path), "instruction": "ask: "}]})
    [stage], [record] = run.stages.values(), run.log["stage_two"]
    queries, documents = (stage.steps[0].texts[column] for column in ("query", "positive"))
    model, losses = formulas_model(run), []
    with torch.no_grad():
        for query, document in zip(queries, documents, strict=True):
            before = [*query, *make_tokenizer()("\n")["input_ids"]]
            logits = model(torch.tensor([[*before, *document]])).logits[0].log_softmax(-1)
            losses += [-logits[len(before) + t - 1, y] for t, y in enumerate(document)]
        contrastive, _ = formulas.contrastive_loss(model, [queries, documents], 0.2)
    written = float(torch.stack(losses).mean())
    assert record["generation"] == pytest.approx(written, rel=2e-5)
    assert record["loss"] == pytest.approx(float(contrastive) + 0.3 * written, rel=2e-5)
    tokens = [2 * (len(q) + len(d)) + 1 for q, d in zip(queries, documents, strict=True)]
    assert record["tokens"] == sum(tokens)


def formulas_model(run):
    """The causal LM that Stage II started from, where there was no Stage I."""
    return AutoModelForCausalLM.from_pretrained(run.folder / "base", attn_implementation="sdpa").double()
