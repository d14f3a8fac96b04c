"""What is said to people: shown as it stands, on whatever terminal."""

import sys

from rich.console import Console


def terminal(*, stderr: bool = False) -> Console:
    """The terminal on stdout or `stderr`. Brackets and colons in texts and names are no markup."""
    return Console(stderr=stderr, markup=False, emoji=False)


def say(line: str) -> None:
    """Show `line` on stderr, as one line."""
    terminal(stderr=True).print(line, highlight=False, soft_wrap=True)


def replace_unshown() -> None:
    """Have what the encoding of stdin, stdout and stderr does not have replaced, in place of a traceback."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
