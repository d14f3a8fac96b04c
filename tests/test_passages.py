"""Long texts as passages: all of a text is in one of them, and a model reads each of them whole."""

import itertools
import random

import pytest
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from anchorvec.data.documents import Document
from anchorvec.data.passages import PassageCutter, document_prompt, passages_of
from anchorvec.errors import AnchorvecError
from anchorvec.model.embedder import build_embedder
from support import make_model, make_tokenizer

WORDS = ["a", "sea", "harbour", "nothing", "antidisestablishmentarianism", "où", "水", "👩‍🚀", "ﷺ", "x=1;", "\n", "\t"]


def trained_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of words and parts of them, of 500 tokens at most, that was trained on texts of WORDS."""
    special = ["<unk>", "<|end|>"]
    if kind == "wordpiece":  # white space has no tokens, texts are normalized
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special)
    elif kind == "metaspace":  # a token may begin with a space that a text's first word does not have
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special)
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator([drawn_text(500, seed) for seed in range(5)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", unk_token="<unk>")


def drawn_text(words: int, seed: int) -> str:
    """So many of WORDS, with spaces between most of them."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice(["", " ", " ", " ", "  "]) for _ in range(words))


@pytest.fixture(scope="module", params=["bytes", "bos", "bpe", "wordpiece", "metaspace"])
def model(request, tmp_path_factory) -> SentenceTransformer:
    """An embedder that reads 40 tokens, with a document prompt."""
    kinds = {"bytes": "plain", "bos": "bos"}
    tokenizer = make_tokenizer(kinds[request.param]) if request.param in kinds else trained_tokenizer(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    make_model(vocab_size=600).float().save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    build_embedder(folder / "base", folder / "model", max_tokens=40, prompts={"document": "doc: "})
    return SentenceTransformer(str(folder / "model"), device="cpu")


TEXTS = {
    "words": drawn_text(1_000, 7),
    "one word": "z" * 1_500,
    "no white space": "".join(drawn_text(400, 8).split()),
    "emoji": "👩‍🚀" * 200,
    "long blanks": "one" + " " * 3_000 + "two\n" + "\n" * 2_000 + "three",
    "blank ends": "\n \n" + drawn_text(100, 9) + "   \n",
    "lines": "\n".join(f"line {i} is about nothing" for i in range(200)),
    "short": "a sea",
    "controls": "\x01\x02\u200b\u2028" * 100,
}


@pytest.mark.parametrize("name", TEXTS)
def test_every_character_is_in_a_passage_that_the_model_reads_whole(model, name):
    """The spans go from the first character to the last without a gap, white space aside; none is cut by the limit."""
    text = TEXTS[name]
    prompt = document_prompt(model)
    [spans] = PassageCutter(model, prompt)([text])
    covered = set().union(*(range(begin, end) for begin, end in spans))
    assert all(i in covered or character.isspace() for i, character in enumerate(text))
    assert all(later > earlier for (earlier, _), (later, _) in itertools.pairwise(spans))
    for begin, end in spans:
        ids = model.tokenizer(prompt + text[begin:end].strip(), truncation=False)["input_ids"]
        assert len(ids) <= 40


def test_passages_share_about_a_fifth_and_cut_no_word(model):
    """Where there is white space near; a text that fits is one passage."""
    text = TEXTS["lines"]
    [spans, short] = PassageCutter(model, document_prompt(model))([text, "a sea"])
    assert short == [(0, 5)]
    for (begin, end), (next_begin, _) in itertools.pairwise(spans):
        assert text[end - 1].isspace() or text[end].isspace()
        assert text[next_begin - 1].isspace() or text[next_begin].isspace()
        assert 0.1 < (end - next_begin) / (end - begin) < 0.5


def test_a_passage_knows_its_line_and_a_row_its_number(model):
    """Of text the line that the passage begins in; of data that of its row, with its number and id."""
    lines = [f"line {i} is about nothing" for i in range(200)]
    text = "\n\n" + "\n".join(lines)
    passages = passages_of([Document(text, "a.txt"), Document(text, "a.csv", 7, 3, "x")], model)
    of_text, of_row = passages[: len(passages) // 2], passages[len(passages) // 2 :]
    assert [passage.text for passage in of_text] == [passage.text for passage in of_row]
    assert {(p.file, p.line, p.record, p.id) for p in of_row} == {("a.csv", 7, 3, "x")}
    for passage in of_text:
        assert passage.text.split("\n")[0] in text.split("\n")[passage.line - 1]
    assert (of_text[0].line, of_text[-1].line > 150) == (3, True)


def test_a_model_without_a_limit_reads_a_text_as_one(model, monkeypatch):
    """There is nothing to cut by."""
    monkeypatch.setattr(model.tokenizer, "model_max_length", int(1e30))
    assert PassageCutter(model, "")([TEXTS["lines"], " "]) == [[(0, len(TEXTS["lines"]))], []]


def test_a_prompt_that_leaves_no_room_is_refused(model):
    """With the tokens that there are, and those that stand around a text."""
    with pytest.raises(AnchorvecError, match=r"the model reads 40 tokens, of which \d+ stand around"):
        PassageCutter(model, "水 " * 50)


def test_a_tokenizer_that_knows_no_places_cuts_by_characters(model, monkeypatch):
    """Passages are shorter than they could be, but all of a text is in one of them, and none is cut."""
    monkeypatch.setattr(model[0], "processor", ByT5Tokenizer(model_max_length=40))
    assert not model.tokenizer.is_fast
    text = TEXTS["words"]
    [spans] = PassageCutter(model, "doc: ")([text])
    covered = set().union(*(range(begin, end) for begin, end in spans))
    assert all(i in covered or character.isspace() for i, character in enumerate(text))
    lengths = [len(model.tokenizer("doc: " + text[begin:end].strip())["input_ids"]) for begin, end in spans]
    assert max(lengths) <= 40
    assert sum(lengths) / len(lengths) > 25
