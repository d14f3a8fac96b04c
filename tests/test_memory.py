"""What fits into memory: activations counted by autograd, free memory, and what follows when it is short."""

import copy

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

import anchorvec.memory
from anchorvec.errors import AnchorvecError
from anchorvec.memory import ADAM_BYTES, bytes_per_token, free_memory, tokens_that_fit
from anchorvec.precision import default_device
from anchorvec.recipe import load_recipe
from anchorvec.reconstruction import Reconstruction
from anchorvec.stages import ENOUGH_TOKENS, stage_one_objective, stage_two_datasets, stage_two_model
from anchorvec.trainers import ReconstructionTrainer
from anchorvec.training import build_base, load_training_data
from conftest import make_model
from test_reconstruction import assert_same_gradients, make_pairs

CPU = torch.device("cpu")


def test_bytes_per_token_counts_what_grows_with_the_tokens():
    """Activations count once each, however often they are saved; weights and fixed buffers do not count."""
    weight = torch.nn.Parameter(torch.ones(3, 5))
    table = torch.ones(1000)

    def forward(n):
        x = torch.ones(7 * n, 3, requires_grad=True)
        y = x @ weight  # keeps x: 12 bytes a token
        return (y * y).sum() * (weight.sum() * table).sum(), 7 * n  # keeps y, twice: 20 bytes a token

    assert bytes_per_token(forward) == 12 + 20


def test_tokens_that_fit_leave_room_for_the_optimizer(monkeypatch):
    """Gradients and moments of trained parameters come off the free memory first; never below 0."""
    monkeypatch.setattr(anchorvec.memory, "free_memory", lambda device: 12_000)
    alone = tokens_that_fit(10, 0, CPU)
    assert 0 < alone < 1_200
    assert tokens_that_fit(10, 500, CPU) == alone // 2 == tokens_that_fit(20, 0, CPU)
    assert tokens_that_fit(10, 12_000 // ADAM_BYTES + 1, CPU) == 0


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    """Free memory is what the control group leaves, where that is less than the machine has."""
    monkeypatch.setattr(anchorvec.memory, "_CGROUP", tmp_path)
    whole = free_memory(CPU)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert free_memory(CPU) == pytest.approx(whole, rel=0.5)
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory(CPU) == 4000


@pytest.fixture
def setup(tmp_path):
    """A function that sets up both stages of the recipe `debug` and gives their engines."""

    def engines(*options):
        own = ["stage_one.micro_batch_tokens=null", "stage_two.micro_batch_tokens=null"]
        recipe = load_recipe("debug", [f"output={tmp_path / 'run'}", *own, *options])
        pairs = load_training_data(recipe)
        base = tmp_path / "base"
        if not base.exists():
            build_base(recipe, base)
        one, two = stage_one_objective(recipe, base), stage_two_model(recipe, base, stage_two_datasets(recipe, pairs))
        return one[1], two[1]

    return engines


def test_with_memory_to_spare_nothing_is_computed_twice(setup):
    """A tiny model on any machine: full micro-batches, no checkpointing, no cached gradients."""
    for engine in setup():
        assert engine.micro_batch_tokens == ENOUGH_TOKENS[default_device().type]
        assert not engine.gradient_checkpointing
        assert not engine.cached_gradients


def test_short_memory_makes_smaller_micro_batches(setup, monkeypatch):
    """Where a step does not fit, Stage I cuts it finer and Stage II caches gradients."""
    one, two = setup()
    room = ADAM_BYTES * 200_000 + 600 * max(one.bytes_per_token, two.bytes_per_token)
    monkeypatch.setattr(anchorvec.memory, "free_memory", lambda device: room)
    for engine in setup():
        assert engine.micro_batch_tokens < ENOUGH_TOKENS[default_device().type]
        assert not engine.gradient_checkpointing
    assert setup()[1].cached_gradients


def test_checkpointing_only_where_it_is_needed_or_asked_for(setup, monkeypatch):
    """`gradient_checkpointing: auto` is on where the longest pair would not fit; true and false are obeyed."""
    plain = setup()[0]
    asked = setup("stage_one.gradient_checkpointing=true")[0]
    assert asked.gradient_checkpointing
    assert asked.bytes_per_token < plain.bytes_per_token
    monkeypatch.setattr(anchorvec.memory, "free_memory", lambda device: 1000)
    assert setup()[0].gradient_checkpointing
    assert not setup("stage_one.gradient_checkpointing=false")[0].gradient_checkpointing


class RunsOutOfMemory(Reconstruction):
    """Out of memory for more than `room` tokens at a time, as a GPU would be."""

    room = 0

    def forward(self, pairs, **options):
        output = super().forward(pairs, **options)
        if sum(pair.tokens for pair in pairs) > self.room:
            (0.5 * output.loss).backward()  # half a step's gradients are there already
            raise torch.OutOfMemoryError("out of memory (injected)")
        return output


def one_step(objective, folder, budget=1000):
    """The gradients of one step over eight pairs, as the trainer leaves them to the optimizer."""
    trainer = ReconstructionTrainer(
        model=objective,
        args=TrainingArguments(output_dir=str(folder), report_to="none", remove_unused_columns=False, use_cpu=True),
        train_dataset=Dataset.from_dict({"index": [0]}),
        micro_batch_tokens=budget,
    )
    loss = trainer.training_step(objective, {"pairs": make_pairs(8)})
    return trainer, loss, {name: p.grad for name, p in objective.named_parameters()}


def test_out_of_memory_halves_the_budget_and_changes_nothing(tmp_path):
    """The step is done again in smaller micro-batches, with the same loss and gradient, and a warning."""
    start = make_model()
    _, loss, expected = one_step(Reconstruction(copy.deepcopy(start)), tmp_path)
    objective = RunsOutOfMemory(start)
    objective.room = 100
    with pytest.warns(UserWarning, match="out of memory: Stage I goes on with micro-batches of"):
        trainer, found_loss, found = one_step(objective, tmp_path)
    assert trainer.micro_batch_tokens <= 100
    assert trainer.tokens_seen == sum(pair.tokens for pair in make_pairs(8))
    torch.testing.assert_close(found_loss, loss)
    assert_same_gradients(found, expected)


@pytest.mark.filterwarnings("ignore:out of memory")
def test_out_of_memory_for_a_single_pair_is_an_error(tmp_path):
    """Where not even one pair fits, the error says what to change."""
    with pytest.raises(AnchorvecError, match=r"gradient_checkpointing=true, or lower model\.max_tokens"):
        one_step(RunsOutOfMemory(make_model()), tmp_path)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that is made, in bytes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("vocab_size", [49_152, 151_936])
def test_memory_does_not_grow_with_vocabulary_times_length(vocab_size, monkeypatch):
    """However many targets a micro-batch has, no tensor is larger than a chunk of logits or than the LM head."""
    limit = 2**25
    monkeypatch.setattr("anchorvec.reconstruction.HEAD_CHUNK_BYTES", limit)
    model = make_model(vocab_size=vocab_size).float()
    head = 4 * vocab_size * model.config.hidden_size
    for repeats in (1, 4):
        pairs = make_pairs(10) * repeats
        logits = 4 * vocab_size * sum(len(p.query_targets) + len(p.document_targets) for p in pairs)
        with LargestTensor() as seen:
            Reconstruction(model)(pairs).loss.backward()
        assert logits > limit * repeats / 2
        assert 0 < seen.largest <= max(limit, head)
