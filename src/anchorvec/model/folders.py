"""What a model's folder is, decided in one place, by its files alone and before anything is loaded."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file, extract_commit_hash

from anchorvec.errors import AnchorvecError
from anchorvec.files import user_path
from anchorvec.model.untrusted import check_untrusted
from anchorvec.run import STAGES, Run, is_embedder

Kind = Literal["causal LM", "embedder", "LoRA stage", "adapter", "run", "data set", "other model", "nothing"]

_MODEL, _ADAPTER, _MODULES = "config.json", "adapter_config.json", "modules.json"
_DATA_SET = ("dataset_dict.json", "dataset_info.json", "state.json", "corpus.jsonl", "corpus.jsonl.gz")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""What families call the number of their positions; those without any, or with as many as one likes, name none."""
START = "start.json"
"""In the folder of an adapter: the folder and the weights that it was trained over, and whether it is to write."""

_PARTS, _PART_BYTES = 32, 2**17
"""Of a file of weights so many parts are hashed; the first one has its header."""
_PICKLES = ("pytorch_model*.bin", "adapter_model*.bin", "*.pt", "*.pth", "consolidated*")


@dataclass(frozen=True)
class ModelFolder:
    """A model by its folder or hub id, and what its files say of it.

    `architectures` are those of its configuration, `positions` the tokens that it has positions for, `is_causal`
    whether its attention is; `pooling`, `pool_prompt` (whether a prompt is a part of it), `prompts` and `max_tokens` (a
    length limit) are an embedder's own; None or empty where it says nothing.
    """

    name: str
    kind: Kind
    architectures: tuple[str, ...] = ()
    positions: int | None = None
    is_causal: bool = True
    pooling: str | None = None
    pool_prompt: bool = True
    other_modules: tuple[str, ...] = ()
    prompts: dict[str, str] = field(default_factory=dict)
    max_tokens: int | None = None

    @property
    def pooling_with_modules(self) -> str | None:
        """What a recipe calls the pooling of an embedder that anchorvec made, with the modules before it."""
        names = {"LatentAttention": "latent_attention", "Dense": "dense_mean"}
        return next((names[module] for module in self.other_modules if module in names), self.pooling)

    @property
    def has_head(self) -> bool:
        """Whether it holds a causal LM, head included, rather than a decoder's body alone (T26)."""
        return any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in self.architectures)

    def __str__(self) -> str:
        match self.kind:
            case "causal LM":
                return f"a causal LM ({', '.join(self.architectures)})"
            case "embedder":
                return "an embedder" if self.has_head else "an embedder without an LM head"
            case "LoRA stage":
                return f"the LoRA adapter of a run's {Path(self.name).name}"
            case "adapter":
                return "an adapter (adapter_config.json), which is a part of a model"
            case "other model":
                return f"a model of another kind ({', '.join(self.architectures) or 'no architectures named'})"
            case "nothing":
                return "no model: it has no config.json"
        return f"a {self.kind}"


def identify(model: str | Path, *, revision: str | None = None) -> ModelFolder:
    """What `model` is, a local folder or a hub id, of which `revision` names a branch, tag or commit.

    Raises AnchorvecError for a local folder that is not there, or whose JSON files cannot be read, and for what asks
    for code of its own or files elsewhere.
    """
    name = str(model)
    folder = user_path(name)
    if is_local(model):
        if not folder.is_dir():
            raise AnchorvecError(f"{name}: there is no such folder; name a model's folder or its id on the hub")
        if is_embedder(Run(folder).base):
            return ModelFolder(name, "run")
        if not any((folder / file).is_file() for file in (_MODEL, _ADAPTER, _MODULES)):
            is_data = any((folder / file).is_file() for file in _DATA_SET)
            return ModelFolder(name, "data set" if is_data else "nothing")
        name = str(folder)

    with reading(model):  # whatever the files hold
        check_untrusted(str(model), lambda file: read_json(name, file, revision), folder if is_local(model) else None)
        return _of_files(str(model), lambda file: read_json(name, file, revision))


def _of_files(model: str, read: Callable[[str], Any]) -> ModelFolder:
    """What `model` is by its JSON files; `read` gives None for one that is not there."""
    modules, adapter, config = read(_MODULES), read(_ADAPTER), read(_MODEL) or {}
    architectures = tuple(config.get("architectures") or ())
    positions = positions_of(config)
    kind: Kind
    if modules is not None:
        kind = "embedder" if adapter is None else "LoRA stage"
        types = [module["type"].rpartition(".")[2] for module in modules]
        pooling = next((module["path"] for module in modules if module["type"].endswith("Pooling")), None)
        settings = read("config_sentence_transformers.json") or {}
        of_pooling = {} if pooling is None else read(f"{pooling}/config.json") or {}
        return ModelFolder(
            model,
            kind,
            architectures,
            positions=positions,
            is_causal=config.get("is_causal", True),
            pooling=None if pooling is None else _pooling(of_pooling),
            pool_prompt=of_pooling.get("include_prompt", True),
            other_modules=tuple(name for name in types if name not in ("Transformer", "Pooling", "Normalize")),
            prompts={key: prompt for key, prompt in (settings.get("prompts") or {}).items() if prompt},
            max_tokens=_limit(read("sentence_bert_config.json") or {}, read("tokenizer_config.json") or {}),
        )
    if adapter is not None:
        return ModelFolder(model, "adapter", architectures)
    is_causal = ModelFolder("", "causal LM", architectures).has_head
    kind = "causal LM" if is_causal or not architectures else "other model"
    return ModelFolder(model, kind, architectures, positions=positions)


def positions_of(config: Mapping[str, Any]) -> int | None:
    """How many positions a model of this `config.json` has, that of its text part first; None: it names no number."""
    text = config.get("text_config")
    parts = [text, config] if isinstance(text, dict) else [config]
    named = (part.get(key) for part in parts for key in _POSITIONS)
    return next((positions for positions in named if isinstance(positions, int)), None)


def is_local(model: str | Path) -> bool:
    """Whether `model` names a folder here, there or not, and no model on the hub."""
    return isinstance(model, Path) or user_path(model).exists() or model.startswith((".", "/", "~"))


def instead(found: ModelFolder, *, wanted: str) -> str:
    """What `found` is, where `wanted` is needed, and the way on."""
    way = {
        "causal LM": "`anchorvec train` makes an embedder of it (model.base)",
        "embedder": "name the model that it was made from",
        "LoRA stage": "name the run, or the folder in it that the stage started from",
        "adapter": "merge it into its base first: peft's AutoPeftModelForCausalLM.from_pretrained(FOLDER)."
        "merge_and_unload().save_pretrained(NEW), with the base's tokenizer saved there too",
        "run": f"name one of the folders in it, such as {Path(found.name) / 'model'}",
        "data set": "name a model's folder; this one is for data.train, or for --data",
        "other model": "name a decoder-only causal LM, or an embedder made of one",
        "nothing": "name a model's folder",
    }[found.kind]
    return f"{found.name}: this is {found}, and {wanted} is needed; {way}"


@contextmanager
def reading(name: str | Path) -> Iterator[None]:
    """A context in which libraries read the model `name`, a folder or a hub id, and may stumble over anything in it.

    What they raise becomes an AnchorvecError with the reason; that a machine is too small stays what it is.
    """
    try:
        yield
    except (AnchorvecError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        folder = user_path(name)
        fault = faulty_weights(folder) if folder.is_dir() else ""
        lines = str(error).strip().split("\n")[:2]  # where access is restricted, the second one says what to do
        reason = fault or f"{name} cannot be loaded ({type(error).__name__}: {' '.join(map(str.strip, lines))})"
        raise AnchorvecError(reason) from error


def faulty_weights(folder: Path) -> str:
    """What is wrong with the weights in `folder`: missing, pickled or damaged; empty where nothing is."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        found = f"only {pickles[0]}, which is a pickle and is not read" if pickles else "none"
        return f"{folder}: weights are read from .safetensors files, and there are {found}; convert them"
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            with file.open("rb") as opened:
                is_pointer = opened.read(40).startswith(b"version https://git-lfs")
            reason = "it is a pointer of git-lfs; run `git lfs pull`" if is_pointer else f"copy it again ({error})"
            return f"{file} is damaged or cut short: {reason}"
    return ""


def weights_fingerprint(folder: Path) -> str:
    """A hash of the weights in `folder`: names, shapes and sizes, and a sample of the numbers."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as opened:
            for part in range(_PARTS):
                opened.seek(part * max(0, size - _PART_BYTES) // (_PARTS - 1))
                digest.update(opened.read(_PART_BYTES))
    return digest.hexdigest()[:32]


def folder_fingerprint(folder: Path) -> str:
    """A hash of all that is in `folder` (weights, tokenizer, modules, prompts), whole, as 40 hexadecimal digits.

    Whatever the folder is called; of its model card and of hidden files it does not depend.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name != Path("README.md") and not any(part.startswith(".") for part in name.parts):
            with path.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
            digest.update(f"{name.as_posix()} {content}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:40]


def origin(folder: Path) -> str:
    """Which stage of which run `folder` is, as a part of a sentence; empty if it is none."""
    run = Run(folder.absolute().parent)
    return f", {folder.name} of the run {run.folder}" if run.record.is_file() and folder.name in STAGES else ""


def start_of_adapter(stage: Path) -> Path:
    """The embedder folder beside the LoRA adapter in the folder `stage` that its training started from.

    Raises AnchorvecError where it is not there any more, or has other weights.
    """
    start = Run(stage.parent).start_of("stage_two")
    if start is None:
        raise AnchorvecError(f"{stage}: a LoRA adapter whose start, stage_one or base, is not beside it any more")
    trained_over = read_json(str(stage), START)
    if trained_over is not None and trained_over["weights"] != weights_fingerprint(start):
        raise AnchorvecError(
            f"{stage}: this LoRA adapter was trained over a {trained_over['folder']} with other weights than {start} "
            "has; put that back beside it"
        )
    return start


def _limit(sentence_bert: dict[str, Any], tokenizer: dict[str, Any]) -> int | None:
    """The length limit of an embedder in tokens; None: it has none, or an absurd one, which tokenizers have."""
    limits = [sentence_bert.get("max_seq_length"), tokenizer.get("model_max_length")]
    return next((int(limit) for limit in limits if limit and limit < 10**6), None)


def _pooling(config: dict[str, Any]) -> str:
    """The name of a pooling in either form of its configuration."""
    if "pooling_mode" in config:
        modes = config["pooling_mode"]
        return modes if isinstance(modes, str) else "+".join(modes)
    on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    return "+".join(key.removeprefix("pooling_mode_").removesuffix("_tokens") for key in on) or "mean"


def commit_of_model(repo: str, *, revision: str | None = None) -> str | None:
    """The commit that `revision` of the model `repo` is; None: the hub cannot be asked, and none is cached."""
    path = _hub_file(repo, _MODEL, revision)
    return None if path is None else extract_commit_hash(path, None)


def _hub_file(name: str, file: str, revision: str | None) -> str | None:
    """The path of `file` in the folder `name`, or from the hub; None: there is none, or it cannot be had."""
    found: str | None = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found


def read_json(name: str, file: str, revision: str | None = None) -> Any:
    """The JSON of `file` in the folder `name`, or on the hub in `revision`; None: there is no such file.

    Raises AnchorvecError for a local file that cannot be read.
    """
    try:
        path = _hub_file(name, file, revision)
        return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        if not is_local(name):
            return None  # loading says what is wrong
        raise AnchorvecError(f"{Path(name) / file} cannot be read ({error})") from error
