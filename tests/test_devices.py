"""Encoding on several devices: which there are, and that the vectors are those of one."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from anchorvec import cli
from anchorvec.commands.search import search
from anchorvec.device import default_device, devices_named
from anchorvec.errors import AnchorvecError
from anchorvec.model.embedder import build_embedder
from anchorvec.model.loading import load_encoder
from anchorvec.model.text_encoder import TextEncoder
from anchorvec.model.vector_cache import VectorCache
from anchorvec.recipe import load_recipe
from anchorvec.run_scores import score_on_the_way

TEXTS = [f"text number {i} " + "and so on " * (i % 7) for i in range(300)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random embedder."""
    return build_embedder("tiny", tmp_path_factory.mktemp("model") / "tiny", max_tokens=64)


def test_devices_are_named_or_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number counts the accelerators, or processes on the CPU where there is none."""
    monkeypatch.setattr("anchorvec.device.default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)
    assert devices_named("cpu, cpu") == devices_named("2") == devices_named(2) == ["cpu", "cpu"]
    for text in ("0", "cuda:0", "cpu,", "cpu:1", "gpu"):
        with pytest.raises(AnchorvecError, match="names no device of this machine"):
            devices_named(text)
    monkeypatch.setattr("anchorvec.device.default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert devices_named("cuda:0,cuda:1") == devices_named("2") == ["cuda:0", "cuda:1"]
    assert devices_named("cpu") == ["cpu"]
    with pytest.raises(AnchorvecError, match=r"\(cuda:2\); it has cpu, cuda:0, cuda:1"):
        devices_named("3")


@pytest.mark.slow
def test_two_processes_give_the_vectors_of_one(folder: Path, tmp_path: Path) -> None:
    """Packed or padded; kept vectors serve both, and the threads of the CPU are shared out."""
    for model in (load_encoder(folder), SentenceTransformer(str(folder), device="cpu")):
        expected = TextEncoder(model)(TEXTS, side="query")
        cache = VectorCache(tmp_path / type(model[0].preprocess).__name__, 10**9)
        with TextEncoder(model, cache=cache, devices=["cpu", "cpu"], batch_size=8) as encode:
            found = encode(TEXTS, side="query")
            assert encode.encoded == len(TEXTS)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        again = TextEncoder(model, cache=cache)
        assert again(TEXTS, side="query").tobytes() == found.tobytes()
        assert again.encoded == 0


@pytest.mark.slow
def test_a_process_that_ends_is_one_error_and_loses_nothing(folder: Path, tmp_path: Path) -> None:
    """What was encoded before is kept."""
    cache = VectorCache(tmp_path, 10**9)
    with TextEncoder(load_encoder(folder), cache=cache, devices=["cpu", "cpu"]) as encode:
        encode(TEXTS[:100])
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(AnchorvecError, match="a process that encoded has ended"):
            encode(TEXTS)
    again = TextEncoder(load_encoder(folder), cache=cache)
    again(TEXTS[:100])
    assert again.kept == 100


@pytest.mark.slow
def test_search_encodes_on_two_devices(folder: Path, tmp_path: Path) -> None:
    """By its option; the answers are those of one device."""
    rows = [f"{i}: a text" for i in range(40)]
    file, found = tmp_path / "a.jsonl", tmp_path / "found.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["search", str(folder), str(file), "--query", "7", "--devices", "cpu,cpu", "--json", str(found)]
    cli.app(arguments, standalone_mode=False)
    expected = search(folder, file, ["7"])["7"]
    assert [hit["text"] for hit in json.loads(found.read_text())["7"]] == [hit.text for hit in expected]


def test_scores_of_a_run_take_the_devices_that_its_processes_have(monkeypatch, tmp_path):
    """Those of this machine; one process names none."""
    asked = []
    monkeypatch.setattr("anchorvec.run_scores.load_encoder", lambda *_: None)
    monkeypatch.setattr("anchorvec.run_scores.evaluate", lambda _, **options: asked.append(options["devices"]) or {})
    for here in ("1", "3"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        score_on_the_way(load_recipe("debug"), [], tmp_path)
    kind = default_device().type
    assert asked == [[], ["cpu"] * 3 if kind == "cpu" else [f"{kind}:{i}" for i in range(3)]]
