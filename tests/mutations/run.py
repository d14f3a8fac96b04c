"""Tries to break the package: each of `changes.py` in a copy of it, against the tests of its module, 20 s at most.

    python tests/mutations/run.py [--json FILE] [NUMBER ...]

A worker for each core imports the libraries once and forks for each change. Exit code 1 where less than 95% of the
changes to recipe keys or less than 90% of the others are noticed.
"""

import argparse
import json
import os
import re
import shutil
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
SECONDS = 20
LEAST = {"key": 0.95, "other": 0.90}

TESTS = {
    "data/samplers": ["batches", "wiring_data"],
    "data/negatives": ["negatives", "batches", "wiring_data"],
    "data/tokens": ["reconstruction", "wiring_data", "wiring_steps"],
    "data/": ["wiring_data", "memory"],
    "objectives/contrastive": ["contrastive", "stage_two_loss", "wiring_steps"],
    "objectives/bag_of_words": ["words", "stage_two_loss", "wiring_steps"],
    "objectives/": ["reconstruction", "wiring_steps", "words"],
    "model/head": ["reconstruction", "wiring_steps"],
    "model/end": ["end_token"],
    "model/base": ["embedder", "wiring_data"],
    "model/readout": ["reconstruction", "embedder"],
    "model/": ["embedder", "loading", "export"],
    "exporting/": ["export", "loading"],
    "training/engine": ["memory"],
    "": ["wiring_steps", "trajectory", "wiring_data", "wiring_engine"],
}
"""The beginning of a file's name -> its tests, the likeliest first; the first that fits."""


def tests_of(kind: str, file: str) -> list[str]:
    """The test files for a change. For a recipe key those with a test that is marked with its name."""
    names = next(TESTS[start] for start in TESTS if file.startswith(start))
    if kind.startswith("key "):
        key = kind.removeprefix("key ")
        marked = [path.stem for path in sorted((ROOT / "tests").glob("test_wiring_*.py")) if _marks(path, key)]
        names = [name.removeprefix("test_") for name in marked] or names
    return [f"tests/test_{name}.py" for name in names]


def _marks(path: Path, key: str) -> bool:
    """Whether a test in the file is marked as one that follows `key`."""
    marks = re.findall(r"mark\.wires\((.*?)\)\n", path.read_text(encoding="utf-8"), re.DOTALL)
    return any(f'"{name}"' in mark for mark in marks for name in {key, key.rpartition(".")[2]})


def outcome(number: int, scratch: Path) -> tuple[str, float]:
    """Whether the tests notice a change: `caught`, `survives` or `time`; in a fork of this process."""
    kind, file, old, new = CHANGES[number]
    package = scratch / str(number)
    shutil.copytree(ROOT / "src", package)
    path = package / "anchorvec" / file
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, (number, file, old)
    path.write_text(text.replace(old, new), encoding="utf-8")
    start = time.monotonic()
    child = os.fork()
    if not child:
        os.dup2(os.open(scratch / f"{number}.log", os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.path.insert(0, str(package))
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "--tb=line", f"--basetemp={scratch / f't{number}'}"]
        os._exit(int(pytest.main([*options, *tests_of(kind, file)])))
    code = None
    while code is None and time.monotonic() - start < SECONDS:
        done, status = os.waitpid(child, os.WNOHANG)
        code = os.waitstatus_to_exitcode(status) if done else None
        time.sleep(0.05)
    if code is None:
        os.kill(child, 9)
        os.waitpid(child, 0)
    for folder in (package, scratch / f"t{number}"):
        shutil.rmtree(folder, ignore_errors=True)
    return {0: "survives", 1: "caught", None: "time"}.get(code, f"code {code}"), time.monotonic() - start


def work(worker: int, workers: int, numbers: list[int]) -> None:
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
    with tempfile.TemporaryDirectory() as scratch:
        for number in numbers[worker::workers]:
            found, seconds = outcome(number, Path(scratch))
            sys.stdout.write(json.dumps({"number": number, "found": found, "seconds": round(seconds, 1)}) + "\n")
            sys.stdout.flush()


def report(found: dict[int, dict[str, Any]]) -> tuple[list[str], bool]:
    """Lines of a table and of what was not noticed; whether enough was."""
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
            lines.append(f"{result['found']}: {number}, {kind}, {file}: {old!r} -> {new!r}")
    return lines, all(shares[name] >= least for name, least in LEAST.items() if groups[name])


def main() -> None:
    """Try the changes, all or those that are named."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("numbers", nargs="*", type=int)
    options.add_argument("--json", type=Path)
    options.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    numbers = chosen.numbers or list(range(len(CHANGES)))
    workers = min(os.cpu_count() or 1, len(numbers))
    if chosen.worker is not None:
        work(chosen.worker, workers, numbers)
        return
    start = time.monotonic()
    command = [sys.executable, __file__, *map(str, numbers), "--worker"]
    running = [subprocess.Popen([*command, str(w)], stdout=subprocess.PIPE, text=True) for w in range(workers)]
    found = {}
    for process in running:
        for line in process.stdout or ():
            if re.match(r'\{"number"', line):
                result = json.loads(line)
                found[result["number"]] = result
    lines, enough = report(found)
    lines.append(f"{len(found)} changes, {(time.monotonic() - start) / 60:.0f} minutes")
    sys.stdout.write("\n".join(lines) + "\n")
    if chosen.json:
        chosen.json.write_text(json.dumps(list(found.values())) + "\n", encoding="utf-8")
    raise SystemExit(0 if enough and len(found) == len(numbers) else 1)


if __name__ == "__main__":
    main()
