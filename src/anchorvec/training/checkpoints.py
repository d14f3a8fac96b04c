"""Checkpoints of a stage: folders that count only with their manifest, which is written last.

A manifest names every file of its folder with its size and checksum. Files, manifest and folder are on the disk before
the next thing is done, so a process may be killed, or a machine lose its power, at any moment: a folder with a manifest
is whole. The checksums tell a file that was altered by accident, not one that was altered on purpose.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from xxhash import xxh3_128

from anchorvec.errors import AnchorvecError
from anchorvec.files import sync, sync_folder, write_json, writing
from anchorvec.terminal import say

if TYPE_CHECKING:  # a trainer needs no recipe, and no pydantic
    from anchorvec.recipe import StageOne, StageTwo

MANIFEST = "manifest.json"

WEIGHT_BYTES, CHECKPOINT_BYTES = 4, 12
"""Of a parameter that is trained: its weight, in fp32, and in a checkpoint the two moments of AdamW beside it."""

_READ_AT_ONCE = 2**24


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one stage in `folder`, of which the newest `limit` are kept.

    Beside them is `start`: what the stage has computed before its first step, and every checkpoint goes on with.
    """

    folder: Path
    limit: int

    @property
    def start(self) -> Path | None:
        """The folder with what the stage has computed before its first step; None: it has not got that far."""
        folder = self.folder / "start"
        return folder if is_complete(folder) else None

    def newest(self) -> Path | None:
        """The newest complete checkpoint; None: there is none.

        One without a manifest, whose writing was cut off, does not count, and is removed. Raises AnchorvecError for one
        whose files are not those of its manifest.
        """
        for step in reversed(self._steps()):
            folder = self.of_step(step)
            if is_complete(folder):
                return folder
            say(f"{folder}: this checkpoint was not written to its end, and is removed")
            shutil.rmtree(folder)
        return None

    def of_step(self, step: int) -> Path:
        """The folder of the checkpoint after the step `step`, named as transformers names it."""
        return self.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"

    def last_good(self) -> str:
        """A part of a message: the newest complete checkpoint by its manifest."""
        step = self.newest_step()
        return f"the last good checkpoint is {self.of_step(step)}" if step else "there is no checkpoint yet"

    def newest_step(self) -> int:
        """The step of the newest checkpoint that has a manifest; 0: there is none."""
        return max((step for step in self._steps() if (self.of_step(step) / MANIFEST).is_file()), default=0)

    @contextmanager
    def writing_start(self) -> Iterator[Path]:
        """The folder `start`, which is complete when the block ends; it vanishes if that fails."""
        with _sealed(self.folder / "start") as folder:
            yield folder

    @contextmanager
    def writing_step(self, step: int) -> Iterator[Path]:
        """The folder of a new checkpoint after `step`, as `writing_start`; older ones are removed once it is complete.

        Raises AnchorvecError, with the last good checkpoint, if it cannot be written.
        """
        try:
            with _sealed(self.of_step(step)) as folder:
                yield folder
        except AnchorvecError as error:
            raise AnchorvecError(f"{error} ({self.last_good()})") from error
        for old in self._steps()[: -self.limit]:
            shutil.rmtree(self.of_step(old))

    def _steps(self) -> list[int]:
        """The steps of all checkpoints, complete or not, in order."""
        names = (path.name for path in self.folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
        numbers = (name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for name in names)
        return sorted(int(number) for number in numbers if number.isdecimal())


def most_at_once(settings: "StageOne | StageTwo", *, timed: bool = False) -> int:
    """How many checkpoints of a stage with these `settings` are there at one time, at most.

    With `timed` it makes any number of steps. One where none is planned: a signal has one written.
    """
    if settings.save_steps is None:
        return 1
    planned = settings.save_total_limit + 1 if timed else (settings.steps - 1) // settings.save_steps
    return max(1, min(settings.save_total_limit + 1, planned))


def step_of(checkpoint: Path) -> int:
    """The steps that were made before the `checkpoint`."""
    return int(checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"))


@contextmanager
def _sealed(folder: Path) -> Iterator[Path]:
    """A new folder that has a manifest when the block ends; it vanishes if that fails."""
    try:
        with writing(folder):
            shutil.rmtree(folder, ignore_errors=True)  # one that was cut off
            folder.mkdir(parents=True)
            yield folder
            sync_folder(folder)
            files = {path.name: _described(path) for path in sorted(folder.iterdir())}
            write_json(folder / MANIFEST, {"files": files})
            sync(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def is_complete(folder: Path) -> bool:
    """Whether `folder` has a manifest, and its files are those of it; False: it has none.

    Raises AnchorvecError for a manifest that cannot be read, and for files that are not what it says: more, fewer, cut
    short or altered.
    """
    if not (folder / MANIFEST).is_file():
        return False
    try:
        expected = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        listed: Mapping[str, Any] = {str(name): dict(described) for name, described in expected.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _altered(folder, f"{MANIFEST} cannot be read") from error
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")} - {MANIFEST}
    for name in sorted(found ^ listed.keys()):
        raise _altered(folder, f"{name} is {'missing' if name in listed else 'no part of it'}")
    for name, described in listed.items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or path.stat().st_size != described.get("bytes"):
            raise _altered(folder, f"{name} has not the size that it was written with")
        if _described(path) != described:
            raise _altered(folder, f"{name} is not what was written")
    return True


def _altered(folder: Path, what: str) -> AnchorvecError:
    return AnchorvecError(
        f"{folder}: this checkpoint was altered or cut short after it had been written: {what}; remove that folder to "
        "go on from what was kept before it"
    )


def _described(path: Path) -> dict[str, Any]:
    """The size of a file and the checksum of what is in it."""
    digest = xxh3_128()
    with path.open("rb") as file:
        while part := file.read(_READ_AT_ONCE):
            digest.update(part)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}
