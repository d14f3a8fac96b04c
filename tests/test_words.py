"""Word reconstruction against its formulas, in float64."""

import math

import pytest
import torch

from anchorvec.objectives.bag_of_words import BagOfWordsLoss, BagOfWordsReconstruction
from anchorvec.objectives.pairs import exchange_partners, micro_batches
from support import assert_same_gradients, gradients, make_model, make_pairs


def make_objective(model, bag_of_words, alpha=0.2):
    """The objective of Stage I with this loss, texts packed."""
    objective = BagOfWordsReconstruction(model, alpha=alpha, packed=True)
    objective.bag_of_words = bag_of_words
    return objective


def make_word_loss(model, pairs, origin=None):
    """The loss whose candidates are the texts of `pairs`."""
    queries, documents = [p.query_targets for p in pairs], [p.document_targets for p in pairs]
    return BagOfWordsLoss(model.get_input_embeddings().weight, queries, documents, origin=origin)


def plain_vectors(embeddings, texts, sample):
    """The vector of each text, one word at a time, with numbers in place of tensors wherever possible."""
    columns = [[p.query_targets for p in sample], [p.document_targets for p in sample]]
    words = [w for column in columns for text in column for w in text]
    mean = sum(embeddings[w] for w in words) / len(words)
    covariance = sum(torch.outer(embeddings[w] - mean, embeddings[w] - mean) for w in words) / len(words)
    variances, directions = torch.linalg.eigh(covariance)
    scales = [max(float(v), 1e-4 * float(variances[-1])) ** -0.5 for v in variances]
    vectors = []
    for text in texts:
        b = torch.zeros_like(mean)
        for w in set(text):
            n_w = max(1, max(sum(w in other for other in column) for column in columns))
            b += math.log(len(sample) / n_w) * (embeddings[w] - mean)
        b = sum(scales[k] * (b @ directions[:, k]) * directions[:, k] for k in range(len(b)))
        vectors.append(b / b.norm())
    return vectors


def plain_loss(model, pairs, sample, alpha, origin, tau=0.05):
    """The loss of `pairs` with the candidates `sample`."""
    table = model.get_input_embeddings().weight.detach()

    def direction(read, told):
        total = 0
        right = plain_vectors(table, [getattr(p, told) for p in pairs], sample)
        own = plain_vectors(table, [getattr(p, f"{read}_targets") for p in pairs], sample)
        candidates = plain_vectors(table, [getattr(p, told) for p in sample], sample)
        partners = plain_vectors(table, [getattr(p, f"{read}_targets") for p in sample], sample)
        for pair, a, b in zip(pairs, own, right, strict=True):
            ids = torch.tensor([getattr(pair, read)])
            e = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
            same = [max(b @ c, a @ c, a @ other) > 0.9999 for c, other in zip(candidates, partners, strict=True)]
            others = [c for c, left_out in zip(candidates, same, strict=True) if not left_out]
            scores = torch.stack([torch.cosine_similarity(e - origin, c, dim=0) / tau for c in [b, *others]])
            total -= scores.log_softmax(0)[0]
        return total / len(pairs)

    return alpha * direction("query", "document_targets") + (1 - alpha) * direction("document", "query_targets")


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_equals_the_formulas(alpha):
    """Value and gradients, with texts of the step among the candidates and without."""
    model, pairs = make_model(), make_pairs(12)
    sample = pairs[3:]
    origin = torch.randn(model.config.hidden_size, dtype=torch.float64)
    expected = plain_loss(model, pairs[:6], sample, alpha, origin)
    expected_gradients = gradients(model, expected)
    objective = make_objective(model, make_word_loss(model, sample, origin), alpha=alpha)
    out = objective(pairs[:6])
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=0)
    assert_same_gradients(gradients(model, out.loss), expected_gradients, tolerance=1e-8)
    assert (out.sums["query_to_document"] == 0) == (alpha == 0)
    assert (out.sums["document_to_query"] == 0) == (alpha == 1)


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_any_cut_gives_the_same_gradient(budget):
    """The micro-batch budget changes nothing, and only what is read counts against it."""
    model, pairs = make_model(), make_pairs(8)
    objective = make_objective(model, make_word_loss(model, pairs))
    whole = objective(pairs).loss
    expected = gradients(model, whole)
    cut = micro_batches(pairs, budget, **objective.cut)
    assert len(cut) == {1: 8, 40: 4, 10_000: 1}[budget]  # one pair reads 18 tokens, and would write 16
    loss = sum(objective(part, targets=(8, 8)).loss for part in cut)
    torch.testing.assert_close(loss, whole, rtol=1e-12, atol=0)
    assert_same_gradients(gradients(model, loss), expected)


def test_a_word_of_all_texts_weighs_nothing():
    """A text of such words has no vector: it has no loss, and is no candidate."""
    model = make_model()
    queries, documents = [[9, 10], [9, 11], [9, 12, 12], [9]], [[9, 13], [9, 14], [9, 15], [9, 16]]
    word_loss = BagOfWordsLoss(model.get_input_embeddings().weight, queries, documents)
    assert word_loss.weights[9] == 0
    assert word_loss.weights[12].item() == pytest.approx(math.log(4))
    vectors = word_loss.vectors([[9], [9, 10], [10], []])
    assert vectors.norm(dim=1).tolist() == pytest.approx([0, 1, 1, 0])
    assert word_loss.vectors([]).shape == (0, vectors.shape[1])
    torch.testing.assert_close(vectors[1], vectors[2])
    e = torch.randn(2, vectors.shape[1], dtype=torch.float64)
    assert word_loss(e, [[13], [13]], [[9], []], to="query").tolist() == [0, 0]
    scores = torch.cosine_similarity(e[:1], word_loss.query_candidates[:3]) / 0.05
    torch.testing.assert_close(word_loss(e[:1], [[13]], [[10]], to="query")[0], -scores.log_softmax(0)[0])


def test_what_is_also_right_is_no_candidate():
    """A candidate with the same words, the text that was read, or the partner of a text with its words (T16)."""
    model = make_model()
    queries, documents = [[10, 11], [11, 10], [12, 13], [14, 15]], [[20], [21], [22], [23]]
    word_loss = BagOfWordsLoss(model.get_input_embeddings().weight, queries, documents)
    e = word_loss.vectors([[10, 11]])
    scores = (e @ word_loss.vectors([[10, 11], [12, 13], [14, 15]]).T)[0] / 0.05
    torch.testing.assert_close(word_loss(e, [[20]], [[10, 11]], to="query")[0], -scores.log_softmax(0)[0])
    scores = (e @ word_loss.vectors([[20], [22], [23]]).T)[0] / 0.05  # [21] answers the same query
    torch.testing.assert_close(word_loss(e, [[10, 11]], [[20]], to="document")[0], -scores.log_softmax(0)[0])
    scores = (e @ word_loss.vectors([[20], [21], [23]]).T)[0] / 0.05  # [22] itself was read, as a query
    torch.testing.assert_close(word_loss(e, [[22]], [[20]], to="document")[0], -scores.log_softmax(0)[0])


@pytest.mark.parametrize(
    ("queries", "documents"),
    [([[1]], [[2]]), ([[1], [2]], [[3]]), ([[1], [1]], [[1], [1]]), ([[1], [2]], [[3], [3]]), ([[]], [[]])],
)
def test_a_sample_without_two_texts_is_refused(queries, documents):
    """One pair, columns of different length, one word, or one side whose words are those of all its texts."""
    with pytest.raises(ValueError, match="sample"):
        BagOfWordsLoss(make_model().get_input_embeddings().weight, queries, documents)


def test_words_under_autocast():
    """In bf16 the embeddings are rounded; the words' vectors and the loss are fp32."""
    model, pairs = make_model().float(), make_pairs(8)
    objective = make_objective(model, make_word_loss(model, pairs))
    expected = objective(pairs).loss
    with torch.autocast("cpu", torch.bfloat16):
        found = objective(pairs).loss
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=0)


def test_training_does_not_move_the_candidates():
    """The words' vectors are made of the token embeddings that the stage started with."""
    model, pairs = make_model(), make_pairs()
    word_loss = make_word_loss(model, pairs)
    before = word_loss.vectors([[10, 11]])
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(-1)
    torch.testing.assert_close(word_loss.vectors([[10, 11]]), before)
    assert not list(word_loss.parameters())
    assert not word_loss.state_dict()


def test_exchanged_embeddings_tell_less():
    """An embedding that says its own words has a lower loss with them than with another pair's."""
    model, pairs = make_model(), make_pairs()
    word_loss = make_word_loss(model, pairs)
    objective = make_objective(model, word_loss)
    told = word_loss.vectors([p.document_targets for p in pairs] + [p.query_targets for p in pairs])
    objective.encode = lambda texts, prompts: told
    own = objective(pairs)
    objective.encode = lambda texts, prompts: told if texts[0] == pairs[0].query else told.roll(1, 0)
    out = objective(pairs, exchange=exchange_partners(pairs))
    assert out.loss == own.loss
    assert out.exchanged["query_to_document"] > 2 * out.sums["query_to_document"]
    assert out.exchanged["document_to_query"] > 2 * out.sums["document_to_query"]
