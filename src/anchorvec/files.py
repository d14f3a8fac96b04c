"""Writing without leaving halves behind: a file or a folder appears whole, or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from anchorvec.errors import AnchorvecError


def user_path(path: str | Path) -> Path:
    """`path` with a leading `~` as the home folder, which a shell does not always replace."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # of a user that does not exist
        return Path(path)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, replacing what was there in one move. Raises AnchorvecError if it cannot."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise AnchorvecError(f"{path} cannot be written: {error.strerror}") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` as indented JSON, replacing what was there in one move."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` when the block ends, and vanishes if it fails.

    Raises AnchorvecError at once if `folder` is in use: nothing is ever written over.
    """
    folder = user_path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AnchorvecError(f"{folder} is in use; name a new folder")
    scratch = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        scratch.mkdir(parents=True)
    except OSError as error:
        raise AnchorvecError(f"{folder} cannot be made: {error.strerror}") from error
    try:
        yield scratch
        if folder.exists():
            folder.rmdir()
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
