"""Texts to batches, padded and packed, and which rows the heads pool over: TextBatch, TextTokenizer, TrainBatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextBatch(NamedTuple):
    """Token ids of B texts in both layouts, padded (B, S) and packed (T,), and which of their rows are pooled.

    Attributes:
        input_ids: (B, S) int64, padded to the longest text of the batch.
        attention_mask: (B, S) int64, 1 for real tokens (special tokens included).
        pool_index: (N,) int64, rows of the flattened (B * S) layout that are pooled, text by text.
        cu_seqlens: (B + 1,) int32, text b owns entries cu_seqlens[b] .. cu_seqlens[b + 1] - 1 of pool_index.
        max_seqlen: largest number of pooled rows of one text, known on the host.
        token_ids: (T,) int64, the real tokens, text by text.
        token_positions: (T,) int64, 0, 1, ... within each text.
        token_cu_seqlens: (B + 1,) int32, text b owns entries token_cu_seqlens[b] .. token_cu_seqlens[b + 1] - 1.
        pooled_tokens: (N,) int64, rows of the packed layout that are pooled: ``pool_index`` without padding.
        longest: largest number of real tokens of one text, known on the host.
    """

    input_ids: Tensor
    attention_mask: Tensor
    pool_index: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    token_ids: Tensor
    token_positions: Tensor
    token_cu_seqlens: Tensor
    pooled_tokens: Tensor
    longest: int

    @classmethod
    def from_masks(cls, input_ids: Tensor, attention_mask: Tensor, pooled: Tensor) -> TextBatch:
        """Derives the packed layout from a mask of pooled positions.

        Args:
            input_ids: (B, S) int64 on the CPU.
            attention_mask: (B, S) int64.
            pooled: (B, S) bool or 0/1, True where a token takes part in the pooling.

        Returns:
            The batch; a text without a pooled token has an empty range in cu_seqlens.

        Raises:
            ValueError: if a position is pooled that the attention mask leaves out.
        """
        real, pooled = attention_mask.bool(), pooled.bool()
        if bool((pooled & ~real).any()):
            raise ValueError("pooled: expected only positions where attention_mask is 1, got others; leave them out")
        rows = real.flatten().nonzero().squeeze(1)
        cu_seqlens, max_seqlen = _bounds(pooled)
        token_cu_seqlens, longest = _bounds(real)
        return cls(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pool_index=pooled.flatten().nonzero().squeeze(1),
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            token_ids=input_ids.flatten()[rows],
            token_positions=(real.cumsum(1) - 1).flatten()[rows],
            token_cu_seqlens=token_cu_seqlens,
            pooled_tokens=pooled.flatten()[rows].nonzero().squeeze(1),
            longest=longest,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TextBatch:
        """Copies every tensor to ``device``; ``max_seqlen`` and ``longest`` stay numbers on the host."""
        return TextBatch(*(t.to(device, non_blocking=non_blocking) if isinstance(t, Tensor) else t for t in self))

    def widened(self, width: int, padding_id: int) -> TextBatch:
        """The same texts with padding up to ``width`` tokens, which is at least S; the packed layout stays."""
        before = self.input_ids.shape[1]
        extra = width - before
        if not extra:
            return self
        return self._replace(
            input_ids=F.pad(self.input_ids, (0, extra), value=padding_id),
            attention_mask=F.pad(self.attention_mask, (0, extra)),
            pool_index=self.pool_index + self.pool_index // before * extra,
        )

    def split(self, tokens: int, *, padded: bool) -> list[TextBatch]:
        """Cuts the batch into runs of whole texts of at most ``tokens`` tokens; one text alone may have more.

        Waits for the device, where the lengths are. Each run keeps the widths of the whole batch.

        Args:
            tokens: limit of a run.
            padded: counts padding, too.
        """
        ends, pooled_ends = torch.stack([self.token_cu_seqlens, self.cu_seqlens]).tolist()
        texts, width = self.input_ids.shape
        counted = range(0, (texts + 1) * width, width) if padded else ends
        starts = [0]
        for text in range(1, texts):
            if counted[text + 1] - counted[starts[-1]] > tokens:
                starts.append(text)
        return [
            TextBatch(
                input_ids=self.input_ids[start:stop],
                attention_mask=self.attention_mask[start:stop],
                pool_index=self.pool_index[pooled_ends[start] : pooled_ends[stop]] - start * width,
                cu_seqlens=self.cu_seqlens[start : stop + 1] - pooled_ends[start],
                max_seqlen=self.max_seqlen,
                token_ids=self.token_ids[ends[start] : ends[stop]],
                token_positions=self.token_positions[ends[start] : ends[stop]],
                token_cu_seqlens=self.token_cu_seqlens[start : stop + 1] - ends[start],
                pooled_tokens=self.pooled_tokens[pooled_ends[start] : pooled_ends[stop]] - ends[start],
                longest=self.longest,
            )
            for start, stop in zip(starts, [*starts[1:], texts], strict=True)
        ]


def _bounds(mask: Tensor) -> tuple[Tensor, int]:
    """Offsets (B + 1,) int32 of the True entries of each row of a (B, S) mask, and the most of them in one row."""
    counts = mask.sum(dim=1)
    cu_seqlens = torch.zeros(len(counts) + 1, dtype=torch.int32)
    cu_seqlens[1:] = counts.cumsum(0)
    return cu_seqlens, int(counts.max()) if len(counts) else 0


class TextTokenizer:
    """Tokenises texts of one side (queries or documents) into a TextBatch.

    It holds nothing but the tokenizer and two numbers, so that worker processes can unpickle it.

    Args:
        tokenizer: any Hugging Face tokenizer with a padding token.
        max_length: longest text in tokens, special tokens included; what is longer is cut off.
        pool_special_tokens: False leaves [CLS], [SEP] and their like out of ``pool_index``.

    Raises:
        ValueError: if max_length is below 3 or the tokenizer cannot pad.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, pool_special_tokens: bool = True):
        if max_length < 3:
            raise ValueError(f"max_length: expected at least 3 tokens, got {max_length}; raise model.max_*_length")
        if tokenizer.pad_token_id is None:
            raise ValueError(
                "tokenizer: expected one with a padding token, got none; set tokenizer.pad_token before training"
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.pool_special_tokens = pool_special_tokens

    def __call__(self, texts: Sequence[str]) -> TextBatch:
        """Tokenises and pads to the longest of ``texts`` (on the tokenizer's padding side).

        Raises:
            ValueError: if there is no text.
        """
        if not texts:
            raise ValueError("texts: expected at least one text, got an empty list; skip empty batches")
        encoded = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=True,
            return_special_tokens_mask=True,
        )
        # By way of numpy: transformers' own conversion takes as long as tokenising.
        ids, mask, special = (
            torch.from_numpy(np.array(encoded[name], dtype=np.int64))
            for name in ("input_ids", "attention_mask", "special_tokens_mask")
        )
        pooled = mask.bool() if self.pool_special_tokens else mask.bool() & (special == 0)
        return TextBatch.from_masks(ids, mask, pooled)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text after truncation, special tokens included, without padding."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts), truncation=True, max_length=self.max_length, return_attention_mask=False
        )
        return [len(ids) for ids in encoded["input_ids"]]


class TrainBatch(NamedTuple):
    """One training step: Bq queries and their Bd = Bq * K documents.

    Attributes:
        query: the Bq queries.
        doc: Bd documents; rows i * K .. i * K + K - 1 belong to query i, the first of them is its positive.
        false_negatives: (Bq, Bd) bool, True where a document is relevant to a query without being its own
            positive: losses leave it out of the denominator.
        teacher_scores: (Bq, K) float32, or None where the data has no teacher.
    """

    query: TextBatch
    doc: TextBatch
    false_negatives: Tensor
    teacher_scores: Tensor | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TrainBatch:
        """Copies every tensor to ``device``."""
        scores = self.teacher_scores
        return TrainBatch(
            query=self.query.to(device, non_blocking),
            doc=self.doc.to(device, non_blocking),
            false_negatives=self.false_negatives.to(device, non_blocking=non_blocking),
            teacher_scores=None if scores is None else scores.to(device, non_blocking=non_blocking),
        )
