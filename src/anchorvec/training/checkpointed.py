"""transformers' trainer with checkpoints from which training goes on bit for bit.

Its own have the optimizer, the schedule and the states of the random generators. What they lack is here: the weights
as they are trained (tied ones, adapters over frozen ones, objectives that are no `PreTrainedModel`), the loss since the
last line of the log, the counts, and what the samplers have found.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from xxhash import xxh3_64_intdigest

from anchorvec.errors import AnchorvecError
from anchorvec.files import write_json
from anchorvec.processes import wait_for_all
from anchorvec.ranks import rank, ranks
from anchorvec.shares import SharedSteps
from anchorvec.training.checkpoints import Checkpoints
from anchorvec.training.sharding import for_first, is_sharded, shared_out, shared_out_state, whole, whole_state

WEIGHTS, STATE, ORDERS = "model.safetensors", "stage.json", "similar_pairs.safetensors"

Explain = Callable[[str, int, Sequence[int]], str]


def hash_of_rows(hashes: Iterable[int]) -> int:
    """An integer of 64 bits with a sign, of rows in any order, of which `hashes` are those of each.

    The sum of two is that of the rows of both, modulo 2^64.
    """
    return (sum(hashes) + 2**63) % 2**64 - 2**63


class CheckpointedTrainer(Trainer):
    """A trainer whose checkpoints are complete, and which stops at the first number that is not finite.

    `checkpoints`: where they are; without, none can be written. `orders`: what its samplers have found and need not
    seek again. `explain` gives the message of an error: what is not finite, at which step, and with which rows, by
    their numbers in the data.
    """

    checkpoints: Checkpoints | None = None
    explain: Explain = staticmethod("{} is no finite number any more at step {}, of the rows {}".format)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.orders: dict[str, Tensor] = {}
        self.row_hashes: list[int] = []  # after each step that of the rows of all steps so far
        super().__init__(*args, **kwargs)

    def go_on_from(self, checkpoint: Path) -> None:
        """Have `train(resume_from_checkpoint=checkpoint)` go on exactly as it would have."""
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if (checkpoint / ORDERS).is_file():
            self.orders.update(load_file(checkpoint / ORDERS))
        self.take_up(state)
        self.add_callback(_LossSoFar(self, state))

    def kept(self) -> dict[str, Any]:
        """What a checkpoint keeps beyond transformers' own, as plain JSON values; floats come back as they were."""
        return {
            "loss_since_log": self._tr_loss.item(),
            "last_logged_step": self._globalstep_last_logged,
            "row_hashes": self.row_hashes,
        }

    def take_up(self, state: dict[str, Any]) -> None:
        """Go on with `state`, which `kept` gave, before training starts."""
        self.row_hashes = state["row_hashes"]

    @property
    def rows_hash(self) -> int:
        """Of the rows of all steps so far: what was trained on, and in which order."""
        return self.row_hashes[-1] if self.row_hashes else 0

    def count_rows(self, hashes: Iterable[int]) -> None:
        """Add a step to `row_hashes`, of whose rows each of `hashes` is that of some by `hash_of_rows`."""
        step = sum(hashes) % 2**64
        self.row_hashes.append(xxh3_64_intdigest(self.rows_hash.to_bytes(8, "little") + step.to_bytes(8, "little")))

    def check_finite(self, what: str, value: Tensor | float) -> None:
        """Raise AnchorvecError, with the step and its rows, unless `value`, which is `what`, is a finite number.

        The weights are still those before the step then.
        """
        if not math.isfinite(value):
            step = self.state.global_step + 1
            raise AnchorvecError(self.explain(what, step, self.rows_of(step)))

    def rows_of(self, step: int) -> list[int]:
        """The numbers of the rows of a step in the training data, whose data sets are counted one after another."""
        loader: Any = self.get_train_dataloader()
        epoch, batch = divmod(step - 1, len(loader))
        loader.set_epoch(epoch)
        steps = loader.batch_sampler
        rows: list[int] = next(islice(iter(steps.steps if isinstance(steps, SharedSteps) else steps), batch, None))
        return rows

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of whole steps, or of this process's share of each; accelerate would deal steps out one by one."""
        loader: Any = super().get_train_dataloader()
        if ranks() > 1:
            steps = SharedSteps(loader.batch_sampler.batch_sampler, rank(), ranks())
            options = ("collate_fn", "num_workers", "pin_memory", "persistent_workers", "prefetch_factor")
            shared = DataLoader(
                loader.dataset, batch_sampler=steps, **{name: getattr(loader, name) for name in options}
            )
            alone = {"num_processes": 1, "process_index": 0}  # shared out already
            loader = prepare_data_loader(shared, loader.device, put_on_device=True, **alone)
        given: DataLoader[Any] = loader
        return given

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float:
        norm: Tensor | float = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        norm = whole(norm) if isinstance(norm, Tensor) else norm
        self.check_finite("the loss has a gradient that", norm)
        return norm

    # Checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self.checkpoints is not None
        self._whole = {name: for_first(tensor.detach()) for name, tensor in self._trained().items()}
        if rank() == 0:
            with self.checkpoints.writing_step(self.state.global_step) as folder:
                wait_for_all()  # the folder is there
                super()._save_checkpoint(model, trial)
                write_json(folder / STATE, self.kept())
                if self.orders:
                    save_file(self.orders, folder / ORDERS)
                wait_for_all()  # so is what is random in the other processes
        else:
            wait_for_all()
            super()._save_checkpoint(model, trial)
            wait_for_all()
        del self._whole
        wait_for_all()  # a process that ends has the launcher end the others

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if rank() == 0:
            weights = {name: tensor.contiguous() for name, tensor in self._whole.items()}
            if not all(tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point()):
                step = self.state.global_step
                raise AnchorvecError(self.explain("a weight", step, self.rows_of(step)))
            save_file(weights, Path(output_dir or str(self.args.output_dir)) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        weights, trained = load_file(Path(resume_from_checkpoint) / WEIGHTS), self._trained()
        if {name: t.shape for name, t in weights.items()} != {name: t.shape for name, t in trained.items()}:
            raise AnchorvecError(f"{resume_from_checkpoint}: this checkpoint is one of another model")
        with torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(shared_out(weights[name], tensor))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer, scheduler = self._optimizer_and_scheduler()
        state = whole_state(optimizer.state_dict())
        if rank() == 0:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, scheduler = self._optimizer_and_scheduler()
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True, mmap=True)
        optimizer.load_state_dict(shared_out_state(state, optimizer))
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _optimizer_and_scheduler(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        return self.optimizer, self.lr_scheduler

    def _trained(self) -> dict[str, Tensor]:
        """The parameters that are trained, tied ones once, and the buffers that the model is saved with."""
        model = self.accelerator.unwrap_model(self.model)
        saved = model.state_dict().keys()
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
        return {name: p for name, p in model.named_parameters() if p.requires_grad} | buffers


class _LossSoFar(TrainerCallback):
    """Gives a trainer back what it forgets when it starts: the loss since the last line of the log."""

    def __init__(self, trainer: CheckpointedTrainer, state: dict[str, Any]) -> None:
        self.trainer, self.state = trainer, state

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._tr_loss.fill_(self.state["loss_since_log"])
        self.trainer._globalstep_last_logged = self.state["last_logged_step"]
