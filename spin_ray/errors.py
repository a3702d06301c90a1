"""The one exception that is the user's to fix: the command line prints it as one line and exits with code 2."""


class BadInput(ValueError):
    """Wrong config, data, model or cluster; the message says what is wrong, where, and what to do."""
