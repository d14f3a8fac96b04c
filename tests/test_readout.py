"""How a text becomes one vector, in every program that reads the folder: read twice, in both directions, as a mean."""

import json

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig

import formulas
from anchorvec import Readout, load_recipe
from anchorvec.commands.decode import decode
from anchorvec.data.reading import check_instructions, text_span
from anchorvec.data.tokens import PairTokenizer
from anchorvec.errors import AnchorvecError
from anchorvec.exporting.folder import encode_with_transformers, export
from anchorvec.model.decoder import is_bidirectional, read_both_ways
from anchorvec.model.embedder import build_embedder, load_causal_lm
from anchorvec.model.encoding import encode_packed
from anchorvec.model.end import template_of, with_end
from anchorvec.model.loading import load_encoder
from anchorvec.model.packing import packed_states, padded_states, use_packed_attention
from anchorvec.model.readout import prompt_length, stored_readout
from anchorvec.objectives.reconstruction import TextReconstruction
from anchorvec.start import with_settings_of_base
from families import config_classes, tiny_model
from support import FAMILIES, assert_same_gradients, bare_ids, gradients, make_model, make_pairs, make_tokenizer

MEAN = {"pooling": "mean", "closed": False, "pool_prompt": False}
TEXTS = ["a", "日本語", "twelve words " * 9, "some more text", "x <|end|> y"]


def embedder(save_base, readout, *, kind="plain", prompts=None, family="llama"):
    """The folder of a tiny embedder that reads so."""
    base = save_base(make_model(family), make_tokenizer(kind))
    return build_embedder(base, base.parent / "embedder", readout=readout, prompts=prompts)


# A text that is read twice


@pytest.mark.parametrize("between", ["", "\nAgain: "])
@pytest.mark.parametrize("kind", ["bos", "chat"])
def test_a_text_that_is_read_twice_is_so_in_every_program(kind, between, save_base):
    """Both copies are cut at the limit, which counts one; the last token is the end (Echo)."""
    folder = embedder(save_base, Readout(24, between=between), kind=kind)
    tokenizer, added = make_tokenizer(kind), [257] * (kind == "bos")
    model, auto = SentenceTransformer(str(folder), device="cpu"), AutoTokenizer.from_pretrained(folder)
    bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
    words = bare_ids(tokenizer, between)
    around = len(added) + len(words) + 1
    for text in ["", "short", "x" * 99]:
        copy = bare_ids(tokenizer, text)[: 24 - around]
        expected = [*added, *copy, *words, *copy, 0]
        assert model.preprocess([text])["input_ids"][0].tolist() == expected
        assert auto(text, truncation=True)["input_ids"] == expected
        assert bare.encode(text).ids == expected
    assert len(expected) == template_of(auto).tokens(24) == 2 * 24 - around
    assert model.max_seq_length == 24
    plain = load_causal_lm(folder).eval()
    torch.testing.assert_close(model.encode(["x" * 99], convert_to_tensor=True)[0], formulas.embed(plain, expected))
    torch.testing.assert_close(encode_with_transformers(folder, ["x" * 99])[0], formulas.embed(plain, expected))
    assert stored_readout(folder) == Readout(24, between=between)


def test_both_copies_count_against_the_positions_of_a_model(tmp_path):
    """600 tokens twice are more than 1,024."""
    with pytest.raises(AnchorvecError, match=r"600, with which 1199 are read in two copies, is more than the 1024"):
        build_embedder("tiny", tmp_path / "embedder", readout=Readout(600, between=""))


@pytest.mark.parametrize("end_token", [True, False])
def test_targets_of_a_text_that_is_read_twice_stand_there_once(end_token):
    """A template with two copies doubles a text without special tokens too; targets and content are one copy."""
    recipe = load_recipe("debug", ["data.train.0.instruction='ask: '", "model.read=twice"])
    tokenizer = with_end(make_tokenizer("bos"), max_tokens=24, between="|")
    row = {"query": "why?", "positive": "x" * 40, "query_prompt": "ask: ", "document_prompt": ""}
    [pair] = PairTokenizer(tokenizer, end_token_target=end_token)([row])["pairs"]
    assert tokenizer.decode(pair.query) == "<|bos|>ask: why?|ask: why?<|end|>"
    assert tokenizer.decode(pair.query_targets) == "why?" + "<|end|>" * end_token
    assert tokenizer.decode(pair.document_targets) == "x" * 21
    span = text_span(tokenizer, recipe)
    assert [tokenizer.decode(ids[span(ids)]) for ids in (pair.query, pair.document)] == ["why?", "x" * 21]
    assert span(pair.query).stop == len(pair.query) - 1  # the second copy


# A mean


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("kind", ["plain", "bos"])
def test_a_mean_is_of_the_states_of_the_text_alone(kind, bidirectional, save_base):
    """Not of those of the instruction: the mean of AutoModel's states over exactly the text's positions (T32)."""
    direction = "bidirectional" if bidirectional else "causal"
    prompts = {"query": "Instruct: find it. Query:", "document": "Text:"}
    folder = embedder(save_base, Readout(64, **MEAN, attention_direction=direction), kind=kind, prompts=prompts)
    plain, tokenizer = load_causal_lm(folder).eval(), make_tokenizer(kind)
    plain.config.is_causal = True  # `embed` has a mask of its own
    model = SentenceTransformer(str(folder), device="cpu")
    encoder = load_encoder(folder)
    for side, prompt in prompts.items():
        before = [257] * (kind == "bos") + bare_ids(tokenizer, prompt)
        texts = [text for text in TEXTS if len(before) + len(bare_ids(tokenizer, text)) <= 64]
        read = [(before + bare_ids(tokenizer, text), len(before)) for text in texts]
        options = {"pooling": "mean", "bidirectional": bidirectional}
        expected = torch.stack([formulas.embed(plain, ids, left_out=n, **options) for ids, n in read])
        assert prompt_length(model.tokenizer, prompt) == len(before)
        assert model.preprocess(["a"], prompt=prompt)["prompt_length"] == len(before)
        for found in (
            model.encode(texts, prompt_name=side, convert_to_tensor=True),
            encoder.encode(texts, prompt_name=side, convert_to_tensor=True),
            encode_packed(encoder, texts, prompt=prompt),
        ):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", ["lasttoken", "mean", "weightedmean"])
@pytest.mark.parametrize("left_out", [0, 3])
def test_poolings_are_those_of_sentence_transformers(mode, left_out):
    """Of packed texts, with a prompt left out of a mean and not of the last token."""
    lengths, states = [5, 9, 4], torch.randn(18, 8, dtype=torch.float64)
    readout = Readout(pooling=mode, pool_prompt=False)
    [pooling] = readout.modules(8)
    starts = torch.tensor([0, *np.cumsum(lengths)])
    features = {"token_embeddings": states[None], "cu_seq_lens_q": starts, "prompt_length": left_out}
    expected = pooling(features)["sentence_embedding"]
    assert isinstance(pooling, Pooling)
    torch.testing.assert_close(readout.pool(states, lengths, [left_out] * 3), expected)


def test_an_end_token_is_a_part_of_a_mean(save_base):
    """And nothing is, where a text is not closed."""
    folder = embedder(save_base, Readout(64, pooling="mean"))
    plain = load_causal_lm(folder).eval()
    found = SentenceTransformer(str(folder), device="cpu").encode(["abc"], convert_to_tensor=True)[0]
    torch.testing.assert_close(found, formulas.embed(plain, [65, 66, 67, 0], pooling="mean"))
    assert "what stands around it" in str(Readout(pooling="mean"))
    assert "what stands around it" not in str(Readout(pooling="mean", closed=False))


@pytest.mark.parametrize("instruction", ["find: ", "find:\n", "fin"])
def test_an_instruction_that_is_read_otherwise_alone_is_refused(instruction, save_base):
    """One that ends in white space, or in what the first letters of a text are joined to: its length is not its own."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = tokenizer.train_new_from_iterator(["fina find: The"] * 9, 300)
    left_out = ["model.pooling=mean", "model.end=none", "model.pool_prompt=false"]

    def check(instruction):
        recipe = load_recipe("debug", [*left_out, f"data.train.0.instruction={json.dumps(instruction)}"])
        check_instructions(recipe, with_end(tokenizer, max_tokens=64, closed=False))

    with pytest.raises(AnchorvecError, match=r"data\.train\.0\.instruction: .* is read otherwise before a text"):
        check(instruction)
    check("find:")


# Both directions


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_alone_in_both_directions(family):
    """States of packed and padded texts are those of each text alone, and depend on later tokens (T34)."""
    model, lengths = make_model(family), [3, 1, 7, 4, 40]
    read_both_ways(model, "here", writes=True)
    words = model.get_input_embeddings()(torch.randint(0, 250, (sum(lengths),))).detach()
    with torch.no_grad():
        alone = torch.cat([model.base_model(inputs_embeds=w[None]).last_hidden_state[0] for w in words.split(lengths)])
        torch.testing.assert_close(padded_states(model, words, lengths), alone, atol=1e-6, rtol=1e-6)
        assert use_packed_attention(model)
        torch.testing.assert_close(packed_states(model, words, lengths), alone, atol=1e-6, rtol=1e-6)
        model.config.is_causal = True
        assert (packed_states(model, words, lengths) - alone).abs().max() > 1e-3


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_is_written_causally_by_a_model_that_reads_both_ways(family, packed):
    """The states of a text that is written are those of the causal model."""
    model, lengths = make_model(family), [3, 9, 12]
    words = model.get_input_embeddings()(torch.randint(0, 250, (sum(lengths),))).detach()
    states = packed_states if packed else padded_states
    with torch.no_grad():
        causal = padded_states(model, words, lengths)
        read_both_ways(model, "here", writes=True)
        assert not packed or use_packed_attention(model)
        torch.testing.assert_close(states(model, words, lengths, writing=True), causal, atol=1e-6, rtol=1e-6)
        assert (states(model, words, lengths) - causal).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_gradients_do_not_depend_on_packing_in_both_directions(family):
    """Of texts written from means of bidirectional states, with prompts left out."""
    tolerance = 1e-5 if family.startswith("gemma") else 1e-9
    model, pairs = make_model(family), make_pairs(6)
    pairs = [type(p)(p.query, p.document, p.query_targets, p.document_targets, 1, 2) for p in pairs]
    read_both_ways(model, "here", writes=True)
    readout = Readout(attention_direction="bidirectional", pooling="mean", pool_prompt=False)
    plain = TextReconstruction(model, readout=readout)(pairs).loss
    expected = gradients(model, plain)
    objective = TextReconstruction(model, readout=readout, packed=True)
    assert objective.packed
    loss = objective(pairs).loss
    torch.testing.assert_close(loss, plain, rtol=tolerance, atol=0)
    assert_same_gradients(gradients(model, loss), expected, tolerance)


@pytest.mark.parametrize("pooling", ["mean", "weightedmean", "lasttoken"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])
def test_texts_written_from_any_readout_equal_the_formulas(pooling, bidirectional):
    """The paper's loss with another embedding in it, in fp64: value and gradient."""
    model = make_model()
    drawn = make_pairs(5)
    pairs = [type(p)(p.query, p.document, p.query_targets, p.document_targets, 1, 2) for p in drawn]

    def e(ids, left_out):
        return formulas.embed(model, ids, pooling=pooling, left_out=left_out, bidirectional=bidirectional)

    q2d = -sum(formulas.log_likelihood(model, e(p.query, 1), p.document_targets) for p in pairs)
    d2q = -sum(formulas.log_likelihood(model, e(p.document, 2), p.query_targets) for p in pairs)
    counts = [sum(len(getattr(p, side)) for p in pairs) for side in ("document_targets", "query_targets")]
    expected = 0.2 * q2d / counts[0] + 0.8 * d2q / counts[1]
    expected_gradients = gradients(model, expected)
    if bidirectional:
        read_both_ways(model, "here", writes=True)
    direction = "bidirectional" if bidirectional else "causal"
    readout = Readout(pooling=pooling, pool_prompt=False, attention_direction=direction)
    for packed in (False, True):
        loss = TextReconstruction(model, readout=readout, packed=packed)(pairs).loss
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        assert_same_gradients(gradients(model, loss), expected_gradients, 1e-9)


@pytest.mark.parametrize("window", [2, 4, 7])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_window_reaches_both_ways_as_the_family_has_it(family, window):
    """Packed, in either direction, as far as in the family's own mask."""
    config, lengths = make_model(family).config, [9, 3, 12]
    config.sliding_window = window
    model = AutoModelForCausalLM.from_config(config).double().eval()
    words = model.get_input_embeddings()(torch.randint(0, 250, (sum(lengths),))).detach()
    read_both_ways(model, "here")
    with torch.no_grad():
        alone = padded_states(model, words, lengths)
        causal = padded_states(model, words, lengths, writing=True)
        assert use_packed_attention(model)
        torch.testing.assert_close(packed_states(model, words, lengths), alone, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(packed_states(model, words, lengths, writing=True), causal, atol=1e-6, rtol=1e-6)


def test_checkpointed_activations_keep_the_direction():
    """Gradient checkpointing computes again what was computed."""
    model, pairs = make_model().train(), make_pairs()
    read_both_ways(model, "here", writes=True)
    objective = TextReconstruction(model, packed=True)
    expected = gradients(model, objective(pairs).loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(gradients(model, objective(pairs).loss), expected)


def test_a_family_that_takes_no_notice_of_the_direction_is_refused():
    """By what it does: a recurrent state goes one way."""
    model = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99))
    with pytest.raises(AnchorvecError, match=r"attention_direction: here \(mamba\) has no attention that can be set"):
        read_both_ways(model, "here")


def test_a_family_that_cannot_write_when_it_reads_both_ways_is_refused_where_it_must(tmp_path):
    """Bloom's mask follows the configuration alone."""
    model = tiny_model(config_classes()["bloom"], tmp_path)
    read_both_ways(model, "here")
    with pytest.raises(AnchorvecError, match=r"\(bloom\) cannot write any more when it is set to both directions"):
        read_both_ways(model, "here", writes=True)


def test_the_folder_says_in_which_direction_it_is_read(save_base):
    """In config.json, in every later form of it; the export and its card name what reads it as causal."""
    readout = Readout(32, **MEAN, attention_direction="bidirectional")
    folder = embedder(save_base, readout)
    exported = export(folder, folder.parent / "model")
    for path in (folder, folder.parent / "model"):
        assert json.loads((path / "config.json").read_text())["is_causal"] is False
        assert stored_readout(path) == readout
    assert is_bidirectional(load_causal_lm(folder))
    assert "transformers 4.57 reads this folder as causal" in exported.not_compared
    assert "transformers 4.57 reads this folder as causal" in exported.__rich__()
    card = (folder.parent / "model" / "README.md").read_text()
    title, first = card.partition("# model\n")[1:][0], card.partition("# model\n")[2].strip().splitlines()[0]
    assert title
    assert "transformers 4.57 reads this folder as causal" in first
    assert "mean of the final states of all its tokens, its instruction left out" in " ".join(card.split())
    assert "is_causal" not in json.loads((embedder_of_a_causal(save_base) / "config.json").read_text())


def embedder_of_a_causal(save_base):
    """A folder that is read as ever."""
    base = save_base(make_model(), make_tokenizer(), "other")
    return build_embedder(base, base.parent / "causal", max_tokens=32)


@pytest.mark.parametrize("readout", [Readout(32, **MEAN, attention_direction="bidirectional"), Readout(32, between="")])
def test_an_embedder_as_base_keeps_how_it_reads(readout, save_base, capsys):
    """Unless the recipe names another way; one line says what is kept and what is replaced."""
    folder = embedder(save_base, readout)
    kept = with_settings_of_base(load_recipe("debug", [f"model.base={folder}"])).model
    named = {"model.read=once", "model.attention_direction=causal", "model.pooling=lasttoken", "model.pool_prompt=true"}
    other = with_settings_of_base(
        load_recipe("debug", [f"model.base={folder}", *named, "model.end=token", "model.max_tokens=32"])
    ).model
    if readout.between is None:
        assert (kept.attention_direction, kept.pooling, kept.pool_prompt, kept.end) == (
            "bidirectional",
            "mean",
            False,
            "none",
        )
        assert "its attention_direction 'bidirectional', by 'causal'" in capsys.readouterr().err
    else:
        assert (kept.read, kept.between) == ("twice", "")
        assert "its read 'twice', by 'once'" in capsys.readouterr().err
    assert (other.read, other.attention_direction, other.pooling) == ("once", "causal", "lasttoken")


@pytest.mark.parametrize("readout", [Readout(32, **MEAN, attention_direction="bidirectional"), Readout(32, between="")])
def test_decode_reads_as_the_folder_says_and_writes_causally(readout, save_base):
    """The likeliest first token is that of the formulas, from the embedding that the folder gives."""
    folder = embedder(save_base, readout, prompts={"query": "ask:"})
    e = SentenceTransformer(str(folder), device="cpu").encode_query(["why"], convert_to_tensor=True)[0]
    plain = load_causal_lm(folder).eval()
    plain.config.is_causal = True
    with torch.no_grad():
        found = plain(inputs_embeds=e[None, None], use_cache=False).logits[0, -1].softmax(-1)
        written = plain.generate(inputs_embeds=e[None, None], max_new_tokens=6, do_sample=False, eos_token_id=0)
    decoded = decode(folder, "why", max_tokens=6, first_tokens=1)
    assert decoded.first_tokens[0][1] == pytest.approx(float(found.max()), rel=1e-4)
    assert decoded.text == AutoTokenizer.from_pretrained(folder).decode(written[0], skip_special_tokens=True)


def test_words_around_a_text_are_those_of_the_readout():
    """Before it and after it, in the tokenizer that is stored."""
    tokenizer = Readout(32, end_prompt=("<", ">>")).tokenizer(make_tokenizer())
    assert tokenizer.decode(tokenizer("a b")["input_ids"]) == "<a b>>"
