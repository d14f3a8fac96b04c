"""Memory of real runs: against the pairs of a step, against the vocabulary, and beside what `plan` says of it.

Each run is trained in a process of its own, on random weights of the shape, texts with the lengths of real ones. Its
memory is the peak of the process, or of the device; *added* is that above what the process held when training began.
Three bounds: with micro-batches of a fixed size 512 pairs a step take at most 1.1 times the memory that 64 take; from
49,152 to 151,936 tokens of vocabulary the peak grows by at most 1.1 times the weights, gradients and moments of
embedding and head; the plan is within 20% of the peak on six shapes.

    python benchmarks/memory.py --shape small --json memory.json
    python benchmarks/memory.py --shape smollm2-6-layers --part pairs vocabulary
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import in_process, make_model, parser, peak_memory, report, survived
from stage_two import save_base, save_texts

STEPS, BUDGET = 2, 2048

ONE: dict[str, Any] = {"stage_one": {"pairs_per_step": 64, "micro_batch_tokens": BUDGET}, "stage_two": None}
TWO: dict[str, Any] = {"stage_one": None, "stage_two": {"pairs_per_step": 64, "micro_batch_tokens": BUDGET}}


def _with(run: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """`run` with other `values` of its stage."""
    return {stage: None if settings is None else settings | values for stage, settings in run.items()}


RUNS: dict[str, tuple[dict[str, Any], int | None]] = {
    "text": (ONE, None),
    "text, larger micro-batches": (_with(ONE, micro_batch_tokens=2 * BUDGET), None),
    "text, checkpointing": (_with(ONE, gradient_checkpointing=True), None),
    "words": (_with(ONE, target="bag_of_words", alpha=0.5), 49_152),
    "contrastive, LoRA, cached gradients": (TWO, None),
    "contrastive, in full, at once": (_with(TWO, lora=None, pairs_per_step=16, micro_batch_tokens=None), 49_152),
}
"""What the plan is compared on: a run, and another vocabulary than the shape's."""


def recipe_of(run: Mapping[str, Any], folder: Path, settings: Mapping[str, Any]) -> Any:
    """The recipe of `run` on a base and pairs that are written into `folder` where they are not there."""
    from anchorvec.recipe import Recipe

    [asked] = [values for values in run.values() if values is not None]
    if not (folder / "base").exists():
        save_base(folder, settings)
        save_texts(folder / "pairs.jsonl", STEPS * asked["pairs_per_step"], settings)
    common = {"steps": STEPS, "warmup_steps": 0, "log_every": 1, "save_steps": None, "learning_rate": 1e-5}
    return Recipe.model_validate(
        {
            "model": {"base": str(folder / "causal"), "precision": settings["precision"]},
            "data": {"train": [{"path": str(folder / "pairs.jsonl"), "name": "pairs"}], "max_tokens": 512},
            **{stage: None if values is None else common | values for stage, values in run.items()},
            "output": str(folder / "run"),
        }
    )


def planned(run: Mapping[str, Any], folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What `plan` says."""
    import anchorvec

    found = anchorvec.plan(recipe_of(run, folder, settings), step=False).estimate
    [stage] = found.stages.values()
    return {"planned": stage.memory.peak, "parts": dict(stage.memory.parts())}


def trained(run: Mapping[str, Any], folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What the steps of a run take, without its export, and what the process held before."""
    import psutil

    import anchorvec

    recipe = recipe_of(run, folder, settings)
    before = psutil.Process().memory_info().rss
    peaks = [0]
    anchorvec.train(recipe, on_log=lambda record: peaks.append(peak_memory()) if "loss" in record else None)
    return {"before": before, "peak_memory": peaks[-1]}


def real(run: Mapping[str, Any], settings: dict[str, Any], *, plan: bool = False) -> dict[str, Any]:
    """Peak of `run` in GB, and what was added to the process; with `plan` what that had said."""
    with tempfile.TemporaryDirectory() as scratch:
        said = in_process(planned, run, Path(scratch), settings) if plan else {}
        found = in_process(trained, run, Path(scratch), settings)
    survived(said, found)
    row = {"peak GB": found["peak_memory"] / 1e9, "added GB": (found["peak_memory"] - found["before"]) / 1e9}
    if not plan:
        return row
    parts = ", ".join(f"{part} {size / 1e9:.3g}" for part, size in said["parts"].items())
    return row | {"planned GB": said["planned"] / 1e9, "ratio": said["planned"] / found["peak_memory"], "parts": parts}


def over_pairs(settings: dict[str, Any], rows: dict[str, Any]) -> dict[str, float]:
    """The peak with 512 pairs a step for each byte with 64, of both stages."""
    ratios = {}
    for stage, run in {"stage_one": ONE, "stage_two": TWO}.items():
        for pairs in (64, 512):
            rows[f"{stage}, {pairs} pairs"] = real(_with(run, pairs_per_step=pairs), settings)
        few, many = (rows[f"{stage}, {pairs} pairs"]["peak GB"] for pairs in (64, 512))
        ratios[f"{stage}_512_to_64_pairs"] = many / few
    return ratios


def over_vocabulary(settings: dict[str, Any], rows: dict[str, Any]) -> dict[str, float]:
    """By what the peak grows for each byte of weights, gradients and moments that embedding and head grow by."""
    for vocabulary in (49_152, 151_936):
        rows[f"vocabulary {vocabulary:,}"] = real(ONE, settings | {"vocabulary": vocabulary})
    few, many = (rows[f"vocabulary {vocabulary:,}"]["peak GB"] for vocabulary in (49_152, 151_936))
    model = make_model(settings["shape"], 0, 8)
    tables = 1 if model.config.tie_word_embeddings else 2
    grown = 16 * tables * (151_936 - 49_152) * model.config.hidden_size / 1e9
    return {"growth_over_vocabulary": (many - few) / grown}


def against_plan(settings: dict[str, Any], rows: dict[str, Any]) -> dict[str, float]:
    """How far the plan is off."""
    for name, (run, vocabulary) in RUNS.items():
        rows[name] = real(run, settings | {"vocabulary": vocabulary}, plan=True)
    return {"largest_error_of_the_plan": max(abs(rows[name]["ratio"] - 1) for name in RUNS)}


PARTS = {"pairs": over_pairs, "vocabulary": over_vocabulary, "plan": against_plan}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = parser(__doc__ or "")
    options.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    options.add_argument("--longest", type=int, default=64, help="tokens of the longest text")
    chosen = options.parse_args(arguments)
    settings = {"shape": chosen.shape, "seed": chosen.seed, "precision": chosen.precision, "longest": chosen.longest}
    rows: dict[str, Any] = {}
    figures: dict[str, float] = {}
    for part in chosen.part:
        figures |= PARTS[part](settings, rows)
    report("Memory", rows, figures, settings, chosen.json)


if __name__ == "__main__":
    main()
