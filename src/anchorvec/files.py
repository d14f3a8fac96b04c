"""Reading with a place for every error, and writing without leaving halves behind.

What is read names its `file:line`; a file or a folder that is written appears whole, or not at all.
"""

import gzip
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
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


def without_surrogates(text: str) -> str:
    """`text` with U+FFFD in place of each lone surrogate, which no tokenizer and no UTF-8 file takes.

    JSON can escape half of a pair, and a text may have been cut between the two. Halves that stand together become
    their character; a text without any is given back as it is.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def plain_or_gzipped(path: Path) -> Path:
    """`path`, or `path` with `.gz` behind it, whichever exists. Raises AnchorvecError if neither does."""
    for candidate in (path, path.with_name(f"{path.name}.gz")):
        if candidate.is_file():
            return candidate
    raise AnchorvecError(f"{path}: there is no such file, nor {path.name}.gz")


def read_json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of the JSON Lines file `path`, plain or gzipped, with its place `file:line`; blank lines are left out.

    Raises AnchorvecError, with the place, for what is no JSON object or no UTF-8, and for a file that cannot be read.
    """
    for place, line in read_lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # a number of too many digits, lists too deep in lists
            raise AnchorvecError(f"{place}: this is no JSON ({error})") from error
        if not isinstance(row, dict):
            raise AnchorvecError(f"{place}: found {line[:60]!r}; each line must be one JSON object")
        yield place, row


def read_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line of the UTF-8 file `path`, plain or gzipped, with its place `file:line`; blank lines are left out.

    Raises AnchorvecError, with the place, for what is no UTF-8, and for a file that cannot be read.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                place = f"{path}:{number}"
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise AnchorvecError(f"{place}: this is not UTF-8; save the file as UTF-8") from error
                if line.strip():
                    yield place, line
    except FileNotFoundError as error:
        raise AnchorvecError(f"{path}: there is no such file") from error
    except (OSError, EOFError, zlib.error) as error:
        raise AnchorvecError(f"{path}: the file cannot be read ({error})") from error


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


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write each of `rows` to a line of `path`, replacing what was there in one move. Raises as `write_text` does."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` as indented JSON, replacing what was there in one move."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _follow_umask(folder: Path) -> None:
    """Give all that is in `folder` the modes that new files have here; some libraries keep theirs to one user."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


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
        _follow_umask(scratch)
        if folder.exists():
            folder.rmdir()
        scratch.rename(folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
