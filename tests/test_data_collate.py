"""Tokenisation, padding and the packed layout; false negatives of a batch."""

from __future__ import annotations

import pickle

import pytest
import torch

from datamodules.collate import TextBatch, TextTokenizer
from datamodules.examples import Example, make_train_batch
from tests.data_helpers import bundled_tokenizer, loader_arguments

TEXTS = ["cell", "the protein of a mouse", "", "virus " * 40]


@pytest.mark.parametrize("pool_special_tokens", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_layout_selects_the_pooled_tokens(pool_special_tokens, side):
    tokenizer = pickle.loads(pickle.dumps(bundled_tokenizer()))
    tokenizer.padding_side = side
    tokenize = TextTokenizer(tokenizer, 12, pool_special_tokens=pool_special_tokens)
    batch = tokenize(TEXTS)
    assert batch.input_ids.shape == batch.attention_mask.shape == (4, 12)
    assert batch.cu_seqlens.dtype == torch.int32 and batch.pool_index.dtype == torch.int64
    rows = batch.input_ids.flatten()[batch.pool_index].split(batch.cu_seqlens.diff().tolist())
    for text, row in zip(TEXTS, rows, strict=True):
        expected = tokenizer(text, truncation=True, max_length=12, add_special_tokens=True)["input_ids"]
        if not pool_special_tokens:
            expected = expected[1:-1]
        assert row.tolist() == expected
    assert batch.max_seqlen == (12 if pool_special_tokens else 10)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("tokens", [1, 20, 30, 1000])
@pytest.mark.parametrize("pool_special_tokens", [True, False])
def test_split_keeps_texts_whole_and_in_order(padded, tokens, pool_special_tokens):
    batch = TextTokenizer(bundled_tokenizer(), 12, pool_special_tokens=pool_special_tokens)([*TEXTS, *TEXTS])
    pieces = batch.split(tokens, padded=padded)
    for piece in pieces:
        own = TextBatch.from_masks(piece.input_ids, piece.attention_mask, _pooled(piece))
        for name in ("pool_index", "cu_seqlens", "token_ids", "token_positions", "token_cu_seqlens", "pooled_tokens"):
            assert torch.equal(getattr(piece, name), getattr(own, name)), name
        used = piece.input_ids.numel() if padded else len(piece.token_ids)
        assert used <= tokens or len(piece.input_ids) == 1
    for name in ("input_ids", "attention_mask", "token_ids", "token_positions"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name)), name
    assert sum(len(piece.pool_index) for piece in pieces) == len(batch.pool_index)
    if tokens in (1, 1000):
        assert len(pieces) == (8 if tokens == 1 else 1)


def _pooled(batch: TextBatch) -> torch.Tensor:
    """The mask (B, S) that pool_index lists."""
    mask = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
    mask[batch.pool_index] = True
    return mask.view_as(batch.input_ids)


def test_lengths_are_those_of_the_batch():
    tokenize = TextTokenizer(bundled_tokenizer(), 12)
    assert tokenize.lengths(TEXTS) == tokenize(TEXTS).attention_mask.sum(1).tolist()
    assert tokenize.lengths([]) == []


def test_to_keeps_types_and_host_number():
    batch = TextTokenizer(bundled_tokenizer(), 12)(TEXTS).to("cpu")
    assert isinstance(batch, TextBatch) and isinstance(batch.max_seqlen, int)


def test_tokenizer_errors():
    with pytest.raises(ValueError, match="max_length: expected at least 3 tokens, got 2"):
        TextTokenizer(bundled_tokenizer(), 2)
    with pytest.raises(ValueError, match="at least one text"):
        TextTokenizer(bundled_tokenizer(), 12)([])


def test_false_negatives_by_hand():
    arguments = loader_arguments()
    examples = [
        Example("a", ["p", "n"], ["p", "n"], frozenset(["p", "x"])),
        # both documents of this one are relevant to query a
        Example("b", ["x", "p"], ["x", "p"], frozenset(["x"])),
        Example("a", ["x", "m"], ["x", "m"], frozenset(["p", "x"])),  # the same query with another positive
    ]
    batch = make_train_batch(examples, arguments["tokenize_query"], arguments["tokenize_doc"])
    assert batch.false_negatives.int().tolist() == [
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 0],
        [1, 0, 1, 1, 0, 0],
    ]
    assert batch.teacher_scores is None
    assert batch.doc.input_ids.shape[0] == 6


def test_teacher_scores_reach_the_batch():
    arguments = loader_arguments()
    examples = [
        Example("a", ["p", "n"], [0, 1], frozenset([0]), [2.0, 1.0]),
        Example("b", ["q", "m"], [2, 3], frozenset([2]), [0.5, 3.0]),
    ]
    batch = make_train_batch(examples, arguments["tokenize_query"], arguments["tokenize_doc"])
    assert batch.teacher_scores.tolist() == [[2.0, 1.0], [0.5, 3.0]]
    assert batch.teacher_scores.dtype == torch.float32
