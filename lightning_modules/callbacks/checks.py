"""The check that the callbacks' integer arguments share."""

from __future__ import annotations


def check_int(owner: str, name: str, value: int, minimum: int) -> int:
    """Returns ``value``.

    Raises:
        ValueError: if it is not an int of at least ``minimum``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{owner}: {name} must be an int >= {minimum}, got {value!r}; use for example {minimum + 10}")
    return value
