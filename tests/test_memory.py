"""What fits into memory: activations counted by autograd, free memory, and what follows when it is short."""

import copy
import gc
import json
import platform
import statistics
import subprocess
import sys
import weakref

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainingArguments

import anchorvec.training.memory
from anchorvec.data.stage_inputs import LENGTH_SAMPLE, large_step
from anchorvec.device import default_device
from anchorvec.errors import AnchorvecError
from anchorvec.objectives.reconstruction import TextReconstruction
from anchorvec.pipeline import load_training_data
from anchorvec.recipe import load_recipe
from anchorvec.run import Run
from anchorvec.start import build_base
from anchorvec.training.engine import ENOUGH_TOKENS
from anchorvec.training.memory import ADAM_BYTES, free_memory, kept_bytes, tokens_that_fit
from anchorvec.training.stage import Stage
from anchorvec.training.stage_one import pair_tokenizer, stage_one_objective
from anchorvec.training.stage_two import stage_two_model
from anchorvec.training.trainers import ReconstructionTrainer
from support import assert_same_gradients, make_model, make_pairs, write_rows

CPU = torch.device("cpu")


def test_kept_bytes_tell_what_grows_with_the_tokens():
    """Activations count once each, however often they are saved; fixed buffers apart from them; weights never."""
    layer = torch.nn.Linear(3, 5, bias=False)
    table = torch.ones(1000)

    def forward(n):
        x = torch.ones(7 * n, 3, requires_grad=True)
        y = layer(x)  # keeps x: 12 bytes a token
        return (y * y).sum() * (layer.weight.sum() * table).sum(), 7 * n  # keeps y, twice: 20 bytes a token

    per_token, fixed = kept_bytes(layer, forward)
    assert per_token == 12 + 20
    assert fixed == pytest.approx(4000, abs=16)  # the table, and scalars


def test_kept_bytes_of_attention_that_keeps_matrices():
    """What grows with the square of the length counts for the longest text."""

    def forward(n):
        x = torch.ones(7 * n, 1, requires_grad=True)
        return (x @ x.T).exp().sum(), 7 * n  # keeps x and the matrix: 4 bytes a token, 4 bytes a pair of tokens

    per_token, fixed = kept_bytes(torch.nn.Identity(), forward, longest=100)
    assert per_token == pytest.approx(4 + 4 * 100)
    assert fixed == pytest.approx(0, abs=1e-6)


def test_measuring_leaves_nothing_behind():
    """The model and its activations are free afterwards, though hooks have seen tensors that nodes keep themselves."""
    layers = [torch.nn.Linear(3, 5, bias=False)]
    weight = weakref.ref(layers[0].weight)
    # exp keeps its own output
    kept_bytes(layers[0], lambda n: (layers[0](torch.ones(7 * n, 3)).exp().sum(), 7 * n))
    layers.clear()
    gc.collect()
    assert weight() is None


def test_tokens_that_fit_leave_room_for_what_is_fixed(monkeypatch):
    """Gradients, moments and copies come off the free memory first; never below 0."""
    monkeypatch.setattr(anchorvec.training.memory, "free_memory", lambda device: 12_000)
    alone = tokens_that_fit(10, 0, CPU)
    assert 0 < alone < 1_200
    assert tokens_that_fit(10, 6_000, CPU) == alone // 2 == tokens_that_fit(20, 0, CPU)
    assert tokens_that_fit(10, 12_001, CPU) == 0


@pytest.mark.parametrize(
    ("folder", "limit", "used", "cache"),
    [
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_a_containers_limit_counts(monkeypatch, tmp_path, folder, limit, used, cache):
    """Free memory is what the control group leaves, cached files included, where the machine has more."""
    monkeypatch.setattr(anchorvec.training.memory, "_CGROUP", tmp_path)
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / folder / used).write_text("1000\n")
    (tmp_path / folder / "memory.stat").write_text(f"anon 7\n{cache} 300\n")
    (tmp_path / folder / limit).write_text("max\n")
    assert free_memory(CPU) > 10**6
    (tmp_path / folder / limit).write_text("5000\n")
    assert free_memory(CPU) == 4300


@pytest.mark.parametrize(
    ("own", "folder"), [("0::/slurm/job_7/step_0\n", "slurm/job_7"), ("4:memory:/slurm/job_7\n", "memory/slurm/job_7")]
)
def test_the_limit_of_a_batch_systems_job_counts(monkeypatch, tmp_path, own, folder):
    """Slurm limits a group below the root, of which each step is a part."""
    (tmp_path / "own").write_text(f"5:cpu:/\n{own}")
    monkeypatch.setattr(anchorvec.training.memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(anchorvec.training.memory, "_OWN_CGROUPS", tmp_path / "own")
    (tmp_path / folder).mkdir(parents=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if "memory" in own else ("memory.max", "memory.current")
    for name, value in zip((*names, "memory.stat"), ("5000\n", "1000\n", "anon 7\n"), strict=True):
        (tmp_path / folder / name).write_text(value)
    assert free_memory(CPU) == 4000


@pytest.fixture
def setup(tmp_path):
    """A function that sets up both stages of the recipe `debug` and gives their engines."""

    def engines(*options):
        own = ["model.max_tokens=64", "stage_one.micro_batch_tokens=null", "stage_two.micro_batch_tokens=null"]
        recipe = load_recipe("debug", [f"output={tmp_path / 'run'}", *own, *options])
        inputs = load_training_data(recipe)
        run = Run(tmp_path)
        if not run.base.exists():
            build_base(recipe, run.base)
        tokenize = pair_tokenizer(recipe, AutoTokenizer.from_pretrained(run.base))
        _, one = stage_one_objective(Stage("stage_one", recipe, run, run.base, inputs), tokenize)
        return one, stage_two_model(Stage("stage_two", recipe, run, run.base, inputs)).engine

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
    logits = 4 * 4 * 262 * 64 * 16
    room = ADAM_BYTES * 200_000 + logits + 1000 * max(one.bytes_per_token, two.bytes_per_token)
    monkeypatch.setattr(anchorvec.training.memory, "free_memory", lambda device: room)
    for engine in setup():
        assert engine.micro_batch_tokens < ENOUGH_TOKENS[default_device().type]
        assert not engine.gradient_checkpointing
    assert setup()[1].cached_gradients


@pytest.mark.parametrize(("longest", "cached"), [("a", False), ("a" * 40, True)])
def test_a_padded_step_is_as_wide_as_the_longest_text(tmp_path, longest, cached):
    """One long text in a large data set decides whether a padded step of Stage II fits at once."""
    file = tmp_path / "pairs.jsonl"
    texts = [f"{i:04}" for i in range(2 * LENGTH_SAMPLE)]
    rows = [{"query": f"q{text}", "positive": longest if text == "0007" else text} for text in texts]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(
        "debug",
        [
            f"output={tmp_path / 'run'}",
            f"data.train=[{{path: {file}}}]",
            "model.attention=sdpa",
            "stage_two.pairs_per_step=4",
            "stage_two.micro_batch_tokens=80",
        ],
    )
    run = Run(tmp_path)
    stage = Stage("stage_two", recipe, run, build_base(recipe, run.base), load_training_data(recipe))
    assert stage_two_model(stage).engine.cached_gradients == cached


def test_checkpointing_only_where_it_is_needed_or_asked_for(setup, monkeypatch):
    """`gradient_checkpointing: auto` is on where the longest pair would not fit; true and false are obeyed."""
    plain = setup()[0]
    asked = setup("stage_one.gradient_checkpointing=true")[0]
    assert asked.gradient_checkpointing
    assert asked.bytes_per_token < plain.bytes_per_token
    monkeypatch.setattr(anchorvec.training.memory, "free_memory", lambda device: 1000)
    assert setup()[0].gradient_checkpointing
    assert not setup("stage_one.gradient_checkpointing=false")[0].gradient_checkpointing


class RunsOutOfMemory(TextReconstruction):
    """Out of memory for more than `room` tokens at a time, as a GPU would be."""

    room = 0

    def forward(self, pairs, **options):
        output = super().forward(pairs, **options)
        if sum(pair.tokens() for pair in pairs) > self.room:
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
    _, loss, expected = one_step(TextReconstruction(copy.deepcopy(start)), tmp_path)
    objective = RunsOutOfMemory(start)
    objective.room = 100
    with pytest.warns(UserWarning, match="out of memory: Stage I goes on with micro-batches of"):
        trainer, found_loss, found = one_step(objective, tmp_path)
    assert trainer.micro_batch_tokens <= 100
    assert trainer.tokens_seen == sum(pair.tokens() for pair in make_pairs(8))
    torch.testing.assert_close(found_loss, loss)
    assert_same_gradients(found, expected)


def test_the_exchange_gap_does_not_depend_on_the_cut(tmp_path):
    """Partners come from the whole step, so that pairs alone in their micro-batch have one too."""
    gaps = [one_step(TextReconstruction(make_model()), tmp_path, budget)[0].exchange for budget in (1, 60, 1000)]
    assert gaps[0].keys() == {"exchange_query_to_document", "exchange_document_to_query"}
    for gap in gaps[:2]:
        assert gap == pytest.approx(gaps[2], abs=1e-5)  # sums are kept in fp32


def test_a_step_without_partners_has_no_gap(tmp_path):
    """The gap of an earlier step is not shown as that of a later one."""
    trainer = one_step(TextReconstruction(make_model()), tmp_path)[0]
    assert trainer.exchange
    trainer.exchange_every = 1
    trainer.training_step(trainer.model, {"pairs": [make_pairs(1)[0]] * 2})
    assert trainer.exchange == {}


@pytest.mark.parametrize(("alpha", "direction"), [(1.0, "query_to_document"), (0.0, "document_to_query")])
def test_a_direction_that_is_off_is_neither_logged_nor_counted(tmp_path, alpha, direction):
    """With one direction alone there is one loss, one gap, and two passes' tokens."""
    trainer = one_step(TextReconstruction(make_model(), alpha=alpha), tmp_path)[0]
    assert trainer.parts[0].keys() == {direction}
    assert trainer.exchange.keys() == {f"exchange_{direction}"}
    one, other = ("query", "document_targets") if alpha else ("document", "query_targets")
    assert trainer.tokens_seen == sum(len(getattr(p, one)) + len(getattr(p, other)) for p in make_pairs(8))


@pytest.mark.filterwarnings("ignore:out of memory")
def test_out_of_memory_for_a_single_pair_is_an_error(tmp_path):
    """Where not even one pair fits, the error says what to change."""
    with pytest.raises(AnchorvecError, match=r"gradient_checkpointing=true, or lower stage_one\.micro_batch_tokens"):
        one_step(RunsOutOfMemory(make_model()), tmp_path)


@pytest.mark.parametrize("vocab_size", [49_152, 151_936])
def test_memory_does_not_grow_with_vocabulary_times_length(vocab_size, monkeypatch):
    """What is kept for a further target token is far less than its logits, whatever the vocabulary."""
    monkeypatch.setattr("anchorvec.model.head.HEAD_CHUNK_BYTES", {"cpu": 2**23})
    model, pairs = make_model(vocab_size=vocab_size).float(), make_pairs(10)
    targets = sum(len(p.query_targets) + len(p.document_targets) for p in pairs)
    objective = TextReconstruction(model)
    per_target, _ = kept_bytes(model, lambda n: (objective(pairs * n).loss, n * targets))
    assert 0 < per_target < 0.2 * 4 * vocab_size


def test_freed_memory_can_be_kept_and_given_back():
    """Kept memory stays with the process when it is freed, and goes back to the system on request."""
    script = """
import psutil, torch
from anchorvec.training.memory import keep_freed_memory, release_freed_memory
resident = lambda: psutil.Process().memory_info().rss / 2**20
before = resident()
keep_freed_memory()
blocks = [torch.ones(2**23) for _ in range(8)]  # 256 MiB
small = torch.ones(8)
del blocks
assert resident() - before > 200, "given back at once"
release_freed_memory()
assert resident() - before < 100, "not given back"
"""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_large_step_is_the_mean_and_three_standard_deviations(tmp_path):
    """Of the tokens of its pairs, so that few steps have more; texts are packed."""
    rows = [{"query": f"{i:02}", "positive": "p" * (1 + i % 20), "negatives": []} for i in range(60)]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    overrides = [f"output={tmp_path / 'run'}", f"data.train=[{{path: {file}}}]", "stage_one=null"]
    recipe = load_recipe("debug", [*overrides, "stage_two.pairs_per_step=4"])
    tokenizer = AutoTokenizer.from_pretrained(build_base(recipe, tmp_path / "base"))
    inputs = load_training_data(recipe)
    tokens = [2 + 1 + (1 + i % 20) + 1 for i in range(60)]  # both texts are bytes and an end
    expected = 4 * statistics.mean(tokens) + 3 * 2 * statistics.pstdev(tokens)
    found = large_step(tokenizer, inputs.contrastive["pairs"], inputs.prompts["pairs"], recipe, packed=True)
    assert found == pytest.approx(expected)


def test_each_slower_way_is_said_with_its_reason(setup, monkeypatch, capsys):
    """In the engine, so in `plan` and the run's record, and in a line when a stage starts."""
    for engine in setup():
        assert engine.slower == ()
    for engine in setup("model.attention=eager"):
        assert engine.slower[0] == "texts are padded: model.attention is eager"
    monkeypatch.setattr(anchorvec.training.memory, "free_memory", lambda device: 1000)
    one, two = setup()
    assert any(line.startswith("gradient checkpointing: the longest texts do not fit") for line in one.slower)
    assert any(line.startswith("cached gradients, every text is encoded twice: a step of") for line in two.slower)
    monkeypatch.undo()
    monkeypatch.setattr("anchorvec.training.stage_two.use_packed_texts", lambda model: False)
    assert setup()[1].slower == ("texts are padded: the model's layers do not keep packed texts apart",)
