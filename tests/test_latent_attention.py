"""Modules before a mean: latent attention against its formula, its plain control, and what reads their folders."""

import json

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.dense import Dense

import anchorvec
from anchorvec import AnchorvecError, Readout
from anchorvec.exporting.folder import encode_with_transformers
from anchorvec.model.embedder import build_embedder
from anchorvec.model.encoding import encode_packed
from anchorvec.model.latent_attention import LatentAttention, dense_layers
from anchorvec.model.loading import load_encoder, load_model, load_sentence_transformer
from anchorvec.model.readout import stored_readout
from interrupting import BOTH_WAYS, assert_same_run, killed_after
from support import make_model, make_tokenizer, recipe

TEXTS = ["a", "日本語", "twelve words " * 3, "some more text"]
VALUES = {**BOTH_WAYS, "stage_two.learning_rate": 1e-2}


def reading(pooling):
    return Readout(64, closed=False, pooling=pooling, pool_prompt=False, attention_direction="bidirectional")


@pytest.fixture(scope="module", params=["latent_attention", "dense_mean"])
def trained(request, tmp_path_factory):
    """A pooling, and the folder of a run with LoRA that trained its modules."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    anchorvec.train(recipe({**VALUES, "model.pooling": request.param, "output": str(folder)}))
    return request.param, folder


def random_weights(module, seed=0):
    """`module` with weights that are nowhere 0, in fp64."""
    draws = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=draws, dtype=torch.float64) * 0.2
    return module.double()


def plain(module, x):
    """The formula for one state, one head after another."""

    def norm(states, layer):
        return layer.weight * (states - states.mean()) / (states.var(correction=0) + 1e-5).sqrt() + layer.bias

    dim, heads = module.dim, module.heads
    q = module.query.weight @ norm(x, module.norm) + module.query.bias
    found = []
    for h in range(heads):
        rows = slice(h * dim // heads, (h + 1) * dim // heads)
        k = module.table @ module.key.weight[rows].T + module.key.bias[rows]
        v = module.table @ module.value.weight[rows].T + module.value.bias[rows]
        found.append((k @ q[rows] / (dim // heads) ** 0.5).softmax(0) @ v)
    y = x + module.out.weight @ torch.cat(found) + module.out.bias
    inner = module.mlp[0].weight @ norm(y, module.norm_of_mlp) + module.mlp[0].bias
    gelu = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    return y + module.mlp[2].weight @ gelu + module.mlp[2].bias


def test_equals_the_formula():
    """In fp64: value, and every gradient; for texts in rows and for packed ones."""
    module = random_weights(LatentAttention(32, latents=12))
    states = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([torch.stack([plain(module, x) for x in text]) for text in states])
    found = module.transform(states)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module.transform(states.reshape(1, 10, 32))[0], expected.reshape(10, 32))
    weights = [states, *module.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), weights) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_has_512_latents_and_8_heads_and_the_control_as_many_parameters():
    """Within 4%, whatever the width."""
    assert (LatentAttention(64).latents, LatentAttention(64).heads) == (512, 8)
    for dim in (64, 256):
        wanted = sum(p.numel() for p in LatentAttention(dim).parameters())
        layers = dense_layers(dim)
        assert sum(p.numel() for layer in layers for p in layer.parameters()) == pytest.approx(wanted, rel=0.04)
        assert all(type(layer) is Dense for layer in layers)
    with pytest.raises(AnchorvecError, match="splits a state among 8 heads, and this model's has 36 numbers"):
        LatentAttention(36)


@pytest.mark.parametrize("pooling", ["latent_attention", "dense_mean"])
def test_starts_as_the_mean(pooling, save_base):
    """And follows the seed; every module has a gradient from the first step on."""
    base = save_base(make_model(), make_tokenizer())
    folders = [
        build_embedder(base, base.parent / name, readout=reading(kind), seed=seed)
        for name, kind, seed in (("a", pooling, 1), ("b", pooling, 1), ("c", pooling, 2), ("mean", "mean", 0))
    ]
    a, b, c, mean = (load_model(folder) for folder in folders)
    vectors = [model.encode(TEXTS, convert_to_tensor=True) for model in (a, mean)]
    torch.testing.assert_close(*vectors, atol=1e-6, rtol=1e-5)
    assert stored_readout(folders[0]) == reading(pooling)
    if pooling == "latent_attention":
        assert torch.equal(a[1].table, b[1].table)
        assert not torch.equal(a[1].table, c[1].table)
    features = a.preprocess(TEXTS)
    a(features)["sentence_embedding"].sin().sum().backward()
    assert all(any(p.grad.any() for p in module.parameters()) for module in list(a)[1:-1])


def test_the_folder_has_the_vectors_of_the_run(trained):
    """Compared by the export; packed as alone, with the prompt left out; and they are no longer the mean's."""
    pooling, run = trained
    model, encoder = load_model(run / "model"), load_encoder(run / "model")
    record = json.loads((run / "run.json").read_text())
    assert min(record["export"]["cosines"].values()) > 0.9999
    assert record["engine"]["stage_two"]["packed"]
    for prompt in ("", "find:"):
        alone = torch.stack([model.encode(text, prompt=prompt, convert_to_tensor=True) for text in TEXTS])
        torch.testing.assert_close(
            encoder.encode(TEXTS, prompt=prompt, convert_to_tensor=True), alone, atol=1e-4, rtol=1e-3
        )
        torch.testing.assert_close(encode_packed(encoder, TEXTS, prompt=prompt), alone, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(
        encode_with_transformers(run / "model", TEXTS), model.encode(TEXTS, prompt="", convert_to_tensor=True)
    )
    moved = [p for module in list(model)[1:-1] for p in module.parameters() if p.any()]
    assert len(moved) == sum(1 for module in list(model)[1:-1] for _ in module.parameters())
    assert stored_readout(run / "model") == reading(pooling)
    plan = anchorvec.plan(recipe({**VALUES, "model.pooling": pooling}), step=False)
    assert plan.description["a text is"] in " ".join((run / "model" / "README.md").read_text().split())


def test_the_modules_that_trained_beside_adapters_are_those_of_the_folder(trained):
    """As Stage II saved them, and no longer as it found them; with the prompts, and in the format that is asked for."""
    _, run = trained
    before, stage, model = (load_model(run / name) for name in ("base", "stage_two", "model"))
    for i, module in enumerate(list(model)[1:-1], start=1):
        saved = load_file(run / "stage_two" / f"{i}_{type(module).__name__}" / "model.safetensors")
        assert saved
        for name, weights in saved.items():
            assert torch.equal(module.get_parameter(name), weights)
            assert torch.equal(stage[i].get_parameter(name), weights)
            assert not torch.equal(before[i].get_parameter(name), weights)
    assert model.prompts["query"] == stage.prompts["query"] == "find:"
    wide = load_sentence_transformer(str(run / "model"), model_kwargs={"dtype": torch.float64})
    assert {p.dtype for p in wide[0].parameters()} == {torch.float64}


def test_what_reads_the_folder(trained):
    """Plain sentence-transformers reads the control; latent attention ends there in an error, unless it is trusted."""
    pooling, run = trained
    folder, expected = str(run / "model"), load_model(run / "model").encode(TEXTS)
    card = " ".join((run / "model" / "README.md").read_text().split())
    others = json.loads((run / "run.json").read_text())["export"]["not_compared"]
    assert "transformers 4.57 reads this folder as causal" in others
    if pooling == "dense_mean":
        assert (SentenceTransformer(folder, device="cpu").encode(TEXTS) == expected).all()
        assert "sentence-transformers 5.7" in others
        assert "sentence-transformers 5.7" in card
        return
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(folder, device="cpu")
    assert (SentenceTransformer(folder, device="cpu", trust_remote_code=True).encode(TEXTS) == expected).all()
    assert "`trust_remote_code=True`, with anchorvec installed" in others
    assert 'SentenceTransformer("model", trust_remote_code=True)' in card


def test_no_other_code_is_run_beside_our_own_module(trained, tmp_path):
    """A folder that names a class of others is refused, wherever ours stands."""
    pooling, run = trained
    if pooling == "dense_mean":
        return
    folder = tmp_path / "other"
    load_model(run / "model").save_pretrained(str(folder), create_model_card=False)
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "others.Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(AnchorvecError, match=r"wants the class others\.Pooling to be loaded"):
        load_model(folder)


@pytest.mark.parametrize("lora", [None, {"r": 4, "dropout": 0.0}], ids=["all parameters", "LoRA"])
def test_a_killed_stage_goes_on_bit_for_bit(lora, tmp_path):
    """The modules are a part of a checkpoint."""
    values = {**VALUES, "model.pooling": "latent_attention", "stage_two.lora": lora}
    asked = {name: recipe({**values, "output": str(tmp_path / name)}) for name in ("whole", "killed")}
    anchorvec.train(asked["whole"])
    with killed_after(2):
        anchorvec.train(asked["killed"])
    anchorvec.train(asked["killed"], resume=True)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_latents_behind_causal_attention_are_said_to_be_no_nv_embed(tmp_path, capsys):
    """Allowed, with a line."""
    values = {**VALUES, "model.pooling": "latent_attention", "model.attention_direction": "causal"}
    anchorvec.plan(recipe(values), step=False)
    assert "behind causal attention is not NV-Embed's" in capsys.readouterr().err
