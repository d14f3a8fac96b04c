"""Loads an embedder that is named by a folder or a hub id."""

from pathlib import Path

from sentence_transformers import SentenceTransformer

from anchorvec.errors import AnchorvecError


def load_model(model: SentenceTransformer | str | Path) -> SentenceTransformer:
    """`model` itself if it is one, else the model of that folder or hub id.

    Nothing is trusted: no code from the folder is run, and the weights are read from safetensors only.
    Raises AnchorvecError if there is no such model.
    """
    if isinstance(model, SentenceTransformer):
        return model
    name = str(model)
    folder = Path(name).expanduser()
    is_local = folder.exists() or isinstance(model, Path) or name.startswith((".", "/", "~"))
    if is_local and not folder.is_dir():
        raise AnchorvecError(f"{name}: there is no such folder; name a model's folder or its id on the hub")
    try:
        return SentenceTransformer(
            str(folder) if is_local else name,
            trust_remote_code=False,
            local_files_only=is_local,
            model_kwargs={"use_safetensors": True},
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise AnchorvecError(f"{name}: this cannot be loaded as a sentence-transformers model ({reason})") from error
