"""Scores of queries against documents in full precision, and the checks every ranking loss shares."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Columns of the gradients that are summed in float32 at a time: 32,768 words of 5,000 texts are 0.7 GB.
COLUMNS = 32_768


def check_positive(name: str, value: float, owner: str) -> float:
    """Returns ``value`` as a float.

    Raises:
        ValueError: if it is not a finite number above zero.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ValueError(f"{owner}: {name} must be a finite number above 0, got {value!r}; use for example 1.0")
    return float(value)


def check_pair(query: Tensor, doc: Tensor, owner: str) -> int:
    """Checks the two sides of a ranking loss and returns K, the number of documents of each query.

    Args:
        query: ``(B, V)``, any floating dtype.
        doc: ``(B * K, V)``; rows ``i * K`` to ``i * K + K - 1`` belong to query ``i``, the first is its positive.
        owner: name of the loss, for the message.

    Raises:
        ValueError: if a side is not a floating matrix, the vocabularies differ or the rows don't divide evenly.
    """
    for name, rep in (("query", query), ("doc", doc)):
        if rep.dim() != 2 or not rep.is_floating_point():
            raise ValueError(
                f"{owner}: {name} must be a floating (rows, V) matrix, got {tuple(rep.shape)} of {rep.dtype}; "
                "pass the head's output"
            )
    if query.shape[1] != doc.shape[1]:
        raise ValueError(
            f"{owner}: query and doc must share one vocabulary, got V={query.shape[1]} and V={doc.shape[1]}; "
            "encode both with one head"
        )
    if query.shape[0] == 0 or doc.shape[0] == 0 or doc.shape[0] % query.shape[0]:
        raise ValueError(
            f"{owner}: doc must have B*K rows for the B rows of query, got {doc.shape[0]} for B={query.shape[0]}; "
            "give each query the same number of documents"
        )
    return doc.shape[0] // query.shape[0]


def check_teacher(teacher_scores: Tensor | None, batch: int, per_query: int, owner: str) -> Tensor:
    """Checks a teacher's scores and returns them, detached.

    Raises:
        ValueError: if there are none, their shape is not ``(B, K)``, or a query has no negative to compare with.
    """
    if teacher_scores is None:
        raise ValueError(
            f"{owner}: teacher_scores must be a ({batch}, {per_query}) tensor, got None; "
            "use data that carries scores, or loss=infonce"
        )
    if per_query < 2:
        raise ValueError(
            f"{owner}: each query needs a positive and at least one negative, got {per_query} document per query; "
            "use data with negatives, or loss=infonce"
        )
    if tuple(teacher_scores.shape) != (batch, per_query):
        raise ValueError(
            f"{owner}: teacher_scores must have the shape (B, K) = ({batch}, {per_query}), "
            f"got {tuple(teacher_scores.shape)}; give one score per document of a query"
        )
    return teacher_scores.detach()


def full_precision(rep: Tensor) -> Tensor:
    """Returns ``rep`` in float32, or unchanged where it is float32 or float64 already."""
    return rep if rep.dtype in (torch.float32, torch.float64) else rep.float()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Returns ``left @ right`` of two bfloat16 matrices with sums and result in float32."""
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


class _BFloat16Scores(torch.autograd.Function):
    """``query @ doc.T`` in float32 from bfloat16 representations, at the speed and in the memory of bfloat16.

    A product of two bfloat16 numbers is exact in float32, so that only the order of the sums differs from a product
    of float32 copies. The scores' gradient goes in as the sum of two bfloat16 numbers, which keep 16 of its bits.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, doc: Tensor) -> Tensor:
        ctx.save_for_backward(query, doc)
        return _product(query, doc.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        query, doc = ctx.saved_tensors
        high = grad.bfloat16()
        low = (grad - high.float()).bfloat16()
        return (
            _rounded_product(high, low, doc) if ctx.needs_input_grad[0] else None,
            _rounded_product(high.T, low.T, query) if ctx.needs_input_grad[1] else None,
        )


def _rounded_product(high: Tensor, low: Tensor, rep: Tensor) -> Tensor:
    """Returns ``(high + low) @ rep`` in bfloat16, summed in float32."""
    result = rep.new_empty(high.shape[0], rep.shape[1])
    for out, words in zip(result.split(COLUMNS, dim=1), rep.split(COLUMNS, dim=1), strict=True):
        out.copy_(_product(high, words).add_(_product(low, words)))
    return result


def all_scores(query: Tensor, doc: Tensor) -> Tensor:
    """Returns each query's score with each document, ``(B, B * K)``, in float32 whatever autocast says.

    A dot product over thousands of words rounds to three digits in bfloat16, which is coarser than the
    differences that a softmax over the documents looks at. float64 stays float64.
    """
    with torch.autocast(query.device.type, enabled=False):
        if query.dtype == doc.dtype == torch.bfloat16:
            return _BFloat16Scores.apply(query, doc)
        return full_precision(query) @ full_precision(doc).T


def own_scores(query: Tensor, doc: Tensor, per_query: int) -> Tensor:
    """Returns each query's score with its own K documents, ``(B, K)``, in float32 whatever autocast says."""
    with torch.autocast(query.device.type, enabled=False):
        docs = full_precision(doc).reshape(query.shape[0], per_query, -1)
        return torch.bmm(docs, full_precision(query).unsqueeze(2)).squeeze(2)
