"""The Stage I objective against a plain version written from the paper's formulas, in float64."""

import itertools
import random

import pytest
import torch
from torch.nn.functional import log_softmax

from anchorvec.data.tokens import PairTokenizer
from anchorvec.model.end import with_end
from anchorvec.model.head import output_head
from anchorvec.objectives.pairs import TokenPair, exchange_partners, micro_batches
from anchorvec.objectives.reconstruction import TextReconstruction
from support import FAMILIES, assert_same_gradients, gradients, make_model, make_pairs, make_tokenizer


def plain_loss(model, pairs, alpha):
    """The formulas, one pair and one text at a time, every logit at once, nothing shared with the package."""

    def embed(ids):
        return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]

    def log_likelihood(e, target):
        words = model.get_input_embeddings()(torch.tensor([target[:-1]]).long())
        logits = model(inputs_embeds=torch.cat([e[None, None], words], dim=1)).logits[0]
        return sum(log_softmax(logits[t], -1)[y] for t, y in enumerate(target))

    q2d = -sum(log_likelihood(embed(p.query), p.document_targets) for p in pairs)
    d2q = -sum(log_likelihood(embed(p.document), p.query_targets) for p in pairs)
    N_D = sum(len(p.document_targets) for p in pairs)
    N_Q = sum(len(p.query_targets) for p in pairs)
    return alpha * q2d / N_D + (1 - alpha) * d2q / N_Q


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_formulas(family, tied):
    """Value, and every parameter's gradient, equal those of the plain version."""
    # Gemma computes norms and attention weights in fp32 even in a float64 model.
    tolerance = 1e-5 if family.startswith("gemma") else 1e-10
    model, pairs = make_model(family, tied=tied), make_pairs()
    expected = plain_loss(model, pairs, alpha=0.2)
    expected_gradients = gradients(model, expected)
    out = TextReconstruction(model, alpha=0.2)(pairs)
    torch.testing.assert_close(out.loss, expected, rtol=tolerance, atol=0)
    assert_same_gradients(gradients(model, out.loss), expected_gradients, tolerance)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_one_direction_alone(alpha):
    """Alpha 1 trains query-to-document alone, alpha 0 document-to-query alone."""
    model, pairs = make_model(), make_pairs()
    out = TextReconstruction(model, alpha=alpha)(pairs)
    torch.testing.assert_close(out.loss, plain_loss(model, pairs, alpha), rtol=1e-12, atol=0)
    assert (out.sums["query_to_document"] == 0) == (alpha == 0)
    assert (out.sums["document_to_query"] == 0) == (alpha == 1)


@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_any_cut_gives_the_same_gradient(budget):
    """The micro-batch budget and the order of the pairs change neither loss nor gradient."""
    model, pairs = make_model(tied=False), make_pairs(8)
    objective = TextReconstruction(model)
    whole = objective(pairs).loss
    expected = gradients(model, whole)
    counts = objective.targets(pairs)
    shuffled = random.Random(budget).sample(pairs, len(pairs))
    cut = micro_batches(shuffled, budget, packed=budget % 20 == 0)
    assert sorted(map(str, itertools.chain(*cut))) == sorted(map(str, pairs))
    loss = sum(objective(part, targets=counts).loss for part in cut)
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(model, loss), expected)


def test_logit_chunks_change_nothing(monkeypatch):
    """Projecting the targets in small checkpointed chunks gives the same loss and gradient."""
    model, pairs = make_model("gemma2", tied=False), make_pairs()
    expected = TextReconstruction(model)(pairs).loss
    expected_gradients = gradients(model, expected)
    monkeypatch.setattr("anchorvec.model.head.HEAD_CHUNK_BYTES", {"cpu": 3 * 4 * 260})
    loss = TextReconstruction(model)(pairs).loss
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(model, loss), expected_gradients)


@pytest.mark.parametrize("family", FAMILIES)
def test_output_head_is_the_models_own(family):
    """From the final states, the head gives the logits that the model gives, soft caps included (T19)."""
    model = make_model(family, tied=False)
    ids = torch.tensor([[5, 6, 7]])
    out = model(ids, output_hidden_states=True)
    torch.testing.assert_close(output_head(model)(out.hidden_states[-1][0]), out.logits[0])


def test_first_token_depends_on_the_embedding():
    """The first content token is predicted from the embedding, and its gradient reaches the encoding pass (T4)."""
    model = make_model()
    objective = TextReconstruction(model)
    embeddings = objective.encode([[7, 8, 9, 0], [7, 30, 0]])
    first = objective.decode(embeddings[:1], [[11]])
    assert first != objective.decode(embeddings[1:], [[11]])
    embeddings.retain_grad()
    first.backward()
    assert embeddings.grad[0].norm() > 0
    touched = model.get_input_embeddings().weight.grad[[7, 8, 9]]  # tokens that only the encoding pass reads
    assert (touched.norm(dim=1) > 0).all()


def test_exchange_rises_above_zero_only_when_embeddings_matter():
    """Equal embeddings exchange without effect; different ones change the loss."""
    objective = TextReconstruction(make_model())
    pairs = make_pairs(4)
    out = objective(pairs, exchange=exchange_partners(pairs))
    assert out.exchanged["query_to_document"] != out.sums["query_to_document"]
    same = [TokenPair(pairs[0].query, pairs[0].document, p.query_targets, p.document_targets) for p in pairs]
    out = objective(same, exchange=same[1:] + same[:1])
    torch.testing.assert_close(out.exchanged["query_to_document"], out.sums["query_to_document"])
    torch.testing.assert_close(out.exchanged["document_to_query"], out.sums["document_to_query"])


@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_the_exchanged_loss_is_that_of_the_partners_embeddings(alpha):
    """Each text of a pair is written from the embedding of its partner's other text."""
    objective, pairs = TextReconstruction(make_model(), alpha=alpha), make_pairs(4)
    partners = exchange_partners(pairs)
    out = objective(pairs, exchange=partners)
    if alpha > 0:
        expected = objective.decode(objective.encode([p.query for p in partners]), [p.document_targets for p in pairs])
        torch.testing.assert_close(out.exchanged["query_to_document"], expected.sum())
    if alpha < 1:
        expected = objective.decode(objective.encode([p.document for p in partners]), [p.query_targets for p in pairs])
        torch.testing.assert_close(out.exchanged["document_to_query"], expected.sum())


def test_exchange_partners_are_other_texts():
    """Each pair gets the next one whose query and document both differ; where there is none, nothing is exchanged."""
    a, b, c = make_pairs(3)
    same_document = TokenPair([9, 9], a.document, [9], a.document_targets)
    assert exchange_partners([a, same_document, b, c]) == [b, b, c, a]
    assert exchange_partners([a, same_document]) is None


@pytest.mark.parametrize("kind", ["plain", "bos", "chat", "left"])
@pytest.mark.parametrize("end_prompt", [None, ('This text: "', '" means:"')])
def test_targets_are_the_text_alone(kind, end_prompt):
    """No instruction, BOS, pad or template is a target; the end token is one if asked for, and once (T5)."""
    tokenizer = with_end(make_tokenizer(kind), max_tokens=64, end_prompt=end_prompt)
    rows = [
        {
            "query": "why?",
            "positive": "because it is so",
            "query_prompt": "Instruct: find\n",
            "document_prompt": "",
        },
        {"query": "q", "positive": "d", "query_prompt": "", "document_prompt": "text: "},
    ]
    for wanted in [True, False]:
        pairs = PairTokenizer(tokenizer, end_token_target=wanted)(rows)["pairs"]
        for row, pair in zip(rows, pairs, strict=True):
            end = [tokenizer.eos_token_id] * wanted
            assert pair.query_targets == tokenizer.encode(row["query"], add_special_tokens=False) + end
            assert pair.document_targets == tokenizer.encode(row["positive"], add_special_tokens=False) + end
            assert pair.query == tokenizer.encode(row["query_prompt"] + row["query"])


def test_a_truncated_text_is_written_as_far_as_it_was_read():
    """Targets stop where truncation stopped the encoding, without an end token."""
    tokenizer = with_end(make_tokenizer("bos"), max_tokens=12)
    row = {"query": "abcdefghijklmnop", "positive": "short", "query_prompt": "do: ", "document_prompt": ""}
    pair = PairTokenizer(tokenizer)([row])["pairs"][0]
    assert len(pair.query) == 12
    assert tokenizer.decode(pair.query_targets) == "abcdef"  # 12 = BOS + 4 of the prompt + 6 + end
    assert tokenizer.decode(pair.document_targets) == "short<|end|>"


def test_max_target_tokens():
    """No text is written beyond `max_target_tokens` tokens."""
    tokenizer = with_end(make_tokenizer(), max_tokens=64)
    row = {"query": "abcdef", "positive": "ghijkl", "query_prompt": "", "document_prompt": ""}
    pair = PairTokenizer(tokenizer, max_target_tokens=3)([row])["pairs"][0]
    assert tokenizer.decode(pair.query_targets) == "abc"
    assert tokenizer.decode(pair.document_targets) == "ghi"
