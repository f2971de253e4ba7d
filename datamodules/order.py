"""The order of training examples: a pure function of (seed, epoch), cut into the same number of batches each epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import ceil

import numpy as np


class EpochOrder:
    """Interleaves examples of several sources, each in a permutation of its own.

    Source k contributes ``per_epoch[k]`` examples to every epoch, spread evenly over it, so that any stretch of the
    epoch holds the sources in their shares (to within one example each). A source is walked permutation by
    permutation: an example comes again only when all others of its source have come as often.

    Args:
        sizes: number of examples of each source.
        per_epoch: how many of them an epoch takes.
        seed: any number >= 0.
    """

    def __init__(self, sizes: Sequence[int], per_epoch: Sequence[int], seed: int):
        if seed < 0:
            raise ValueError(f"seed: expected a number >= 0, got {seed}; set seed=0 or larger")
        self.sizes = list(sizes)
        self.per_epoch = list(per_epoch)
        self.seed = seed
        self._permutation = lru_cache(maxsize=2 * len(self.sizes))(self._make_permutation)

    def __getstate__(self) -> dict:
        """Leaves the cache of permutations behind: it cannot be pickled and can be made again."""
        return {"sizes": self.sizes, "per_epoch": self.per_epoch, "seed": self.seed}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)

    def __len__(self) -> int:
        """Number of examples in an epoch."""
        return sum(self.per_epoch)

    def epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The source and the index within it of every example of ``epoch``, each (len(self),) int64."""
        counts = np.array(self.per_epoch)
        sources = np.repeat(np.arange(len(counts)), counts)
        places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts if count])
        order = np.argsort(places, kind="stable")
        indices = np.concatenate([self._walk(k, epoch * count, count) for k, count in enumerate(self.per_epoch)])
        return sources[order], indices[order]

    def _walk(self, source: int, start: int, count: int) -> np.ndarray:
        """Entries start .. start + count - 1 of the endless sequence of permutations of one source."""
        size = self.sizes[source]
        parts = [np.zeros(0, dtype=np.int64)]
        while count > 0:
            lap, offset = divmod(start, size)
            parts.append(self._permutation(source, lap)[offset : offset + count])
            start += len(parts[-1])
            count -= len(parts[-1])
        return np.concatenate(parts)

    def _make_permutation(self, source: int, lap: int) -> np.ndarray:
        return np.random.default_rng([self.seed, source, lap]).permutation(self.sizes[source])


class BatchPlan:
    """Cuts every epoch into batches of a number of pairs or of a budget of tokens.

    Every epoch has the same number of batches, because Lightning asks for it once. By pairs, what does not fill the
    last batch is left out (other pairs in each epoch). By tokens, an epoch is cut where the running sum of tokens
    passes multiples of its share, so that nothing is left out and batches hold about the budget.

    Args:
        order: the order of the examples.
        batch_size: pairs in a batch; used when there is no ``batch_tokens``.
        batch_tokens: real tokens of queries and documents in a batch.
        lengths: tokens of each example, one array per source; needed with ``batch_tokens`` and for ``costliest``.
    """

    def __init__(
        self,
        order: EpochOrder,
        batch_size: int | None,
        batch_tokens: int | None = None,
        lengths: Sequence[np.ndarray] | None = None,
    ):
        for name, value in (("batch.size", batch_size), ("batch.tokens", batch_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {value}; set {name}=32 or so")
        if batch_size is None and batch_tokens is None:
            raise ValueError("batch.size: expected a number where batch.tokens is not set, got None; set batch.size=32")
        self.order = order
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.lengths = None if lengths is None else [np.asarray(array) for array in lengths]
        if batch_tokens is None:
            self.batches_per_epoch = max(1, len(order) // batch_size)
        else:
            expected = sum(c * array.mean() for c, array in zip(order.per_epoch, self.lengths, strict=True) if c)
            self.batches_per_epoch = min(max(1, ceil(expected / batch_tokens)), len(order))

    def batches(self, epoch: int, start: int = 0, stride: int = 1) -> Iterator[list[tuple[int, int]]]:
        """Batches ``start``, ``start + stride``, ... of ``epoch``; each is a list of (source, index)."""
        sources, indices = self.order.epoch(epoch)
        bounds = self._bounds(sources, indices)
        for number in range(start, self.batches_per_epoch, stride):
            cut = slice(bounds[number], bounds[number + 1])
            yield list(zip(sources[cut].tolist(), indices[cut].tolist(), strict=True))

    def costliest(self, *, padded: bool) -> tuple[int, list[tuple[int, int]]]:
        """Number and members of epoch 0's batch with the most tokens; padded, if all were as long as its longest."""
        sources, indices = self.order.epoch(0)
        bounds, tokens = self._bounds(sources, indices), self._tokens(sources, indices)
        costs = (np.maximum if padded else np.add).reduceat(tokens[: bounds[-1]], bounds[:-1])
        number = int(np.argmax(costs * np.diff(bounds) if padded else costs))
        return number, next(self.batches(0, number))

    def _tokens(self, sources: np.ndarray, indices: np.ndarray) -> np.ndarray:
        tokens = np.empty(len(sources), dtype=np.int64)
        for k, array in enumerate(self.lengths):
            tokens[sources == k] = array[indices[sources == k]]
        return tokens

    def _bounds(self, sources: np.ndarray, indices: np.ndarray) -> np.ndarray:
        if self.batch_tokens is None:
            return np.minimum(np.arange(self.batches_per_epoch + 1) * self.batch_size, len(sources))
        ends = self._tokens(sources, indices).cumsum()
        count = self.batches_per_epoch
        shares = ends[-1] * np.arange(count + 1) / count
        bounds = np.searchsorted(ends, shares, side="right")
        bounds[0], bounds[-1] = 0, len(ends)
        # a single text may be longer than a share: every batch keeps at least one pair
        slack = np.maximum.accumulate(bounds - np.arange(count + 1)) + np.arange(count + 1)
        return np.minimum(slack, len(ends) - count + np.arange(count + 1))
