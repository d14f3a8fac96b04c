"""Vectors that are kept: what decides them, that no text is encoded twice, and that nothing harms or fails a run."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from tokenizers.normalizers import Lowercase

import anchorvec
from anchorvec import cli
from anchorvec.commands.search import Index, search
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import BeirData, evaluate
from anchorvec.model.embedder import build_embedder
from anchorvec.model.fingerprint import model_fingerprint
from anchorvec.model.loading import load_encoder
from anchorvec.model.text_encoder import TextEncoder, side_prompt
from anchorvec.model.vector_cache import VectorCache, vector_cache
from support import decoder_calls

PROMPTS = {"query": "question: ", "document": "document: "}
TEXTS = ["one", "two words", "one", "a longer text than the others", "où 水 🙂", "two words"]
DATA = BeirData(
    {f"d{i}": {"title": "", "text": f"The {name} sleeps."} for i, name in enumerate(["cat", "dog", "cow", "hen"])},
    {"q0": "where is the cat", "q1": "where is the dog"},
    {"q0": {"d0": 1}, "q1": {"d1": 1}},
    name="animals",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random embedder with stored prompts."""
    return build_embedder("tiny", tmp_path_factory.mktemp("model") / "tiny", max_tokens=64, prompts=PROMPTS)


@pytest.fixture
def model(folder: Path) -> SentenceTransformer:
    """The embedder, loaded anew for each test, which may change it."""
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for vectors, which the environment names."""
    monkeypatch.setenv("ANCHORVEC_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def cache_in(folder: Path, max_bytes: int = 10**9) -> VectorCache:
    return VectorCache(folder, max_bytes)


def found_in(cache: VectorCache, keys: list[bytes]) -> dict[bytes, list[float]]:
    """Each kept key with its vector."""
    pieces = list(cache.find(keys, np.float32))
    return {keys[i]: row for places, rows in pieces for i, row in zip(places, rows.tolist(), strict=True)}


# Each text once


def test_a_text_that_is_there_twice_is_encoded_once(model: SentenceTransformer) -> None:
    """Within one call; each place has its vector."""
    encode = TextEncoder(model)
    with decoder_calls() as calls:
        vectors = encode(TEXTS, prompt="p: ")
    assert sum(call.texts for call in calls) == encode.encoded == 4
    np.testing.assert_allclose(vectors, model.encode(TEXTS, prompt="p: "), atol=1e-5)


def test_no_text_has_no_vectors(model: SentenceTransformer) -> None:
    """Their dimension is that of others."""
    assert TextEncoder(model)([]).shape == (0, 64)


def test_what_was_encoded_before_is_not_encoded_again(model: SentenceTransformer, folder: Path, tmp_path: Path) -> None:
    """By another object of the same model, whatever it was used for: the vectors are the same, bit by bit."""
    first = TextEncoder(model, cache=cache_in(tmp_path))(TEXTS, side="query")
    again = TextEncoder(load_encoder(folder), cache=cache_in(tmp_path))
    with decoder_calls() as calls:
        vectors = again([*TEXTS, "new"], side="query")
    assert (again.encoded, again.kept, sum(call.texts for call in calls)) == (1, 4, 1)
    assert vectors[:-1].tobytes() == first.tobytes()


def test_a_model_in_half_precision_keeps_its_vectors_whole(model: SentenceTransformer, tmp_path: Path) -> None:
    """They are given back as sentence-transformers gives them, in float32."""
    model = model.to(torch.bfloat16)
    vectors = [TextEncoder(model, cache=cache_in(tmp_path))(TEXTS, prompt="") for _ in range(2)]
    assert vectors[0].tobytes() == vectors[1].tobytes()
    np.testing.assert_allclose(vectors[1], model.encode(TEXTS, prompt=""), rtol=0.05, atol=0.05)


def change_weights(model: SentenceTransformer) -> None:
    with torch.no_grad():
        model[0].model.norm.weight[0] += 2**-20


def change_tokenizer(model: SentenceTransformer) -> None:
    model.tokenizer.backend_tokenizer.normalizer = Lowercase()


def change_limit(model: SentenceTransformer) -> None:
    model.max_seq_length = 8


def change_dimension(model: SentenceTransformer) -> None:
    model.truncate_dim = 16


def change_pooling(model: SentenceTransformer) -> None:
    model[1].pooling_mode = "mean"


def change_config(model: SentenceTransformer) -> None:
    model[0].model.config.rms_norm_eps *= 2


def change_format(model: SentenceTransformer) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [change_weights, change_tokenizer, change_limit, change_dimension, change_pooling, change_config, change_format],
)
def test_a_changed_model_finds_none_of_its_old_vectors(
    model: SentenceTransformer, tmp_path: Path, change: Callable[[SentenceTransformer], None]
) -> None:
    """One bit of one weight, its tokenizer, limit, dimension, modules, configuration or number format."""
    TextEncoder(model, cache=cache_in(tmp_path))(TEXTS)
    change(model)
    again = TextEncoder(model, cache=cache_in(tmp_path))
    again(TEXTS)
    assert (again.encoded, again.kept) == (4, 0)


def test_another_prompt_or_side_finds_none_of_the_vectors(model: SentenceTransformer, tmp_path: Path) -> None:
    """A prompt is a part of the key, and so is the side, which some models route by."""
    cache = cache_in(tmp_path)
    for options in ({"prompt": ""}, {"prompt": "p"}, {"side": "query"}, {"prompt": "question: "}):
        encode = TextEncoder(model, cache=cache)
        encode(TEXTS, **options)  # type: ignore[arg-type]
        assert encode.kept == 0


def test_the_fingerprint_does_not_depend_on_what_the_model_was_used_for(folder: Path, tmp_path: Path) -> None:
    """Nor on where its folder is, on prompts, or on whether it reads packed texts (T25)."""
    models = [SentenceTransformer(str(folder), device="cpu"), load_encoder(folder)]
    expected = model_fingerprint(models[0])
    models[1].encode(["a text", "another one"], prompt="p: ")
    models[1].save_pretrained(str(tmp_path / "copy"), create_model_card=False)
    models[1].prompts["query"] = "other"
    assert {model_fingerprint(model) for model in [*models, load_encoder(tmp_path / "copy")]} == {expected}


def test_side_prompt_is_that_of_the_library(model: SentenceTransformer) -> None:
    """Of queries and documents, and of other texts the default one or none."""
    for side, encode in (("query", model.encode_query), ("document", model.encode_document), (None, model.encode)):
        np.testing.assert_array_equal(encode(["a"]), model.encode(["a"], prompt=side_prompt(model, side) or ""))
    model.default_prompt_name = "query"
    assert side_prompt(model, None) == PROMPTS["query"]


# Where it serves


def test_a_second_evaluation_encodes_no_text_and_gives_the_same_scores(
    model: SentenceTransformer, kept: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bit by bit; a line says so."""
    first = evaluate(model, data=[DATA])["animals"]
    with decoder_calls() as calls:
        second = evaluate(model, data=[DATA])["animals"]
    assert calls == []
    assert (second.per_item, second.main_score) == (first.per_item, first.main_score)
    assert capsys.readouterr().err.splitlines() == [f"vectors kept from before, in {kept}: 6; texts encoded: 0"]


def test_no_cache_keeps_nothing_and_reads_nothing(folder: Path, kept: Path, tmp_path: Path) -> None:
    """In both commands, as an argument and as an option."""
    evaluate(folder, data=[DATA], cache=False)
    (tmp_path / "a.txt").write_text("one")
    arguments = ["search", str(folder), str(tmp_path / "a.txt"), "--query", "one", "--no-cache"]
    cli.app(arguments, standalone_mode=False)
    assert not kept.exists()


def test_a_new_session_encodes_the_passages_that_have_changed(
    model: SentenceTransformer, kept: Path, tmp_path: Path
) -> None:
    """A changed file is read again; of its passages those that were there are not encoded again."""
    notes = tmp_path / "notes.jsonl"
    notes.write_text('"the cat"\n"the dog"\n')
    search(model, notes, ["cat"])
    notes.write_text('"the cat"\n"the cow"\n')
    with decoder_calls() as calls:
        [hits] = search(model, notes, ["cow"]).values()
    assert sum(call.texts for call in calls) == 2  # the cow, and the query
    assert {hit.text for hit in hits} == {"the cat", "the cow"}


def test_a_file_that_changes_while_one_asks_is_read_again(
    model: SentenceTransformer, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next answer is from the new text; where it cannot be read, from the old one."""
    notes = tmp_path / "notes.txt"
    notes.write_text("the cat")
    contents = iter(["the cow eats", "", None])

    def ask(*_: object) -> str:
        content = next(contents, None)
        if content is None:
            raise EOFError
        notes.write_text(content)
        return f"what {content}"

    monkeypatch.setattr("builtins.input", ask)
    answers = search(model, notes)
    assert [[hit.text for hit in hits] for hits in answers.values()] == [["the cow eats"]] * 2


def test_scores_within_a_time_are_measured_without_kept_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How long a scoring takes decides when training must end; within steps, vectors are kept."""

    class AskedError(Exception):
        """By a scoring, whether it uses kept vectors."""

    def evaluate(*_: object, cache: bool, **__: object) -> None:
        raise AskedError(cache)

    monkeypatch.setattr("anchorvec.run_scores.evaluate", evaluate)
    monkeypatch.setattr("anchorvec.pipeline.check_test_data", lambda **_: [DATA])
    for minutes in (None, 10):
        recipe = anchorvec.load_recipe("debug", [f"output={tmp_path / str(minutes)}"])
        with pytest.raises(AskedError) as found:
            anchorvec.train(recipe, budget=anchorvec.Budget(minutes))
        assert found.value.args == (minutes is None,)


# The file


def test_the_folder_is_that_of_the_environment_or_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty means none; on Linux XDG_CACHE_HOME counts."""
    assert vector_cache() is None
    monkeypatch.setenv("ANCHORVEC_CACHE", str(tmp_path / "named"))
    assert vector_cache().file.parent == tmp_path / "named"
    monkeypatch.delenv("ANCHORVEC_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("ANCHORVEC_CACHE_GB", "0.5")
    if sys.platform == "linux":
        assert (vector_cache().file.parent, vector_cache().max_bytes) == (tmp_path / "anchorvec", 5 * 10**8)
    monkeypatch.setenv("ANCHORVEC_CACHE_GB", "many")
    with pytest.raises(AnchorvecError, match="ANCHORVEC_CACHE_GB: 'many' is no number of gigabytes"):
        vector_cache()


@pytest.mark.parametrize("fault", ["no folder", "no file", "damaged"])
def test_a_cache_that_does_not_work_is_one_line_and_no_failure(
    model: SentenceTransformer, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    """The vectors are computed, as often as they are asked for."""
    folder = tmp_path / "kept"
    if fault == "no folder":
        folder.write_text("")
    elif fault == "no file":
        (folder / "vectors.sqlite3").mkdir(parents=True)
    else:
        folder.mkdir()
        (folder / "vectors.sqlite3").write_bytes(b"no database" * 1000)
    cache = cache_in(folder)
    encoders = [TextEncoder(model, cache=cache) for _ in range(2)]
    for encode in encoders:
        np.testing.assert_allclose(encode(TEXTS, prompt=""), model.encode(TEXTS, prompt=""), atol=1e-5)
        assert encode.encoded == 4
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"the vectors kept in {folder} cannot be ")


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file stays within its limit, and what was used meanwhile stays in it."""
    clock = 1_000_000.0
    monkeypatch.setattr(time, "time", lambda: clock)
    cache = cache_in(tmp_path, max_bytes=2_000_000)
    draw = np.random.default_rng(0)
    groups = [[f"{group} {i}".encode() for i in range(100)] for group in range(8)]
    for keys in groups:
        cache.keep(keys, draw.random((100, 1_000), dtype=np.float32))  # 400 kB
        clock += 10_000
        found_in(cache, groups[0])
    assert cache.file.stat().st_size <= 2_500_000
    shares = [len(found_in(cache, keys)) for keys in groups]
    assert shares[0] == shares[-1] == 100
    assert shares[1] == shares[2] == 0


WRITER = """
import sys
from pathlib import Path
import numpy as np
from anchorvec.model.vector_cache import VectorCache

cache = VectorCache(Path(sys.argv[1]), 10**9)
for i in range(int(sys.argv[2])):
    numbers = np.arange(50 * i, 50 * i + 100)  # half of them again
    print(i, flush=True)
    cache.keep([f"{n}".encode() for n in numbers], np.repeat(numbers[:, None], 500, axis=1).astype(np.float32))
"""


def write(folder: Path, times: int) -> "subprocess.Popen[str]":
    """A process that keeps vectors: under each number, this number 500 times."""
    command = [sys.executable, "-c", WRITER, str(folder), str(times)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def check_kept(folder: Path, most: int) -> int:
    """How many of the numbers below `most` are kept; each has its own vector, and the file is whole."""
    found = found_in(cache_in(folder), [f"{n}".encode() for n in range(most)])
    assert all(row == [float(key)] * 500 for key, row in found.items())
    with closing(sqlite3.connect(folder / "vectors.sqlite3")) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("SELECT count(*) FROM vectors").fetchone() == (len(found),)
    return len(found)


def test_processes_that_write_at_once_keep_all_their_vectors(tmp_path: Path) -> None:
    """Each key once, with its own vector; no one says anything."""
    writers = [write(tmp_path, 10) for _ in range(3)]
    for writer in writers:
        output, _ = writer.communicate()
        assert output.split() == [str(i) for i in range(10)]
    assert check_kept(tmp_path, 1_000) == 550


def test_a_killed_process_leaves_a_whole_file(tmp_path: Path) -> None:
    """Of what it had begun to keep there is all or nothing, and another one goes on."""
    writer = write(tmp_path, 100_000)
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) == 20:
            writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert check_kept(tmp_path, 5_000) % 50 == 0
    write(tmp_path, 3).communicate()
    assert check_kept(tmp_path, 5_000) >= 1_000


def test_an_export_shares_the_vectors_of_its_run(run: Path) -> None:
    """Compared with the stage that it was made of, whose adapter is merged."""
    found = {model_fingerprint(load_encoder(run / folder, torch.float32)) for folder in ("stage_two", "model")}
    assert len(found) == 1


def test_an_index_without_a_cache_is_the_same(model: SentenceTransformer, kept: Path) -> None:
    """Kept vectors change no answer."""
    documents = {"a": "The cat sleeps.", "b": "Trains to Berlin."}
    indices: list[Any] = [Index(model, documents), Index(model, documents), Index(model, documents, cache=False)]
    answers = [[(hit.id, hit.score) for hit in index.search("cat")] for index in indices]
    assert answers[0] == answers[1] == answers[2]
