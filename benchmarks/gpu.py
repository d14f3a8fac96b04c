"""Everything that is claimed of a GPU, in one command and under five minutes, in order of importance.

Each part has a time limit, and its result is written as soon as it is there, so that nothing is lost when the card is
taken away. Weights are random where only time and memory are measured; the last part runs the pipeline on a real base
model for a minute of training and scores it.

    python benchmarks/gpu.py RESULTS [--base FOLDER --pairs pairs.jsonl --score-set FOLDER] [--only PART ...]
    python benchmarks/gpu_scores.py RESULTS --score-set FOLDER      on any machine: nDCG@10 of the vectors

A part that has no more time is stopped, and says so in its result; so does one that lacks a package, as those that read
a recipe lack pydantic and datasets where these are not there.
"""

import argparse
import gc
import json
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from sentence_transformers import SentenceTransformer
from torch import nn

from anchorvec.device import default_device, device_name
from anchorvec.model.encoding import encode_packed
from anchorvec.model.loading import load_encoder
from anchorvec.model.packing import use_packed_attention
from anchorvec.model.working_weights import WorkingWeights
from anchorvec.objectives.reconstruction import TextReconstruction
from anchorvec.run import Run, StageName
from anchorvec.training import engine
from common import make_model, matmul_seconds, synchronise
from gpu_pipeline import pipeline
from stage_one import draw_pairs, plain_loss

if TYPE_CHECKING:
    from anchorvec.recipe import Recipe

SECONDS = 295.0
"""Of all parts together."""

SMALL, LARGE = "smollm2-135m", "llama-3.2-1b"


def peak_tflops() -> float:
    """What a large product of bf16 matrices reaches on this card, in TFLOP/s."""
    n = 8192 if torch.cuda.is_available() else 512
    a, b = (torch.randn(n, n, device=default_device(), dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronise()
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    synchronise()
    return 10 * 2 * n**3 / (time.perf_counter() - start) / 1e12


def trained_flops(model: nn.Module, tokens: int, targets: int) -> float:
    """Multiplications and additions of forward and backward passes: the layers' products, and the head's at targets."""
    body = sum(layer.weight.numel() for layer in model.base_model.modules() if isinstance(layer, nn.Linear))
    return 6.0 * (body * tokens + model.get_output_embeddings().weight.numel() * targets)


def recipe(scratch: Path, settings: Mapping[str, Any]) -> "Recipe":
    """The recipe of a run on `scratch`'s base and pairs."""
    from anchorvec.recipe import Recipe

    return Recipe.model_validate(
        {
            "model": {"base": str(scratch / "causal"), "max_tokens": settings["max_tokens"], "precision": "bf16"},
            "data": {"train": [{"path": str(scratch / "pairs.jsonl"), "name": "pairs"}]},
            "stage_one": settings.get("stage_one"),
            "stage_two": settings.get("stage_two"),
            "output": str(scratch / "run"),
        }
    )


def stage(which: StageName, shape: str, pairs: int, max_tokens: int, **settings: Any) -> dict[str, Any]:
    """Tokens a second of a stage as `anchorvec train` runs it: from the first record of its log to the last."""
    from anchorvec.pipeline import load_training_data
    from anchorvec.training.stage import Stage
    from anchorvec.training.stage_one import train_stage_one
    from anchorvec.training.stage_two import train_stage_two
    from stage_two import draw_texts, save_base

    log_every, steps = 6, 13
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        base = save_base(scratch, {"shape": shape, "seed": 0})
        columns = draw_texts(pairs * steps, {"seed": 0, "longest": max_tokens})
        rows = [{"query": q, "positive": d} for q, d in zip(*columns, strict=True)]
        (scratch / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = {"steps": steps, "pairs_per_step": pairs, "warmup_steps": 0, "log_every": log_every}
        asked = recipe(scratch, {which: common | settings, "max_tokens": max_tokens})
        (scratch / "run").mkdir()
        ends: list[tuple[float, Mapping[str, Any]]] = []
        start = time.perf_counter()
        train = train_stage_one if which == "stage_one" else train_stage_two
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        run = Run(scratch / "run")
        inputs = load_training_data(asked)
        train(Stage(which, asked, run, base, inputs, None, lambda r: ends.append((time.perf_counter(), r))))
        chosen = json.loads((scratch / "run" / "run.json").read_text())["engine"][which]
    logged = [(end, record) for end, record in ends if "loss" in record]
    (begin, first), (end, last) = [entry for entry in logged if entry[1]["step"] % log_every == 0][-2:]
    return {
        "tokens_per_second": (last["tokens"] - first["tokens"]) / (end - begin),
        "tokens_per_step": (last["tokens"] - first["tokens"]) / log_every,
        "first_step_seconds": logged[0][0] - start,
        "loss": last["loss"],
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None,
        "engine": chosen,
    }


def same_step(shape: str) -> dict[str, Any]:
    """How far loss and gradient are from those of the plain engine: weights cast once, fused, layers compiled."""
    found = []
    ways = [(False, False, False), (True, False, False), (True, True, False), (True, True, True)]
    for cast_once, fused, compiled in ways:
        model = make_model(shape, 0)
        pairs = draw_pairs(16, 0, model.config.vocab_size)
        objective = TextReconstruction(model, packed=True)
        if compiled:
            objective.compile_layers()
        working = WorkingWeights(objective, fuse=fused) if cast_once else None
        with working.in_use() if working else nullcontext():
            for half in (pairs[:8], pairs[8:]):
                with torch.autocast(default_device().type, torch.bfloat16):
                    loss = objective(half).loss
                loss.backward()
        found.append((loss.item(), [p.grad for p in model.parameters()], objective.packed))
    (loss, gradient, packed), *others = found
    return {"packed": packed, "loss": loss} | {
        name: {
            "loss": abs(other[0] - loss) / loss,
            "gradient": max(float((a - b).norm() / a.norm()) for a, b in zip(gradient, other[1], strict=True)),
        }
        for name, other in zip(("cast_once", "fused", "compiled"), others, strict=True)
    }


def measured(model: nn.Module, step: Callable[[], None]) -> dict[str, float]:
    """Seconds of a step, the mean of three after two, and the most memory held."""
    for _ in range(2):
        model.zero_grad()
        step()
    synchronise()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(3):
        model.zero_grad()
        step()
    synchronise()
    memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    return {"seconds": (time.perf_counter() - start) / 3, "peak_gb": memory}


def against_plain(shape: str, pairs: int, parts: int, peak: float) -> dict[str, Any]:
    """Seconds of a Stage I step in the plain way and here, without the optimizer's."""
    model = make_model(shape, 0)
    step_pairs = draw_pairs(pairs, 0, model.config.vocab_size)

    def plain() -> None:
        size = -(-pairs // parts)
        for i in range(0, pairs, size):
            with torch.autocast(default_device().type, torch.bfloat16):
                loss = plain_loss(model, step_pairs[i : i + size], step_pairs)
            loss.backward()

    found: dict[str, Any] = {"plain": measured(model, plain)}
    objective = TextReconstruction(model, packed=True)
    counts = objective.targets(step_pairs)
    working = [WorkingWeights(objective)]

    def here() -> None:
        with working[0].in_use():
            with torch.autocast(default_device().type, torch.bfloat16):
                loss = objective(step_pairs, targets=counts).loss
            loss.backward()

    tokens = sum(p.tokens() for p in step_pairs)
    for name in ("packed", "fused", "compiled"):
        if name == "compiled":
            objective.compile_layers()
        if name != "packed":
            working[0] = WorkingWeights(objective, fuse=True)
        found[name] = measured(model, here)
        found[name]["ratio"] = found["plain"]["seconds"] / found[name]["seconds"]
        flops = trained_flops(model, tokens, sum(counts))
        found[name]["share_of_peak"] = flops / found[name]["seconds"] / peak / 1e12
        with working[0].in_use(), torch.autocast(default_device().type, torch.bfloat16):
            products = matmul_seconds(model, tokens, sum(counts))
        found[name]["share_of_own_products"] = products / found[name]["seconds"]
    return found | {"tokens": tokens}


def encoding(shape: str, texts: int) -> dict[str, Any]:
    """Tokens a second of encoding, here and by sentence-transformers, bf16."""
    from stage_two import draw_texts, save_base

    with tempfile.TemporaryDirectory() as name:
        base = save_base(Path(name), {"shape": shape, "seed": 0})
        rows = draw_texts(texts, {"seed": 0, "longest": 512})[1]
        tokens = sum(len(text.split()) + 1 for text in rows)
        library = SentenceTransformer(str(base), device=str(default_device()), model_kwargs={"dtype": torch.bfloat16})
        here = load_encoder(base, torch.bfloat16)
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "library": lambda: library.encode(rows, convert_to_tensor=True),
            "library_large_batches": lambda: library.encode(rows, convert_to_tensor=True, batch_size=256),
            "here": lambda: encode_packed(here, rows, compiled=False),
            "here_compiled": lambda: encode_packed(here, rows, compiled=True),
        }
        found: dict[str, Any] = {"tokens": tokens}
        expected = None
        for side, encode in ways.items():
            encode()
            synchronise()
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                vectors = encode()
                synchronise()
                seconds.append(time.perf_counter() - start)
            found[side] = tokens / min(seconds)
            expected = vectors.float().cpu() if expected is None else expected
            found[f"{side}_least_cosine"] = float(torch.cosine_similarity(expected, vectors.float().cpu()).min())
    return found | {
        "ratio": found["here"] / found["library"],
        "ratio_compiled": found["here_compiled"] / found["library"],
    }


def packs(shape: str) -> dict[str, Any]:
    """Whether the check of packed attention passes, and its seconds."""
    model = make_model(shape, 0)
    start = time.perf_counter()
    return {"packs": use_packed_attention(model), "seconds": time.perf_counter() - start}


class OutOfTime(BaseException):
    """A part's time is over; no library takes it for an error of its own."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in what runs here after so many `seconds`, and again every five while it goes on."""

    def stop(*_: object) -> None:
        raise OutOfTime(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def result_of(part: Callable[[], Any], seconds: float) -> dict[str, Any]:
    """What `part` gives within so many `seconds`, or how it failed: the others are still to be measured."""
    if seconds <= 1:
        return {"failed": "no time is left"}
    try:
        with limited(seconds):
            found: dict[str, Any] = part()
            return found
    except (Exception, OutOfTime) as error:
        return {"failed": repr(error)[:500], "traceback": traceback.format_exc()[-1500:]}


def main() -> None:
    """Run the parts."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("results", type=Path)
    options.add_argument("--only", nargs="*")
    options.add_argument("--base", help="a model's folder or GGUF file, for the pipeline")
    options.add_argument("--pairs", help="its training pairs, JSON Lines")
    options.add_argument("--score-set", help="its score set, a folder in BEIR layout")
    options.add_argument("--tiny", action="store_true", help="the tiny shape, to try the parts on a CPU")
    chosen = options.parse_args()
    chosen.results.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    engine.COMPILE_PAIRS = 0  # as a longer stage would be
    if chosen.base and not (chosen.pairs and chosen.score_set):
        options.error("--base needs --pairs and --score-set")
    small, large = ("tiny", "tiny") if chosen.tiny else (SMALL, LARGE)
    pairs = 32 if chosen.tiny else 512
    full = {"lora": None, "learning_rate": 1e-4}
    parts: list[tuple[str, float, Callable[[], Any]]] = [
        ("machine", 5, lambda: {"device": device_name(), "torch": torch.__version__, "peak_tflops": peak_tflops()}),
        ("packs", 10, lambda: packs(small)),
        ("stage_one_small", 50, lambda: stage("stage_one", small, pairs, 128)),
        ("stage_two_small", 30, lambda: stage("stage_two", small, pairs, 128, **full)),
        ("stage_two_small_lora", 25, lambda: stage("stage_two", small, pairs, 128)),
        ("same", 20, lambda: same_step(small)),
        ("large_step", 30, lambda: against_plain(large, 8 if chosen.tiny else 64, 4, peak_tflops())),
        ("encode_small", 20, lambda: encoding(small, 64 if chosen.tiny else 4096)),
        ("encode_large", 15, lambda: encoding(large, 64 if chosen.tiny else 1024)),
    ]
    if chosen.base:
        parts.append(("pipeline", 90, lambda: pipeline(chosen, 20.0 if chosen.tiny else 60.0)))
    slower = 15 if chosen.tiny else 1  # a CPU beside other work
    began = time.perf_counter()
    for name, seconds, part in parts:
        if chosen.only and name not in chosen.only:
            continue
        start = time.perf_counter()
        result = result_of(part, slower * min(seconds, SECONDS - (start - began) / slower))
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        now = time.perf_counter()
        line = json.dumps({"part": name, "part_seconds": now - start, "at": now - began, **result})
        with (chosen.results / "gpu.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        Console().print(line, soft_wrap=True, highlight=False, markup=False)


if __name__ == "__main__":
    main()
