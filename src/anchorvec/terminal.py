"""What is said to people: shown as it stands, on whatever terminal."""

import sys
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from anchorvec.ranks import rank


def terminal(*, stderr: bool = False) -> Console:
    """The terminal on stdout or `stderr`. Brackets and colons in texts and names are no markup."""
    return Console(stderr=stderr, markup=False, emoji=False)


def say(line: str) -> None:
    """Show `line` on stderr, as one line; of several processes the first one does."""
    if rank() == 0:
        terminal(stderr=True).print(line, highlight=False, soft_wrap=True)


class Bar:
    """One bar on stderr over several pieces of work, with the time left; nothing where that is no terminal.

    `sizes` are those of the pieces by name, in the order in which they come; one that is not known is None, and taken
    for the mean of the others. It is shown if `shown`, while it is used as a context manager.
    """

    def __init__(self, sizes: Mapping[str, float | None], *, shown: bool) -> None:
        known = [size for size in sizes.values() if size is not None]
        mean = sum(known) / len(known) if known else 1.0
        self._sizes = {name: max(mean if size is None else size, 1.0) for name, size in sizes.items()}
        self._before = self._size = self._done = 0.0
        console = terminal(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            disable=not (shown and console.is_terminal),
        )
        self._task = self._progress.add_task("", total=sum(self._sizes.values()))

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def start(self, name: str) -> None:
        """Go on with the piece `name`; what came before it is done."""
        names = list(self._sizes)
        place = names.index(name)
        self._before, self._size, self._done = sum(list(self._sizes.values())[:place]), self._sizes[name], 0.0
        of = f" ({place + 1} of {len(names)})" if len(names) > 1 else ""
        self._progress.update(self._task, description=f"{name}{of}", completed=self._before)

    def advance(self, amount: float) -> None:
        """Show that `amount` more of it is done; of a piece that was larger than its size, no more than this."""
        self._done += amount
        self._progress.update(self._task, completed=self._before + min(self._done, self._size))


def replace_unshown() -> None:
    """Have what the encoding of stdin, stdout and stderr does not have replaced, in place of a traceback."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
