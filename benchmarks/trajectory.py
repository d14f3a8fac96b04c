"""Training is what it was: this tree against commit b98c275, from which it was redesigned.

Both trees run the same recipes with the same rows in each step, on the same machine, one thread, fp32, one seed. The
losses of all steps must agree to 1e-6, the exported folders byte for byte; card and recipe after the map of names
below. What chooses the rows, the sampler, is left out: a step's rows are given.

    python benchmarks/trajectory.py [--base smollm2]
    python benchmarks/trajectory.py --store tests/trajectory.json    writes the losses of b98c275 for the tests again
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEFORE = "b98c275"
STEPS, PAIRS = 5, 4

RENAMED = {
    "stage_two.words_weight": "stage_two.bag_of_words_weight",
    "stage_one.target=words": "stage_one.target=bag_of_words",
}
"""Keys and values of a recipe, as they were and as they are."""

ADDED: dict[str, dict[str, Any]] = {
    "": {"about": "", "report_to": []},
    "model": {
        "attention_direction": "causal",
        "between": "\n",
        "pool_prompt": True,
        "pooling": "lasttoken",
        "read": "once",
    },
    "evaluation": {"precision": "fp32", "bm25": False, "at": [], "every": None, "keep_best": False},
    "stage_one": {
        "candidates": "texts",
        "lm_weight": 1.0,
        "lora": None,
        "masking": {"mask_replace_prob": 0.8, "mlm_probability": 0.2, "random_replace_prob": 0.1, "token": "_"},
        "max_df": 0.1,
        "save_steps": 100,
        "save_total_limit": 2,
        "sharded": False,
        "source": "other",
    },
    "stage_two": {"generation_weight": 0.0, "save_steps": 100, "save_total_limit": 2},
    "data.train": {"revision": None},
}
"""Keys that a recipe has now, by section, with their defaults, which are what was done then."""

STAGES = [
    f"stage_{stage}.{key}"
    for stage in ("one", "two")
    for key in (f"steps={STEPS}", f"pairs_per_step={PAIRS}", "log_every=1")
]
CASES: dict[str, list[str]] = {
    "texts": ["stage_one.warmup_steps=1", "stage_two.warmup_steps=2", "stage_two.lora={r: 4, alpha: 8, dropout: 0.05}"],
    "words": [
        "model.end={before: '<', after: '>'}",
        "stage_one.target=words",
        "stage_one.learning_rate=1e-4",
        "stage_two.learning_rate=1e-4",
        "stage_one.alpha=0.4",
        "stage_two.words_weight=0.3",
        "stage_two.lora=null",
        "stage_two.micro_batch_tokens=60",
        "stage_two.temperature=0.1",
    ],
    "padded": [
        "model.attention=eager",
        "stage_one.gradient_checkpointing=true",
        "stage_one.schedule=cosine",
        "stage_one.weight_decay=0.1",
        "stage_one.micro_batch_tokens=90",
        "stage_one.end_token_target=false",
        "stage_two.schedule=constant",
        "stage_two.weight_decay=0.2",
        "stage_two.max_grad_norm=0.5",
        "stage_two.lora=null",
    ],
}
"""Overrides of the recipe `debug`, with the names of then."""


def data_of(case: str, folder: Path) -> str:
    """The data sets of a case, written to `folder`, as a value of `data.train`; every row has a hard negative."""
    sets = []
    for name in ("first", "second") if case == "padded" else ("first",):
        rows = []
        for i in range(3 * STEPS * PAIRS):
            positive = f"the {i}th of {name}{' and more' * (i % 4)}"
            rows.append({"query": f"{name} {i} who?", "positive": positive, "negatives": [f"no {i}"]})
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        sets.append({"path": str(file), "instruction": f"{name}: " if case == "padded" else ""})
    return json.dumps(sets)


def row_ids(rows: int) -> list[int]:
    """The rows of all steps, a fixed list: no sampler has a say."""
    return [(7 * i + 3) % rows for i in range(STEPS * PAIRS)]


def overrides(case: str, base: str, folder: Path, names: Mapping[str, str]) -> list[str]:
    """The overrides of a case, after `names`."""
    listed = [f"model.base={base}", "model.max_tokens=64", "model.precision=fp32", "seed=5", *STAGES, *CASES[case]]
    listed += [f"data.train={data_of(case, folder)}", f"output={folder / 'run'}"]
    for old, new in names.items():
        listed = [new + o.removeprefix(old) if o == old or o.startswith(f"{old}=") else o for o in listed]
    return listed


@contextmanager
def given_rows() -> Iterator[None]:
    """Both stages' trainers see the rows of `row_ids`, in this order."""
    from sentence_transformers import SentenceTransformerTrainer
    from torch.utils.data import BatchSampler
    from transformers import Trainer

    def batches(self: Any, dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
        return BatchSampler(row_ids(len(dataset)), batch_size, drop_last)

    before = Trainer._get_train_sampler, SentenceTransformerTrainer.get_batch_sampler
    Trainer._get_train_sampler = lambda self, dataset=None: row_ids(len(dataset or self.train_dataset))
    SentenceTransformerTrainer.get_batch_sampler = batches
    try:
        yield
    finally:
        Trainer._get_train_sampler, SentenceTransformerTrainer.get_batch_sampler = before


def drive(case: str, base: str, folder: Path, names: Mapping[str, str]) -> None:
    """Train the case with whatever `anchorvec` is imported, in one thread."""
    import torch

    import anchorvec

    torch.set_num_threads(1)
    with given_rows():
        anchorvec.train(anchorvec.load_recipe("debug", overrides(case, base, folder, names)))


def trained(tree: Path, case: str, base: str, folder: Path, *, then: bool) -> Path:
    """The run of a case by the package in `tree`."""
    folder.mkdir(parents=True)
    environment = os.environ | {"PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--drive", case, "--folder", str(folder), "--base", base]
    done = subprocess.run([*command, *["--then"] * then], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case}, {tree}:\n{done.stderr[-3000:]}")
    return folder / "run"


def losses(run: Path) -> dict[str, list[float]]:
    """The losses of all steps, by stage."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {name: [r["loss"] for r in records if r["stage"] == name] for name in ("stage_one", "stage_two")}


def differences(before: Path, now: Path) -> Iterator[str]:
    """What differs between two runs."""
    from anchorvec.model.portable import make_portable

    for stage, values in losses(before).items():
        for step, (a, b) in enumerate(zip(values, losses(now)[stage], strict=True), start=1):
            if not abs(a - b) <= 1e-6 * abs(a):
                yield f"{stage}, step {step}: loss {a} was, {b} is"
    make_portable(before / "model")  # the form of a folder that older versions read too
    files = {p.relative_to(before / "model") for p in (before / "model").rglob("*") if p.is_file()}
    files |= {p.relative_to(now / "model") for p in (now / "model").rglob("*") if p.is_file()}
    for name in sorted(files - {Path("README.md")}):
        pair = [run / "model" / name for run in (before, now)]
        if not all(p.is_file() for p in pair) or pair[0].read_bytes() != pair[1].read_bytes():
            yield f"model/{name}"
    then, since = as_now(recipe_of(before)), without_added(recipe_of(now))
    for key in sorted(then.keys() | since.keys()):
        if then.get(key) != since.get(key):
            yield f"recipe.yaml: {key}: {then.get(key)} was, {since.get(key)} is"
    cards = [card_text(run) for run in (before, now)]
    if cards[0] != cards[1]:
        yield "model/README.md"


def recipe_of(run: Path) -> dict[str, Any]:
    """The resolved recipe, without the paths of the run."""
    import yaml

    recipe: dict[str, Any] = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    del recipe["output"]
    for source in recipe["data"]["train"]:
        source["path"] = Path(source["path"]).name
    return recipe


def as_now(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe of then with the names of now."""
    for old, new in RENAMED.items():
        section, _, key = old.partition(".")
        key, _, value = key.partition("=")
        found = recipe.get(section) or {}
        if value and found.get(key) == value:
            found[key] = new.partition("=")[2]
        elif not value and key in found:
            found[new.partition(".")[2]] = found.pop(key)
    return recipe


def without_added(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe of now without the keys that are new, where they have their defaults."""
    for name, added in ADDED.items():
        sections = recipe["data"]["train"] if name == "data.train" else [recipe[name] if name else recipe]
        for section in sections:
            for key, default in added.items():
                if section is not None and section.get(key) == default:
                    del section[key]
    return recipe


def card_text(run: Path) -> str:
    """The card without its recipe, which is compared by itself, and its record of versions and machine.

    How a text is read is told in other words; its length and the vector's are compared.
    """
    text = (run / "model" / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"```(yaml|json)\n.*?\n```", "", text, flags=re.DOTALL)
    reading = r"It maps a text of up to (\d+) tokens to\s+(\d+) numbers.*?(?=\n\n)"
    text = re.sub(reading, r"It maps \1 tokens to \2 numbers.", text, flags=re.DOTALL)
    return text.replace("reconstruction of bags of words", "reconstruction of words").replace(
        "bag-of-words reconstruction beside it", "reconstruction of words beside it"
    )


@contextmanager
def tree_before() -> Iterator[Path]:
    """The tree of the commit before, beside this one."""
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "before"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), BEFORE], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def main() -> None:
    """Compare, or store the losses of before."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--base", default="tiny")
    options.add_argument("--store", type=Path)
    options.add_argument("--drive", choices=CASES, help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options.add_argument("--then", action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.drive:
        drive(chosen.drive, chosen.base, chosen.folder, {} if chosen.then else RENAMED)
        return
    stored, failed = {}, False
    with tempfile.TemporaryDirectory() as scratch, tree_before() as tree:
        for case in CASES:
            before = trained(tree, case, chosen.base, Path(scratch) / f"{case}-before", then=True)
            stored[case] = losses(before)
            if chosen.store:
                continue
            now = trained(ROOT, case, chosen.base, Path(scratch) / f"{case}-now", then=False)
            found = list(differences(before, now))
            failed |= bool(found)
            sys.stdout.write(
                f"{case}: {'the same' if not found else 'DIFFERENT'}\n" + "".join(f"  {f}\n" for f in found)
            )
    if chosen.store:
        chosen.store.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
