"""What a second command encodes, in a process of its own: nothing that the first one has, and all that has changed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from anchorvec.model.embedder import build_embedder
from support import write_rows

SESSION = """
import sys
from anchorvec import cli
from anchorvec.model.loading import load_encoder
from support import decoder_calls

with decoder_calls() as calls:
    load_encoder(sys.argv[2])
    checked = sum(call.texts for call in calls)
    cli.app(sys.argv[1:], standalone_mode=False)
print("encoded", sum(call.texts for call in calls) - 2 * checked)
"""
"""A model is checked on some texts whenever it is loaded; these do not count."""

PROMPTS = {"query": "question: ", "document": "document: "}
WORDS = ["cat", "dog", "cow", "hen", "owl", "bee"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, another one, and a set of scored pairs of six texts."""
    folder = tmp_path_factory.mktemp("sessions")
    for name, seed in (("model", 0), ("other", 1)):
        build_embedder("tiny", folder / name, max_tokens=64, prompts=PROMPTS, seed=seed)
    rows = [{"sentence1": f"the {a}", "sentence2": f"the {b}", "score": len(a + b)} for a in WORDS for b in WORDS]
    write_rows(folder / "animals.jsonl", [row for row in rows if row["sentence1"] != row["sentence2"]])
    return folder


def encoded(kept: Path, *arguments: object) -> int:
    """How many texts a new process encodes for a command."""
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": paths, "ANCHORVEC_CACHE": str(kept), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SESSION, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("encoded")[-1])


@pytest.mark.slow
def test_a_second_evaluation_in_a_new_process_encodes_no_text(folder, tmp_path):
    """And has the same scores; another prompt or model has vectors of its own, and so has one without a cache."""
    data = ["--data", folder / "animals.jsonl"]
    files = [tmp_path / f"{i}.json" for i in range(2)]
    counts = [encoded(tmp_path, "evaluate", folder / "model", *data, "--json", file) for file in files]
    assert counts == [len(WORDS), 0]
    first, second = (json.loads(file.read_text())["scores"]["animals"] for file in files)
    assert first["per_item"] == second["per_item"]
    assert encoded(tmp_path, "evaluate", folder / "model", *data, "--instruction", "another: ") == len(WORDS)
    assert encoded(tmp_path, "evaluate", folder / "other", *data) == len(WORDS)
    assert encoded(tmp_path, "evaluate", folder / "model", *data, "--no-cache") == 2 * len(WORDS)  # on both sides


@pytest.mark.slow
def test_a_second_search_in_a_new_process_encodes_the_question_alone(folder, tmp_path):
    """And of a file that has changed the passages that are new."""
    notes = write_rows(tmp_path / "notes.jsonl", [f"the {word}" for word in WORDS])
    search = ["search", folder / "model", notes, "--query"]
    assert [encoded(tmp_path, *search, "which") for _ in range(2)] == [len(WORDS) + 1, 1]
    write_rows(notes, [f"the {word}" for word in [*WORDS[1:], "ant"]])
    assert encoded(tmp_path, *search, "which") == 2
    assert encoded(tmp_path, *search, "which", "--no-cache") == len(WORDS) + 1
