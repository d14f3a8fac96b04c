"""Internals of libraries that no other test would miss; docs/internals.md lists all, each with its test."""

import json

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.model_card import BaseModelCardCallback

from anchorvec.data.samplers import SimilarPairs
from anchorvec.model.embedder import build_embedder
from anchorvec.model.packing import reads_packed, use_packed_texts
from anchorvec.objectives.reconstruction import TextReconstruction
from anchorvec.pipeline import train
from anchorvec.recipe import load_recipe
from anchorvec.training.trainers import ContrastiveTrainer, ReconstructionTrainer, _out_of_memory

STAGE_TWO = ["stage_one=null", "stage_two.steps=2", "stage_two.warmup_steps=1", "model.precision=fp32"]


def test_a_module_that_must_be_padded_is_left_so(tmp_path):
    """sentence-transformers' own switch, `unpad_inputs`, says so."""
    folder = build_embedder("tiny", tmp_path / "base", max_tokens=32)
    model = SentenceTransformer(str(folder), device="cpu")
    model[0].unpad_inputs = False
    assert not use_packed_texts(model)
    assert not reads_packed(model)
    assert use_packed_texts(SentenceTransformer(str(folder), device="cpu"))


def test_stage_two_makes_no_model_card_of_the_librarys(tmp_path, monkeypatch):
    """Its card would encode examples and ask the hub; the method that adds it is the one that is replaced."""
    callbacks = []

    def recorded(self, *args, **options):
        callbacks.extend(self.callback_handler.callbacks)
        return super(ContrastiveTrainer, self).train(*args, **options)

    monkeypatch.setattr(ContrastiveTrainer, "train", recorded, raising=False)
    train(load_recipe("debug", [f"output={tmp_path / 'run'}", *STAGE_TWO]))
    assert callbacks
    assert not any(isinstance(callback, BaseModelCardCallback) for callback in callbacks)


def test_the_trainer_names_the_data_set_of_the_samplers_rows(tmp_path, monkeypatch):
    """By that name the sampler of similar pairs finds the prompts of its columns."""
    prompts, iterate = [], SimilarPairs.__iter__

    def recorded(self):
        prompts.append(self.prompts)
        return iterate(self)

    monkeypatch.setattr(SimilarPairs, "__iter__", recorded)
    options = ["stage_two.in_batch_negatives=similar", "data.train.0.instruction='Find: '"]
    train(load_recipe("debug", [f"output={tmp_path / 'run'}", *STAGE_TWO, *options]))
    assert prompts
    assert all(of_columns["query"] == "Find: " for of_columns in prompts)


def test_the_tokens_of_a_step_are_counted_packed_and_padded(tmp_path):
    """The trainer finds the lengths in sentence-transformers' features, whose names tell columns and kinds apart."""
    counted = []
    for attention in ("auto", "sdpa"):
        output = tmp_path / attention
        train(load_recipe("debug", [f"output={output}", *STAGE_TWO, f"model.attention={attention}"]))
        counted.append(json.loads((output / "log.jsonl").read_text().splitlines()[-1])["tokens"])
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_stage_one_computes_in_bf16_where_it_is_asked_for(tmp_path, monkeypatch, precision):
    """The context that transformers' trainer gives its own steps is autocast to bf16; weights stay fp32."""
    seen, encode = set(), TextReconstruction.encode

    def recorded(self, *texts):
        if torch.is_grad_enabled() and self.training:
            seen.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), self.model.dtype))
        return encode(self, *texts)

    def step(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(TextReconstruction, "encode", recorded)
            return training_step(*args, **options)

    training_step = ReconstructionTrainer.training_step
    monkeypatch.setattr(ReconstructionTrainer, "training_step", step)
    options = ["stage_two=null", "stage_one.steps=2", "stage_one.warmup_steps=1", f"model.precision={precision}"]
    train(load_recipe("debug", [f"output={tmp_path / 'run'}", *options]))
    assert seen == {(precision == "bf16", torch.bfloat16, torch.float32)}


def test_accelerate_knows_what_torch_says_when_memory_is_used_up():
    """An allocation that no machine can make is told from other errors."""
    with pytest.raises(RuntimeError) as failure:
        torch.empty(2**50, dtype=torch.uint8)
    assert _out_of_memory(failure.value)
    assert not _out_of_memory(RuntimeError("a shape does not fit"))
