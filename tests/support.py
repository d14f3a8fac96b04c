"""What tests see of the package beyond its public functions: where a change of its insides changes the tests."""

import contextlib
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.trainer
from sentence_transformers import SentenceTransformer
from tokenizers.processors import ByteLevel, TemplateProcessing
from tokenizers.processors import Sequence as Processors
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)

import anchorvec
from anchorvec.model.base import byte_tokenizer
from anchorvec.model.packing import use_packed_texts
from anchorvec.objectives.bag_of_words import BagOfWordsLoss
from anchorvec.objectives.contrastive import contrastive_loss
from anchorvec.objectives.pairs import TokenPair

Values = Mapping[str, Any]
"""Recipe keys, dotted, and their values."""


# Runs, and what happens in them


@dataclass
class Step:
    """One optimizer step: the texts of its batch by column, as token ids, and what the optimizer was given.

    `norm` is that of the gradient after it was clipped. Stage I has the columns query, positive, query_target and
    positive_target, Stage II query, positive, negative_1, ...
    """

    texts: dict[str, list[list[int]]]
    rates: list[float] = field(default_factory=list)
    norm: float = 0.0


@dataclass
class Forward:
    """One call of the decoder: the tokens it computes, padding included, and the texts they belong to.

    `again`: in a backward pass, where gradient checkpointing and cached gradients compute activations once more.
    """

    tokens: int
    texts: int
    again: bool


@dataclass
class Stage:
    """One stage of a run: its steps, its trained weights before the first one, and how its decoder was called."""

    steps: list[Step] = field(default_factory=list)
    start: dict[str, Tensor] = field(default_factory=dict)
    forwards: list[Forward] = field(default_factory=list)
    linear_dtypes: set[torch.dtype] = field(default_factory=set)
    """Of what linear layers give."""
    attention_weights: bool = False
    """Whether the attention gave its weights back, which transformers' eager one does."""
    adapter_inputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """What came to the first adapters' dropout, and what it let through."""


@dataclass
class Run:
    """A finished run, its records by stage, and what happened in its stages."""

    folder: Path
    stages: dict[str, Stage]

    @property
    def log(self) -> dict[str, list[dict[str, Any]]]:
        """The records of `log.jsonl` by stage."""
        lines = (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        return {stage: list(group) for stage, group in itertools.groupby(records, key=lambda record: record["stage"])}

    @property
    def record(self) -> dict[str, Any]:
        """`run.json`."""
        found: dict[str, Any] = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        return found


def recipe(values: Values, *, start: str = "debug") -> anchorvec.Recipe:
    """The recipe `start` with other values."""
    return anchorvec.load_recipe(start, [f"{key}={json.dumps(value)}" for key, value in values.items()])


def train(folder: Path, values: Values) -> Run:
    """Run the recipe `debug` with other values, in fp32 unless they say otherwise, and watch it."""
    asked = recipe({"output": str(folder), "model.precision": "fp32", **values})
    with watched() as stages:
        anchorvec.train(asked)
    run = Run(folder, {})
    run.stages = dict(zip(run.log, stages, strict=True))
    return run


@contextlib.contextmanager
def watched() -> Iterator[list[Stage]]:
    """The stages that are trained in this context, one after another, as transformers' Trainer goes through them."""
    stages: list[Stage] = []
    running: list[Stage] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
            trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
            stages.append(Stage(start=trained))
            running[:] = stages[-1:]

        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Any, **kwargs: Any
        ) -> None:
            step = stages[-1].steps[-1]
            step.rates = [group["lr"] for group in optimizer.param_groups]
            step.norm = float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            running.clear()

    batches_of = Trainer.get_batch_samples

    def get_batch_samples(self: Trainer, *args: Any) -> Any:
        batches, items = batches_of(self, *args)
        stages[-1].steps += [Step(_columns(batch)) for batch in batches]
        return batches, items

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not running:
            return
        stage, name = running[-1], type(module).__name__
        if name.endswith("Attention"):
            stage.attention_weights |= output[1] is not None
            if module.layer_idx == 0:
                stage.forwards.append(_forward(*args, **kwargs))
        elif isinstance(module, nn.Dropout) and len(stage.adapter_inputs) < 8:
            stage.adapter_inputs.append((args[0].detach(), output.detach()))
        elif isinstance(module, nn.Linear):
            stage.linear_dtypes.add(output.dtype)

    with contextlib.ExitStack() as stack:
        stack.callback(nn.modules.module.register_module_forward_hook(after, with_kwargs=True).remove)
        stack.callback(setattr, Trainer, "get_batch_samples", batches_of)
        Trainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]
        watch = Watch()
        transformers.trainer.DEFAULT_CALLBACKS.append(watch)
        stack.callback(transformers.trainer.DEFAULT_CALLBACKS.remove, watch)
        yield stages


@contextlib.contextmanager
def decoder_calls() -> Iterator[list[Forward]]:
    """All calls of a decoder in this context, whatever they are for."""
    calls: list[Forward] = []

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if getattr(module, "layer_idx", None) == 0 and type(module).__name__.endswith("Attention"):
            calls.append(_forward(*args, **kwargs))

    handle = nn.modules.module.register_module_forward_hook(after, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def _columns(batch: dict[str, Any]) -> dict[str, list[list[int]]]:
    """The texts of a batch by column, as token ids."""
    if "pairs" in batch:
        names = {"query": "query", "positive": "document"}
        names |= {f"{name}_target": f"{old}_targets" for name, old in names.items()}
        return {name: [list(getattr(pair, old)) for pair in batch["pairs"]] for name, old in names.items()}
    columns = [key.removesuffix("_input_ids") for key in batch if key.endswith("_input_ids")]
    return {
        column: _texts({key.removeprefix(f"{column}_"): value for key, value in batch.items()}) for column in columns
    }


def _texts(features: dict[str, Any]) -> list[list[int]]:
    """The ids of each text of a column, padded or packed."""
    ids = features["input_ids"].tolist()
    if "cu_seq_lens_q" in features:
        return [ids[0][start:end] for start, end in itertools.pairwise(features["cu_seq_lens_q"].tolist())]
    return [list(itertools.compress(row, mask)) for row, mask in zip(ids, features["attention_mask"], strict=True)]


def _forward(hidden_states: Tensor, *_: Any, cu_seq_lens_q: Any = None, **__: Any) -> Forward:
    rows, length, _ = hidden_states.shape
    texts = rows if cu_seq_lens_q is None else len(cu_seq_lens_q) - 1
    return Forward(rows * length, texts, again=torch._C._current_graph_task_id() != -1)


# Stage II's loss


@dataclass(frozen=True)
class BagOfWords:
    """Word reconstruction beside the contrastive loss: its weight, its sample's texts as token ids, and its origin.

    The last id of a text as it is read is no word of it.
    """

    weight: float
    queries: Sequence[Sequence[int]]
    documents: Sequence[Sequence[int]]
    origin: Tensor


def stage_two_loss(
    model: SentenceTransformer,
    columns: Sequence[Sequence[str]],
    *,
    temperature: float,
    packed: bool,
    micro_batch_tokens: int | None,
    bag_of_words: BagOfWords | None = None,
) -> Tensor:
    """The package's loss of the texts of a step: queries, positives, and hard negatives."""
    if packed:
        assert use_packed_texts(model)
    options: dict[str, Any] = {}
    if bag_of_words is not None:
        words = bag_of_words
        embeddings = model[0].model.get_input_embeddings().weight
        options["bag_of_words"] = BagOfWordsLoss(embeddings, words.queries, words.documents, origin=words.origin)
        options["bag_of_words_weight"] = words.weight
        options["content"] = lambda ids: ids[:-1]
    loss = contrastive_loss(model, temperature=temperature, micro_batch_tokens=micro_batch_tokens, **options)
    value: Tensor = loss([dict(model.preprocess(list(column))) for column in columns], torch.empty(0))
    return value


# Tasks of mteb


MOCK_TASKS = [
    "MockAggregatedTask",
    "MockBitextMiningTask",
    "MockClassificationTask",
    "MockClusteringTask",
    "MockInstructionReranking",
    "MockInstructionRetrieval",
    "MockMultilabelClassification",
    "MockMultilingualClusteringFastTask",
    "MockMultilingualRetrievalTask",
    "MockMultilingualSTSTask",
    "MockPairClassificationTask",
    "MockRegressionTask",
    "MockRerankingTask",
    "MockRetrievalTask",
    "MockSTSTask",
    "MockSummarizationTask",
]
"""A small task of every kind that mteb has for texts, some with several languages, and one that averages others."""


def register_mock_tasks(monkeypatch: Any, *others: type) -> None:
    """Have mteb find its small tasks of every kind by the names of their classes, and `others` by their own names."""
    mocks = pytest.importorskip("mteb.mocks")
    from mteb.get_tasks import _TASKS_REGISTRY

    for found in {**vars(mocks.mock_tasks), **vars(mocks)}.values():
        if isinstance(found, type) and "Mock" in found.__name__ and hasattr(found, "metadata"):
            monkeypatch.setitem(_TASKS_REGISTRY, found.__name__, found)
    for other in others:
        monkeypatch.setitem(_TASKS_REGISTRY, other.metadata.name, other)


# Models, tokenizers and pairs


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"]


TOKENIZERS = ["plain", "bos", "chat", "left"]


def make_model(family: str = "llama", *, tied: bool = True, vocab_size: int = 260, seed: int = 0) -> PreTrainedModel:
    """A random two-layer causal LM of `family` in float64, in evaluation mode."""
    config = CONFIG_MAPPING[family](
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=257,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).double().eval()


def make_tokenizer(kind: str = "plain") -> PreTrainedTokenizerFast:
    """A byte tokenizer with the end token `<|end|>` (id 0).

    `bos`: it puts `<|bos|>` before each text, through the two chained post-processors of Llama 3. `chat`: it has a chat
    template and a pad token of its own. `left`: it pads on the left.
    """
    tokenizer = byte_tokenizer()
    if kind == "bos":
        tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
        template = TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.convert_tokens_to_ids("<|bos|>"))]
        )
        tokenizer.backend_tokenizer.post_processor = Processors([ByteLevel(trim_offsets=True), template])
    if kind == "chat":
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>\n{% endfor %}"
    if kind == "left":
        tokenizer.padding_side = "left"
    return tokenizer


def write_rows(path, rows):
    """Write `rows` as JSON Lines and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_pairs(n: int = 6, *, seed: int = 0, vocab_size: int = 260) -> list[TokenPair]:
    """Random pairs whose lengths all differ."""
    draw = random.Random(seed)

    def text(length: int) -> list[int]:
        return [draw.randrange(1, vocab_size) for _ in range(length)]

    pairs = []
    for i in range(n):
        query, document = text(2 + i), text(12 - i)
        pairs.append(TokenPair([7, *query, 0], [7, *document, 0], [*query, 0], [*document, 0]))
    return pairs


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-14, name


END, BOS = 0, 257


END_PROMPT = ('This text: "', '" in one word: "')


def bare_ids(tokenizer, text):
    """The ids of a text alone."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


QUICK = ["stage_one.steps=3", "stage_two.steps=3", "stage_one.warmup_steps=1", "stage_two.warmup_steps=1"]


class Clock:
    """A second passes whenever it is asked."""

    now = 0.0

    def monotonic(self) -> float:
        """The seconds so far."""
        self.now += 1.0
        return self.now
