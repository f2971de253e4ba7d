"""The head inside sentence-transformers: a SPLADE model of that library without its (B, S, V) logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sentence_transformers import SparseEncoder
from sentence_transformers.sparse_encoder.modules import SpladePooling
from torch import Tensor, nn

from sparton.functional import lsr_head

ACTIVATIONS = {"relu": "log1p", "log1p_relu": "log1p_log1p"}


class FusedPooling(nn.Module):
    """Decoder and SpladePooling in one call of :func:`sparton.lsr_head`.

    Args:
        decoder: nn.Linear(D, V) of the masked language model; its parameters are used, not copied.
        activation: ``log1p`` or ``log1p_log1p``.
        impl: as in ``lsr_head``.
    """

    def __init__(self, decoder: nn.Linear, *, activation: str, impl: str) -> None:
        super().__init__()
        self.decoder, self.activation, self.impl = decoder, activation, impl

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pools ``token_embeddings`` (B, S, D) under ``attention_mask`` (B, S) into ``sentence_embedding`` (B, V)."""
        features["sentence_embedding"] = lsr_head(
            features["token_embeddings"],
            self.decoder.weight,
            self.decoder.bias,
            features["attention_mask"],
            activation=self.activation,
            impl=self.impl,
        )
        return features

    def get_embedding_dimension(self) -> int:
        """Dimension V of the vectors."""
        return self.decoder.out_features


@contextmanager
def fused_head(model: SparseEncoder, *, impl: str = "auto") -> Iterator[SparseEncoder]:
    """Runs a SPLADE model of sentence-transformers through the fused head, for training or encoding.

    The vectors and gradients stay the same; the logits are never stored. Leave the context before saving the model,
    which puts decoder and pooling back::

        model = SparseEncoder("naver/splade-v3")
        with fused_head(model):
            vectors = model.encode_document(texts)

    Args:
        model: a masked language model followed by max pooling (other modules may stand between).
        impl: ``auto``, ``triton``, ``tiled`` or ``naive``.

    Raises:
        ValueError: if the model is not of that kind.
    """
    language_model, pooling = getattr(model[0], "auto_model", None), model[-1]
    decoder = language_model.get_output_embeddings() if language_model is not None else None
    if not isinstance(decoder, nn.Linear):
        raise ValueError("model: expected a masked language model as first module, got none with a decoder")
    if not isinstance(pooling, SpladePooling) or pooling.pooling_strategy != "max":
        raise ValueError(f"model: expected SpladePooling with max as last module, got {pooling}")
    name = next(name for name, module in language_model.named_modules() if module is decoder)
    parent_name, _, leaf = name.rpartition(".")
    parent = language_model.get_submodule(parent_name)
    last = next(reversed(model._modules))
    setattr(parent, leaf, nn.Identity())
    model._modules[last] = FusedPooling(decoder, activation=ACTIVATIONS[pooling.activation_function], impl=impl)
    try:
        yield model
    finally:
        setattr(parent, leaf, decoder)
        model._modules[last] = pooling
