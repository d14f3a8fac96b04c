"""Reading with a place for every error, and writing without leaving halves behind.

What is read names its `file:line`; a file or a folder that is written appears whole, or not at all.
"""

import errno
import gzip
import io
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from anchorvec.errors import AnchorvecError

LONGEST_LINE = 2**26
"""Bytes of a line of text that is read; a longer one is no row, and would have to be held in memory."""

MOST_TIMES, FREE_OF_LIMIT = 200, 2**30
"""A gzipped file may grow to so many times its size, or to so many bytes: ten times is usual for text."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TORCH_CANNOT_WRITE = ("PytorchStreamWriter failed writing", "unexpected pos")


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
        with open_bytes(path) as file:
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


def open_bytes(path: Path, *, lines: bool = True) -> io.BufferedReader:
    """The file `path` to read, unzipped where it is gzipped; of one that is not made of `lines` these may be long.

    What is read raises AnchorvecError for a line of more than `LONGEST_LINE` bytes, and where the file unzips to more
    than `MOST_TIMES` its size and `FREE_OF_LIMIT`.
    """
    gzipped = path.suffix.lower() == ".gz"
    opened: Any = gzip.open(path) if gzipped else path.open("rb")  # noqa: SIM115 - closed with what is given back
    most = max(FREE_OF_LIMIT, MOST_TIMES * path.stat().st_size) if gzipped else None
    return io.BufferedReader(_Limited(opened, path, most, LONGEST_LINE if lines else None))


def check_unpacked_size(path: Path, size: int) -> None:
    """Raise AnchorvecError where the file `path` says that it unpacks to a `size` in bytes which no text does."""
    if size > max(FREE_OF_LIMIT, MOST_TIMES * path.stat().st_size):
        raise AnchorvecError(
            f"{path} unpacks to {size:,} bytes, more than {MOST_TIMES} times its size, which no text does; if you "
            "trust it, write it again without compression"
        )


class _Limited(io.RawIOBase):
    """What is read of `file`, at most `most` bytes, and `line` of them without a line's end; None: no limit."""

    def __init__(self, file: Any, path: Path, most: int | None, line: int | None) -> None:
        self.file, self.path, self.most, self.line = file, path, most, line
        self.name = str(path)
        self._read = self._of_line = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part: bytes = self.file.read(len(buffer))
        buffer[: len(part)] = part
        self._read += len(part)
        end = part.rfind(b"\n")
        self._of_line = self._of_line + len(part) if end < 0 else len(part) - end - 1
        if self.most is not None and self._read > self.most:
            raise AnchorvecError(
                f"{self.path} unzips to more than {MOST_TIMES} times its size, which no text does; if you trust it, "
                "unzip it yourself"
            )
        if self.line is not None and self._of_line > self.line:
            raise AnchorvecError(f"{self.path} has a line of more than {self.line:,} bytes; write one row on each line")
        return len(part)

    def close(self) -> None:
        self.file.close()
        super().close()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in UTF-8, replacing what was there in one move. Raises AnchorvecError if it cannot.

    The text is on the disk before the move: what is there after a power cut is the old text or the new one.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch.write_text(text, encoding="utf-8")
            sync(scratch)
            scratch.replace(path)
    except AnchorvecError:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write each of `rows` to a line of `path`, replacing what was there in one move. Raises as `write_text` does."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` as indented JSON, replacing what was there in one move."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A context in which `path` is written, by a library perhaps: what the system refuses becomes an AnchorvecError."""
    try:
        yield
    except Exception as error:
        if no_room(error):
            raise AnchorvecError(f"{path} cannot be written: the disk is full; make room on it") from error
        if isinstance(error, OSError):
            raise AnchorvecError(f"{path} cannot be written: {error.strerror or error}") from error
        raise


def no_room(error: Exception) -> bool:
    """Whether `error` says that the disk is full, or a quota or the limit on a file's size reached.

    safetensors and torch pass on what the system said as a part of their own messages.
    """
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    said = str(error)
    return any(words in said for words in (*(f"(os error {code})" for code in _NO_ROOM), *_TORCH_CANNOT_WRITE))


def sync(path: Path) -> None:
    """Wait until what was written to the file or folder `path` is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # a folder cannot be opened there
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until all files below `folder`, the folder itself and its name are on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
    sync(folder.parent)


def remove_scratch(folder: Path) -> None:
    """Remove what processes that were killed have left in `folder` of files and folders that they were writing."""
    for path in folder.glob(".*.tmp"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _follow_umask(folder: Path) -> None:
    """Give all that is in `folder` the modes that new files have here; some libraries keep theirs to one user."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A scratch folder that becomes `folder` when the block ends and it is on the disk; it vanishes if that fails.

    Raises AnchorvecError at once if `folder` is in use: nothing is ever written over; and where the disk is full.
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
        sync_folder(scratch)
        if folder.exists():
            folder.rmdir()
        scratch.rename(folder)
        sync(folder.parent)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, Exception) and no_room(error):
            raise AnchorvecError(f"{folder} cannot be written: the disk is full; make room on it") from error
        raise
