"""Vectors that are kept on disk from one run to the next, so that no model encodes a text twice.

One SQLite file holds those of all models, each under a hash of whatever decides it (`text_encoder.py` makes these
keys). Its transactions make it safe with several processes, and whole after one was killed. When it grows over its
limit, the vectors go that were not used for longest.
"""

import math
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from platformdirs import user_cache_dir

from anchorvec.errors import AnchorvecError
from anchorvec.files import user_path
from anchorvec.terminal import say

FOLDER, GIGABYTES = "ANCHORVEC_CACHE", "ANCHORVEC_CACHE_GB"
"""The environment variables for the folder, empty for no cache, and for its limit."""

_DEFAULT_GIGABYTES = "10"
_PAGE_BYTES = 32_768  # a vector of 576 numbers would fill little more than half of SQLite's 4,096
_KEYS_AT_ONCE = 1_000
_WAIT_SECONDS = 60.0  # for another process that writes
_USED_SECONDS = 3_600  # use is noted again when so much time has passed
_KEPT_PART = 0.9  # of the limit, when vectors had to go

# The times of use, which are written when vectors are read, stand apart from the vectors, which are a hundred times as
# large.
_TABLES = """
CREATE TABLE IF NOT EXISTS vectors (id INTEGER PRIMARY KEY, vector BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS keys (key BLOB PRIMARY KEY, id INTEGER NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID;
"""


class VectorCache:
    """The vectors that are kept in `folder`, at most `max_bytes` of them.

    A folder that cannot be read or written is said in one line, once, and is no failure: then nothing is found, or
    nothing kept.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.file = folder / "vectors.sqlite3"
        self.max_bytes = max_bytes
        self._reads = self._writes = True

    def find(self, keys: Sequence[bytes], dtype: Any) -> Iterator[tuple[list[int], "np.ndarray[Any, Any]"]]:
        """The places in `keys` of those that are kept, with their vectors (places, dim), some at a time.

        The keys differ; `dtype` is what their vectors were kept in.
        """
        if not self._reads or not self.file.exists():
            return
        try:
            with closing(self._connect()) as db:
                for start in range(0, len(keys), _KEYS_AT_ONCE):
                    places = {key: i for i, key in enumerate(keys[start : start + _KEYS_AT_ONCE], start)}
                    found = self._rows(db, "key, vector, used", "JOIN vectors USING (id)", list(places))
                    if found:
                        self._note_use(db, [key for key, _, used in found if used < time.time() - _USED_SECONDS])
                        vectors = np.frombuffer(b"".join(vector for _, vector, _ in found), dtype=dtype)
                        yield [places[key] for key, _, _ in found], vectors.reshape(len(found), -1)
        except (OSError, sqlite3.Error) as error:
            self._reads = self._writes = False
            self._say("read", error)

    def keep(self, keys: Sequence[bytes], vectors: "np.ndarray[Any, Any]") -> None:
        """Keep the `vectors` (keys, dim) of texts under `keys`."""
        if not self._writes:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as db, db:
                db.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
                db.execute("BEGIN IMMEDIATE")
                for statement in _TABLES.strip().split("\n"):
                    db.execute(statement)
                known = {row[0] for row in self._rows(db, "key", "", keys)}
                new = [(key, vector.tobytes()) for key, vector in zip(keys, vectors, strict=True) if key not in known]
                [first] = db.execute("SELECT coalesce(max(id), 0) + 1 FROM vectors").fetchone()
                rows = [(i, key, vector) for i, (key, vector) in enumerate(new, first)]
                now = int(time.time())
                db.executemany("INSERT INTO vectors VALUES (?, ?)", [(i, vector) for i, _, vector in rows])
                db.executemany("INSERT INTO keys VALUES (?, ?, ?)", [(key, i, now) for i, key, _ in rows])
                self._evict(db)
        except (OSError, sqlite3.Error) as error:
            self._writes = False
            self._say("written", error)

    def _connect(self) -> sqlite3.Connection:
        """A connection for one call, so that the cache can be sent to other processes; transactions are begun by hand.

        The journal is SQLite's default, which, unlike a write-ahead log, network file systems can have.
        """
        return sqlite3.connect(self.file, timeout=_WAIT_SECONDS, isolation_level=None)

    def _rows(self, db: sqlite3.Connection, columns: str, join: str, keys: Sequence[bytes]) -> list[Any]:
        rows = []
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            part = keys[start : start + _KEYS_AT_ONCE]
            marks = ",".join("?" * len(part))
            rows += db.execute(f"SELECT {columns} FROM keys {join} WHERE key IN ({marks})", part).fetchall()
        return rows

    def _note_use(self, db: sqlite3.Connection, keys: Sequence[bytes]) -> None:
        """Write down that `keys` are used now, where that can be written."""
        if not keys or not self._writes:
            return
        try:
            with db:
                db.execute("BEGIN IMMEDIATE")
                db.executemany("UPDATE keys SET used = ? WHERE key = ?", [(int(time.time()), key) for key in keys])
        except sqlite3.OperationalError as error:
            self._writes = False
            self._say("written", error)

    def _evict(self, db: sqlite3.Connection) -> None:
        """Where there is more than the limit, delete what was not used for longest; its pages are used again."""
        pages, free, size = (
            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        taken = (pages - free) * size
        if taken <= self.max_bytes:
            return
        [count] = db.execute("SELECT count(*) FROM keys").fetchone()
        most = math.ceil(count * (1 - _KEPT_PART * self.max_bytes / taken))
        db.execute("CREATE TEMP TABLE gone AS SELECT key, id FROM keys ORDER BY used, id LIMIT ?", (most,))
        db.execute("DELETE FROM vectors WHERE id IN (SELECT id FROM gone)")
        db.execute("DELETE FROM keys WHERE key IN (SELECT key FROM gone)")

    def _say(self, what: str, error: Exception) -> None:
        say(
            f"the vectors kept in {self.file.parent} cannot be {what} ({error}), so texts are encoded again; name "
            f"another folder in {FOLDER}, or leave it empty for none"
        )


def vector_cache() -> VectorCache | None:
    """The cache in the folder that ANCHORVEC_CACHE names, or in this system's folder for caches; None: it is empty.

    Its limit is ANCHORVEC_CACHE_GB, 10 by default. Raises AnchorvecError for a limit that is no number.
    """
    folder, limit = os.environ.get(FOLDER), os.environ.get(GIGABYTES, _DEFAULT_GIGABYTES)
    if folder == "":
        return None
    try:
        max_bytes = int(float(limit) * 1e9)
    except (ValueError, OverflowError) as error:
        raise AnchorvecError(f"{GIGABYTES}: {limit!r} is no number of gigabytes; write, for example, 10") from error
    return _cache_in(user_path(folder or user_cache_dir("anchorvec", appauthor=False)), max_bytes)


@cache
def _cache_in(folder: Path, max_bytes: int) -> VectorCache:
    """One in a process, which says once that it does not work."""
    return VectorCache(folder, max_bytes)
