"""Tiny models of all families of causal LMs that transformers knows: their configs with small sizes, random weights.

One rule makes a config small, by the names of its sizes and without any name of a family. Where it does not do, what is
to be changed besides stands in `BY_HAND`.
"""

import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

import anchorvec
from anchorvec.model.base import byte_tokenizer
from anchorvec.model.embedder import load_causal_lm
from anchorvec.objectives.reconstruction import TextReconstruction

VOCABULARY, HIDDEN, HEADS, HEAD, LAYERS, EXPERTS, POSITIONS = 260, 64, 4, 16, 2, 4, 256

SIZES: list[tuple[str, int]] = [
    (r"(vocab_size_per_layer_input|(decoder_|unpadded_)?vocab_size)", VOCABULARY),
    (r"(num_key_value_heads|num_kv_heads|num_query_groups|swa_num_key_value_heads|multi_query_groups)", 2),
    (r".*heads|n_head", HEADS),
    (r"qk_nope_head_dim|qk_rope_head_dim|rotary_dim|index_rope_head_dim", 8),
    (r".*(head_dim|d_head|headdim|head_size|dim_head|d_kv|kv_channels)|query_pre_attn_scalar", HEAD),
    (r".*_rank|hc_lowrank", 16),
    (r"(decoder_|encoder_|num_|n_)*(hidden_)?(layers?|blocks)|num_(encoder|decoder)_layers", LAYERS),
    (r"num_layers_per_stack|max_window_layers", LAYERS),
    (r"first_k_dense_replace|moe_layer_(end|start)_index|num_dense_layers|(n|num|num_expert|topk)_group", 1),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers|mtp_num_hidden_layers|zero_expert_num", 0),
    (r"(num_|n_|moe_)*(local_|routed_|num_)?experts", EXPERTS),
    (r".*(experts?_per_tok(en)?|moe_topk|moe_top_k|moe_k|experts_top_k)", 2),
    (r".*(ffn|intermediate|dff|dim_ff|d_ff|n_inner|feed_forward|mlp|d_inner).*", 2 * HIDDEN),
    (r"mamba_d_ssm|attention_hidden_size|lru_width", 2 * HIDDEN),
    (
        r"d_model|n_embd|dim|emb_dim|.*embedding_(size|dim)|.*hidden_size(_per_layer_input|_global)?|.*proj_dim|ple_embed_dim",
        64,
    ),
    (r"n_positions|n_ctx|(original_)?max_position_embeddings|max_seq_len|model_max_length", POSITIONS),
    (r"context_length|max_target_positions|rel_extent|prompt_length", POSITIONS),
    (r".*(state_size|d_state)", 8),
    (r".*(chunk_size|block_size|window_size|sliding_window.*|attention_window.*|local_attention|chunk_length)", 32),
    (r"index_topk(_blocks)?|max_inference_chunksize|mem_len", 32),
]
"""Whole names of sizes, and what they become; the first that matches counts."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_hidden_layers": 2,
            "num_kv_shared_layers": 2,
        }
    },
}
"""What the config of a family needs to be one at all."""

SHARED_BLOCK = ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]

BY_HAND: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 300},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}},
    "dots1": {"n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "falcon_h1": {"mamba_d_head": HEAD, "mamba_n_heads": 8},
    "gemma4_text": {"hidden_size_per_layer_input": 0},  # else it reads token ids beside their embeddings
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "modernbert-decoder": {"pad_token_id": 1},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 32,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 5,
        "layers_block_type": SHARED_BLOCK,
        "num_key_value_heads": HEADS,
        "attention_head_dim": 2 * HEAD,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 5,
        "layers_block_type": SHARED_BLOCK,
        "num_key_value_heads": HEADS,
        "attention_head_dim": 2 * HEAD,
        "hybrid_layer_ids": [2, 4],
        "n_mamba_heads": 8,
        "mamba_headdim": HEAD,
    },
}
"""What to set for a family, beside the rule; keys of a config within a config are dotted."""


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The default config of a family with small sizes, for the byte tokenizer's ids.

    Three more, since the tokenizer class of some families adds tokens.
    """
    settings = _shrunk(config_class().to_dict())
    for key, value in BY_HAND.get(config_class.model_type, {}).items():
        *sections, last = key.split(".")
        reduce(dict.__getitem__, sections, settings)[last] = value
    settings.pop("model_type", None)
    return config_class.from_dict(settings)


def tiny_model(config_class: type[PreTrainedConfig], folder: Path) -> PreTrainedModel | None:
    """A random model of the family, saved in `folder` with a tokenizer of bytes.

    None for one that reads more than text, which is refused by its config; that is saved without weights.
    """
    byte_tokenizer().save_pretrained(folder)
    if {"text_config", "text_encoder"} & set(config_class.sub_configs):
        config_class(**DEFAULTS.get(config_class.model_type, {})).save_pretrained(folder)
        return None
    config = tiny_config(config_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # that of the end, which is the pad token too, as no trained model has it: zeros
        model.get_input_embeddings().weight.data[0].normal_(std=0.02)
    model.save_pretrained(folder)
    return model


def config_classes() -> dict[str, type[PreTrainedConfig]]:
    """The families that transformers maps to a causal LM, by the name of their config."""
    return {config.model_type: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}


def _shrunk(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with small sizes; of lists with an entry for each layer, one of each kind, two at least."""
    depth = next((settings[key] for key in DEPTHS if isinstance(settings.get(key), int)), None)
    per_layer = {
        key: value for key, value in settings.items() if isinstance(value, list) and depth and len(value) == depth
    }
    kinds = [tuple(str(v) for v in row) for row in zip(*per_layer.values(), strict=True)]
    kept = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())[:4]
    kept += [i for i in range(len(kinds)) if i not in kept][: max(0, LAYERS - len(kept))] if kinds else []
    kept.sort()
    shrunk: dict[str, Any] = {}
    for key, value in settings.items():
        if key in per_layer:
            shrunk[key] = [_small(key, value[i], settings) for i in kept]
        elif key in DEPTHS and kept:
            shrunk[key] = len(kept)
        elif key == "per_layer_config" and value:
            shrunk[key] = {i: _shrunk(value.get(i) or value.get(str(i))) for i in range(LAYERS) if i in value}
        elif isinstance(value, Mapping) and key not in ("id2label", "label2id"):
            shrunk[key] = _shrunk(value)
        else:
            shrunk[key] = _small(key, value, settings)
    return shrunk


NOT_SAID = {
    "head_dim": HEAD,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 2 * HIDDEN,
    "n_routed_experts": EXPERTS,
}
"""Sizes that a default config leaves open, although its model wants them."""

DEPTHS = ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers"]
"""Names of the number of layers."""


def _small(key: str, value: Any, settings: Mapping[str, Any]) -> Any:
    """`value` of `key`, small if it is a size."""
    if value is None:
        return NOT_SAID.get(key)
    if key.endswith("token_id") and isinstance(value, list):
        return 0
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if key.endswith(("token_id", "token_index")):
        return 0
    if key == "head_dim" and value == settings.get("qk_rope_head_dim"):
        return _small("qk_rope_head_dim", value, settings)
    if key == "num_key_value_heads" and value == settings.get("num_attention_heads"):
        return HEADS
    mamba = any("state" in k or "d_state" in k for k in settings)
    if re.fullmatch(r"(mamba_)?(n|num)_heads|mamba_num_heads", key) and mamba:
        return 8
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, key)), value)
    return min(value, size) if value >= 0 else value


TRAINS, REFUSED, BREAKS = "trains", "refused", "breaks"


@dataclass(frozen=True)
class Trial:
    """What came of a family: it trains, is refused before the work with a `reason`, or breaks.

    `losses`: of each stage, the mean of the first and of the last steps.
    """

    family: str
    outcome: str
    reason: str = ""
    losses: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    seconds: float = 0.0


def trial(config_class: type[PreTrainedConfig], folder: Path, *, steps: int = 20) -> Trial:
    """Plan, both stages with `steps` steps each, and the export, of a tiny model of the family, in `folder`."""
    name = config_class.model_type
    try:
        tiny_model(config_class, folder / "base")
    except Exception as error:
        return Trial(name, BREAKS, "no tiny config: " + last_line(error))
    values = [
        f"model.base={folder / 'base'}",
        f"output={folder / 'run'}",
        "model.precision=fp32",
        "model.max_tokens=64",
        *(f"stage_{n}.{key}={value}" for n in ("one", "two") for key, value in
          {"steps": steps, "pairs_per_step": 8}.items()),
    ]  # fmt: skip
    recipe = anchorvec.load_recipe("debug", values)
    try:
        anchorvec.plan(recipe)
    except anchorvec.AnchorvecError as error:
        return Trial(name, REFUSED, str(error).replace(str(folder / "base"), "BASE"))
    except Exception as error:
        return Trial(name, BREAKS, "plan: " + last_line(error))
    try:
        anchorvec.train(recipe)
        check_gradient(folder / "run" / "stage_one")
    except Exception as error:
        return Trial(name, BREAKS, last_line(error))
    records = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {}
    for stage in ("stage_one", "stage_two"):
        found = [record["loss"] for record in records if record["stage"] == stage]
        losses[stage] = (statistics.mean(found[:3]), statistics.mean(found[-3:]))
    if not all(after < before for before, after in losses.values()):
        return Trial(name, BREAKS, f"a loss does not fall: {losses}", losses)
    return Trial(name, TRAINS, "", losses)


def check_gradient(folder: Path) -> None:
    """Raise AssertionError unless the loss of a first token reaches what was read, in the embedder of `folder`."""
    model = load_causal_lm(folder).train()
    objective = TextReconstruction(model, packed=True)
    embedding = objective.encode([[7, 8, 9, 0]])
    embedding.retain_grad()  # type: ignore[no-untyped-call]
    objective.decode(embedding, [[11]]).sum().backward()
    assert embedding.grad is not None
    assert embedding.grad.norm() > 0, "no gradient at the embedding"
    weight = model.get_input_embeddings().weight
    assert weight.grad is not None
    assert (weight.grad[[7, 8, 9]].norm(dim=1) > 0).all(), "no gradient at what was read"


def last_line(error: Exception) -> str:
    """What a traceback ends in, and where it was raised."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:200]} ({Path(where.filename).name}:{where.lineno})"


def sweep(names: Sequence[str], report: Path, *, seconds: float = 180.0) -> list[Trial]:
    """A trial of each family, in a process of its own, for `seconds` at most; written to `report` as they end.

    Trials of other families that stand in `report` are kept, and given too.
    """
    trials = {}
    if report.is_file():
        trials = {found["family"]: Trial(**found) for found in json.loads(report.read_text(encoding="utf-8"))}
    for name in names:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            found = _in_a_process(name, Path(scratch), seconds)
        trials[name] = replace(found, seconds=round(time.monotonic() - began, 1))
        report.write_text(json.dumps([asdict(t) for t in trials.values()], indent=1), encoding="utf-8")
        print(name, found.outcome, found.reason, trials[name].seconds, flush=True)  # noqa: T201
    return [trials[name] for name in sorted(trials)]


def _in_a_process(name: str, folder: Path, seconds: float) -> Trial:
    """The trial of a family in a forked process, which has all imports already."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        with (folder / "output").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            theirs.send(trial(config_classes()[name], folder))

    process = context.Process(target=work)
    process.start()
    theirs.close()
    try:
        if ours.poll(seconds):
            return cast("Trial", ours.recv())
        return Trial(name, BREAKS, f"not done in {seconds:.0f} s")
    except EOFError:
        return Trial(name, BREAKS, "its process ended")
    finally:
        process.kill()
        process.join()


def page(trials: Sequence[Trial]) -> str:
    """`docs/models.md`: what came of each family, and why some are refused."""
    by_hand = sorted(set(BY_HAND) & {t.family for t in trials})
    trained = [t.family for t in trials if t.outcome == TRAINS]
    lines = [
        "# Families of models",
        "",
        f"What comes of each family that transformers {version('transformers')} maps to a causal LM, as a tiny model "
        "with random weights: `plan`, 20",
        "steps of each stage, the export. It trains if both losses fall, gradient reaches what was read, and the "
        "export gives the run's vectors.",
        "`python tests/families.py FILE.json docs/models.md` makes this page. One rule makes the configs small; those "
        "with a * have settings by hand",
        "beside it. It says that the machinery fits a family, not how good an embedder one makes.",
        "",
        f"## Trains ({len(trained)})",
        "",
        *textwrap.wrap(", ".join(name + "*" * (name in by_hand) for name in trained), 120, break_on_hyphens=False),
    ]
    for outcome, title in ((REFUSED, "Refused before the work"), (BREAKS, "Breaks")):
        rows = [t for t in trials if t.outcome == outcome]
        if rows:
            lines += ["", f"## {title} ({len(rows)})", "", "| family | reason |", "| --- | --- |"]
            lines += [f"| {t.family} | {_reason(t)} |" for t in rows]
    return "\n".join(lines) + "\n"


def _reason(found: Trial) -> str:
    """The reason of `found` without what is said in every row."""
    reason = re.sub(rf"^model\.base: BASE( \({re.escape(found.family)}\))?:? ", "", found.reason)
    return re.sub(r"; name a [-\w ]+causal LM$", "", reason).replace("|", "\\|")


if __name__ == "__main__":
    done = sweep(sys.argv[3:] or list(config_classes()), Path(sys.argv[1]))
    Path(sys.argv[2]).write_text(page(done), encoding="utf-8")
