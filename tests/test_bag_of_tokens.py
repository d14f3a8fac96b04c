"""Bags of tokens over the vocabulary against their formulas, their stop tokens, and a stage that goes on with these."""

import json

import pytest
import torch

import anchorvec
from anchorvec import AnchorvecError, BagOfTokens, BagOfTokensReconstruction, Readout
from anchorvec.model import head
from anchorvec.model.decoder import read_both_ways
from anchorvec.objectives.pairs import exchange_partners, micro_batches
from interrupting import killed_after
from support import assert_same_gradients, gradients, make_model, make_pairs, recipe

SIDES = ("query", "document")
VALUES = {
    "model.base": "tiny",
    "data.train": [{"path": "builtin:debug", "instruction": "find:"}],
    "stage_one.target": "bag_of_words",
    "stage_one.candidates": "vocabulary",
    "stage_one.max_df": 0.6,
    "stage_one.steps": 3,
    "stage_one.warmup_steps": 0,
    "stage_one.pairs_per_step": 8,
    "stage_one.save_steps": 1,
    "stage_two": None,
}


def text_pairs(n=6):
    """Each text behind one token and before an end; the targets are the tokens of the text."""
    return [
        type(p)(p.query, p.document, p.query_targets[:-1], p.document_targets[:-1])
        for p in make_pairs(n, vocab_size=30)
    ]


def make_objective(model, pairs, **options):
    """Stop tokens are those in more than a third of the texts; a text begins at its second token."""
    texts = [p.query_targets for p in pairs], [p.document_targets for p in pairs]
    bag = BagOfTokens(260, *texts, max_df=0.34)
    return BagOfTokensReconstruction(model, bag=bag, span=lambda ids: slice(1, len(ids) - 1), **options)


def plain_loss(model, pairs, *, alpha, source, lm_weight, stop, most=None):
    """The formulas, one text at a time and every logit of it."""
    weights, bags, lm = dict(zip(SIDES, (alpha, 1 - alpha), strict=True)), {}, []
    for pair in pairs:
        content = {side: getattr(pair, f"{side}_targets")[:most] for side in SIDES}
        for read in (side for side in SIDES if weights[side]):
            ids = getattr(pair, read)
            out = model(torch.tensor([ids]), output_hidden_states=True)
            said = out.logits[0, -1].log_softmax(-1)
            for told in SIDES:
                bag = set(content[told]) - stop
                if bag and source in ("both", "own" if told == read else "other"):
                    bags.setdefault((read, told), []).append(-sum(said[t] for t in bag) / len(bag))
            lm += [-out.logits[0, i].log_softmax(-1)[ids[i + 1]] for i in range(len(content[read]))]
    loss = sum(weights[read] * torch.stack(losses).mean() for (read, _), losses in bags.items())
    return loss + lm_weight * torch.stack(lm).mean()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("family", "tied", "options"),
    [
        ("llama", True, {"source": "both", "alpha": 0.5, "lm_weight": 1.0}),
        ("llama", False, {"source": "own", "alpha": 0.3, "lm_weight": 0.0}),
        ("qwen3", False, {"source": "other", "alpha": 0.8, "lm_weight": 2.5}),
        ("gemma2", True, {"source": "both", "alpha": 0.0, "lm_weight": 0.5}),
        ("llama", True, {"source": "both", "alpha": 1.0, "lm_weight": 1.0}),
    ],
    ids=str,
)
def test_equals_the_formulas(family, tied, options, packed):
    """In fp64: value, and every parameter's gradient, the LM head's too."""
    tolerance = 1e-5 if family.startswith("gemma") else 1e-10
    model, pairs = make_model(family, tied=tied), text_pairs()
    objective = make_objective(model, pairs, packed=packed, **options)
    stop = objective.bag.stop_tokens
    assert stop
    expected = plain_loss(model, pairs, stop=stop, **options)
    expected_gradients = gradients(model, expected)
    out = objective(pairs)
    assert objective.packed == packed
    torch.testing.assert_close(out.loss, expected, rtol=tolerance, atol=0)
    assert_same_gradients(gradients(model, out.loss), expected_gradients, tolerance)
    assert list(out.sums) == list(objective.parts)
    assert ("language_model" in out.sums) == (options["lm_weight"] > 0)


@pytest.mark.parametrize("states", [1, 4])
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_any_cut_gives_the_same_gradient(budget, states, monkeypatch):
    """Micro-batches, and logits that exist for few states at a time; a text of stop tokens alone is not counted."""
    model, pairs = make_model(tied=False), text_pairs(8)
    only = sorted(make_objective(model, pairs).bag.stop_tokens)
    pairs[2] = type(pairs[2])([7, *only, 0], [7, *only, 0], only, only)
    objective = make_objective(model, pairs, alpha=0.4)
    assert max(objective.targets(pairs)[:4]) < 8
    whole = objective(pairs).loss
    expected = gradients(model, whole)
    monkeypatch.setitem(head.HEAD_CHUNK_BYTES, "cpu", 4 * 260 * states)
    parts = micro_batches(pairs, budget, **objective.cut)
    loss = sum(objective(part, targets=objective.targets(pairs)).loss for part in parts)
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(model, loss), expected)


def test_logits_are_of_the_places_that_are_scored_alone(monkeypatch):
    """An embedding each, and the tokens of the texts: not prompts, ends and padding (T11)."""
    model, pairs = make_model(), text_pairs(4)
    objective = make_objective(model, pairs)
    seen = []
    project = objective._head
    monkeypatch.setattr(objective, "_head", lambda states: seen.append(len(states)) or project(states))
    objective(pairs)
    assert seen == [8, sum(len(p.query_targets) + len(p.document_targets) for p in pairs)]


def test_a_first_token_has_to_have_a_state_before_it():
    """Where nothing stands before a text, its first token is not predicted."""
    model, pairs = make_model(), text_pairs(3)
    bare = [type(p)(p.query[1:], p.document[1:], p.query_targets, p.document_targets) for p in pairs]
    objective = make_objective(model, pairs)
    objective.span = lambda ids: slice(0, len(ids) - 1)
    assert objective.targets(pairs)[-1] - objective.targets(bare)[-1] == 0
    objective.span = lambda ids: slice(1, len(ids) - 1)
    assert objective.targets(pairs)[-1] == sum(len(p.query_targets) + len(p.document_targets) for p in pairs)


def test_another_embedding_tells_other_tokens():
    """The sums of the bags are also those with the embeddings of other pairs; the language model reads none."""
    model, pairs = make_model(), text_pairs()
    objective = make_objective(model, pairs)
    out = objective(pairs, exchange=exchange_partners(pairs))
    assert out.exchanged.keys() == out.sums.keys() - {"language_model"}
    assert all(out.exchanged[name] != out.sums[name] for name in out.exchanged)


def test_stop_tokens_are_those_of_many_queries_or_of_many_documents():
    """More than the share of either; others stay, however often one text has them."""
    bag = BagOfTokens(9, [[1, 2], [1, 3], [4, 4, 4]], [[5, 5], [5, 6], [7]], max_df=0.5)
    assert bag.stop_tokens == {1, 5}
    assert bag([5, 4, 1, 4, 2, 8]) == [2, 4, 8]
    assert BagOfTokens(9, [[1]], [[1]], max_df=1.0).stop_tokens == frozenset()
    with pytest.raises(ValueError, match="every token of the sample"):
        BagOfTokens(9, [[1]], [[1]], max_df=0.5)


def test_where_no_token_is_left_the_recipe_is_refused(tmp_path):
    """A vocabulary of letters has none that is rare."""
    with pytest.raises(AnchorvecError, match=r"stage_one\.max_df: 0\.01 leaves no token to tell.*; raise it"):
        anchorvec.train(recipe({**VALUES, "stage_one.max_df": 0.01, "output": str(tmp_path / "run")}))


def test_a_killed_stage_goes_on_with_its_stop_tokens(tmp_path, monkeypatch, capsys):
    """The same weights as without the interruption, whatever the rows would say now; the record names the tokens."""
    asked = {name: recipe({**VALUES, "output": str(tmp_path / name)}) for name in ("whole", "killed")}
    anchorvec.train(asked["whole"])
    with killed_after(2):
        anchorvec.train(asked["killed"])
    other = BagOfTokens(257, [[1], [2]], [[1], [2]], max_df=0.6)
    monkeypatch.setattr("anchorvec.training.stage_one.bag_of_tokens", lambda *_, **__: other)
    anchorvec.train(asked["killed"], resume=True)
    whole, killed = (tmp_path / name / "stage_one" / "model.safetensors" for name in asked)
    assert whole.read_bytes() == killed.read_bytes()
    records = [json.loads((tmp_path / name / "run.json").read_text())["stop_tokens"] for name in asked]
    assert records[0] == records[1]
    assert "e" in records[0]["tokens"]
    assert f"{len(records[0]['ids'])} tokens stand in more than 60% of the texts" in capsys.readouterr().err


def test_bags_are_told_from_means_of_both_directions_too():
    """Without the language-model loss, which would see what it predicts."""
    model, pairs = make_model(), text_pairs()
    read_both_ways(model, "here")
    readout = Readout(attention_direction="bidirectional", pooling="mean")
    losses = [
        make_objective(model, pairs, packed=packed, readout=readout, lm_weight=0.0)(pairs).loss for packed in (0, 1)
    ]
    torch.testing.assert_close(*losses, rtol=1e-10, atol=0)
