"""Learned sparse retrieval heads that never store the logits: torch alone, Triton on demand."""

from sparton.functional import lsr_head
from sparton.heads import CompiledHead, NaiveHead, SpartonHead, TiledHead

__all__ = ["CompiledHead", "NaiveHead", "SpartonHead", "TiledHead", "lsr_head"]
