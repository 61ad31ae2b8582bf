"""The one exception for a user's mistake. The command line prints its text and exits with 2."""


class InputError(ValueError):
    """Bad input: the text names the value received and the remedy, in one line."""
