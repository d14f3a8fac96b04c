"""What `plan` says of the paper's five models on several devices, as the table of docs/scaling.md. Nothing is trained.

Configurations stand here, as their public files have them; no weights and no tokenizer are needed. Texts are drawn with
the lengths of real pairs (queries of 16 to 39 tokens, documents log-normal around 120 up to 512), and a second time
with 512 tokens each, the most that the paper's limit allows. A stage whose copies do not fit is planned shared out.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --machine h100 --devices 1 8 64 --only llama-3.2-1b
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config

import anchorvec
from anchorvec.model.base import byte_tokenizer
from anchorvec.planning.estimate import StageEstimate
from anchorvec.planning.shown import duration, gigabytes
from anchorvec.recipe import load_recipe
from common import draw_lengths

LIMIT, PAIRS = 512, 512


def _llama(hidden: int, between: int, layers: int, heads: int, *, tied: bool) -> LlamaConfig:
    sizes = {"hidden_size": hidden, "intermediate_size": between, "num_hidden_layers": layers}
    shape = {"num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": tied}
    return LlamaConfig(**sizes, **shape, head_dim=128 if hidden > 2048 else 64, max_position_embeddings=131_072)


MODELS: dict[str, PreTrainedConfig] = {
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, tied=True),
    "qwen2.5-1.5b": Qwen2Config(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, tied=True),
    "mistral-7b": MistralConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
    "llama-3.1-8b": _llama(4096, 14_336, 32, 32, tied=False),
}
"""By the names of the paper's recipes, smallest first."""

HOURS = {"llama-3.2-1b": (4, 2), "llama-3.2-3b": (12, 5), "llama-3.1-8b": (45, 13)}
"""The paper's, of Stage I and Stage II, on 8 A100 80 GB; it gives none for the others."""


def save_base(name: str, folder: Path) -> Path:
    """The configuration of the model `name`, and a tokenizer of single bytes, in `folder`."""
    config = MODELS[name]
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 0, None
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_pairs(file: Path, *, longest: bool) -> Path:
    """Pairs whose texts have the lengths of real ones, or as many tokens as the limit allows."""
    draw = random.Random(0)

    def text(tokens: int) -> str:
        return "".join(draw.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(tokens - 1)) + "."

    lengths = [(LIMIT, LIMIT)] * PAIRS if longest else draw_lengths(PAIRS, 0)
    rows = [{"query": text(query), "positive": text(document)} for query, document in lengths]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def planned(name: str, folder: Path, machine: str, *, longest: bool) -> dict[str, StageEstimate]:
    """What `plan` says of the paper's recipe `name` on `machine`; Stage I is shared out where copies do not fit."""
    base = folder / name
    if not base.exists():
        save_base(name, base)
    pairs = save_pairs(folder / f"{longest}.jsonl", longest=longest)
    data = f"data.train=[{{path: {pairs}, name: pairs}}]"
    for sharded in ("false", "true"):
        values = [f"model.base={base}", data, f"stage_one.sharded={sharded}"]
        found = anchorvec.plan(load_recipe(f"paper/{name}", values), step=False, machine=machine).estimate.stages
        if found["stage_one"].fits:
            break
    return found


def rows(names: Sequence[str], kind: str, devices: Sequence[int]) -> Iterator[list[str]]:
    """A row for each model, number of devices and stage."""
    with tempfile.TemporaryDirectory() as scratch:
        for name in names:
            for n in devices:
                stages, longest = (
                    planned(name, Path(scratch), f"{kind}:{n}", longest=longest) for longest in (False, True)
                )
                for place, (stage, found) in enumerate(stages.items()):
                    hours = HOURS.get(name, ("", ""))[place] if n == 8 and kind == "a100-80gb" else ""
                    yield [name, str(n), stage.replace("stage_", ""), *_cells(found, longest[stage], n), str(hours)]


def _cells(found: StageEstimate, longest: StageEstimate, devices: int) -> list[str]:
    held = "parts" if found.whole_model else "copies" if devices > 1 else "all"
    memory = max(found.memory.peak, found.whole_model)
    if not found.fits:
        return [f"{held}: {gigabytes(memory)}, does not fit", "", "", "", ""]
    assert found.seconds_per_step is not None
    assert found.seconds is not None
    assert longest.seconds is not None
    return [
        f"{held}: {gigabytes(memory)}",
        gigabytes(found.exchanged) if devices > 1 else "",
        duration(found.seconds_per_step),
        _hours(found.seconds),
        _hours(longest.seconds) + ("" if longest.fits else " (does not fit)"),
    ]


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.2g}" if hours < 100 else f"{hours:.0f}"


TITLES = [
    *["model", "devices", "stage", "GB on each", "GB sent in a step", "a step", "hours"],
    *["hours at 512", "the paper's"],
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    options: Any = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--machine", default="a100-80gb", help="a name that `plan` knows")
    options.add_argument("--devices", nargs="+", type=int, default=[1, 8, 64])
    options.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    chosen = options.parse_args(arguments)
    console = Console(width=200)
    for row in [TITLES, ["---"] * len(TITLES), *rows(chosen.only, chosen.machine, chosen.devices)]:
        console.print(f"| {' | '.join(row)} |", highlight=False, markup=False)


if __name__ == "__main__":
    main()
