"""The trainers of the two stages: transformers' and sentence-transformers' own, with what a stage adds."""

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.data_collator import BaseDataCollator
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor, nn

from anchorvec.errors import AnchorvecError
from anchorvec.model.working_weights import WorkingWeights
from anchorvec.objectives.pairs import TokenPair, exchange_partners, micro_batches, row_hash, tokens_at_once
from anchorvec.objectives.reconstruction import Reconstruction
from anchorvec.processes import added, from_first, gathered
from anchorvec.ranks import rank, ranks
from anchorvec.shares import share
from anchorvec.terminal import say
from anchorvec.training.budget import Limit
from anchorvec.training.checkpointed import CheckpointedTrainer, hash_of_rows

_OUT_OF_MEMORY_HELP = "set {stage}.gradient_checkpointing=true, or lower {stage}.micro_batch_tokens or data.max_tokens"


class TimedTrainer(CheckpointedTrainer):
    """A trainer whose learning rate follows what is used of its `limit`, a time or decoder tokens, where it has one.

    Its share of the way from the warm-up to 0 is then the share that is used, so that a stage of which nobody can say
    how many steps fit comes to the end of its schedule (T13). Of several processes the clock of the first counts, and
    the tokens of all. In bf16 a process that is alone converts the weights once a step. `seconds` of training and
    `tokens_seen` are counted on where it goes on; `spent` gives the seconds of the whole run, which a checkpoint keeps,
    `kept_seconds` those before a deadline that are not for training.
    """

    limit: Limit | None = None
    spent: Callable[[], float] = staticmethod(lambda: 0.0)
    kept_seconds: Callable[[], float] = staticmethod(lambda: 0.0)
    seconds = 0.0
    tokens_seen = 0

    @cached_property
    def working_weights(self) -> WorkingWeights | None:
        """The bf16 copies of the weights, where the stage trains in bf16; on a GPU with fewer operations."""
        if not self.args.bf16 or ranks() > 1:  # several must see gradients arrive at the weights themselves
            return None
        # a CPU computes at once what it is told, so that it would gain nothing, and goes on bit for bit as it did
        working = WorkingWeights(self.accelerator.unwrap_model(self.model), fuse=self.args.device.type == "cuda")
        if working.own_way:
            say(f"computed as the model's own code does, with more operations: {', '.join(working.own_way)}")
        return working

    def with_working_weights(self) -> AbstractContextManager[None]:
        """The context of a step's forward and backward passes."""
        return self.working_weights.in_use() if self.working_weights is not None else nullcontext()

    def kept(self) -> dict[str, Any]:
        """As the base class says, with the time and the tokens so far."""
        seconds = time.monotonic() - self.began
        return super().kept() | {"seconds": seconds, "spent": self.spent(), "tokens": self.tokens_seen}

    def take_up(self, state: dict[str, Any]) -> None:
        """Go on with the `state` that `kept` gave."""
        super().take_up(state)
        self.seconds, self.tokens_seen = state["seconds"], state["tokens"]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of the training arguments, over steps or over the limit; the time starts here."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self.began = time.monotonic() - self.seconds
        if self.limit is not None:
            assert isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR)
            [of_step, *_] = scheduler.lr_lambdas

            looked: dict[int, float] = {}  # once a step, for all groups of weights

            def of_share(step: int) -> float:
                if step not in looked:
                    looked.clear()
                    share = from_first(min(1.0, self.used(by_schedule=True)))
                    looked[step] = float(of_step(round(num_training_steps * share)))
                return looked[step]

            scheduler.lr_lambdas = [of_share] * len(scheduler.lr_lambdas)
            for group, base in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
                group["lr"] = base * of_share(0)  # where no time is left, the one step that is made has a rate of 0
        return scheduler

    def used(self, *, by_schedule: bool = False) -> float:
        """The share of its limit that it has used; `by_schedule`: without the time that scores to come will take."""
        assert self.limit is not None
        kept = self.kept_seconds if by_schedule else lambda: 0.0
        return self.limit.used(self.began, self.tokens_seen, kept)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Have the callbacks score the model as it is, which a `control.should_evaluate` asks for."""
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {})
        return {}


class ReconstructionTrainer(TimedTrainer):
    """A trainer whose batch is the pairs of one optimizer step, cut into micro-batches inside the step.

    Target tokens are counted over all devices before the first micro-batch, so the gradient is that of the whole step
    however it is cut (T10). Gradients are synchronised with the last micro-batch only. Where the device runs out of
    memory, `micro_batch_tokens` is halved and the step done again. In the first of `exchange_every` steps embeddings
    are exchanged between pairs, too.
    """

    def __init__(self, *args: Any, micro_batch_tokens: int, exchange_every: int = 10, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.args.gradient_accumulation_steps == 1  # a batch is a step
        self.micro_batch_tokens = micro_batch_tokens
        self.exchange_every = exchange_every
        self.parts: list[dict[str, float]] = []  # of each step since the last record
        self.exchange: dict[str, float] = {}

    def kept(self) -> dict[str, Any]:
        """As the base class says, with what the next record tells of the steps so far, and how they are cut."""
        own = {"parts": self.parts, "exchange": self.exchange, "micro_batch_tokens": self.micro_batch_tokens}
        return super().kept() | own

    def take_up(self, state: dict[str, Any]) -> None:
        """Go on with the `state` that `kept` gave."""
        super().take_up(state)
        self.parts, self.exchange = state["parts"], state["exchange"]
        self.micro_batch_tokens = min(self.micro_batch_tokens, state["micro_batch_tokens"])

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Backpropagate one optimizer step and return its loss over all devices.

        Raises AnchorvecError if not even one pair at a time fits into the memory, or if the loss is not finite.
        """
        model.train()
        objective = self.accelerator.unwrap_model(model)
        own = share(self.args.train_batch_size, rank(), ranks())
        read: list[TokenPair] = inputs["pairs"]
        drawn = objective.draw(read, self.state.global_step, own.start)
        pairs, stand_in = (drawn if own else []), drawn[0]
        counts = self._count(objective, pairs, hash_of_rows(pair.row for pair in read if own))
        while True:
            parts = micro_batches(pairs, self.micro_batch_tokens, **objective.cut)
            largest = max(tokens_at_once(part, **objective.cut) for part in [*parts, [stand_in]])
            try:
                with self.with_working_weights():
                    return self._step(model, parts, counts, stand_in)
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                # One process cannot do a step again while others wait for its gradients.
                if len(parts) == len(pairs) or ranks() > 1:
                    raise AnchorvecError(
                        f"stage_one: out of memory with {largest:,} tokens at a time; "
                        + _OUT_OF_MEMORY_HELP.format(stage="stage_one")
                    ) from error
            # Outside the except block, so that the failed step's tensors are free.
            model.zero_grad()
            if self.args.device.type == "cuda":
                torch.cuda.empty_cache()
            self.micro_batch_tokens = min(self.micro_batch_tokens, largest) // 2
            warnings.warn(
                f"out of memory: Stage I goes on with micro-batches of {self.micro_batch_tokens} tokens, which "
                "changes nothing in the result",
                stacklevel=2,
            )

    def _count(self, objective: Reconstruction, pairs: list[TokenPair], rows: int) -> "_Counts":
        """What all processes count in a step, of which this one has `pairs`, and `rows` by `hash_of_rows`."""
        step = self.state.global_step + 1
        exchanges = bool(objective.exchanges) and (step == 1 or step % self.exchange_every == 0)
        # by length: a partner is about as long, whatever the cut
        ordered = [pair for [pair] in micro_batches(pairs, 1, **objective.cut)]
        partners = exchange_partners(ordered) if exchanges else None
        parts = len(micro_batches(pairs, self.micro_batch_tokens, **objective.cut))
        tokens = tokens_at_once(pairs, **objective.cut | {"packed": True})
        of_all = gathered([rows, tokens, parts, partners is None, *objective.targets(pairs)])
        hashes, read, cuts, without_partners, *targets = zip(*of_all, strict=True)
        self.count_rows(hashes)
        self.tokens_seen += sum(read)
        if exchanges:
            self.exchange = {}
        partner_of = {id(pair): partner for pair, partner in zip(ordered, partners or (), strict=False)}
        return _Counts([*map(sum, targets)], max(1, *cuts), None if any(without_partners) else partner_of)

    def _step(
        self, model: nn.Module, parts: Sequence[Sequence[TokenPair]], counts: "_Counts", stand_in: TokenPair
    ) -> Tensor:
        """Backpropagate the micro-batches of one step; `stand_in` is computed for one that others have more."""
        objective = self.accelerator.unwrap_model(model)
        sums = torch.zeros(2, len(counts.targets), device=self.args.device)  # own, with other pairs' embeddings
        parts = [*parts, *[()] * (counts.parts - len(parts))]
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(model):
                computed = part or [stand_in]
                with self.compute_loss_context_manager():
                    out = model(computed, targets=counts.targets, exchange=counts.exchanged(computed))
                # DDP averages over processes; the loss is already this process's share of the step.
                self.accelerator.backward(out.loss * (ranks() if part else 0))
            if part:
                sums[0] += torch.stack([*out.sums.values()])
            if part and out.exchanged is not None:
                sums[1] += torch.stack([out.exchanged.get(name, own) for name, own in out.sums.items()])
        own, exchanged = (added(sums) / torch.tensor(counts.targets, device=sums.device).clamp(min=1)).tolist()
        weights = objective.parts
        self.parts.append({name: loss for (name, weight), loss in zip(weights.items(), own, strict=True) if weight})
        if counts.partners is not None:
            gaps = {name: b - a for name, a, b in zip(weights, own, exchanged, strict=True)}
            self.exchange = {f"exchange_{name}": gaps[name] for name in objective.exchanges if weights[name]}
        loss = sum(weight * part for weight, part in zip(weights.values(), own, strict=True))
        self.check_finite("the loss", loss)
        return torch.tensor(loss, device=self.args.device)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the parts of the loss, their exchange gaps and the tokens so far to a training record."""
        if "loss" in logs:
            parts = {name: statistics.mean(step[name] for step in self.parts) for name in self.parts[0]}
            logs = {**logs, **parts, **self.exchange, "tokens": self.tokens_seen}
            self.parts = []
        super().log(logs, start_time)


@dataclass(frozen=True)
class _Counts:
    """Of a step in all processes: its targets, part by part, and the most micro-batches that one of them has.

    `partners`: another pair for each one of this process, by its `id`; None where no embeddings are exchanged.
    """

    targets: list[int]
    parts: int
    partners: dict[int, TokenPair] | None

    def exchanged(self, pairs: Sequence[TokenPair]) -> list[TokenPair] | None:
        """The partners of `pairs`; a pair that stands in for another one is its own."""
        return None if self.partners is None else [self.partners.get(id(pair), pair) for pair in pairs]


class _CollatorWithRows(SentenceTransformerDataCollator):
    """The library's own; a batch also has the hash of each of its rows, as a list, which stays on the host."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().__call__(features)
        return batch | {"rows": [row_hash(row["query"], row["positive"]) for row in features]}


class ContrastiveTrainer(TimedTrainer, SentenceTransformerTrainer):
    """sentence-transformers' trainer; it also counts the tokens that it reads."""

    def kept(self) -> dict[str, Any]:
        """As the base class says, with the losses beside the contrastive one that the next record tells of."""
        beside = {name: [float(loss) for loss in losses] for name, losses in self.beside.items()}
        return super().kept() | {"beside": beside}

    def take_up(self, state: dict[str, Any]) -> None:
        """Go on with the `state` that `kept` gave."""
        super().take_up(state)
        for name, losses in state["beside"].items():
            self.beside[name].extend(torch.tensor(loss) for loss in losses)

    @property
    def beside(self) -> dict[str, list[Tensor]]:
        """The losses beside the contrastive one since the last record, by name."""
        found: dict[str, list[Tensor]] = getattr(self.loss, "beside", {})
        return found

    data_collator_class = _CollatorWithRows

    def get_data_collator(self, *args: Any, **options: Any) -> BaseDataCollator:
        """The library's own; it reads of each column the texts that are there, as a row may have no hard negative."""
        collator = super().get_data_collator(*args, **options)
        collator.preprocess_fn = partial(_features_of_texts, collator.preprocess_fn)
        return collator

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Leave out the library's model card, which encodes examples and asks the hub; `export` writes one."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One optimizer step. Raises AnchorvecError where it runs out of memory, or if the loss is not finite."""
        tokens = 0
        for key, value in inputs.items():
            if key.endswith("attention_mask"):
                tokens += int(value.sum())
            elif key.endswith("cu_seq_lens_q"):  # texts without padding
                tokens += int(value[-1])
        hashes, read = zip(*gathered([hash_of_rows(inputs["rows"]), tokens]), strict=True)
        self.count_rows(hashes)
        self.tokens_seen += sum(read)
        try:
            with self.with_working_weights():
                loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
            raise AnchorvecError(
                f"stage_two: out of memory; {_OUT_OF_MEMORY_HELP.format(stage='stage_two')}"
            ) from error
        there = [losses for losses in self.beside.values() if losses]
        of_all = added(torch.stack([loss, *(losses[-1] for losses in there)])) / ranks()  # each has as many pairs
        loss = of_all[0]
        for losses, of_step in zip(there, of_all[1:], strict=True):
            losses[-1] = of_step
        self.check_finite("the loss", loss)
        self.tokens_seen += getattr(self.loss, "written_tokens", 0)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the tokens so far to a training record, and the losses beside the contrastive one."""
        if "loss" in logs:
            logs = {**logs, "tokens": self.tokens_seen}
            for name, losses in self.beside.items():
                if losses:
                    logs[name] = statistics.mean(map(float, losses))
                    losses.clear()
        super().log(logs, start_time)


def _features_of_texts(
    preprocess: Callable[..., dict[str, Any]], texts: Sequence[str | None], **options: Any
) -> dict[str, Any]:
    """What `preprocess` makes of those that are no None; nothing where all are."""
    there = [text for text in texts if text is not None]
    return preprocess(there, **options) if there else {}


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that memory is used up, on whatever device."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
