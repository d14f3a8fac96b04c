"""Steps of Stage II: this engine against sentence-transformers' own trainer, on the same texts, in one run.

Both sides train LoRA through the library's losses: this one as a recipe does, the library's as its documentation says,
with padded texts and, where this engine caches gradients too, with cached gradients and `mini_batch_size=32`. Each runs
in a process of its own; no figures are given unless the losses and gradient norms of all their steps agree.

    python benchmarks/stage_two.py --json stage_two.json
"""

import itertools
import json
import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.training_args import BatchSamplers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback, set_seed

from anchorvec.device import default_device, resolve_precision
from anchorvec.model.embedder import build_embedder
from anchorvec.pipeline import load_training_data
from anchorvec.recipe import Recipe
from anchorvec.run import Run
from anchorvec.training.stage import Stage
from anchorvec.training.stage_two import train_stage_two
from common import compare_trained, describe_machine, draw_lengths, in_process, make_model, parser, report, survived

WARMUP = 1
"""Steps that are not timed."""

LORA = {"r": 16, "alpha": 32, "dropout": 0.0}


def save_base(folder: Path, settings: Mapping[str, Any]) -> Path:
    """An embedder with random weights; its tokenizer knows the words w1, w2, ... and nothing else."""
    vocabulary = {"<end>": 0} | {f"w{i}": i for i in range(1, 1000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    base = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<end>")
    make_model(settings["shape"], settings["seed"], settings.get("vocabulary")).save_pretrained(folder / "causal")
    base.save_pretrained(folder / "causal")
    return build_embedder(str(folder / "causal"), folder / "base", max_tokens=512)


def draw_texts(n: int, settings: Mapping[str, Any]) -> list[list[str]]:
    """Queries and documents of random words, with the lengths of real ones, at most `longest`."""
    draw = random.Random(settings["seed"])

    def text(length: int) -> str:
        return " ".join(f"w{draw.randrange(1, 1000)}" for _ in range(min(length, settings["longest"]) - 1))

    lengths = draw_lengths(n, settings["seed"])
    return [[text(query) for query, _ in lengths], [text(document) for _, document in lengths]]


def save_texts(file: Path, n: int, settings: Mapping[str, Any]) -> None:
    """`n` pairs of such texts as JSON Lines."""
    rows = [{"query": q, "positive": d} for q, d in zip(*draw_texts(n, settings), strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows_of(settings: Mapping[str, Any]) -> list[dict[str, str]]:
    """The pairs of all steps."""
    queries, documents = draw_texts(settings["pairs"] * (settings["repeats"] + WARMUP), settings)
    return [{"query": q, "positive": d} for q, d in zip(queries, documents, strict=True)]


def engine_side(scratch: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The steps as `anchorvec train` runs them."""
    data = scratch / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows_of(settings)))
    recipe = Recipe.model_validate(
        {
            "model": {"base": str(scratch / "causal"), "precision": settings["precision"]},
            "data": {"train": [{"path": str(data), "name": "pairs"}]},
            "stage_one": None,
            "stage_two": {
                "steps": settings["repeats"] + WARMUP,
                "warmup_steps": 0,
                "pairs_per_step": settings["pairs"],
                "lora": LORA,
                "log_every": 1,
            },
            "output": str(scratch / "run"),
            "seed": settings["seed"],
        }
    )
    (scratch / "run").mkdir()
    records: list[Mapping[str, Any]] = []
    train_stage_two(
        Stage(
            "stage_two",
            recipe,
            Run(scratch / "run"),
            scratch / "base",
            load_training_data(recipe),
            on_log=lambda record: records.append({**record, "ended": time.perf_counter()}),
        )
    )
    ends = [record["ended"] for record in records]
    return {
        "seconds": [end - start for start, end in itertools.pairwise(ends)],
        "tokens": records[-1]["tokens"] - records[WARMUP - 1]["tokens"],
        "losses": [record["loss"] for record in records],
        "gradient_norms": [record["grad_norm"] for record in records],
        "engine": json.loads((scratch / "run" / "run.json").read_text())["engine"]["stage_two"],
    }


class Clock(TrainerCallback):
    """Notes when each step is logged."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Note the time."""
        if "loss" in (logs or {}):
            self.ends.append(time.perf_counter())


def library_side(scratch: Path, settings: dict[str, Any], cached: bool) -> dict[str, Any]:
    """The same steps by sentence-transformers alone."""
    set_seed(settings["seed"])
    model = SentenceTransformer(str(scratch / "base"), device=str(default_device()))
    model.add_adapter(
        LoraConfig(
            r=LORA["r"],
            lora_alpha=LORA["alpha"],
            lora_dropout=LORA["dropout"],
            target_modules="all-linear",
            task_type="FEATURE_EXTRACTION",
        )
    )
    clock = Clock()
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(scratch / "library"),
            max_steps=settings["repeats"] + WARMUP,
            per_device_train_batch_size=settings["pairs"],
            learning_rate=2e-4,
            bf16=resolve_precision(settings["precision"]) == "bf16",
            use_cpu=default_device().type == "cpu",
            batch_sampler=BatchSamplers.NO_DUPLICATES,
            dataloader_drop_last=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=settings["seed"],
        ),
        train_dataset={"pairs": Dataset.from_list(rows_of(settings))},
        loss=CachedMultipleNegativesRankingLoss(
            model, scale=20, directions=("query_to_doc",), mini_batch_size=settings["mini_batch_size"]
        )
        if cached
        else MultipleNegativesRankingLoss(model, scale=20, directions=("query_to_doc",)),
        callbacks=[clock],
    )
    trainer.train()
    records = [record for record in trainer.state.log_history if "loss" in record]
    return {
        "seconds": [end - start for start, end in itertools.pairwise(clock.ends)],
        "losses": [record["loss"] for record in records],
        "gradient_norms": [record["grad_norm"] for record in records],
    }


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__)
    options.add_argument("--pairs", type=int, default=64)
    options.add_argument("--longest", type=int, default=512, help="tokens of the longest text")
    options.add_argument(
        "--mini-batch-size",
        type=int,
        default=32,
        help="of the library's side, in texts; 32 is its default and takes 30 GB in fp32",
    )
    chosen = vars(options.parse_args())
    file = chosen.pop("json")
    with tempfile.TemporaryDirectory() as scratch:
        save_base(Path(scratch), chosen)
        ours = in_process(engine_side, Path(scratch), chosen)
        survived(ours)
        library = in_process(library_side, Path(scratch), chosen, ours["engine"]["cached_gradients"])
    figures = compare_trained(library, ours, describe_machine(chosen["precision"])["precision"])
    tokens = ours["tokens"]
    rows = {
        name: {
            "seconds": sum(result["seconds"]) / len(result["seconds"]),
            "tokens/s": tokens / sum(result["seconds"]),
            "peak GB": result["peak_memory"] / 1e9,
            "loss": result["losses"][-1],
        }
        for name, result in [("sentence-transformers", library), ("anchorvec", ours)]
    }
    figures |= {"speedup": sum(library["seconds"]) / sum(ours["seconds"])}
    figures |= {"tokens": tokens, "engine": ours["engine"]}
    report(f"Stage II with LoRA, {chosen['pairs']} pairs a step", rows, figures, chosen, file)


if __name__ == "__main__":
    main()
