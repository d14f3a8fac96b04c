"""The keys that take part in a training step: two runs against the formulas, step by step, with the recipe's values."""

import statistics

import pytest
import torch
from safetensors.torch import load_file

import formulas
from support import train, write_rows
from wiring import PLAIN, adapters, model_before

STAGES = [(run, stage) for run in ("texts_run", "words_run") for stage in ("stage_one", "stage_two")]


class Followed:
    """A stage of a run, gone through by the formulas: `losses` and `norms` of its steps, `weights` after the last.

    A loss is a list: the whole, and its parts. Norms are those before the gradient was clipped.
    """

    def __init__(self, expected, stage):
        self.stage, self.expected, self.run = stage, expected, expected.run
        self.seen = self.run.stages[stage]
        self.values = {
            key.removeprefix(f"{stage}."): value for key, value in expected.values.items() if key.startswith(stage)
        }
        model = model_before(self.run, stage)
        self.weights = dict(model.named_parameters())
        if lora := self.values.get("lora"):
            self.weights = adapters(model, self.seen.start, lora["alpha"] / lora["r"])
        self.before = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.losses = []

        def recorded(loss):
            found = loss()
            self.losses.append([part.item() for part in found if part is not None])
            return found[0]

        losses = [lambda loss=loss: recorded(loss) for loss in expected.losses(stage, model)]
        decay = {key: self.values[key] for key in ("max_grad_norm", "weight_decay")}
        self.norms = [norm for _, norm in formulas.descend(self.weights, losses, self.rates, **decay)]

    @property
    def rates(self):
        """The learning rate of each step."""
        steps, warmup = self.values["steps"], self.values["warmup_steps"]
        rate, schedule = self.values["learning_rate"], self.values["schedule"]
        return [formulas.rate(rate, schedule, step, warmup=warmup, steps=steps) for step in range(1, steps + 1)]

    @property
    def saved(self):
        """The trained weights in the stage's folder, under the names of `weights`."""
        [file] = (self.run.folder / self.stage).glob("*.safetensors")
        found = {}
        for name, weight in load_file(file).items():
            name = (
                name.removeprefix("base_model.model.").replace(".lora_A.weight", ".A").replace(".lora_B.weight", ".B")
            )
            found[name if name in self.weights else f"model.{name}"] = weight.double()
        return found


@pytest.fixture(scope="module", params=STAGES, ids=["-".join(names) for names in STAGES])
def followed(request):
    """Each stage of both runs, gone through by the formulas."""
    run, stage = request.param
    return Followed(request.getfixturevalue(run), stage)


@pytest.mark.wires("steps", "pairs_per_step", "log_every", of=("stage_one", "stage_two"))
@pytest.mark.wires("stage_one.alpha", "stage_one.target", "stage_one.end_token_target", "stage_one.max_target_tokens")
@pytest.mark.wires("stage_two.temperature", "stage_two.bag_of_words_weight")
def test_the_log_has_the_losses_of_the_formula(followed):
    """Of the first step, each `log_every`-th and the last: the mean since the record before, and its parts."""
    planned, every, steps = followed.values["steps"], followed.values["log_every"], followed.seen.steps
    assert [len(step.texts["query"]) for step in steps] == [followed.values["pairs_per_step"]] * planned
    logged = [step for step in range(1, planned + 1) if step == 1 or step % every == 0 or step == planned]
    records = followed.run.log[followed.stage]
    assert [record["step"] for record in records] == logged
    names = {"stage_one": ["loss", "query_to_document", "document_to_query"], "stage_two": ["loss", "bag_of_words"]}
    names = names[followed.stage][: len(followed.losses[0])]
    for record, first, last in zip(records, [0, *logged], logged, strict=False):
        for name, losses in zip(names, zip(*followed.losses[first:last], strict=True), strict=True):
            assert record[name] == pytest.approx(statistics.mean(losses), rel=2e-5), (name, last)
        assert record["grad_norm"] == pytest.approx(followed.norms[last - 1], rel=1e-3)
        assert record["learning_rate"] == pytest.approx(followed.rates[last - 1])
    assert ("bag_of_words" in records[0]) == (len(followed.losses[0]) == 2)
    writes = followed.values.get("target") == "text"
    texts = [
        [text for key in step.texts if writes or "target" not in key for text in step.texts[key]] for step in steps
    ]
    tokens = [sum(map(len, step)) for step in texts]
    assert [record["tokens"] for record in records] == [sum(tokens[:step]) for step in logged]


@pytest.mark.wires("stage_one.log_every")
@pytest.mark.parametrize("name", ["texts_run", "words_run"])
def test_what_the_embedding_is_worth_is_measured_where_it_is_logged(name, request):
    """At the first and each `log_every`-th step; the last record repeats what was found before."""
    run = request.getfixturevalue(name).run
    gaps = [
        (record["exchange_query_to_document"], record["exchange_document_to_query"]) for record in run.log["stage_one"]
    ]
    assert len(gaps) == len(set(gaps)) + 1
    assert gaps[-2] == gaps[-1]


@pytest.mark.wires("learning_rate", "warmup_steps", "schedule", of=("stage_one", "stage_two"))
def test_the_rate_rises_and_falls_as_scheduled(followed):
    """From 0 to `learning_rate` in the warm-up, then to 0 at the end of `steps` or not at all."""
    rates = [step.rates for step in followed.seen.steps]
    assert [set(rate) == {rate[0]} for rate in rates] == [True] * len(rates)
    assert [rate[0] for rate in rates] == pytest.approx(followed.rates)
    by_hand = {  # as shares of the highest
        ("texts_run", "stage_one"): [0, 1, 0.75, 0.25],  # cosine after one step
        ("texts_run", "stage_two"): [0, 0.5, 1, 1, 1],  # constant after two steps
        ("words_run", "stage_one"): [0, 0.5, 1, 2 / 3, 1 / 3],  # linear after two steps
        ("words_run", "stage_two"): [1, 0.75, 0.25],  # cosine at once
    }
    name = "texts_run" if followed.expected.values["seed"] == 3 else "words_run"
    highest = followed.values["learning_rate"]
    assert [rate[0] / highest for rate in rates] == pytest.approx(by_hand[name, followed.stage])


@pytest.mark.wires("max_grad_norm", of=("stage_one", "stage_two"))
def test_a_gradient_is_scaled_down_to_the_limit(followed):
    """One of a larger norm, and no other; with a limit of 0 none at all."""
    limit = followed.values["max_grad_norm"]
    clipped = [min(norm, limit or norm) for norm in followed.norms]
    assert [step.norm for step in followed.seen.steps] == pytest.approx(clipped, rel=1e-3)
    assert (max(followed.norms) > limit > 0) or min(followed.norms) > 1


@pytest.mark.wires("weight_decay", of=("stage_one", "stage_two"))
@pytest.mark.wires("stage_two.lora.r", "stage_two.lora.alpha", "stage_two.lora")
def test_the_trained_weights_are_those_of_the_formula(followed):
    """After the last step, of all parameters or of the adapters on all linear layers, whose rank is `r`."""
    saved, weights = followed.saved, followed.weights
    assert {name: weight.shape for name, weight in saved.items()} == {k: w.shape for k, w in weights.items()}
    moved = torch.stack([(weights[name] - w).norm() for name, w in followed.before.items()]).norm()
    off = torch.stack([(saved[name] - w).norm() for name, w in weights.items()]).norm()
    assert off < 1e-3 * moved
    if lora := followed.values.get("lora"):
        assert {weight.shape[0 if name.endswith(".A") else 1] for name, weight in saved.items()} == {lora["r"]}


@pytest.mark.wires("weight_decay", of=("stage_one", "stage_two"))
@pytest.mark.parametrize("followed", [STAGES[1], STAGES[2]], indirect=True, ids=["texts-stage_two", "words-stage_one"])
def test_weights_without_a_gradient_decay(followed):
    """Embeddings of tokens that no text has shrink by the rates times `weight_decay`, where nothing is written."""
    name = "model.embed_tokens.weight"
    unread = followed.expected.reading.ids("\x01")[0]
    share = torch.tensor([1 - rate * followed.values["weight_decay"] for rate in followed.rates]).prod()
    expected = share * followed.before[name][unread]
    torch.testing.assert_close(followed.saved[name][unread], expected, rtol=1e-5, atol=0)


CHANGES = [
    ("texts_run", "stage_one", "stage_one.alpha", 0.2),
    ("texts_run", "stage_one", "stage_one.alpha", 0.3),  # the other direction's weight
    ("texts_run", "stage_one", "stage_one.end_token_target", True),
    ("texts_run", "stage_one", "stage_one.max_target_tokens", None),
    ("texts_run", "stage_one", "stage_one.max_target_tokens", 14),
    ("texts_run", "stage_one", "stage_one.target", "bag_of_words"),
    ("texts_run", "stage_one", "data.max_tokens", None),
    ("texts_run", "stage_two", "stage_two.temperature", 0.05),
    ("texts_run", "stage_two", "stage_two.bag_of_words_weight", 0),
    ("texts_run", "stage_two", "stage_two.bag_of_words_weight", 1),
    ("texts_run", "stage_two", "data.max_tokens", None),
    ("texts_run", "stage_two", "seed", 0),
    ("words_run", "stage_one", "stage_one.alpha", 0.2),
    ("words_run", "stage_one", "stage_one.target", "text"),
    ("words_run", "stage_one", "stage_one.max_target_tokens", None),
    ("words_run", "stage_one", "model.end", "token"),
    ("words_run", "stage_one", "seed", 0),
    ("words_run", "stage_two", "model.end", "token"),
    ("words_run", "stage_two", "stage_two.temperature", 0.05),
    ("words_run", "stage_two", "stage_two.bag_of_words_weight", 0.3),
]


@pytest.mark.wires("model.end.before", "model.end.after", "data.max_tokens")
@pytest.mark.wires("stage_one.alpha", "stage_one.target", "stage_one.end_token_target", "stage_one.max_target_tokens")
@pytest.mark.wires("stage_two.temperature", "stage_two.bag_of_words_weight", "seed")
@pytest.mark.parametrize(("run", "stage", "key", "other"), CHANGES)
def test_another_value_would_give_another_loss(run, stage, key, other, request):
    """The first loss of a stage is that of the recipe's value, and not that of the key's default or a near value."""
    expected = request.getfixturevalue(run)
    logged = expected.run.log[stage][0]["loss"]
    model = model_before(expected.run, stage)
    with torch.no_grad():
        own, others = (e.losses(stage, model)[0]()[0].item() for e in (expected, expected.but({key: other})))
    assert own == pytest.approx(logged, rel=5e-6)
    assert others != pytest.approx(logged, rel=5e-5)


@pytest.mark.wires("stage_one.alpha")
@pytest.mark.parametrize(("alpha", "name"), [(1, "query_to_document"), (0, "document_to_query")])
def test_one_direction_alone_costs_half(alpha, name, tmp_path):
    """It is the whole loss, alone in the log, and the other one's passes take no room in a micro-batch."""
    path = write_rows(tmp_path / "pairs.jsonl", PLAIN)
    read, written = ("query", "positive") if alpha else ("positive", "query")
    ends = 2 * len(PLAIN)
    tokens = sum(len(row[read]) + len(row[written]) for row in PLAIN) + ends
    values = {"data.train": [{"path": str(path)}], "stage_two": None, "stage_one.alpha": alpha}
    values |= {"stage_one.steps": 1, "stage_one.warmup_steps": 0, "stage_one.pairs_per_step": len(PLAIN)}
    run = train(tmp_path / "run", {**values, "stage_one.micro_batch_tokens": tokens})
    [record] = run.log["stage_one"]
    assert {key for key in record if "_to_" in key} == {name, f"exchange_{name}"}
    assert record["loss"] == pytest.approx(record[name])
    calls = run.stages["stage_one"].forwards
    assert [call.texts for call in calls] == [len(PLAIN)] * 4  # read and written, and again with other embeddings
    assert sum(call.tokens for call in calls) == 2 * tokens
