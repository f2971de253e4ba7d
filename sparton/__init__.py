"""Learned sparse retrieval heads that never store the logits: torch alone, Triton on demand."""

from sparton.functional import lsr_head
from sparton.heads import CompiledHead, NaiveHead, SpartonHead, TiledHead
from sparton.sparse import SparseVectors, encode_sparse

__all__ = ["CompiledHead", "NaiveHead", "SpartonHead", "SparseVectors", "TiledHead", "encode_sparse", "lsr_head"]
