"""Stage II's loss, with words added or not."""

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer

from anchorvec.model.embedder import build_embedder
from anchorvec.model.packing import use_packed_texts
from anchorvec.objectives.bag_of_words import BagOfWordsLoss
from anchorvec.objectives.contrastive import contrastive_loss
from support import gradients


@pytest.mark.parametrize("weight", [None, 0.7])
def test_the_cached_loss_equals_the_plain_one(tmp_path, weight):
    """Stage II's loss and gradient do not depend on the tokens of a micro-batch, with words added or not."""
    model = SentenceTransformer(str(build_embedder("tiny", tmp_path / "base", max_tokens=32)), device="cpu").double()
    texts = [["one", "two two", "three"], ["a", "bb bb", "ccc"], ["x", "y y", "z"]]
    losses, found, words = [], [], {}
    if weight is not None:
        read = [model.tokenizer(column)["input_ids"] for column in texts]
        word_loss = BagOfWordsLoss(model[0].model.get_input_embeddings().weight, *read[:2])
        words = {"bag_of_words": word_loss, "bag_of_words_weight": weight}
    for size in (None, 1, 70):
        loss = contrastive_loss(model, temperature=0.1, micro_batch_tokens=size, **words)
        value = loss([dict(model.tokenize(column)) for column in texts], None)
        losses.append(value)
        found.append(gradients(model, value))
    for value, gradient in zip(losses[1:], found[1:], strict=True):
        torch.testing.assert_close(value, losses[0])
        for name, expected in found[0].items():
            torch.testing.assert_close(gradient[name], expected, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("weight", [None, 0.7])
@pytest.mark.parametrize("micro_batch_tokens", [None, 1, 70])
def test_one_pass_over_all_columns_changes_nothing(tmp_path, weight, micro_batch_tokens):
    """Packed columns that go through the model together have the loss and gradient of columns one after another."""
    model = SentenceTransformer(str(build_embedder("tiny", tmp_path / "base", max_tokens=32)), device="cpu").double()
    texts = [["one", "two two", "three"], ["a", "bb bb", "ccc"], ["x", "y y", "z"]]
    words = {}
    if weight is not None:
        read = [model.tokenizer(column)["input_ids"] for column in texts]
        word_loss = BagOfWordsLoss(model[0].model.get_input_embeddings().weight, *read[:2])
        words = {"bag_of_words": word_loss, "bag_of_words_weight": weight}
    assert use_packed_texts(model)
    found = []
    for one_pass in (False, True):
        loss = contrastive_loss(model, micro_batch_tokens=micro_batch_tokens, one_pass=one_pass, **words)
        passes = []
        hook = model[0].register_forward_hook(lambda *_: passes.append(1))  # noqa: B023
        value = loss([dict(model.preprocess(column)) for column in texts], None)
        hook.remove()
        found.append((value, gradients(model, value), len(passes)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-10, atol=0)
    for name, expected in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], expected, atol=1e-10, rtol=1e-8)
    assert found[1][2] <= found[0][2] / (3 if micro_batch_tokens is None else 1)


def test_words_are_added_to_the_contrastive_loss(tmp_path):
    """The weight times the mean, over both directions, of what each embedding says of the other text's words."""
    model = SentenceTransformer(str(build_embedder("tiny", tmp_path / "base", max_tokens=32)), device="cpu").double()
    texts = [["one", "two two", "three"], ["a", "bb bb", "ccc"]]
    queries, documents = (model.tokenizer(column)["input_ids"] for column in texts)
    word_loss = BagOfWordsLoss(model[0].model.get_input_embeddings().weight, queries, documents)
    e_Q, e_D = (model.encode(column, convert_to_tensor=True) for column in texts)
    told = sum(word_loss(e_Q, queries, documents, to="document")) / 3
    told += sum(word_loss(e_D, documents, queries, to="query")) / 3
    features = [dict(model.tokenize(column)) for column in texts]
    plain = contrastive_loss(model)([dict(column) for column in features], None)
    both = contrastive_loss(model, bag_of_words=word_loss, bag_of_words_weight=0.3)(features, None)
    torch.testing.assert_close(both, plain + 0.3 * told / 2)


def test_padded_texts_are_counted_by_the_length_limit(tmp_path):
    """Where texts are padded, a micro-batch has as many as always fit, one at least."""
    model = SentenceTransformer(str(build_embedder("tiny", tmp_path / "base", max_tokens=32)), device="cpu")
    assert contrastive_loss(model, micro_batch_tokens=70).mini_batch_size == 2
    assert contrastive_loss(model, micro_batch_tokens=1).mini_batch_size == 1


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [None, 70])
def test_negatives_of_some_rows_are_candidates_of_all(tmp_path, packed, size):
    """With hard negatives in some rows only, each query's candidates are all positives and all of these."""
    model = SentenceTransformer(str(build_embedder("tiny", tmp_path / "base", max_tokens=32)), device="cpu").double()
    assert not packed or use_packed_texts(model)
    columns = [["one", "two two", "three", "four"], ["a", "bb bb", "ccc", "d"], ["x", "y y"], ["z"]]
    loss = contrastive_loss(model, temperature=0.1, micro_batch_tokens=size)
    value = loss([dict(model.preprocess(column)) for column in columns], None)
    e_Q, *documents = (F.normalize(model.encode(texts, convert_to_tensor=True), dim=1) for texts in columns)
    expected = F.cross_entropy(e_Q @ torch.cat(documents).T / 0.1, torch.arange(4))
    torch.testing.assert_close(value, expected)
    gradient = gradients(model, value)
    embeddings = [model(dict(model.preprocess(column)))["sentence_embedding"] for column in columns]
    e_Q, *documents = (F.normalize(e, dim=1) for e in embeddings)
    plain = gradients(model, F.cross_entropy(e_Q @ torch.cat(documents).T / 0.1, torch.arange(4)))
    for name, expected in plain.items():
        torch.testing.assert_close(gradient[name], expected, atol=1e-8, rtol=1e-6)
