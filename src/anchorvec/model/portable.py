"""One form of an embedder folder that sentence-transformers from 5.1 and transformers from 4.57 on read alike.

Newer versions save what older ones misread: other module names, options that these do not know, and rotary positions
under a name that they take no notice of, so that they compute other vectors without a word. They still read the older
form, in which a folder is therefore written, whatever version writes it.
"""

import json
from pathlib import Path
from typing import Any

from anchorvec.files import write_json, write_text
from anchorvec.model.untrusted import OWN_MODULE

READ_BY = "sentence-transformers 5.1 and transformers 4.57 or newer"
BOTH_WAYS_READ_BY = "transformers 5 and sentence-transformers 6 or newer; transformers 4.57 reads this folder as causal"
"""What reads a folder alike whose attention goes in both directions: older versions take no notice of that."""

DENSE_READ_BY = "sentence-transformers 5.7 and transformers 4.57 or newer; older ones cannot load it"
"""What reads a folder with dense layers before a mean."""
OWN_READ_BY = (
    "sentence-transformers that is told `trust_remote_code=True`, with anchorvec installed; else it ends in an error"
)
"""What reads a folder with a module of our own."""

_MODULES = "sentence_transformers.models."
_POOLINGS = {
    "cls": "cls_token",
    "mean": "mean_tokens",
    "max": "max_tokens",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean": "weightedmean_tokens",
    "lasttoken": "lasttoken",
}
"""A pooling's name -> the end of its switch in the older form."""


def make_portable(folder: Path) -> None:
    """Rewrite the JSON files of the embedder in `folder`, as sentence-transformers saved it, in the older form."""
    modules = _read(folder / "modules.json")
    for module in modules:
        name = module["type"].rpartition(".")[2]
        if module["type"] != OWN_MODULE:
            module["type"] = _MODULES + name
        if name == "Pooling":
            _older_pooling(folder / module["path"] / "config.json")
    write_text(folder / "modules.json", json.dumps(modules, indent=2) + "\n")
    tokenizer = _read(folder / "tokenizer_config.json")
    limit = {"max_seq_length": tokenizer["model_max_length"], "do_lower_case": False}
    write_json(folder / "sentence_bert_config.json", limit)
    if (folder / "config.json").is_file():  # an adapter has none
        write_json(folder / "config.json", with_older_rope(_read(folder / "config.json")))


def read_by(both_ways: bool, pooling: str) -> list[str]:
    """What reads a folder alike whose attention goes `both_ways`, or does not, and which is pooled by `pooling`."""
    of_modules = {"latent_attention": [OWN_READ_BY], "dense_mean": [DENSE_READ_BY]}.get(pooling, [])
    return [*([BOTH_WAYS_READ_BY] if both_ways else []), *of_modules] or [READ_BY]


def with_older_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The model's `config` with `rope_theta` and `rope_scaling` too, as transformers before 5 reads them."""
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope:  # without rotary positions, or with some for each kind of layer
        return config
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    older = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if scaling.get("rope_type", "default") != "default":
        older["rope_scaling"] = scaling
    return {**config, **older}


def _older_pooling(path: Path) -> None:
    config = _read(path)
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        chosen = {_POOLINGS[mode] for mode in ([modes] if isinstance(modes, str) else modes)}
        switches = {f"pooling_mode_{switch}": switch in chosen for switch in _POOLINGS.values()}
        dim, prompt = config["embedding_dimension"], config.get("include_prompt", True)
        config = {"word_embedding_dimension": dim, **switches, "include_prompt": prompt}
    write_json(path, config)


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
