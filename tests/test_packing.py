"""Packed texts have the states, the loss and the gradient of each text alone (T20)."""

import copy
import pickle

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    MambaConfig,
    Qwen2MoeConfig,
    StableLmConfig,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from anchorvec.model import attention, packing
from anchorvec.model.attention import PACKED_ATTENTION
from anchorvec.model.embedder import build_embedder, load_causal_lm, save_causal_lm
from anchorvec.model.loading import load_encoder
from anchorvec.model.packing import packed_states, padded_states, reads_packed, use_packed_attention, use_packed_texts
from anchorvec.objectives.contrastive import contrastive_loss
from anchorvec.objectives.pairs import exchange_partners
from anchorvec.objectives.reconstruction import TextReconstruction
from anchorvec.pipeline import train
from anchorvec.recipe import load_recipe
from support import FAMILIES, assert_same_gradients, gradients, make_model, make_pairs, make_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_is_alone(family):
    """The states of packed texts are those of each text in a forward pass of its own."""
    model, lengths = make_model(family), [3, 1, 7, 3, 40]
    words = model.get_input_embeddings()(torch.randint(0, 250, (sum(lengths),))).detach()
    with torch.no_grad():
        alone = torch.cat(
            [model.base_model(inputs_embeds=part[None]).last_hidden_state[0] for part in words.split(lengths)]
        )
        torch.testing.assert_close(padded_states(model, words, lengths), alone, atol=1e-6, rtol=1e-6)
        assert use_packed_attention(model)
        torch.testing.assert_close(packed_states(model, words, lengths), alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_do_not_depend_on_packing(family, tied):
    """Packed and padded Stage I agree: value, and every parameter's gradient."""
    tolerance = 1e-5 if family.startswith("gemma") else 1e-10  # Gemma computes in fp32 inside
    model, pairs = make_model(family, tied=tied), make_pairs(8)
    plain = TextReconstruction(model)(pairs, exchange=exchange_partners(pairs))
    expected = gradients(model, plain.loss)
    objective = TextReconstruction(model, packed=True)
    assert objective.packed
    packed = objective(pairs, exchange=exchange_partners(pairs))
    torch.testing.assert_close(packed.loss, plain.loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(
        packed.exchanged["document_to_query"], plain.exchanged["document_to_query"], rtol=tolerance, atol=0
    )
    assert_same_gradients(gradients(model, packed.loss), expected, tolerance)


def see_the_neighbour(starts):
    """The first two texts as one."""
    return torch.cat([starts[:1], starts[2:]])


def end_too_late(starts):
    """The first text takes the first token of the second one."""
    return starts + torch.tensor([0, 1, *[0] * (len(starts) - 2)], dtype=starts.dtype)


def end_too_early(starts):
    """The last text but one lacks its last token, which the last one has."""
    return starts - torch.tensor([*[0] * (len(starts) - 2), 1, 0], dtype=starts.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", [see_the_neighbour, end_too_late, end_too_early, None])
def test_a_kernel_that_mixes_texts_is_refused(fault, dtype):
    """By the check of states and gradients, in either format; the kernel as it is passes."""
    model = make_model().to(dtype)

    def broken(*args, cu_seq_lens_q=None, **kwargs):
        starts = cu_seq_lens_q if cu_seq_lens_q is None or fault is None else fault(cu_seq_lens_q)
        return attention.packed_attention(*args, cu_seq_lens_q=starts, **kwargs)

    ALL_ATTENTION_FUNCTIONS[PACKED_ATTENTION] = broken
    try:
        assert use_packed_attention(model) == (fault is None)
    finally:
        del ALL_ATTENTION_FUNCTIONS[PACKED_ATTENTION]
    assert (model.config._attn_implementation == PACKED_ATTENTION) == (fault is None)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["text", "bag_of_words"])
def test_a_trained_model_passes_the_check(tmp_path, target):
    """After 200 steps of Stage I, in fp32 and in bf16, whose rounding grows with training (T35)."""
    overrides = [f"output={tmp_path / 'run'}", "stage_one.steps=200", "stage_two=null", f"stage_one.target={target}"]
    train(load_recipe("debug", overrides))
    for dtype in (torch.float32, torch.bfloat16):
        assert use_packed_attention(load_causal_lm(tmp_path / "run" / "stage_one").to(dtype))


def test_texts_that_were_encoded_can_be_trained_on():
    """What is known of texts of some lengths is kept from one use to the next."""
    parts = [torch.randn(1, 2, 9, 4, dtype=torch.bfloat16) for _ in range(3)]
    starts = torch.tensor([0, 4, 9]).int()
    with torch.inference_mode():
        encoded, _ = attention.packed_attention(torch.nn.Identity(), *parts, None, cu_seq_lens_q=starts, max_length_q=5)
    query = parts[0].clone().requires_grad_()
    trained, _ = attention.packed_attention(
        torch.nn.Identity(), query, *parts[1:], None, cu_seq_lens_q=starts, max_length_q=5
    )
    trained.sum().backward()
    assert query.grad is not None
    torch.testing.assert_close(trained, encoded)


def test_a_window_shorter_than_a_text_is_kept():
    """A sliding window is applied within each packed text."""
    model = make_model("mistral")
    model.config.sliding_window = 4
    lengths = [9, 3, 12]
    words = model.get_input_embeddings()(torch.randint(0, 250, (sum(lengths),))).detach()
    with torch.no_grad():
        alone = padded_states(model, words, lengths)
        assert use_packed_attention(model)
        torch.testing.assert_close(packed_states(model, words, lengths), alone, atol=1e-6, rtol=1e-6)
        model.config.sliding_window = None
        assert (packed_states(model, words, lengths) - alone).abs().max() > 1e-4


def test_checkpointed_activations_change_nothing():
    """Gradient checkpointing passes the packed lengths on when it computes again."""
    model, pairs = make_model().train(), make_pairs()
    objective = TextReconstruction(model, packed=True)
    expected = gradients(model, objective(pairs).loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(gradients(model, objective(pairs).loss), expected)


def test_packing_leaves_no_trace_in_the_saved_model(tmp_path, save_base):
    """The attention used for training is not written into config.json."""
    base = save_base(make_model(), make_tokenizer())
    model = make_model().float()
    assert use_packed_attention(model)
    save_causal_lm(model, base, tmp_path / "saved")
    assert PACKED_ATTENTION not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.parametrize("micro_batch_tokens", [None, 70])
def test_stage_two_reads_the_texts_of_a_batch_packed(tmp_path, micro_batch_tokens):
    """sentence-transformers' losses have the same value and gradient on packed texts, and encode the same vectors."""
    model = SentenceTransformer(str(build_embedder("tiny", tmp_path / "base", max_tokens=32)), device="cpu").double()
    texts = [["one", "a much longer query " * 3, "three"], ["a " * 40, "bb bb", "c"]]

    def loss_gradients_vectors():
        loss = contrastive_loss(model, micro_batch_tokens=micro_batch_tokens)(
            [dict(model.preprocess(column, prompt="find: ")) for column in texts], None
        )
        return loss, gradients(model, loss), model.encode([*texts[0], *texts[1]], batch_size=4, convert_to_tensor=True)

    loss, expected, vectors = loss_gradients_vectors()
    assert use_packed_texts(model)
    assert model.preprocess(texts[0])["input_ids"].shape[0] == 1
    packed_loss, found, packed_vectors = loss_gradients_vectors()
    torch.testing.assert_close(packed_loss, loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(packed_vectors, vectors, rtol=1e-6, atol=1e-7)
    assert_same_gradients(found, expected)


def test_a_packed_model_is_saved_as_any_other(tmp_path):
    """A folder saved from an embedder that read packed texts is the same as without."""
    base = build_embedder("tiny", tmp_path / "base", max_tokens=32)
    for name in ("plain", "packed"):
        model = SentenceTransformer(str(base), device="cpu")
        assert name == "plain" or use_packed_texts(model)
        model.encode(["a text"])
        model.save_pretrained(str(tmp_path / name), create_model_card=False)
    for file in ("config.json", "modules.json", "sentence_bert_config.json", "tokenizer.json"):
        assert (tmp_path / "packed" / file).read_text() == (tmp_path / "plain" / file).read_text()


def test_folders_are_encoded_packed_and_models_left_alone(tmp_path):
    """`evaluate` and `search` read a decoder's folder without padding; a model that they are given stays as it is."""
    base = build_embedder("tiny", tmp_path / "base", max_tokens=32)
    model, texts = SentenceTransformer(str(base), device="cpu"), ["one", "a longer text " * 5, "", "two"]
    encoder = load_encoder(base)
    assert reads_packed(encoder)
    assert load_encoder(model) is model
    assert not reads_packed(model)
    np.testing.assert_allclose(encoder.encode(texts), model.encode(texts), rtol=1e-4, atol=1e-5)


def test_an_encoder_with_bidirectional_attention_is_not_packed(tmp_path):
    """Packed attention is causal; a model that reads both ways, or has no decoder, is left alone."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=len(tokenizer)
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    transformer = Transformer(str(tmp_path / "bert"))
    model = SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu")
    before = model.encode(["one", "two words"])
    assert not use_packed_texts(model)
    np.testing.assert_array_equal(model.encode(["one", "two words"]), before)
    assert not use_packed_texts(SentenceTransformer(modules=[StaticEmbedding(tokenizer._tokenizer, embedding_dim=8)]))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_can_be_used_in_every_other_way(family):
    """Padded on either side with a mask, or writing with a cache, it does what it did before."""
    model = make_model(family)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12], [0, 0, 0, 5, 6, 7, 8, 9]])
    batches = [{"input_ids": ids, "attention_mask": mask} for mask in ((ids > 0).long(), (ids > 0).long().flip(1))]

    def outputs():
        states = [model.base_model(**batch).last_hidden_state[batch["attention_mask"].bool()] for batch in batches]
        cache = model(ids[:1, :4], use_cache=True).past_key_values
        states.append(model.base_model(ids[:1, 4:], past_key_values=cache).last_hidden_state)
        return [*states, model(ids[:1]).logits, model.generate(ids[:1], max_new_tokens=4, do_sample=False)]

    with torch.no_grad():
        expected = outputs()
        assert use_packed_attention(model)
        assert use_packed_attention(model)  # once more changes nothing
        for found, wanted in zip(outputs(), expected, strict=True):
            known = wanted.isfinite()  # Gemma 2's own attention gives NaN for texts that are padded on the left
            assert known.any()
            torch.testing.assert_close(found[known], wanted[known], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(
            TextReconstruction(model)(make_pairs()).loss, TextReconstruction(make_model(family))(make_pairs()).loss
        )


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 99,
}


@pytest.mark.parametrize(
    "config",
    [
        StableLmConfig(**SIZES),  # drops what packed attention must be told
        Qwen2MoeConfig(
            **SIZES,
            use_sliding_window=True,
            sliding_window=4,
            layer_types=["sliding_attention"] * 2,
            num_experts=4,
            num_experts_per_tok=1,
        ),  # its window is in the mask alone
        MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99),  # a recurrent state
    ],
    ids=lambda config: config.model_type,
)
def test_families_that_cannot_be_packed_are_left_as_they_were(config):
    """Their texts are padded."""
    model = AutoModelForCausalLM.from_config(config).eval()
    before = model.config._attn_implementation
    assert not use_packed_attention(model)
    assert model.config._attn_implementation == before


def test_an_encoder_decoder_is_padded(tmp_path):
    """Bart has a decoder, but an embedder reads it through its encoder."""
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 300}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    BartModel(BartConfig(**sizes, **heads)).save_pretrained(tmp_path / "bart")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "bart")
    model = SentenceTransformer(modules=[Transformer(str(tmp_path / "bart")), Pooling(32)], device="cpu")
    assert not use_packed_texts(model)
    model.encode(["one"])


def test_an_empty_text_is_no_other_text(tmp_path):
    """A tokenizer that adds nothing leaves no token of an empty text; its vector is that of the padded batch."""
    make_model().float().save_pretrained(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "model")
    model = SentenceTransformer(
        modules=[Transformer(str(tmp_path / "model")), Pooling(64, pooling_mode="lasttoken")], device="cpu"
    )
    texts = ["one", "", "two words"]
    expected = model.encode(texts)
    assert use_packed_texts(model)
    np.testing.assert_allclose(model.encode(texts), expected, atol=1e-5)


def test_a_packed_model_can_be_copied_and_sent_to_other_processes(tmp_path):
    """A copy reads packed texts by itself."""
    model = load_encoder(build_embedder("tiny", tmp_path / "base", max_tokens=32))
    expected = model.encode(["one", "a longer text"])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert reads_packed(other)
        assert other[0].preprocess.module is other[0]
        np.testing.assert_array_equal(other.encode(["one", "a longer text"]), expected)


@pytest.mark.parametrize("correct", [True, False])
def test_flash_attention_is_preferred_where_it_reads_packed_texts(monkeypatch, correct):
    """An attention that stands before our own is used, with the lengths of the texts, if it passes the same test."""
    called = []

    def other(module, query, key, value, attention_mask, **kwargs):
        called.append(kwargs.get("cu_seq_lens_q"))
        if not correct:
            kwargs["cu_seq_lens_q"] = None  # texts see each other
        return attention.packed_attention(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "other", other)
    monkeypatch.setattr(packing, "packed_attentions", lambda device: ["other", PACKED_ATTENTION])
    model = make_model()
    assert use_packed_attention(model)
    lengths = packing._CHECKED_LENGTHS[:3]
    starts = [0, lengths[0], sum(lengths[:2]), sum(lengths)]
    assert [s.tolist() for s in called if s is not None] == [starts] * len(model.base_model.layers)
    assert model.config._attn_implementation == ("other" if correct else PACKED_ATTENTION)


def test_where_packing_pays():
    """On a CPU, and in half precision on a GPU."""
    assert packing.packing_pays(torch.device("cpu"), torch.float32)
    assert packing.packing_pays(torch.device("cuda"), torch.bfloat16)
    assert not packing.packing_pays(torch.device("cuda"), torch.float32)
    assert not packing.packing_pays(torch.device("mps"), torch.float16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_packed_equals_padded(family):
    """In bf16 on a GPU, loss and gradient of packed texts are those of padded ones, to what bf16 resolves."""
    model, pairs = make_model(family).float().cuda(), make_pairs()
    found = []
    for packed in (False, True):
        with torch.autocast("cuda", torch.bfloat16):
            objective = TextReconstruction(model, packed=packed)
            loss = objective(pairs).loss
        assert objective.packed == (packed and family != "gemma2")  # there is no kernel with its soft cap
        found.append((loss, gradients(model, loss)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=2e-2, atol=0)
    assert_same_gradients(found[1][1], found[0][1], tolerance=5e-2)
