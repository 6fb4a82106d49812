"""The one exception that a user's mistake raises: shown as one sentence, without a traceback, exit code 2."""


class UserError(ValueError):
    """Input that foretune cannot work with; the message names what came and what to do about it."""


def first_line(error: Exception) -> str:
    r"""What another library's error says first, without a full stop; its kind where it says nothing.

    >>> first_line(OSError("Not there.\nLook elsewhere."))
    'Not there'
    >>> first_line(KeyError())
    'KeyError'
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
