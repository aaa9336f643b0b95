"""The one error of this library."""


class IntactKVError(ValueError):
    """What was given cannot be done right: the message names the value, the rule and the remedy."""
