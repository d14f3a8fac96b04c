"""Stage II's loss against its formula, written out for texts that are encoded one by one: value and gradient."""

import functools

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

from anchorvec import build_embedder
from formulas import Reading, Words, contrastive_loss
from support import BagOfWords, stage_two_loss

QUERIES = ["how high", "what is the deepest lake", "who", "where do herons live, and otters too"]
POSITIVES = ["8,849 metres", "Baikal, in Siberia", "w", "By a river."]
NEGATIVES = [
    ["not high", "a shallow lake", "you", "in a forest"],
    ["low", "the sea", "I know him", "on the moon, maybe"],
]
# Every query has a w, which so weighs nothing: the third document is no words, neither told nor a candidate. Others of
# the candidates are the step's own texts, answers to its queries, what asks for its documents, and what it read itself.
SAMPLE = [
    *zip(QUERIES[:2], POSITIVES[:2], strict=True),
    ("how deep", "1,642 metres"),
    ("which w", "w"),
    ("how high", "a mile"),
    ("what mountain, below Siberia, is it", "8,849 metres"),
    ("who knows what", "what is the deepest lake"),
    ("By a river, w.", "no"),
]
TEMPERATURE, WEIGHT = 0.2, 0.7


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An embedder in fp32 on disk."""
    return build_embedder("tiny", tmp_path_factory.mktemp("loss") / "base", max_tokens=32, seed=1)


@pytest.fixture(scope="module")
def expected(base):
    """A function that gives value and gradient by the formula, in float64, and the words that it used."""

    @functools.cache
    def compute(negatives, with_words):
        # the eager attention takes its softmax in fp32
        plain = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa").double()
        encoded = SentenceTransformer(str(base), device="cpu").tokenizer
        reading = Reading(lambda text: encoded(text, add_special_tokens=False)["input_ids"], [], [0], 32)
        columns = [QUERIES, POSITIVES, *NEGATIVES[:negatives]]
        read = [[reading.read("", text) for text in column] for column in columns]
        contents = tuple([reading.content("", text) for text in column] for column in columns[:2])
        sample = [[reading.content("", pair[side]) for pair in SAMPLE] for side in (0, 1)]
        e_0 = torch.linspace(-1, 1, plain.config.hidden_size, dtype=torch.float64)
        words = Words(plain.get_input_embeddings().weight, *sample, e_0) if with_words else None
        loss, _ = contrastive_loss(plain, read, TEMPERATURE, words, WEIGHT, contents)
        loss.backward()
        gradient = {name: p.grad for name, p in plain.base_model.named_parameters()}
        return loss.detach(), gradient, BagOfWords(WEIGHT, *sample, e_0) if with_words else None

    return compute


@pytest.mark.parametrize("words", [False, True], ids=["alone", "words"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("micro_batch_tokens", [None, 64], ids=["at once", "cached"])
@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_equals_the_formula(base, expected, dtype, tolerance, negatives, micro_batch_tokens, packed, words):
    """In-batch and hard negatives, at once and by cached gradients, padded and packed, with words and without."""
    value, gradient, bag = expected(negatives, words)
    model = SentenceTransformer(str(base), device="cpu").to(dtype)
    loss = stage_two_loss(
        model,
        [QUERIES, POSITIVES, *NEGATIVES[:negatives]],
        temperature=TEMPERATURE,
        packed=packed,
        micro_batch_tokens=micro_batch_tokens,
        bag_of_words=bag,
    )
    loss.backward()
    assert loss.item() == pytest.approx(value.item(), rel=tolerance, abs=0)
    found = {name: p.grad.double() for name, p in model[0].model.named_parameters()}
    assert found.keys() == gradient.keys()
    off = torch.stack([(found[name] - g).norm() for name, g in gradient.items()])
    size = torch.stack([g.norm() for g in gradient.values()])
    assert off.norm() <= tolerance * size.norm()
    if dtype == torch.float64:  # of every weight by itself too
        assert (off <= tolerance * size).all()
