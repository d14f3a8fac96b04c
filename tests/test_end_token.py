"""Every text ends in the pooled token, in every program that reads the embedder's folder."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoTokenizer,
    GemmaTokenizer,
    LlamaTokenizer,
    Qwen2Tokenizer,
)

from anchorvec.model.embedder import build_embedder
from anchorvec.model.end import Template, template_of, with_end
from support import BOS, END, END_PROMPT, TOKENIZERS, bare_ids, make_model, make_tokenizer

ENDS = [None, END_PROMPT]

SCRIPTS = [
    "<|end|>",
    "<|bos|>",
    "<|pad|>",
    "text",
    "ابجد ",
    "日本語",
    "ไทย",
    "é",
    "e\u0301",
    "🏳️‍🌈",
    "\u202e",
    "\ufeff",
    "\x00",
    "\r\n\t ",
    "½",
]
TEXTS = st.lists(
    st.sampled_from(SCRIPTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=8
).map("".join)

examples = settings(max_examples=50, deadline=None, database=None)


def around(tokenizer, kind, end_prompt):
    """The ids that must stand before and after each text, from the tokenizer that was not touched."""
    prefix = [BOS] if kind == "bos" else []
    if end_prompt is None:
        return prefix, [END]
    before, after = (bare_ids(tokenizer, words) for words in end_prompt)
    return prefix + before, after


# The end of a text


@pytest.mark.parametrize("end_prompt", ENDS)
@pytest.mark.parametrize("kind", TOKENIZERS)
@examples
@given(text=TEXTS, spare=st.integers(-2, 2), side=st.sampled_from(["left", "right"]))
def test_a_text_is_cut_and_its_end_is_not(kind, end_prompt, text, spare, side):
    """Just below, at and just above the limit: what the tokenizer adds, the text's first tokens, one end."""
    tokenizer = make_tokenizer(kind)
    before, after = around(tokenizer, kind, end_prompt)
    content = bare_ids(tokenizer, text)
    room = max(1, len(content) + spare)
    ended = with_end(tokenizer, max_tokens=len(before) + room + len(after), end_prompt=end_prompt)
    expected = before + content[:room] + after

    ended.padding_side = side
    longest = "x" * (room + 3)
    batch = ended([text, longest, ""], truncation=True, padding=True, return_tensors="pt")
    rows = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert rows[0].tolist() == expected
    assert all(row[-len(after) :].tolist() == after for row in rows)
    assert batch["input_ids"].shape[1] == ended.model_max_length == len(before) + room + len(after)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_literal_of_the_end_token_is_content(kind):
    """A text that contains the end token's literal holds its id too; the template's end comes after it."""
    ended = with_end(make_tokenizer(kind), max_tokens=64)
    before, after = around(ended, kind, None)
    assert ended("a<|end|>b<|end|>")["input_ids"] == [*before, 65, END, 66, END, *after]


def test_a_pair_of_texts_ends_too():
    """A pair, which some programs pass to a tokenizer, becomes one text with one end."""
    ended = with_end(make_tokenizer("bos"), max_tokens=64)
    assert ended("a", "b")["input_ids"] == [BOS, 65, 66, END]


def test_an_end_prompt_may_hold_special_tokens():
    """A chat-like end prompt keeps its special tokens' own ids."""
    ended = with_end(make_tokenizer("bos"), max_tokens=64, end_prompt=("<|bos|>", "<|end|>x"))
    assert ended("a")["input_ids"] == [BOS, BOS, 65, END, 88]


def test_what_a_tokenizer_was_used_with_is_forgotten():
    """Truncation and padding that the base's tokenizer was last called with do not come along (T25)."""
    tokenizer = make_tokenizer("left")
    tokenizer.pad_token = "<|end|>"
    tokenizer(["ab", "abcdef"], truncation=True, max_length=3, padding="max_length")
    tokenizer.truncation_side = "left"
    ended = with_end(tokenizer, max_tokens=8, end_prompt=("", "wxyz"))
    assert ended(["abcdefghij", "a"], truncation=True, padding=True)["input_ids"] == [
        [65, 66, 67, 68, 87, 88, 89, 90],
        [65, 87, 88, 89, 90, END, END, END],
    ]


@pytest.mark.parametrize("max_tokens", [2, 3, 64])
def test_a_template_does_not_depend_on_the_limit(max_tokens):
    """The ids around a text are found also where hardly any text fits between them."""
    ended = with_end(make_tokenizer(), max_tokens=max_tokens)
    assert template_of(ended) == Template((), (END,))


def test_an_embedder_as_base_gets_a_new_end():
    """A base that has an end prompt already loses it; what its own base put before a text stays (T22)."""
    first = with_end(make_tokenizer("bos"), max_tokens=64, end_prompt=END_PROMPT)
    again = with_end(first, max_tokens=64, end_prompt=END_PROMPT)
    assert again.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    assert template_of(with_end(first, max_tokens=64)) == Template((BOS,), (END,))


# The saved folder


@pytest.fixture(scope="module", params=[(kind, end) for kind in ["bos", "chat"] for end in ENDS], ids=str)
def readers(request, tmp_path_factory):
    """The tokenizer in memory, and text -> ids of each of three programs that read its saved folder."""
    kind, end_prompt = request.param
    folder = tmp_path_factory.mktemp("readers")
    make_model().float().save_pretrained(folder / "base")
    make_tokenizer(kind).save_pretrained(folder / "base")
    embedder = build_embedder(folder / "base", folder / "embedder", max_tokens=48, end_prompt=end_prompt)
    model = SentenceTransformer(str(embedder), device="cpu")
    auto = AutoTokenizer.from_pretrained(embedder)
    bare = Tokenizer.from_file(str(embedder / "tokenizer.json"))
    return with_end(make_tokenizer(kind), max_tokens=48, end_prompt=end_prompt), [
        lambda text: model.preprocess([text])["input_ids"][0].tolist(),
        lambda text: auto(text, truncation=True)["input_ids"],
        lambda text: bare.encode(text).ids,
    ]


@examples
@given(text=TEXTS)
def test_every_program_reads_the_same_ids(readers, text):
    """sentence-transformers, AutoTokenizer and the tokenizers library agree with the tokenizer in memory."""
    made, programs = readers
    expected = made(text, truncation=True)["input_ids"]
    assert [read(text) for read in programs] == [expected] * len(programs)


def letters(special, *, byte_level):
    """A small vocabulary in the manner of Llama and Gemma, or of GPT-2 and Qwen, and its merges."""
    space = "Ġ" if byte_level else "▁"
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    if not byte_level:
        symbols = [f"<0x{byte:02X}>" for byte in range(256)] + [space, *"abcdefghijklmnopqrstuvwxyz"]
    merges = [(space, "t"), ("h", "e"), (space + "t", "he")]
    tokens = [*special, *symbols, *(left + right for left, right in merges)]
    return {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}


def llama_tokenizer(**options):
    """Llama 2's kind: byte fallback, a space before the text."""
    return LlamaTokenizer(**letters(["<unk>", "<s>", "</s>"], byte_level=False), **options)


def gemma_tokenizer(**options):
    """Gemma's kind: byte fallback, no space before the text, a pad token of its own."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    return GemmaTokenizer(**letters(special, byte_level=False), **options)


def qwen_tokenizer(**options):
    """Qwen's kind: bytes, NFC, single digits, no BOS."""
    return Qwen2Tokenizer(**letters(["<|endoftext|>", "<|im_end|>"], byte_level=True), **options)


@pytest.mark.parametrize("adds_end", [False, True])
@pytest.mark.parametrize(
    ("family", "make"),
    [
        ("llama", llama_tokenizer),
        ("mistral", llama_tokenizer),
        ("qwen2", qwen_tokenizer),
        (
            "qwen2",
            llama_tokenizer,
        ),  # transformers takes the Qwen class for this family, whatever the folder says
        ("qwen3", qwen_tokenizer),
        ("gemma2", gemma_tokenizer),
        ("gemma3_text", gemma_tokenizer),
    ],
)
def test_a_family_s_own_tokenizer_class(family, make, adds_end, save_base):
    """With `add_bos_token` and `add_eos_token`: BOS where there is one, one end, in every program (T22)."""
    options = {"add_bos_token": True, "add_eos_token": adds_end}
    base = save_base(make_model(family, vocab_size=320), make(**options))
    config = base / "tokenizer_config.json"  # saving drops the two options, folders on the hub have them
    config.write_text(json.dumps(json.loads(config.read_text()) | options))
    before = AutoTokenizer.from_pretrained(base)
    folder = build_embedder(base, base.parent / "embedder", max_tokens=24)
    auto = AutoTokenizer.from_pretrained(folder)
    bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = SentenceTransformer(str(folder), device="cpu")
    bos = [] if before.bos_token_id is None else [before.bos_token_id]
    for text in ["the  cat", " then", "", "é e\u0301 12 ½", "x</s><eos><|im_end|>", "日本語 🙂", "the " * 40]:
        room = 24 - len(bos) - 1
        expected = bos + bare_ids(before, text)[:room] + [before.eos_token_id]
        assert auto(text, truncation=True)["input_ids"] == expected
        assert bare.encode(text).ids == expected
        assert model.preprocess([text])["input_ids"][0].tolist() == expected


@pytest.mark.parametrize("between", [None, " again "])
def test_the_text_is_found_among_what_stands_around_it(between):
    """Of two copies the second one; neither the words before it nor those after it."""
    tokenizer = with_end(make_tokenizer("bos"), max_tokens=64, end_prompt=END_PROMPT, between=between)
    ids = tokenizer("some words")["input_ids"]
    template = template_of(tokenizer)
    assert ids[template.span(ids)] == template.once(bare_ids(tokenizer, "some words"))
