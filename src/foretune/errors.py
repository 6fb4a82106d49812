"""The one exception that a user's mistake raises: shown as one sentence, without a traceback, exit code 2."""


class UserError(ValueError):
    """Input that foretune cannot work with; the message names what came and what to do about it."""
