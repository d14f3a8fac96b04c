"""Memory and time of data: `plan`, and both stages up to their first optimizer step, on generated pairs.

Queries have 60 characters and documents 400; every second row has a hard negative, every tenth query several positives.
Each command runs in a process of its own on the model `tiny`, and its peak is that of `RssAnon`, which leaves out what
is mapped from files. What a number of rows adds is the difference to the smallest number. Needs Linux, and disk for
twice the pairs in the system's temporary folder (TMPDIR): 5 GB for three million.

    python benchmarks/data.py --json data.json
    python benchmarks/data.py --rows 1000 300000 stage_two.in_batch_negatives=similar
"""

import argparse
import json
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common import in_process, report, survived

ROWS = [1_000, 300_000, 3_000_000]
QUERY, DOCUMENT = 60, 400
"""Characters."""

PAIRS_PER_STEP = 16
_SECONDS_BETWEEN_LOOKS = 0.005


def write_pairs(file: Path, rows: int, seed: int = 0) -> None:
    """Write `rows` pairs of random words to `file`, as JSON Lines."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(20_000)]
    letters = " ".join(draw.choices(words, k=200_000))

    def text(number: int, length: int) -> str:
        start = draw.randrange(len(letters) - length)
        return f"{number} {letters[start : start + length]}"[:length]

    with file.open("w", encoding="utf-8") as out:
        query = positive = ""
        for row in range(rows):
            earlier = positive
            if row % 12 not in (10, 11):  # ten queries in twelve rows: the tenth has three positives
                query = text(row, QUERY)
            positive = text(row, DOCUMENT)
            negatives = [text(rows + row, DOCUMENT)] if row % 2 else []
            if row % 12 == 11:
                negatives.insert(0, earlier)  # a positive of the same query, which is no negative
            out.write(json.dumps({"query": query, "positive": positive, "negatives": negatives}) + "\n")


def anonymous_memory() -> int:
    """Bytes of this process's memory that no file stands behind."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@contextmanager
def watched(found: dict[str, Any]) -> Iterator[None]:
    """Put the seconds of the block and the most anonymous memory in it into `found`."""
    done = threading.Event()
    peak = 0

    def look() -> None:
        nonlocal peak
        while not done.wait(_SECONDS_BETWEEN_LOOKS):
            peak = max(peak, anonymous_memory())

    watcher = threading.Thread(target=look, daemon=True)
    began = time.perf_counter()
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        found |= {"seconds": time.perf_counter() - began, "peak_anonymous": max(peak, anonymous_memory())}


def run(command: str, file: Path, folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The figures of `plan`, or of `train` with one step a stage, on the pairs of `file`."""
    import torch

    import anchorvec

    torch.set_num_threads(1)
    sizes = {"steps": 1, "warmup_steps": 0, "pairs_per_step": PAIRS_PER_STEP}
    steps = [f"{stage}.{key}={value}" for stage in ("stage_one", "stage_two") for key, value in sizes.items()]
    data = f"data.train=[{{path: {file}, instruction: 'Find: '}}]"
    recipe = anchorvec.load_recipe("debug", [data, f"output={folder}", *steps, *overrides])
    found: dict[str, Any] = {}
    with watched(found):
        if command == "plan":
            anchorvec.plan(recipe)
        else:
            anchorvec.train(recipe)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, nargs="+", default=ROWS)
    options.add_argument("--json", type=Path, help="write the figures to this file")
    options.add_argument("overrides", nargs="*", default=[], help="values of the recipe, as for `anchorvec train`")
    chosen = options.parse_intermixed_args(arguments)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_DATASETS_CACHE"] = str(Path(scratch) / "cache")  # for the processes that are started
        for rows in sorted(chosen.rows):
            file = Path(scratch) / "pairs.jsonl"
            write_pairs(file, rows)
            for command in ("plan", "train"):
                result = in_process(run, command, file, Path(scratch) / f"{command}-{rows}", chosen.overrides)
                survived(result)
                least = results.get(f"{command}, {min(chosen.rows):,} rows", {}).get("peak GB")
                peak = result["peak_anonymous"] / 1e9
                results[f"{command}, {rows:,} rows"] = {
                    "rows": rows,
                    "seconds": result["seconds"],
                    "peak GB": peak,
                    "added GB": peak - (least if least is not None else peak),
                }
            for cached in (Path(scratch) / "cache").rglob("*.arrow"):
                cached.unlink()
    figures = {"most_added_gb": max(row["added GB"] for row in results.values())}
    settings = {"shape": "tiny", "precision": "auto", "overrides": chosen.overrides}
    report("Data", results, figures, settings, chosen.json)


if __name__ == "__main__":
    main()
