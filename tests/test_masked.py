"""Masked next-token prediction against its formula, its draws, and the stage that trains it with adapters."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import anchorvec
from anchorvec import AnchorvecError, MaskedReconstruction, TokenMasking
from anchorvec.data.reading import mask_token
from anchorvec.model.decoder import read_both_ways
from anchorvec.model.end import with_end
from anchorvec.objectives.masked import IGNORED
from anchorvec.objectives.pairs import TokenPair, micro_batches
from support import assert_same_gradients, gradients, make_model, make_tokenizer

QUICK = ["stage_one.steps=4", "stage_one.warmup_steps=1", "stage_one.pairs_per_step=8", "stage_two=null"]
TINY = ["model.base=tiny", "data.train=[{path: 'builtin:debug', instruction: 'find:'}]"]


def text_pairs(n=6, *, seed=0):
    """Pairs as they come from the data: read behind a prompt of two tokens and before an end, the targets the text."""
    draws = np.random.default_rng(seed)
    texts = [[draws.integers(3, 260, size=length).tolist() for length in (3 + i, 14 - i)] for i in range(n)]
    return [TokenPair([1, 2, *q, 0], [*d, 0], q, d, 2, 0) for q, d in texts]


def masking(**options):
    """Of texts with one token behind them; many are masked."""
    return TokenMasking(token=5, vocabulary=260, after=1, **{"mlm_probability": 0.4, **options})


def plain_loss(model, pairs):
    """The formula, one text at a time: -1/M sum over masked i of log P(x_i | the text with masks), from i - 1."""
    losses = []
    for pair in pairs:
        for ids, labels in ((pair.query, pair.query_targets), (pair.document, pair.document_targets)):
            logits = model(torch.tensor([ids])).logits[0]
            losses += [-logits[i - 1].log_softmax(-1)[y] for i, y in enumerate(labels) if y != IGNORED]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_equals_the_formula(family, tied, packed):
    """In fp64: value, and every parameter's gradient, the LM head's too."""
    tolerance = 1e-5 if family.startswith("gemma") else 1e-10
    model = make_model(family, tied=tied)
    read_both_ways(model, "here")
    objective = MaskedReconstruction(model, masking=masking(), alpha=0.5, packed=packed)
    pairs = objective.draw(text_pairs(), 0)
    expected = plain_loss(model, pairs)
    assert objective.targets(pairs)[0] > 10
    if packed:
        assert objective.packed
    expected_gradients = gradients(model, expected)
    out = objective(pairs)
    torch.testing.assert_close(out.loss, expected, rtol=tolerance, atol=0)
    assert out.sums.keys() == {"masked"}
    assert_same_gradients(gradients(model, out.loss), expected_gradients, tolerance)
    model.config.is_causal = True
    assert (plain_loss(model, pairs) - expected).abs() > 1e-6  # what stands behind a mask is read


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_any_cut_gives_the_same_gradient(budget):
    """Masked positions are counted over the whole step; a part may have none."""
    model = make_model(tied=False)
    read_both_ways(model, "here")
    objective = MaskedReconstruction(model, masking=masking(mlm_probability=0.15), alpha=0.5)
    pairs = objective.draw(text_pairs(8), 3)
    whole = objective(pairs).loss
    expected = gradients(model, whole)
    parts = micro_batches(pairs, budget, **objective.cut)
    assert budget > 1 or min(objective.targets(part)[0] for part in parts) < 2
    loss = sum(objective(part, targets=objective.targets(pairs)).loss for part in parts)
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(model, loss), expected)


def test_without_a_masked_token_there_is_no_loss():
    """Nor a gradient, nor an error."""
    model = make_model()
    read_both_ways(model, "here")
    objective = MaskedReconstruction(model, masking=masking(), alpha=0.5)
    nothing = [TokenPair(p.query, p.document, [IGNORED] * len(p.query), [IGNORED] * 99) for p in text_pairs(2)]
    loss = objective(nothing).loss
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients(model, loss).values())


def test_what_is_masked_follows_the_seed_the_step_and_the_place():
    """Not the process that draws it: the same again, and others at another step, place or seed."""
    pairs = text_pairs(8)
    drawn = masking(seed=1).draw(pairs, 5)
    assert masking(seed=1).draw(pairs, 5) == drawn
    assert masking(seed=1).draw(pairs[:3], 5) == drawn[:3]
    same = masking(seed=1).draw([pairs[0]] * 4, 5)
    assert len({str(pair.document_targets) for pair in same}) > 1
    for other in (masking(seed=1).draw(pairs, 6), masking(seed=2).draw(pairs, 5)):
        assert other != drawn


def test_tokens_of_the_text_are_masked_in_the_shares_that_are_asked_for():
    """Prompts, ends and the first token are not; a label is the token that stood there."""
    [long] = [TokenPair([1, 2, *text, 0], [*text, 0], text, text) for text in [[7, 8, 9, 10] * 5_000]]
    [pair] = masking(mlm_probability=0.2, mask_replace_prob=0.7, random_replace_prob=0.2).draw([long], 0)
    for read, labels, ids, start in (
        (pair.query, pair.query_targets, long.query, 2),
        (pair.document, pair.document_targets, long.document, 1),
    ):
        read, labels, ids = np.array(read), np.array(labels), np.array(ids)
        chosen = labels != IGNORED
        assert not chosen[:start].any()
        assert not chosen[-1]
        assert (labels[chosen] == ids[chosen]).all()
        assert (read[~chosen] == ids[~chosen]).all()
        assert chosen.mean() == pytest.approx(0.2, abs=0.01)
        assert (read[chosen] == 5).mean() == pytest.approx(0.7, abs=0.02)
        assert (read[chosen] == ids[chosen]).mean() == pytest.approx(0.1, abs=0.02)
        assert len(np.unique(read[chosen])) > 200
    [all_of_it] = masking(mlm_probability=1.0).draw([long], 0)
    for labels, start in ((all_of_it.query_targets, 2), (all_of_it.document_targets, 1)):
        assert [i for i, label in enumerate(labels) if label == IGNORED] == [*range(start), len(labels) - 1]
    [first] = masking(most=10).draw([long], 0)
    assert max(np.nonzero(np.array(first.query_targets) != IGNORED)[0]) < 12


def test_a_mask_is_one_token_of_the_model(capsys):
    """The one that is asked for; else the tokenizer's own, which is said; else an error with some that would do."""
    tokenizer = with_end(make_tokenizer("bos"), max_tokens=32, closed=False)
    assert mask_token(tokenizer, "_") == tokenizer.convert_tokens_to_ids("_")
    with pytest.raises(AnchorvecError, match=r"stage_one\.masking\.token: '__' is 2 tokens .* for example, _ # \* ~"):
        mask_token(tokenizer, "__")
    tokenizer.mask_token = "~"
    assert mask_token(tokenizer, "__") == tokenizer.convert_tokens_to_ids("~")
    assert "the tokenizer's own '~' is taken" in capsys.readouterr().err


def test_adapters_are_merged_when_the_stage_ends(tmp_path):
    """The folder is a causal LM as ever; each adapted weight differs from the base's by a matrix of the rank."""
    values = ["stage_one.lora={r: 2, alpha: 4, dropout: 0.0}", "stage_one.learning_rate=1e-2", "model.precision=fp32"]
    anchorvec.train(anchorvec.load_recipe("arms/llm2vec", [*TINY, *QUICK, *values, f"output={tmp_path / 'run'}"]))
    base, trained = (load_file(tmp_path / "run" / name / "model.safetensors") for name in ("base", "stage_one"))
    assert base.keys() == trained.keys()
    for name, weight in trained.items():
        change = (weight - base[name]).double()
        if "proj" in name:
            values = torch.linalg.svdvals(change)
            assert values[1] > 1e-4
            assert values[2] < 1e-5 * values[0] + 1e-6
        else:
            assert not change.any(), name
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["engine"]["stage_one"]["packed"]
