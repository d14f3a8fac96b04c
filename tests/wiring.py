"""Two runs whose keys all have values that are no defaults and differ between the stages, and what they must have done.

Expectations are computed from the values, the rows, and the batches that were seen, by `formulas`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import formulas
from formulas import Ids, Pair, Reading, Words
from support import Run, Step, Values, make_tokenizer, write_rows

ANIMALS = ["owl", "fox", "bat", "mole", "moth", "crab", "wolf", "lynx"]
METALS = ["iron", "zinc", "gold", "lead", "tin", "copper", "silver", "nickel"]
PLACES = ["Oslo", "Rome", "Kyiv", "Bonn", "Lima", "Riga", "Bern", "Cork"]

PLAIN = [
    {"query": f"{i} who {animal[::-1]}s at night?", "positive": f"{i}: the {animal}{', and sleeps by day' * (i % 2)}."}
    for i, animal in enumerate(ANIMALS)
]
"""Rows without hard negatives."""

HARD = [
    {
        "query": f"{metal}{' of the old town' * (i % 3)}, {i}?",
        "positive": f"{i} {metal} melts at {place}",
        "negatives": [f"{i} no {place}", f"{i} {place} is far, and {metal} is not there", f"never {i}"]
        if i % 2
        else [],
    }
    for i, (metal, place) in enumerate(zip(METALS, PLACES, strict=True))
]
"""Rows of which half have three hard negatives."""

# What every key of the recipe reference that takes part in a step is set to. The weights make an epoch of Stage I
# 20 rows; of Stage II 4 of `plain`, and 16 of `hard`, of which half have negatives.
TEXTS: Values = {
    "seed": 3,
    "model.base": "tiny",
    "model.max_tokens": 48,
    "model.precision": "fp32",
    "data.max_tokens": 30,
    "stage_one.target": "text",
    "stage_one.steps": 4,
    "stage_one.pairs_per_step": 5,
    "stage_one.learning_rate": 3e-3,
    "stage_one.warmup_steps": 1,
    "stage_one.schedule": "cosine",
    "stage_one.weight_decay": 0.3,
    "stage_one.max_grad_norm": 0.5,
    "stage_one.gradient_checkpointing": True,
    "stage_one.log_every": 3,
    "stage_one.alpha": 0.7,
    "stage_one.end_token_target": False,
    "stage_one.max_target_tokens": 15,
    "stage_one.micro_batch_tokens": 200,
    "stage_two.steps": 5,
    "stage_two.pairs_per_step": 4,
    "stage_two.learning_rate": 2e-3,
    "stage_two.warmup_steps": 2,
    "stage_two.schedule": "constant",
    "stage_two.weight_decay": 0.7,
    "stage_two.max_grad_norm": 2.0,
    "stage_two.gradient_checkpointing": False,
    "stage_two.log_every": 2,
    "stage_two.temperature": 0.2,
    "stage_two.lora": None,
    "stage_two.bag_of_words_weight": 0.3,
    "stage_two.negatives": 2,
    "stage_two.micro_batch_tokens": 130,
}
"""Texts are written; full fine-tuning with words beside it; cut and packed."""

WORDS: Values = {
    "seed": 7,
    "model.base": "tiny",
    "model.max_tokens": 64,
    "model.end": {"before": 'Say "', "after": '" as:'},
    "model.precision": "fp32",
    "model.attention": "eager",
    "data.max_tokens": 40,
    "stage_one.target": "bag_of_words",
    "stage_one.steps": 5,
    "stage_one.pairs_per_step": 4,
    "stage_one.learning_rate": 2e-3,
    "stage_one.warmup_steps": 2,
    "stage_one.schedule": "linear",
    "stage_one.weight_decay": 0.4,
    "stage_one.max_grad_norm": 0,
    "stage_one.gradient_checkpointing": False,
    "stage_one.log_every": 2,
    "stage_one.alpha": 0.4,
    "stage_one.max_target_tokens": 13,
    "stage_two.steps": 3,
    "stage_two.pairs_per_step": 4,
    "stage_two.learning_rate": 1e-2,
    "stage_two.warmup_steps": 0,
    "stage_two.schedule": "cosine",
    "stage_two.weight_decay": 0.2,
    "stage_two.max_grad_norm": 0.4,
    "stage_two.gradient_checkpointing": True,
    "stage_two.log_every": 4,
    "stage_two.temperature": 0.1,
    "stage_two.lora": {"r": 3, "alpha": 5, "dropout": 0.0},
    "stage_two.bag_of_words_weight": 0,
    "stage_two.negatives": 3,
    "stage_two.micro_batch_tokens": None,
}
"""Words are told, behind an end prompt; then LoRA adapters; padded."""


def sources(folder: Path) -> list[dict[str, Any]]:
    """The value of `data.train` with the rows above, written into `folder`."""
    folder.mkdir(exist_ok=True)
    plain = {"path": str(write_rows(folder / "plain.jsonl", PLAIN)), "weight": 0.5, "instruction": "ask: "}
    hard = {"path": str(write_rows(folder / "more.jsonl", HARD)), "weight": 2, "name": "hard"}
    return [plain, {**hard, "instruction": "metal: ", "document_instruction": "text: "}]


Seen = tuple[Mapping[str, Any], Mapping[str, Any]]
"""A data set, as the recipe has it, and one of its rows."""

Losses = list[Callable[[], tuple[Tensor, ...]]]
"""Of each step of a stage, the function that gives its loss, followed by the losses that are parts of it."""


@dataclass(frozen=True)
class Expected:
    """What a run with these values must have done, in the batches that it saw, by stage."""

    run: Run
    values: Values
    seen: Mapping[str, Sequence[Sequence[Seen]]]

    def but(self, values: Values) -> "Expected":
        """With other values in the same batches."""
        return replace(self, values={**self.values, **values})

    def losses(self, stage: str, model: nn.Module) -> Losses:
        """The loss of each step of a stage, from `model`, which is the one before it."""
        return {"stage_one": self._stage_one, "stage_two": self._stage_two}[stage](model)

    @property
    def reading(self) -> Reading:
        """How texts are read in training."""
        tokenizer = make_tokenizer()

        def ids(text: str) -> list[int]:
            found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
            return found

        end = self.values.get("model.end", "token")
        before, after = ([], [0]) if end == "token" else (ids(end["before"]), ids(end["after"]))
        return Reading(ids, before, after, self.values["data.max_tokens"] or self.values["model.max_tokens"])

    def pair(self, seen: Seen, *, most: int | None, end: int | None) -> Pair:
        """A row as it is read, and as it is reconstructed up to `most` tokens, closed by the id `end`."""
        reading, (source, row) = self.reading, seen
        texts = [(source["instruction"], row["query"]), (source.get("document_instruction", ""), row["positive"])]
        return Pair(*(reading.read(*t) for t in texts), *(reading.written(*t, end=end, most=most) for t in texts))

    def _stage_one(self, model: nn.Module) -> Losses:
        tells_words = self.values["stage_one.target"] == "bag_of_words"
        end = 0 if self.values.get("stage_one.end_token_target", True) and not tells_words else None
        pair = partial(self.pair, most=self.values["stage_one.max_target_tokens"], end=end)
        alpha = self.values["stage_one.alpha"]
        steps = [[pair(seen) for seen in step] for step in self.seen["stage_one"]]
        if not tells_words:
            return [partial(formulas.text_loss, model, pairs, alpha) for pairs in steps]
        words = self._words(model, pair)
        return [partial(formulas.words_loss, model, pairs, alpha, words) for pairs in steps]

    def _stage_two(self, model: nn.Module) -> Losses:
        weight, negatives = self.values["stage_two.bag_of_words_weight"], self.values["stage_two.negatives"]
        pair = partial(self.pair, most=None, end=None)
        words = self._words(model, pair) if weight else None
        found: Losses = []
        for step in self.seen["stage_two"]:
            pairs, source = [pair(seen) for seen in step], step[0][0]
            columns = [[p.query for p in pairs], [p.document for p in pairs]]
            prompt = source.get("document_instruction", "")
            listed = [row.get("negatives", []) for _, row in step]
            columns += [
                [self.reading.read(prompt, texts[n]) for texts in listed if len(texts) >= negatives]
                for n in range(negatives)
            ]
            contents = [p.query_target for p in pairs], [p.document_target for p in pairs]
            temperature = self.values["stage_two.temperature"]
            found.append(partial(formulas.contrastive_loss, model, columns, temperature, words, weight, contents))
        return found

    def _words(self, model: nn.Module, pair: Callable[[Seen], Pair]) -> Words:
        """Candidates: all rows as often as an epoch draws them; e_0 from the first ones in the order of the seed."""
        drawn = [row["query"] for step in self.seen["stage_one"] for _, row in step]
        plain, hard = self.values["data.train"]
        rows = [(plain, row) for row in PLAIN if row["query"] in drawn] + [(hard, row) for row in HARD * 2]
        sample = [pair(rows[i]) for i in np.random.default_rng(self.values["seed"]).permutation(len(rows))]
        texts = [p.query_target for p in sample], [p.document_target for p in sample]
        return Words(model.get_input_embeddings().weight, *texts, formulas.origin(model, sample))


def expected(run: Run, values: Values) -> Expected:
    """What `run` must have done; each text that it saw is that of a row, prompted and cut as the values say."""
    blank = Expected(run, values, {})

    def read(source: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[Ids, ...]:
        texts = (source["instruction"], row["query"]), (source.get("document_instruction", ""), row["positive"])
        return tuple(tuple(blank.reading.read(*text)) for text in texts)

    known = {
        read(source, row): (source, row)
        for source, listed in zip(values["data.train"], (PLAIN, HARD), strict=True)
        for row in listed
    }

    def rows(step: Step) -> list[Seen]:
        pairs = zip(step.texts["query"], step.texts["positive"], strict=True)
        return [known[tuple(map(tuple, texts))] for texts in pairs]

    return replace(blank, seen={name: [rows(step) for step in stage.steps] for name, stage in run.stages.items()})


def model_before(run: Run, stage: str) -> nn.Module:
    """The causal LM that a stage started from, in float64."""
    folder = run.folder / ("base" if stage == "stage_one" else "stage_one")
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").double()
    return model


def adapters(model: nn.Module, start: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights of LoRA adapters on all linear layers, which `model` has from here on: x W + scale x A B.

    Their values are those of `start`, named as peft does, without what stands before the layer's name.
    """
    weights = {}
    for name, layer in model.base_model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        [a], [b] = ([v for key, v in start.items() if f".{name}.lora_{part}." in f".{key}"] for part in "AB")
        a, b = a.double().requires_grad_(), b.double().requires_grad_()
        layer.register_forward_hook(lambda _, args, out, a=a, b=b: out + scale * args[0] @ a.T @ b.T)
        weights |= {f"{name}.A": a, f"{name}.B": b}
    assert len(weights) == len(start)
    return weights
