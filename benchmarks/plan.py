"""What `plan` predicts beside what a run takes, on three recipes of different shape: memory and seconds of a step.

Each recipe is planned and trained in processes of their own, on random weights of the shape, texts with the lengths of
real ones. Memory is the peak of the process, or of the device; time is the trainer's, from its log, without the first
step. The targets are 20% of the memory and 25% of the time.

    python benchmarks/plan.py --json plan.json
    python benchmarks/plan.py --shape tiny --only full
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import in_process, parser, report, survived
from stage_two import save_base, save_texts

STEPS = 4

RECIPES: dict[str, dict[str, Any]] = {
    "full": {"stage_one": {"pairs_per_step": 16}, "stage_two": None},
    "lora": {"stage_one": None, "stage_two": {"pairs_per_step": 24, "micro_batch_tokens": 1024}},
    "words": {
        "stage_one": {"pairs_per_step": 32, "target": "bag_of_words", "alpha": 0.5, "gradient_checkpointing": True},
        "stage_two": None,
        "longest": 64,
    },
}
"""Stage I in full on texts of up to 512 tokens; Stage II with LoRA and cached gradients; words with checkpointing."""


def recipe_of(name: str, folder: Path, settings: Mapping[str, Any]) -> Any:
    """The recipe `name` on a base and pairs that are written into `folder` where they are not there."""
    from anchorvec.recipe import Recipe

    asked = dict(RECIPES[name])
    longest = asked.pop("longest", 512)
    if not (folder / "base").exists():
        save_base(folder, dict(settings))
        save_texts(folder / "pairs.jsonl", 48 * STEPS, {**settings, "longest": longest})
    common = {"steps": STEPS, "warmup_steps": 0, "log_every": 1, "save_steps": None, "learning_rate": 1e-5}
    return Recipe.model_validate(
        {
            "model": {"base": str(folder / "causal"), "precision": settings["precision"]},
            "data": {"train": [{"path": str(folder / "pairs.jsonl"), "name": "pairs"}], "max_tokens": longest},
            **{stage: None if values is None else common | values for stage, values in asked.items()},
            "output": str(folder / "run"),
        }
    )


def planned(name: str, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What `plan` says, and how long it takes to say it."""
    import anchorvec

    asked = recipe_of(name, folder, settings)
    start = time.perf_counter()
    found = anchorvec.plan(asked, step=False).estimate
    [(stage, of_stage)] = found.stages.items()
    return {
        "memory": of_stage.memory.peak,
        "parts": dict(of_stage.memory.parts()),
        "step_seconds": of_stage.seconds_per_step,
        "plan_seconds": time.perf_counter() - start,
        "stage": stage,
    }


def trained(name: str, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a run takes."""
    import anchorvec

    ends: list[float] = []

    def note(record: Mapping[str, Any]) -> None:
        if "loss" in record:
            ends.append(time.perf_counter())

    anchorvec.train(recipe_of(name, folder, settings), on_log=note)
    return {"step_seconds": (ends[-1] - ends[0]) / (len(ends) - 1)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = parser(__doc__ or "")
    options.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    chosen = options.parse_args(arguments)
    settings = {"shape": chosen.shape, "seed": chosen.seed, "precision": chosen.precision}
    rows: dict[str, dict[str, Any]] = {}
    for name in chosen.only:
        with tempfile.TemporaryDirectory() as scratch:
            plan = in_process(planned, name, Path(scratch), settings)
            survived(plan)
            real = in_process(trained, name, Path(scratch), settings)
            survived(real)
        rows[name] = {
            "planned GB": plan["memory"] / 1e9,
            "real GB": real["peak_memory"] / 1e9,
            "memory ratio": plan["memory"] / real["peak_memory"],
            "planned s": plan["step_seconds"],
            "real s": real["step_seconds"],
            "time ratio": plan["step_seconds"] / real["step_seconds"],
            "plan took s": plan["plan_seconds"],
            "parts": ", ".join(f"{part} {size / 1e9:.3g}" for part, size in plan["parts"].items()),
        }
    figures = {
        "largest_memory_error": max(abs(row["memory ratio"] - 1) for row in rows.values()),
        "largest_time_error": max(abs(row["time ratio"] - 1) for row in rows.values()),
    }
    report("Planned and real", rows, figures, settings, chosen.json)


if __name__ == "__main__":
    main()
