"""What is taken from the hub is pinned, and the exported model goes there; against a stand-in on this machine."""

import json

import pytest
import torch
from safetensors.torch import load

import anchorvec
from anchorvec.errors import AnchorvecError
from support import QUICK, make_model, make_tokenizer


@pytest.fixture
def repositories(hub, tmp_path):
    """A decoder and pairs on the hub, each with one commit: functions that add another one."""

    def decoder(seed):
        folder = tmp_path / f"decoder{seed}"
        make_model(seed=seed).float().save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return hub.add("models/someone/decoder", {file.name: file.read_bytes() for file in folder.iterdir()})

    def pairs(word):
        rows = [{"query": f"{word} {i}?", "positive": f"{i} {word}"} for i in range(20)]
        return hub.add("datasets/someone/pairs", {"train.jsonl": "".join(json.dumps(r) + "\n" for r in rows).encode()})

    return decoder, pairs


def hub_recipe(output, *overrides):
    """A short run on what the hub has."""
    where = ["model.base=someone/decoder", "model.max_tokens=64", "data.train=[{path: someone/pairs}]"]
    return anchorvec.load_recipe("debug", [*where, f"output={output}", *QUICK, *overrides])


def test_a_run_saves_the_commits_that_it_read(repositories, tmp_path):
    """Its recipe gives the same run again, whatever has been committed since."""
    decoder, pairs = repositories
    commits = decoder(0), pairs("owl")
    anchorvec.train(hub_recipe(tmp_path / "run", "stage_two=null"))
    saved = anchorvec.load_recipe(tmp_path / "run" / "recipe.yaml")
    assert (saved.model.revision, saved.data.train[0].revision) == commits

    decoder(1), pairs("fox")
    again = anchorvec.load_recipe(tmp_path / "run" / "recipe.yaml", [f"output={tmp_path / 'again'}"])
    anchorvec.train(again)
    first, second = (load((tmp_path / run / "model" / "model.safetensors").read_bytes()) for run in ("run", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_goes_on_asks_for_no_other_commit(repositories, tmp_path):
    """What it read of a branch stays what it is, though the branch is another one by now."""
    decoder, pairs = repositories
    commits = decoder(0), pairs("owl")
    asked = hub_recipe(tmp_path / "run", "stage_two=null")
    anchorvec.train(asked)
    decoder(1), pairs("fox")
    anchorvec.train(asked, resume=True)
    saved = anchorvec.load_recipe(tmp_path / "run" / "recipe.yaml")
    assert (saved.model.revision, saved.data.train[0].revision) == commits


def test_the_export_is_pushed(hub, tmp_path):
    """All of its folder, in one commit, to a repository that is made before training; the result has its address."""
    asked = anchorvec.load_recipe("debug", [f"output={tmp_path / 'run'}", *QUICK, "stage_two=null"])
    records = []
    result = anchorvec.train(asked, push="someone/embedder", on_log=lambda _: records.append(list(hub.made)))
    assert records[0] == ["someone/embedder"]
    commit, files = hub.files("models/someone/embedder", "main")
    assert result.pushed.endswith(f"/someone/embedder/commit/{commit}")
    folder = tmp_path / "run" / "model"
    assert files == {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_who_may_not_push_is_told_before_the_work(hub, tmp_path, monkeypatch):
    """In one line; nothing is trained."""
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no_token"))
    with pytest.raises(AnchorvecError, match=r"^--push someone/embedder: .*; log in with `hf auth login`"):
        anchorvec.train(anchorvec.load_recipe("debug", [f"output={tmp_path / 'run'}", *QUICK]), push="someone/embedder")
    assert not (tmp_path / "run" / "base").exists()


def test_a_push_that_fails_loses_nothing(hub, tmp_path):
    """The error says where the model is; the same command again uploads it, and trains nothing."""
    asked = anchorvec.load_recipe("debug", [f"output={tmp_path / 'run'}", *QUICK, "stage_two=null"])
    hub.refuse_uploads = True
    with pytest.raises(
        AnchorvecError, match=r"--push .*storage of someone is full.*the model is in .*/model; .*--resume"
    ):
        anchorvec.train(asked, push="someone/embedder")
    hub.refuse_uploads = False
    records = []
    assert anchorvec.train(asked, push="someone/embedder", resume=True, on_log=records.append).pushed
    assert records == []
