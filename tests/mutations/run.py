"""Tries to break the package: each of `changes.py` in a copy of it, against the tests of its module.

    python tests/mutations/run.py [--json FILE] [--rows FILE] [NUMBER ...]

`--rows` tries other changes: a JSON list of [file, text, what it becomes].

A worker for each core imports the libraries once and forks for each change, which has 20 s of processor time. The
tests run on the unchanged package first. Exit code 1 where they fail there, where a change raises an exception, or
where less than 95% of the changes to recipe keys or less than 90% of the others are noticed.
"""

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from changes import CHANGES

ROOT = Path(__file__).resolve().parents[2]
Change = tuple[str, str, str, str]
SECONDS = 20
UNCHANGED = "unchanged"
"""Stands for all of `unchanged` among the names of changes."""
LEAST = {"key": 0.95, "other": 0.90}

TESTS = {
    "data/samplers": ["batches", "wiring_data"],
    "data/negatives": ["negatives", "wiring_simcse", "batches", "wiring_data"],
    "data/stage_inputs": [
        "training_data::test_lengths_are_those_of_rows_from_everywhere",
        "memory::test_a_large_step_is_the_mean_and_three_standard_deviations",
        "wiring_data",
        "wiring_simcse",
        "training_data",
    ],
    "data/tokens": ["reconstruction", "wiring_data", "wiring_steps"],
    "data/reading": ["wiring_reading", "readout", "training_data", "wiring_steps"],
    "data/": ["wiring_data", "training_data", "memory"],
    "objectives/contrastive": ["contrastive", "stage_two_loss", "generation", "wiring_steps"],
    "objectives/bag_of_words": ["words", "stage_two_loss", "wiring_steps"],
    "objectives/generation": ["generation", "wiring_objectives"],
    "objectives/masked": ["masked", "wiring_objectives"],
    "objectives/bag_of_tokens": ["bag_of_tokens", "wiring_objectives"],
    "objectives/reconstruction": ["reconstruction", "readout", "wiring_steps"],
    "objectives/": ["reconstruction", "wiring_steps", "words"],
    "model/head": ["reconstruction", "wiring_steps"],
    "model/end": ["end_token"],
    "model/base": ["embedder", "wiring_data"],
    "model/readout": ["readout", "wiring_reading"],
    "model/decoder": ["readout", "families"],
    "model/portable": ["runtimes", "embedder"],
    "model/attention": ["packing"],
    "model/grouped_attention": ["packing"],
    "model/packing": ["packing", "encoding"],
    "model/folders": ["folders", "loading"],
    "model/latent_attention": ["latent_attention"],
    "model/loading": [
        "latent_attention::test_the_modules_that_trained_beside_adapters_are_those_of_the_folder",
        "loading",
        "export",
    ],
    "model/": ["embedder", "loading", "export"],
    "exporting/": ["export", "loading"],
    "training/engine": ["memory", "wiring_engine"],
    "training/budget": ["quickstarting", "wiring_engine"],
    "training/progress": ["quickstarting", "curve", "wiring_engine"],
    "training/trainers": [
        "quickstarting::test_the_learning_rate_follows_the_clock",
        "wiring_steps",
        "wiring_objectives",
        "wiring_engine",
    ],
    "training/lora": ["lora", "masked", "wiring_steps", "wiring_objectives", "families"],
    "training/stage.py": ["wiring_engine", "wiring_steps"],
    "training/stage_one": [
        "wiring_devices",
        "wiring_data",
        "wiring_engine",
        "memory",
        "wiring_objectives",
        "bag_of_tokens",
    ],
    "training/bag_of_words": ["bag_of_tokens", "words_training", "wiring_objectives"],
    "training/stage_two": ["wiring_engine", "memory", "wiring_steps", "wiring_data", "generation"],
    "recipe/description": ["words_training", "wiring_simcse"],
    "recipe/checks": ["wiring_simcse", "arms", "recipe"],
    "recipe/": ["wiring_engine", "wiring_data"],
    "pipeline.py": ["quickstarting", "wiring_data", "wiring_engine"],
    "run_scores.py": [
        "quickstarting::test_a_whole_set_that_takes_too_long_is_left_out_before_training",
        "quickstarting",
        "wiring_data",
        "wiring_engine",
    ],
    "curve.py": ["curve", "wiring_checkpoints"],
    "training/scoring": ["curve", "wiring_checkpoints"],
    "start.py": ["folders", "wiring_data", "wiring_engine"],
    "evaluation/_mteb": ["prompts_of_tasks", "own_documents", "evaluation"],
    "evaluation/": ["evaluation", "collections", "scores", "own_documents"],
    "": ["wiring_steps", "trajectory", "wiring_data", "wiring_engine"],
}
"""The beginning of a file's name -> its tests, files or single ones, the likeliest first; the first that fits."""


def tests_of(kind: str, file: str) -> list[str]:
    """The test files for a change. For a recipe key those with a test that is marked with its name."""
    names = next(TESTS[start] for start in TESTS if file.startswith(start))
    if kind.startswith("key "):
        key = kind.removeprefix("key ")
        marked = [path.stem for path in sorted((ROOT / "tests").glob("test_wiring_*.py")) if _marks(path, key)]
        names = [name.removeprefix("test_") for name in marked] or names
    parts = [name.partition("::") for name in names]
    return [f"tests/test_{file}.py{colons}{test}" for file, colons, test in parts]


def _marks(path: Path, key: str) -> bool:
    """Whether a test in the file is marked as one that follows `key`."""
    marks = re.findall(r"mark\.wires\((.*?)\)\n", path.read_text(encoding="utf-8"), re.DOTALL)
    return any(f'"{name}"' in mark for mark in marks for name in {key, key.rpartition(".")[2]})


class Verdict:
    """A pytest plugin: whether a test fails by its own check, and which only because the package raises.

    A traceback that goes through the changed package and ends outside of the tests is an exception that the change
    raises, which says nothing about the tests. They go on until one fails by a check.
    """

    def __init__(self, package: Path, key: str) -> None:
        self.package, self.key, self.noticed, self.raised = str(package), key, "", ""

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        """Called for each failure."""
        paths = [str(entry.path) for entry in call.excinfo.traceback]
        if any(path.startswith(self.package) for path in paths) and not paths[-1].startswith(str(ROOT / "tests")):
            self.raised = self.raised or f"{node.nodeid}: {call.excinfo.exconly()[:200]}"
        else:
            self.noticed = node.nodeid
            node.session.shouldstop = "noticed"

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Those first that are marked with the key that is changed."""
        items.sort(key=lambda item: not any(self.key in mark.args for mark in item.iter_markers("wires")))

    def of(self, code: int) -> str:
        """`caught`, `raised` or `survives`, by what was seen and pytest's exit code."""
        if self.noticed or self.raised:
            return "caught" if self.noticed else "raised"
        return {0: "survives"}.get(code, f"code {code}")


def outcome(change: Change, name: str, scratch: Path) -> tuple[str, float, str]:
    """Whether the tests notice a change: `caught`, `raised`, `survives` or `time`; seconds; the test that noticed."""
    kind, file, old, new = change
    package = scratch / name
    shutil.copytree(ROOT / "src", package)
    path = package / "anchorvec" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, (name, file, old)
    path.write_text(text.replace(old, new), encoding="utf-8")
    start, found = time.monotonic(), scratch / f"{name}.json"
    child = os.fork()
    if not child:
        os.setsid()
        used = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, used + SECONDS))
        os.dup2(os.open(scratch / f"{name}.log", os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(1, 2)
        os.environ["PYTHONPATH"] = str(package)
        sys.path.insert(0, str(package))
        import pytest

        verdict = Verdict(package, kind.rpartition(".")[2].removeprefix("key "))
        options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--basetemp={scratch / f't{name}'}"]
        code = int(pytest.main([*options, *tests_of(kind, file)], plugins=[verdict]))
        found.write_text(json.dumps([verdict.of(code), verdict.noticed or verdict.raised]), encoding="utf-8")
        os._exit(0)
    done = 0
    while not done and time.monotonic() - start < 5 * SECONDS:
        done, _ = os.waitpid(child, os.WNOHANG)
        time.sleep(0.05)
    seconds = time.monotonic() - start
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not done:
        os.waitpid(child, 0)
    for folder in (package, scratch / f"t{name}"):
        shutil.rmtree(folder, ignore_errors=True)
    verdict_of, test = json.loads(found.read_text(encoding="utf-8")) if found.exists() else ("time", "")
    return verdict_of, seconds, test


def unchanged() -> list[Change]:
    """For each list of tests one change that changes nothing, which these must pass."""
    lists = {tuple(tests_of(kind, file)): (kind, file) for kind, file, *_ in CHANGES}
    rows = []
    for kind, file in lists.values():
        text = (ROOT / "src" / "anchorvec" / file).read_text(encoding="utf-8")
        rows.append((kind, file, text, text + "\n"))
    return rows


def work(worker: int, workers: int, names: list[str]) -> None:
    """Every so manieth change; a line of JSON for each."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.chdir(ROOT)
    import accelerate
    import datasets
    import peft.tuners.lora
    import pytest
    import sentence_transformers.sentence_transformer.losses
    import torch
    import transformers.models.llama.modeling_llama

    del accelerate, datasets, peft, pytest, sentence_transformers
    _ = transformers.Trainer, transformers.AutoModelForCausalLM, transformers.PreTrainedTokenizerFast
    torch.set_num_threads(1)
    changes = {f"unchanged-{n}": change for n, change in enumerate(unchanged())} if UNCHANGED in names else {}
    changes |= {name: CHANGES[int(name)] for name in names if name != UNCHANGED}
    with tempfile.TemporaryDirectory() as scratch:
        for name in list(changes)[worker::workers]:
            found, seconds, test = outcome(changes[name], name, Path(scratch))
            line = {"name": name, "found": found, "seconds": round(seconds, 1), "test": test}
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


def report(found: dict[int, dict[str, Any]]) -> tuple[list[str], bool]:
    """Lines of a table and of what was not noticed; whether enough was, and no change raised an exception."""
    kinds: dict[str, list[int]] = defaultdict(list)
    for number in found:
        kinds[CHANGES[number][0].split()[0]].append(number)
    groups = {"key": kinds.pop("key", []), "other": [n for numbers in kinds.values() for n in numbers]}
    shares, lines = {}, []
    for name, numbers in {**groups, **kinds}.items():
        caught = sum(found[n]["found"] == "caught" for n in numbers)
        shares[name] = caught / max(1, len(numbers))
        lines.append(f"{name:12} {caught:4} of {len(numbers):4}  {shares[name]:.1%}")
    for number, result in sorted(found.items()):
        if result["found"] != "caught":
            kind, file, old, new = CHANGES[number]
            lines.append(f"{result['found']}: {number}, {kind}, {file}: {old!r} -> {new!r} {result['test']}")
    enough = all(shares[name] >= least for name, least in LEAST.items() if groups[name])
    return lines, enough and all(result["found"] != "raised" for result in found.values())


def results(names: list[str], rows: Path | None) -> dict[str, dict[str, Any]]:
    """What the workers found, by name."""
    workers = min(os.cpu_count() or 1, len(names))
    command = [sys.executable, __file__, *names, *(["--rows", str(rows)] if rows else []), "--worker"]
    running = [subprocess.Popen([*command, str(w)], stdout=subprocess.PIPE, text=True) for w in range(workers)]
    found = {}
    for process in running:
        for line in process.stdout or ():
            if line.startswith('{"name"'):
                result = json.loads(line)
                found[result["name"]] = result
    return found


def main() -> None:
    """Try the changes, all or those that are named."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("names", nargs="*", metavar="NUMBER")
    options.add_argument("--json", type=Path)
    options.add_argument("--rows", type=Path)
    options.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.rows:
        CHANGES[:] = [("other", *row) for row in json.loads(chosen.rows.read_text(encoding="utf-8"))]
    if chosen.worker is not None:
        work(chosen.worker, os.cpu_count() or 1, chosen.names)
        return
    start = time.monotonic()
    failing = [
        result
        for result in results([UNCHANGED] * 2, chosen.rows).values()
        if result["found"] not in {"survives", "time"}
    ]
    if failing:
        raise SystemExit(f"These tests fail on the unchanged package: {failing}")
    names = chosen.names or [str(number) for number in range(len(CHANGES))]
    found = {int(name): result for name, result in results(names, chosen.rows).items()}
    lines, enough = report(found)
    lines.append(f"{len(found)} changes, {(time.monotonic() - start) / 60:.0f} minutes")
    sys.stdout.write("\n".join(lines) + "\n")
    if chosen.json:
        chosen.json.write_text(json.dumps(list(found.values())) + "\n", encoding="utf-8")
    raise SystemExit(0 if enough and len(found) == len(names) else 1)


if __name__ == "__main__":
    main()
