"""Which training queries are held out for validation: a fixed hash of the query id, never anything about tests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

DEV_BUCKETS = 10  # one bucket of ten goes to dev


def digest(text: str) -> int:
    """A 64-bit number for ``text`` that is the same on every machine and in every run."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def held_out(digests: Iterable[int], limit: int | None = None) -> set[int]:
    """The digests that go to dev: every tenth bucket, or the smallest digest where that bucket is empty.

    Args:
        digests: digests of the training queries.
        limit: at most so many, the smallest digests first.
    """
    unique = sorted(set(digests))
    chosen = [value for value in unique if value % DEV_BUCKETS == 0] or unique[:1]
    return set(chosen[:limit])
