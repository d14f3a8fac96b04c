"""The folder that leaves a run: compared with it, and what its card says."""

import json
import shutil
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

from anchorvec.commands.decode import decode
from anchorvec.errors import AnchorvecError
from anchorvec.exporting.folder import PROBES, PROGRAMS, encode_with_transformers, export
from anchorvec.model.embedder import build_embedder
from anchorvec.model.loading import load_model
from anchorvec.pipeline import train
from anchorvec.recipe import load_recipe
from anchorvec.start import stored_prompts
from support import QUICK


def test_export_of_an_unfinished_run_must_name_the_stage(run, tmp_path):
    """What stands for the whole run is its last planned stage alone; the result says what it was made from."""
    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("model", "stage_two"))
    with pytest.raises(AnchorvecError, match=r"stage_two of this run did not finish; name .*/stage_one"):
        export(unfinished, tmp_path / "out")
    shutil.rmtree(unfinished / "stage_one")
    with pytest.raises(AnchorvecError, match=r"did not finish; name .*/base"):
        export(unfinished, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(unfinished / "base", tmp_path / "out").stage == str(unfinished / "base")


def test_instructions_reach_the_model_as_prompts(tmp_path):
    """The instruction of the recipe is stored as the query prompt, in every stage and in the export (T15)."""
    instruction = "data.train.0.instruction='Instruct: find it\nQuery: '"
    recipe = load_recipe("debug", [f"output={tmp_path / 'run'}", *QUICK, instruction])
    assert stored_prompts(recipe)["query"] == recipe.data.train[0].instruction
    train(recipe)
    model = SentenceTransformer(str(tmp_path / "run" / "model"), device="cpu")
    assert model.prompts["query"] == recipe.data.train[0].instruction
    assert model.prompts["document"] == ""


def test_export_merges_lora_and_is_compared(run, tmp_path):
    """The export holds no adapter, and gives the vectors of the run's adapter over Stage I."""
    result = export(run, tmp_path / "model", texts=["a further probe"])
    assert list(result.cosines) == [f"{name} {version(name)}" for name in ("sentence-transformers", "transformers")]
    assert "transformers 4.57" in result.not_compared
    assert min(result.cosines.values()) >= 0.9999
    assert not list((tmp_path / "model").glob("adapter*"))
    texts = ["one", "another text"]
    expected = load_model(run / "stage_two", merge=False).encode(texts)
    found = SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(texts)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    started = load_model(run / "stage_one").encode(texts)
    assert abs(started - expected).max() > 1e-4  # the adapter does something


def test_export_fails_where_vectors_differ_and_deletes_nothing(run, tmp_path, monkeypatch):
    """If a program gives other vectors the export is refused, no folder appears, and the run stays."""
    monkeypatch.setitem(PROGRAMS, "transformers", lambda folder, texts: torch.randn(len(texts), 64))
    with pytest.raises(AnchorvecError, match=r"in transformers \S+ the vectors"):
        export(run, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert (run / "stage_two" / "adapter_model.safetensors").exists()


def test_a_stage_one_export_can_still_write(run, tmp_path):
    """Exporting Stage I keeps the LM head (T26), so decode works; after Stage II it says plainly that it cannot."""
    assert export(run / "stage_one", tmp_path / "one").can_write
    decode(tmp_path / "one", "text", max_tokens=2)
    assert not export(run / "stage_two", tmp_path / "two").can_write
    with pytest.raises(AnchorvecError, match="can no longer write"):
        decode(tmp_path / "two", "text")


def test_the_card_names_recipe_stages_and_what_the_folder_can_do(run, tmp_path):
    """The exported card says which stages were trained, how to use the model, and nothing of the machine's paths."""
    export(run, tmp_path / "two")
    export(run / "stage_one", tmp_path / "one")
    last, first = ((tmp_path / name / "README.md").read_text() for name in ("two", "one"))
    assert "Stage I, bidirectional reconstruction, then Stage II" in last
    assert "then Stage II" not in first
    assert "holds no LM head" in last
    assert "also a causal LM" in first
    assert str(run) not in last
    assert "temperature: 0.05" in last


def test_the_card_says_what_the_model_reads_and_how_it_was_scored(tmp_path, monkeypatch):
    """Its limit, the one of training, the numbers of a vector, prompts, scores, versions; no path of the output."""
    overrides = ["model.max_tokens=40", "data.max_tokens=20", "data.train.0.instruction='ask: '", "stage_two=null"]
    train(load_recipe("debug", [f"output={tmp_path / 'own-run'}", *QUICK[::2], *overrides]))
    run = tmp_path / "own-run"
    (run / "scores.json").write_text(
        json.dumps({"untrained": {"sets": {"main_score": 0.25, "ndcg_at_10_interval": [0.125, 0.5]}}})
    )
    export(run, tmp_path / "again")
    card = (tmp_path / "again" / "README.md").read_text()
    assert "a text of up to 40 tokens to\n64 numbers" in card
    assert "texts were cut to 20 tokens" in card
    assert '`query`: `"ask: "`' in card
    assert "| untrained | sets | 0.250 | 0.125 to 0.500 |" in card
    assert "own-run" not in card
    assert '"versions"' in card
    export(run / "base", tmp_path / "base")
    assert "with anchorvec: not trained yet" in (tmp_path / "base" / "README.md").read_text()


def test_an_exports_files_are_as_they_were_meant(run, tmp_path):
    """The tokenizer cuts at the model's limit and pads nothing; what sentence-transformers reads is there; fp32."""
    model = SentenceTransformer(str(run / "stage_one"), device="cpu")
    model.tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=9)
    export(run / "stage_one", tmp_path / "one")
    tokenizer = json.loads((tmp_path / "one" / "tokenizer.json").read_text())
    assert tokenizer["truncation"]["max_length"] == model.max_seq_length
    assert tokenizer["padding"] is None
    config = json.loads((tmp_path / "one" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (tmp_path / "one" / "sentence_bert_config.json").is_file()
    assert {weight.dtype for weight in load_file(tmp_path / "one" / "model.safetensors").values()} == {torch.float32}
    trained = load_file(run / "stage_one" / "model.safetensors")
    for name, weight in load_file(tmp_path / "one" / "model.safetensors").items():
        assert torch.equal(weight, trained[name])  # Stage I's own, not the base's


def test_an_export_is_compared_to_four_nines(run, tmp_path, monkeypatch):
    """A vector that is off by a hundredth is refused."""
    plain = PROGRAMS["transformers"]

    def off(folder, texts):
        vectors = plain(folder, texts)
        return vectors + 0.05 * vectors.norm(dim=1, keepdim=True) * torch.eye(vectors.shape[1])[0]

    monkeypatch.setitem(PROGRAMS, "transformers", off)
    with pytest.raises(AnchorvecError, match=r"in transformers \S+ the vectors"):
        export(run, tmp_path / "model")


def test_a_run_without_a_stage_has_no_export(run, tmp_path):
    """The base alone is asked for by its own folder."""
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    shutil.copytree(run / "base", unfinished / "base")
    with pytest.raises(AnchorvecError, match=r"stage_one of this run did not finish; name .*base to export that"):
        export(unfinished, tmp_path / "model")


def test_an_adapter_is_put_over_the_stage_that_it_started_from(run, tmp_path):
    """What LoRA leaves alone is Stage I's in the export, not the base's."""
    export(run, tmp_path / "model")
    exported = load_file(tmp_path / "model" / "model.safetensors")
    stages = [load_file(run / name / "model.safetensors") for name in ("stage_one", "base")]
    [name] = [name for name in exported if name.endswith("embed_tokens.weight")]
    of_stages = [next(w for key, w in stage.items() if key.endswith("embed_tokens.weight")) for stage in stages]
    assert torch.equal(exported[name], of_stages[0])
    assert not torch.equal(exported[name], of_stages[1])


def test_what_is_compared_is_the_run_itself(run, tmp_path, monkeypatch):
    """The adapter as it was trained, not what was merged; and the export holds fp32 weights whatever a stage holds."""
    loaded = []

    def load(folder, **options):
        loaded.append(options)
        return load_model(folder, **options)

    monkeypatch.setattr("anchorvec.exporting.folder.load_model", load)
    shutil.copytree(run / "base", tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(run / "base", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    export(run, tmp_path / "model")
    assert loaded == [{"merge": False}, {}, {}]
    export(tmp_path / "half", tmp_path / "from_half")
    assert load_model(tmp_path / "from_half").dtype == torch.float32


def test_each_text_counts_in_the_comparison(run, tmp_path, monkeypatch):
    """The probes and the texts that are given; one that differs a little is enough, however close the others are."""
    seen = []

    def almost(folder, texts):
        seen.append(list(texts))
        vectors = encode_with_transformers(folder, texts)
        length, noise = vectors[-1].norm(), torch.randn(vectors.shape[1], generator=torch.Generator().manual_seed(0))
        vectors[-1] += 0.025 * length * noise / noise.norm()  # a cosine of 0.9997
        return vectors

    monkeypatch.setitem(PROGRAMS, "transformers", almost)
    with pytest.raises(AnchorvecError, match=r"in transformers \S+ the vectors of some text have cosine 0.999[5-8]"):
        export(run, tmp_path / "model", texts=["a further text"])
    assert seen == [[*PROBES, "a further text"]]


def test_an_embedder_in_half_precision_is_exported_in_fp32(tmp_path):
    """Any folder of an embedder can be exported."""
    half = load_model(build_embedder("tiny", tmp_path / "base", max_tokens=32)).to(torch.bfloat16)
    half.save_pretrained(str(tmp_path / "half"), create_model_card=False)
    exported = export(tmp_path / "half", tmp_path / "model")
    assert {weights.dtype for weights in load_file(tmp_path / "model" / "model.safetensors").values()} == {
        torch.float32
    }
    assert min(exported.cosines.values()) >= 0.9999
