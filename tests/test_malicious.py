"""Folders and files that want more than to be read: each is refused with one error, and nothing of theirs is run."""

import gzip
import json
import os
import pickle
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import anchorvec
from anchorvec import files
from anchorvec.data.pairs import read_pairs
from anchorvec.errors import AnchorvecError
from anchorvec.model.loading import load_model
from support import recipe


class Bomb:
    """What makes a folder where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """A folder that is there once code of a model was run."""
    return tmp_path / "was_run"


def change(file, **values):
    """Set members of the JSON in `file`."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def pickled(folder, mark):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(str(mark))))


def code_of_a_model(folder, mark):
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(mark)!r})\nclass Config: pass\nclass Model: pass\n")
    mapped = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}
    change(folder / "config.json", model_type="evil", auto_map=mapped)


def code_of_a_module(folder, mark):
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(mark)!r})\nclass Module: pass\n")
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["type"] = "evil.Module"
    (folder / "modules.json").write_text(json.dumps(modules))


def module_path(path):
    def act(folder, mark):
        modules = json.loads((folder / "modules.json").read_text())
        modules[1]["path"] = path
        (folder / "modules.json").write_text(json.dumps(modules))

    return act


def linked_module(folder, mark):
    shutil.move(folder / "1_Pooling", folder.parent / "elsewhere")
    (folder / "1_Pooling").symlink_to(folder.parent / "elsewhere")


def shard(path):
    def act(folder, mark):
        shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
        index = {"metadata": {"total_size": 1}, "weight_map": {"model.embed_tokens.weight": path}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return act


def tokenizer_elsewhere(folder, mark):
    shutil.move(folder / "tokenizer.json", folder.parent / "other.json")
    change(folder / "tokenizer_config.json", tokenizer_file=str(folder.parent / "other.json"))


def adapter_in_a_module(folder, mark):
    (folder / "1_Pooling" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/etc"}))


FOLDERS = {
    "pickle": (pickled, "only pytorch_model.bin, which is a pickle and is not read"),
    "code": (code_of_a_model, r"config.json \(auto_map\) wants code of its own to be run, which is never done"),
    "class": (code_of_a_module, "modules.json wants the class evil.Module to be loaded"),
    "module above": (module_path("../other"), "modules.json names '../other', which is outside of the folder"),
    "module at the root": (module_path("/etc"), "modules.json names '/etc', which is outside"),
    "module on Windows": (module_path("C:\\x"), r"modules.json names 'C:.*x', which is outside"),
    "linked module": (linked_module, "modules.json names '1_Pooling', which is outside"),
    "shard above": (shard("../outside.safetensors"), "index.json names '../outside.safetensors', which is outside"),
    "shard at the root": (shard("/x.safetensors"), "index.json names '/x.safetensors', which is outside"),
    "tokenizer": (tokenizer_elsewhere, r"tokenizer_config.json names '.*other.json', which is outside"),
    "adapter": (adapter_in_a_module, "1_Pooling holds an adapter over another model"),
}


@pytest.mark.parametrize(("act", "message"), FOLDERS.values(), ids=FOLDERS)
def test_a_malicious_folder_is_refused(run, tmp_path, mark, act, message):
    """As an embedder, and as a base to train; its code is not run."""
    folder = shutil.copytree(run / "base", tmp_path / "model")
    act(folder, mark)
    with pytest.raises(AnchorvecError, match=message):
        load_model(folder)
    values = {"model.base": str(folder), "output": str(tmp_path / "run")}
    with pytest.raises(AnchorvecError, match=message):
        anchorvec.train(recipe({**values, "stage_one.steps": 1, "stage_one.warmup_steps": 0}))
    assert not mark.exists()
    assert not (tmp_path / "run" / "base").exists()


def test_a_pickled_adapter_is_refused(run, tmp_path, mark):
    """Peft would read it."""
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "stage_two" / "adapter_model.safetensors").unlink()
    (folder / "stage_two" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(str(mark))))
    with pytest.raises(AnchorvecError, match=r"only adapter_model.bin, which is a pickle and is not read"):
        load_model(folder / "stage_two")
    assert not mark.exists()


def test_paths_of_another_machine_are_no_harm(run, tmp_path):
    """Which many models carry; the folder's own files are read."""
    folder = shutil.copytree(run / "base", tmp_path / "model")
    elsewhere = {"tokenizer_file": "/root/tokenizer.json", "special_tokens_map_file": "/root/special_tokens_map.json"}
    change(folder / "tokenizer_config.json", **elsewhere)
    assert load_model(folder).encode(["text"]).shape[0] == 1


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.json.gz", "pairs.csv.gz"])
def test_a_file_that_unzips_to_far_too_much_is_refused(tmp_path, monkeypatch, name):
    """After so many bytes: it is never held in memory."""
    monkeypatch.setattr(files, "FREE_OF_LIMIT", 2**20)
    rows = b'{"query": "q", "positive": "p"}\n' if "json" in name else b"query,positive\n"
    (tmp_path / name).write_bytes(gzip.compress(rows + (b" " * 999 + b"\n") * 2**13))
    with pytest.raises(AnchorvecError, match=r"unzips to more than 200 times its size.*unzip it yourself"):
        read_pairs(tmp_path / name)
    with pytest.raises(AnchorvecError, match="unzips to more than 200 times its size"):
        list(files.read_lines(tmp_path / name))


def test_a_parquet_file_that_unpacks_to_far_too_much_is_refused(tmp_path, monkeypatch):
    """By what it says of itself, before any of it is read."""
    monkeypatch.setattr(files, "FREE_OF_LIMIT", 2**20)
    table = pa.table({"query": [f"{i}" + "q" * 2**12 for i in range(2**11)], "positive": ["p"] * 2**11})
    pq.write_table(table, tmp_path / "pairs.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(AnchorvecError, match=r"pairs.parquet unpacks to [0-9,]+ bytes, more than 200 times its size"):
        read_pairs(tmp_path / "pairs.parquet")


def test_a_line_that_is_far_too_long_is_refused(tmp_path, monkeypatch):
    """Before it is read to its end."""
    monkeypatch.setattr(files, "LONGEST_LINE", 2**20)
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"query": "q", "positive": "' + "p" * 2**22 + '"}\n')
    for read in (read_pairs, lambda path: list(files.read_lines(path))):
        with pytest.raises(AnchorvecError, match=r"has a line of more than 1,048,576 bytes"):
            read(path)
