"""What the benchmarks share: a process for each side, the peak of matrix products, scores over seeds, tables, JSON."""

import argparse
import gc
import json
import math
import multiprocessing
import random
import re
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from sentence_transformers.util import pairwise_cos_sim
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from anchorvec.device import default_device, device_name, resolve_precision
from anchorvec.errors import AnchorvecError
from anchorvec.evaluation import check_test_data, evaluate
from anchorvec.files import read_json_lines, write_json
from anchorvec.model.loading import load_encoder

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "small": {
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "smollm2-6-layers": {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
}


def parser(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument(
        "--shape", choices=SHAPES, default="smollm2-135m", help="the model's sizes; weights are random"
    )
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--repeats", type=int, default=2, help="timed steps of each side")
    options.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    options.add_argument("--json", type=Path, help="write the figures to this file")
    return options


def make_model(shape: str, seed: int, vocabulary: int | None = None) -> LlamaForCausalLM:
    """A model of the given sizes with random weights in fp32, on the device that would train."""
    torch.manual_seed(seed)
    sizes = SHAPES[shape] | ({"vocab_size": vocabulary} if vocabulary else {})
    with torch.device(default_device()):
        return LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=None)).train()


def draw_lengths(n: int, seed: int) -> list[tuple[int, int]]:
    """(query, document) tokens of `n` pairs: 16 to 39, and log-normal around 120 up to 512, at even quantiles.

    16 pairs have 5,902 tokens in four passes, the longest document 489.
    """
    normal = statistics.NormalDist(math.log(121), 0.75)
    documents = [min(512, round(math.exp(normal.inv_cdf((i + 0.5) / n)))) for i in range(n)]
    queries = [16 + round(23 * i / max(1, n - 1)) for i in range(n)]
    draw = random.Random(seed)
    draw.shuffle(documents)
    draw.shuffle(queries)
    return list(zip(queries, documents, strict=True))


def autocast(precision: str) -> torch.autocast:
    """bf16 autocast, if `precision` says so."""
    return torch.autocast(default_device().type, torch.bfloat16, enabled=resolve_precision(precision) == "bf16")


def synchronise() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, so that the first may pay for memory and caches."""
    seconds = []
    for _ in range(repeats):
        gc.collect()
        synchronise()
        start = time.perf_counter()
        work()
        synchronise()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def peak_memory() -> int:
    """Most memory held by this process so far, in bytes: of the device, or resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # ru_maxrss of a new process starts at its parent's
    if status.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_process(function: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """What `function` gives in a fresh process, so that its peak memory is its own; `failed` if it did not survive."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, function, args))
    process.start()
    sender.close()
    try:
        result: dict[str, Any] = receiver.recv()
    except EOFError:
        result = {"failed": "the process was killed"}
    process.join()
    return result


def _report(sender: Any, function: Callable[..., dict[str, Any]], args: Sequence[Any]) -> None:
    try:
        result = function(*args)
        sender.send({"peak_memory": peak_memory()} | result)
    except Exception as error:
        sender.send({"failed": str(error) if isinstance(error, AnchorvecError) else traceback.format_exc()})


def matmul_seconds(model: nn.Module, tokens: float, targets: float, repeats: int = 4) -> float:
    """Seconds that the matrix products of a training step's linear layers take alone, each needed one counted once.

    For every layer the product forward and the two backward, at the best speed measured for its shape: the body's
    layers over `tokens`, the LM head over `targets`. The products inside attention are not counted.
    """
    rows, together = 2048, 8 if default_device().type == "cuda" else 1  # products between two looks at the clock
    total = 0.0
    dtype = torch.bfloat16 if torch.is_autocast_enabled(default_device().type) else torch.float32
    measured: dict[tuple[int, int], float] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        shape = (layer.in_features, layer.out_features)
        if shape not in measured:
            x = torch.randn(rows, shape[0], device=default_device(), dtype=dtype)
            w = torch.randn(shape[1], shape[0], device=default_device(), dtype=dtype)
            g = torch.randn(rows, shape[1], device=default_device(), dtype=dtype)
            y, dx, dw = torch.empty_like(g), torch.empty_like(x), torch.empty_like(w)
            products: list[Callable[[], Tensor]] = [
                lambda x=x, w=w, y=y: torch.mm(x, w.T, out=y),
                lambda g=g, w=w, dx=dx: torch.mm(g, w, out=dx),
                lambda g=g, x=x, dw=dw: torch.mm(g.T, x, out=dw),
            ]
            measured[shape] = sum(
                timed(lambda product=product: [product() for _ in range(together)], repeats) / together
                for product in products
            )
            measured[shape] /= rows
        total += measured[shape] * (targets if name == "lm_head" else tokens)
    return total


def survived(*results: Mapping[str, Any]) -> None:
    """End the benchmark if a side failed."""
    for result in results:
        if "failed" in result:
            raise SystemExit(f"a side failed: {result['failed']}")


def compare_trained(theirs: Mapping[str, Any], ours: Mapping[str, Any], precision: str) -> dict[str, float]:
    """Figures of both sides, after their `losses` and `gradient_norms` were found to be the same."""
    survived(theirs, ours)
    tolerance = 5e-2 if precision == "bf16" else 1e-3
    differences = {}
    for key in ("losses", "gradient_norms"):
        both = list(zip(theirs[key], ours[key], strict=True))
        relative = [abs(a - b) / max(abs(a), abs(b), 1e-12) for a, b in both]
        differences[key] = max(relative)
        if not all(difference <= tolerance for difference in relative):  # nan is a difference too
            raise SystemExit(f"the sides differ in {key}: {both[:5]}")
    return {
        "memory_ratio": ours["peak_memory"] / theirs["peak_memory"],
        "largest_difference": max(differences.values()),
    }


def score_more(
    found: dict[str, Any], file: Path, model: Path, dtype: torch.dtype, data: Sequence[str], sts: Sequence[str]
) -> None:
    """Score `model` on test data that `found` has no figures of, and write it to `file` after each.

    `scores` gets nDCG@10 by folder of `data` and query, `spearman` a figure for each file of `sts`.
    """
    new_data = [path for path in data if name_of(path) not in found["scores"]]
    new_sts = [path for path in sts if name_of(path) not in found["spearman"]]
    if not new_data and not new_sts:
        return
    encoder = load_encoder(model, dtype)
    for path in new_data:
        [scores] = evaluate(encoder, data=[path], cache=False, show_progress_bar=True).values()
        found["scores"][name_of(path)] = scores.per_item["ndcg_at_10"]
        write_json(file, found)
    for path in new_sts:
        found["spearman"][name_of(path)] = spearman(encoder, path)
        write_json(file, found)


def check_scored_elsewhere(data: Sequence[str], sts: Sequence[str]) -> None:
    """Raise AnchorvecError for other test data that cannot be read, or where two have the same name in the figures."""
    check_test_data(data=list(data))
    for file in sts:
        scored_sentences(file)
    for paths in (data, sts):
        for i, path in enumerate(paths):
            if name_of(path) in map(name_of, paths[:i]):
                raise AnchorvecError(f"two of the test data are called {name_of(path)}; rename one")


def name_of(path: str) -> str:
    """What the figures call a folder or a file of test data."""
    return Path(path).resolve().name


def spearman(model: Any, path: str) -> float:
    """Rank correlation of cosine similarity and score over the `scored_sentences` of a file."""
    firsts, seconds, scores = zip(*scored_sentences(path), strict=True)
    similarities = pairwise_cos_sim(model.encode(list(firsts)), model.encode(list(seconds)))
    return float(spearmanr(similarities, scores).statistic)


def scored_sentences(path: str) -> list[tuple[str, str, float]]:
    """`sentence1`, `sentence2` and `score` of the rows of a JSON Lines file, which may be gzipped.

    Where rows name their split, those of `test` count. Raises AnchorvecError if there are none, or a key is missing.
    """
    rows = [row for _, row in read_json_lines(Path(path)) if row.get("split", "test") == "test"]
    if not rows:
        raise AnchorvecError(f"{path}: no rows to score")
    try:
        return [(row["sentence1"], row["sentence2"], float(row["score"])) for row in rows]
    except KeyError as error:
        raise AnchorvecError(f"{path}: a row without {error}; it needs sentence1, sentence2 and score") from error


def describe_machine(precision: str) -> dict[str, Any]:
    """Where the figures were taken."""
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "precision": resolve_precision(precision),
        "torch": torch.__version__,
    }


def report(
    title: str,
    rows: Mapping[str, Mapping[str, Any]],
    figures: Mapping[str, Any],
    settings: Mapping[str, Any],
    file: Path | None,
) -> None:
    """Print a table of `rows` with the `figures` under it; write both, the machine and the settings to `file`."""
    machine = describe_machine(settings["precision"])
    table = Table(title=f"{title}; {settings['shape']}, {machine['device']}, {machine['precision']}")
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    for column in ["", *columns]:
        table.add_column(column)
    for name, row in rows.items():
        table.add_row(name, *(_shown(row.get(column, "")) for column in columns))
    console = Console()
    console.print(table)
    for name, value in figures.items():
        console.print(f"{name}: {_shown(value)}", highlight=False)
    if file is not None:
        result = {**figures, "rows": rows, "settings": settings, "machine": machine}
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _shown(value: Any) -> str:
    return f"{value:,.3g}" if isinstance(value, float) else str(value)
