"""The one error of this library."""


class IntactKVError(ValueError):
    """What was given cannot be done right: the message names the value, the rule and the remedy."""


def first_line(error: BaseException) -> str:
    """What an error says, as far as it fits into a sentence; its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
