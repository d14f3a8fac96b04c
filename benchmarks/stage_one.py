"""One step of Stage I: this engine against the plain way, on the same pairs, in one run.

A step is here the forward and backward passes over its pairs. The plain way is written from the paper's formulas: the
whole step at once, every text padded to the longest, the logits of all positions. Each side runs in a process of its
own; no figures are given unless their losses and the gradient norms of all parameters agree.

    python benchmarks/stage_one.py --json stage_one.json
    python benchmarks/stage_one.py --sweep --shape smollm2-6-layers     memory against pairs per step and vocabulary
"""

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from anchorvec.device import default_device
from anchorvec.objectives.pairs import TokenPair, micro_batches
from anchorvec.objectives.reconstruction import TextReconstruction
from anchorvec.training.engine import ENOUGH_TOKENS
from anchorvec.training.memory import keep_freed_memory
from common import (
    autocast,
    compare_trained,
    describe_machine,
    draw_lengths,
    in_process,
    make_model,
    matmul_seconds,
    parser,
    peak_memory,
    report,
    survived,
    timed,
)

ALPHA = 0.2


def draw_pairs(n: int, seed: int, vocabulary: int) -> list[TokenPair]:
    """Pairs of random tokens with the lengths of real ones."""
    draw = random.Random(seed)

    def text(length: int) -> list[int]:
        return [draw.randrange(1, vocabulary) for _ in range(length)]

    pairs = []
    for query_length, document_length in draw_lengths(n, seed):
        query, document = text(query_length), text(document_length)
        pairs.append(TokenPair([*query, 0], [*document, 0], query, document))
    return pairs


def plain_loss(model: nn.Module, pairs: list[TokenPair], step: list[TokenPair]) -> Tensor:
    """The share of `pairs` in the Stage I loss of their `step`, over rows padded to its longest, all logits in fp32."""

    def rows(texts: list[list[int]], longest: int, value: int) -> Tensor:
        return torch.tensor([[*text, *[value] * (longest - len(text))] for text in texts], device=model.device)

    def embed(texts: list[list[int]], longest: int) -> Tensor:
        lengths = torch.tensor([len(text) for text in texts], device=model.device)
        mask = torch.arange(longest, device=model.device) < lengths[:, None]
        ids = rows(texts, longest, 0)
        states = model.model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        return states[torch.arange(len(texts), device=model.device), lengths - 1]

    def write(embeddings: Tensor, targets: list[list[int]], longest: int, count: int) -> Tensor:
        words = model.get_input_embeddings()(rows([text[:-1] for text in targets], longest - 1, 0))
        inputs = torch.cat([embeddings[:, None].to(words.dtype), words], dim=1)
        labels = rows(targets, longest, -100)
        logits = model(inputs_embeds=inputs, attention_mask=(labels != -100).long(), use_cache=False).logits.float()
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum") / count

    texts = ("query", "document", "query_targets", "document_targets")
    longest = {key: max(len(getattr(p, key)) for p in step) for key in texts}
    counts = {key: sum(len(getattr(p, key)) for p in step) for key in texts}
    e_Q = embed([p.query for p in pairs], longest["query"])
    e_D = embed([p.document for p in pairs], longest["document"])
    q2d = write(e_Q, [p.document_targets for p in pairs], longest["document_targets"], counts["document_targets"])
    d2q = write(e_D, [p.query_targets for p in pairs], longest["query_targets"], counts["query_targets"])
    return ALPHA * q2d + (1 - ALPHA) * d2q


def gradient_norms(model: nn.Module) -> list[float]:
    """The gradient's norm by parameter: what the two sides are compared in."""
    return [float(p.grad.float().norm()) for p in model.parameters()]


def plain_side(settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds, loss and gradient norms of the plain step."""
    model = make_model(settings["shape"], settings["seed"], settings["vocabulary"])
    pairs = draw_pairs(settings["pairs"], settings["seed"], model.config.vocab_size)
    found: dict[str, Any] = {}

    def step() -> None:
        model.zero_grad()
        losses = []
        size = -(-len(pairs) // settings["plain_parts"])
        for i in range(0, len(pairs), size):
            with autocast(settings["precision"]):
                loss = plain_loss(model, pairs[i : i + size], pairs)
            loss.backward()
            losses.append(loss.item())
        found["losses"] = [sum(losses)]

    return {"seconds": timed(step, settings["repeats"]), **found, "gradient_norms": gradient_norms(model)}


def engine_side(settings: dict[str, Any]) -> dict[str, Any]:
    """The same of this engine; and its share of the peak of matrix multiplication."""
    model = make_model(settings["shape"], settings["seed"], settings["vocabulary"])
    pairs = draw_pairs(settings["pairs"], settings["seed"], model.config.vocab_size)
    objective = TextReconstruction(model, alpha=ALPHA, packed=True)
    keep_freed_memory()  # as in training
    budget = settings["micro_batch_tokens"] or ENOUGH_TOKENS[default_device().type]
    counts = objective.targets(pairs)
    found: dict[str, Any] = {}

    def step() -> None:
        model.zero_grad()
        losses = []
        for part in micro_batches(pairs, budget, packed=objective.packed):
            with autocast(settings["precision"]):
                loss = objective(part, targets=counts).loss
            loss.backward()
            losses.append(loss.item())
        found["losses"] = [sum(losses)]

    result = {"seconds": timed(step, settings["repeats"]), **found, "gradient_norms": gradient_norms(model)}
    result |= {"tokens": sum(p.tokens() for p in pairs), "peak_memory": peak_memory()}
    with autocast(settings["precision"]):
        products = matmul_seconds(model, result["tokens"], sum(counts))
    return result | {"share_of_peak": products / result["seconds"]}


def row(result: dict[str, Any], tokens: int) -> dict[str, Any]:
    """A line of the table."""
    if "failed" in result:
        return {"failed": result["failed"]}
    return {
        "seconds": result["seconds"],
        "tokens/s": tokens / result["seconds"],
        "peak GB": result["peak_memory"] / 1e9,
        "loss": result["losses"][-1],
    }


def compare(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both sides on the same step: rows of a table, and figures."""
    plain, engine = in_process(plain_side, settings), in_process(engine_side, settings)
    survived(engine)
    rows = {"plain": row(plain, engine["tokens"]), "anchorvec": row(engine, engine["tokens"])}
    figures = {"tokens": engine["tokens"], "share_of_peak": engine["share_of_peak"]}
    if "failed" in plain:
        return rows, figures
    figures |= compare_trained(plain, engine, describe_machine(settings["precision"])["precision"])
    return rows, figures | {"speedup": plain["seconds"] / engine["seconds"]}


def sweep(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The engine alone: cost against tokens, memory against pairs per step and vocabulary."""
    rows = {}
    for pairs in (16, 64, 512):
        result = in_process(engine_side, settings | {"pairs": pairs})
        survived(result)
        rows[f"{pairs} pairs"] = row(result, result.get("tokens", 0))
    for vocabulary in (49_152, 151_936):
        result = in_process(engine_side, settings | {"vocabulary": vocabulary})
        survived(result)
        rows[f"vocabulary {vocabulary:,}"] = row(result, result.get("tokens", 0))
    return rows, {
        "memory_512_to_64_pairs": rows["512 pairs"]["peak GB"] / rows["64 pairs"]["peak GB"],
        "speed_512_to_64_pairs": rows["512 pairs"]["tokens/s"] / rows["64 pairs"]["tokens/s"],
    }


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__)
    options.add_argument("--pairs", type=int, default=16)
    options.add_argument("--vocabulary", type=int, help="instead of the shape's own")
    options.add_argument("--micro-batch-tokens", type=int, help="default: the largest that training takes by default")
    options.add_argument("--plain-parts", type=int, default=1, help="the plain step in parts, where memory is short")
    options.add_argument("--sweep", action="store_true", help="the engine alone, over pairs per step and vocabularies")
    chosen = vars(options.parse_args())
    file, wants_sweep = chosen.pop("json"), chosen.pop("sweep")
    rows, figures = (sweep if wants_sweep else compare)(chosen)
    report(f"Stage I, {chosen['pairs']} pairs a step", rows, figures, chosen, file)


if __name__ == "__main__":
    main()
