"""The one exception type for what a user can mend."""


class AnchorvecError(ValueError):
    """Bad input: the message says what was found, where, and what to write instead.

    The command line prints the message alone and exits with code 2.
    """
