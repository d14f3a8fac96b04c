"""What a model's folder may ask for and does not get: code of its own, and files outside of it."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from transformers import CONFIG_MAPPING

from anchorvec.errors import AnchorvecError

OWN_MODULE = "anchorvec.model.latent_attention.LatentAttention"
"""The one class of a `modules.json` that is not sentence-transformers' own and is loaded: it is in this package.

sentence-transformers refuses it, unless told to trust it, or cannot import it.
"""

_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer_file", "vocab_file", "merges_file")
"""Keys of `tokenizer_config.json` that name a file which is read where the folder has none of that name."""


def check_untrusted(model: str, read: Callable[[str], Any], folder: Path | None) -> None:
    """Raise AnchorvecError where the JSON files of `model` name code of its own, or a path that leads out of it.

    `read` gives a file's content, None for one that is not there; `folder` is where it lies, None: on the hub.
    """
    config = read("config.json")
    if isinstance(config, dict) and config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        raise AnchorvecError(
            f"{model}: config.json (auto_map) wants code of its own to be run, which is never done; name a model of a "
            "family that transformers has"
        )
    modules = read("modules.json") or []
    for module in modules:
        if module["type"] != OWN_MODULE and not str(module["type"]).startswith("sentence_transformers."):
            raise AnchorvecError(
                f"{model}: modules.json wants the class {module['type']} to be loaded, which is none of "
                "sentence-transformers' own; code that comes with a model is never run, name another model"
            )
    for file, path in _paths(modules, read, folder):
        if _leads_out(path) or (folder is not None and _is_linked_out(folder, path)):
            raise AnchorvecError(f"{model}: {file} names {path!r}, which is outside of the folder; name another model")
    for module in modules:
        if module["path"] and read(f"{module['path']}/adapter_config.json") is not None:
            raise AnchorvecError(
                f"{model}: {module['path']} holds an adapter over another model (adapter_config.json), which is not "
                "fetched; merge it first"
            )


def _paths(
    modules: list[Mapping[str, Any]], read: Callable[[str], Any], folder: Path | None
) -> Iterator[tuple[str, str]]:
    """Each path that a loader would follow, behind the file that names it."""
    yield from (("modules.json", str(module["path"])) for module in modules)
    index = read(_INDEX) or {}
    yield from ((_INDEX, str(path)) for path in dict.fromkeys((index.get("weight_map") or {}).values()))
    tokenizer = read("tokenizer_config.json")
    for key in _TOKENIZER_FILES if isinstance(tokenizer, dict) else ():
        named = tokenizer.get(key)
        # models carry paths of the machine that they were made on, which are not read where the file is in the folder
        if isinstance(named, str) and folder is not None and not (folder / Path(named).name).is_file():
            yield "tokenizer_config.json", named


def _leads_out(path: str) -> bool:
    """Whether `path`, as Linux or Windows reads it, is absolute, or goes upwards."""
    forms = (PurePosixPath(path), PureWindowsPath(path))
    return any(form.is_absolute() or form.anchor or ".." in form.parts for form in forms)


def _is_linked_out(folder: Path, path: str) -> bool:
    """Whether `path` is a folder in `folder` that is a link to one outside; files of the hub's cache are links."""
    found = folder / path
    return found.is_dir() and not found.resolve().is_relative_to(folder.resolve())
