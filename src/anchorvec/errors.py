"""The one exception type for what a user can mend, and that for work that was asked to stop."""


class AnchorvecError(ValueError):
    """Bad input: the message says what was found, where, and what to write instead.

    The command line prints the message alone and exits with code 2.
    """


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM has ended a run: the message says what is kept, and how to go on.

    `signal` is its number; the command line prints the message alone and exits with 128 + `signal`, as a shell would
    say it.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
