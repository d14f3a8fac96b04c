"""Texts encoded in batches of tokens have the vectors of the model's own `encode`."""

import pytest
import torch

from anchorvec.model import encoding
from anchorvec.model.embedder import build_embedder
from anchorvec.model.encoding import encode_packed
from anchorvec.model.loading import load_encoder, load_model


@pytest.mark.parametrize("most", [1, 40, 10_000])
def test_the_vectors_are_those_of_encode(tmp_path, monkeypatch, most):
    """In the order of the texts, with the prompt, texts over the limit cut, however they are grouped."""
    base = build_embedder("tiny", tmp_path / "base", max_tokens=32)
    texts = ["b", "", "a longer text", "c" * 100, *map(str, range(20))]
    expected = load_model(base).encode(texts, prompt="find: ", convert_to_tensor=True)
    monkeypatch.setitem(encoding.BATCH_TOKENS, "cpu", most)
    monkeypatch.setattr(encoding, "_TOKENIZED_AT_ONCE", 7)
    found = encode_packed(load_encoder(base), texts, prompt="find: ")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_no_texts_have_no_vectors(tmp_path):
    """An empty list gives an empty matrix of the model's width."""
    assert encode_packed(load_encoder(build_embedder("tiny", tmp_path / "base")), []).shape == (0, 64)


def test_a_padded_model_is_refused(tmp_path):
    """A model that reads padded texts has an `encode` of its own."""
    with pytest.raises(ValueError, match="padded"):
        encode_packed(load_model(build_embedder("tiny", tmp_path / "base")), ["a"])
