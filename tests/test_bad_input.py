"""Whatever is given: it works, or it ends in exit code 2 and one clear line, and nothing on disk has changed."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import anchorvec
from anchorvec.cli import main
from anchorvec.recipe import dump_recipe

EXAMPLES = int(os.environ.get("ANCHORVEC_BAD_INPUTS", "25"))
"""Of each kind; 200 were tried."""

thorough = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)

PAIRS = [{"query": f"what is {i}?", "positive": f"{i} is a number, {i * 7}"} for i in range(12)]
STEPS = ["stage_one.steps=1", "stage_one.warmup_steps=0", "stage_one.pairs_per_step=2"]
STEPS += ["stage_two.steps=1", "stage_two.warmup_steps=0", "stage_two.pairs_per_step=2"]


def state(folder):
    """Every file below `folder`, with a hash of what is in it, and every folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def run_command(words, folder):
    """The exit code of `anchorvec WORDS`, run in `folder`, and what stands on stderr."""
    out, err = io.StringIO(), io.StringIO()
    before, here = sys.argv, Path.cwd()
    sys.argv = ["anchorvec", *words]
    code = 0
    try:
        os.chdir(folder)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        os.chdir(here)
        sys.argv = before
    return code, err.getvalue()


def works_or_is_refused(words, folder):
    """Assert it of `anchorvec WORDS` in `folder`; whether it was refused."""
    before = state(folder)
    code, err = run_command(words, folder)
    assert code in (0, 2), (words, code, err)
    assert "Traceback" not in err, (words, err)
    if code == 2:
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert not words or len(lines) == 1 or "Usage:" in err, (words, err)
        assert state(folder) == before, words
    return code == 2


@pytest.fixture(scope="module")
def place(tmp_path_factory, run):
    """A folder with pairs, a finished run, a collection and a corpus."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    shutil.copytree(run, folder / "run")
    (folder / "set" / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", "abc"), ("queries", "xyz")):
        rows = [{"_id": f"{name}{i}", "title": "", "text": text * 5} for i, text in enumerate(texts)]
        (folder / "set" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["query-id\tcorpus-id\tscore", *(f"queries{i}\tcorpus{i}\t1" for i in range(3))]
    (folder / "set" / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["token", "auto", "[/b]", "~", "../..", "/", "nan", "1e400", "pairs.jsonl", "builtin:debug"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=4,
)

RECIPE = yaml.safe_load(dump_recipe(anchorvec.load_recipe("debug", STEPS)))


def places_in(value, path=()):
    """The path of every value in a recipe."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from places_in(child, (*path, key))


@thorough
@given(st.sampled_from([path for path in places_in(RECIPE) if path]), JSON, st.booleans())
def test_recipes(place, path, value, as_override):
    """Any value at any place of a recipe, in its file or on the command line."""
    if path[0] == "output" or (path[-1] in ("steps", "base", "r", "name") and isinstance(value, int | float | str)):
        return  # a valid one may take long, or be looked for on the hub
    if as_override:
        words = ["debug", *STEPS, f"{'.'.join(map(str, path))}={json.dumps(value)}"]
    else:
        recipe = json.loads(json.dumps(RECIPE))
        *parents, last = path
        section = recipe
        for key in parents:
            section = section[key]
        section[last] = value
        (place / "recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
        words = ["recipe.yaml"]
    works_or_is_refused(["plan", *words], place)


@thorough
@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_recipe_files(place, content):
    """Any bytes."""
    (place / "recipe.yaml").write_bytes(content)
    works_or_is_refused(["plan", "recipe.yaml"], place)


@st.composite
def damaged(draw, content):
    """`content` with a part cut out, written twice, or replaced by other bytes."""
    begin = draw(st.integers(0, len(content)))
    end = draw(st.integers(begin, min(len(content), begin + 40)))
    other = draw(st.sampled_from([b"", content[begin:end] * 2, b'"', b"\x00", b"\xff", b"[", b"\n", b"\\ud800", b","]))
    return content[:begin] + other + content[end:]


def tables():
    """Good training data in each format, by the name of its file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "".join(json.dumps(row) + "\n" for row in PAIRS).encode()
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(PAIRS), parquet)
    rows = "".join(f'"{row["query"]}",{json.dumps(row["positive"])}\n' for row in PAIRS)
    return {
        "a.jsonl": lines,
        "a.json": json.dumps(PAIRS).encode(),
        "a.csv": f"query,positive\n{rows}".encode(),
        "a.tsv": b"query\tpositive\n" + b"".join(f"q{i}\tp{i}\n".encode() for i in range(9)),
        "a.jsonl.gz": gzip.compress(lines, mtime=0),
        "a.parquet": parquet.getvalue(),
    }


@thorough
@given(st.sampled_from(sorted(tables().items())).flatmap(lambda item: st.tuples(st.just(item[0]), damaged(item[1]))))
def test_data_files(place, file):
    """Damaged in any format."""
    name, content = file
    (place / name).write_bytes(content)
    works_or_is_refused(["plan", "--no-step", "debug", *STEPS, f"data.train=[{{path: {name}}}]"], place)


COMMANDS = {
    "plan": ["plan", "debug", *STEPS, "model.base={}", "data.train=[{path: pairs.jsonl}]"],
    "evaluate": ["evaluate", "{}", "--data", "set"],
    "search": ["search", "{}", "set/corpus.jsonl", "--query", "a"],
    "export": ["export", "{}", "out"],
    "decode": ["decode", "{}", "a", "--max-tokens", "2"],
}


@thorough
@given(st.sampled_from(sorted(COMMANDS)), st.sampled_from(["base", "stage_one", "stage_two", "model"]), st.data())
def test_model_folders(place, command, part, data):
    """A folder of a run of which a file is damaged or gone, with each command that reads one."""
    shutil.rmtree(place / "broken", ignore_errors=True)
    shutil.rmtree(place / "out", ignore_errors=True)
    shutil.copytree(place / "run", place / "broken")
    files = sorted(str(p.relative_to(place / "broken")) for p in (place / "broken" / part).rglob("*") if p.is_file())
    file = place / "broken" / data.draw(st.sampled_from(files))
    if data.draw(st.booleans()):
        file.unlink()
    else:
        file.write_bytes(data.draw(damaged(file.read_bytes())))
    words = [word.replace("{}", f"broken/{part}") for word in COMMANDS[command]]
    works_or_is_refused(words, place)


WORDS = ["plan", "train", "evaluate", "search", "decode", "export", "debug", "paper/llama-3.2-1b", "run", "run/model"]
WORDS += ["--data", "set", "--query", "x", "--json", "out.json", "--json=no/such/folder.json", "--top-k", "0", "-1"]
WORDS += ["--minutes", "nan", "--batch-size", "--task", "NoSuchTask", "--as", "query", "", " ", "[/b]", "\ud800"]
WORDS += ["output=run", "output=", "a.b=1", "=", "stage_one=null", "stage_two=null", "model.base=no-such-folder/"]
WORDS += ["out", "--help"]


@thorough
@given(st.lists(st.sampled_from(WORDS), max_size=6))
def test_command_lines(place, words):
    """Any words in any order; those that would train for long are left out."""
    if words[:1] == ["train"] and any(word.startswith("output=") for word in words):
        return
    works_or_is_refused(words, place)
