"""Taking the decoder out of a masked language model, so that a head stands in its place, and putting it back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

log = logging.getLogger(__name__)


class Backbone(NamedTuple):
    """What stands before the head, and the head's parameters.

    Attributes:
        model: masked language model with nn.Identity for its decoder (keep), or the bare encoder (skip).
        decoder: nn.Linear(D, V) whose weight and bias are the model's own parameters; not part of ``model``.
        decoder_name: module name of the decoder in the masked language model; None for skip.
    """

    model: PreTrainedModel
    decoder: nn.Linear
    decoder_name: str | None


def decoder_name(model: PreTrainedModel) -> str:
    """Module name of the decoder, found by identity with ``get_output_embeddings()``.

    Raises:
        ValueError: if the model has none, or one that does not map to the vocabulary (deberta with legacy=false).
    """
    decoder = model.get_output_embeddings()
    vocab_size = model.config.vocab_size
    if not isinstance(decoder, nn.Linear) or decoder.out_features != vocab_size:
        raise ValueError(
            f"model: expected get_output_embeddings() to be a Linear layer onto {vocab_size} words, got {decoder} in "
            f"{type(model).__name__}; choose another masked LM"
        )
    return next(name for name, module in model.named_modules() if module is decoder)


def transform_is_missing(model: PreTrainedModel, decoder: str, missing: set[str]) -> bool:
    """Whether the checkpoint lacks parameters that lie between base model and decoder (the MLM transform)."""
    tied = {id(p) for p in model.get_submodule(decoder).parameters()}
    between = {
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if not name.startswith(f"{model.base_model_prefix}.") and id(p) not in tied
    }
    return bool(between & missing)


def take_decoder(model: PreTrainedModel) -> Backbone:
    """Takes the decoder out of a masked language model and leaves nn.Identity under its module name.

    A second bias beside the decoder (``cls.predictions.bias`` of BERT, when embeddings are not tied) would never get a
    gradient: it becomes the decoder's own.
    """
    name = decoder_name(model)
    parent_name, _, leaf = name.rpartition(".")
    parent, decoder = model.get_submodule(parent_name), model.get_submodule(name)
    beside = getattr(parent, "bias", None)
    if isinstance(beside, nn.Parameter) and decoder.bias is not None and beside.shape == decoder.bias.shape:
        parent.bias = decoder.bias
    setattr(parent, leaf, nn.Identity())
    return Backbone(model, decoder, name)


def skip_transform(model: PreTrainedModel) -> Backbone:
    """The bare encoder, with its input embeddings and a new zero bias as decoder.

    Raises:
        ValueError: if embeddings and last hidden state differ in size (ALBERT, some ELECTRA).
    """
    base = model.base_model
    weight = base.get_input_embeddings().weight
    hidden_size = model.config.hidden_size
    if weight.shape[1] != hidden_size:
        raise ValueError(
            f"model.mlm_transform=skip: expected embeddings as wide as the last hidden state ({hidden_size}), got "
            f"{weight.shape[1]}; use model.mlm_transform=keep"
        )
    decoder = nn.Linear(hidden_size, weight.shape[0], device="meta")
    decoder.weight = weight
    decoder.bias = nn.Parameter(torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device))
    return Backbone(base, decoder, None)


def cut(model: PreTrainedModel, missing_keys: set[str], mlm_transform: str) -> Backbone:
    """Divides a masked language model into what stands before the head and the head's parameters.

    Args:
        model: the whole model, with its decoder.
        missing_keys: parameters that its checkpoint lacks.
        mlm_transform: keep, skip, or auto: skip where the checkpoint lacks the transform, else keep.
    """
    missing = transform_is_missing(model, decoder_name(model), missing_keys)
    if mlm_transform == "skip" or (missing and mlm_transform == "auto"):
        return skip_transform(model)
    if missing:
        log.warning("model.mlm_transform=keep: the checkpoint has no MLM transform, its weights here are random")
    return take_decoder(model)


def position_table(model: nn.Module) -> nn.Embedding | None:
    """The model's table of absolute positions; None where it has none."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            return module
    return None


def first_position(model: nn.Module) -> int:
    """Position id of a text's first token: the RoBERTa family counts from ``padding_idx + 1``, the others from 0."""
    table = position_table(model)
    return 0 if table is None or table.padding_idx is None else table.padding_idx + 1


def longest_input(model: nn.Module) -> int | None:
    """Most tokens that the model's table of absolute positions allows; None where it has no such table."""
    table = position_table(model)
    return None if table is None else table.num_embeddings - first_position(model)


def recompute_layers(model: PreTrainedModel) -> None:
    """Turns gradient checkpointing on: the layers run again in the backward pass instead of keeping activations."""
    if not model.supports_gradient_checkpointing:
        raise ValueError(
            f"model.gradient_checkpointing: expected false, {type(model).__name__} cannot recompute its layers; "
            "set it to false"
        )
    # The older name warns since transformers 5.23; the newer one does not exist in 5.17.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    model.config.use_cache = False  # of decoders; transformers logs a line for every model that leaves it on


def hidden_rows(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """What the decoder would get: (B, S, D)."""
    return decoder_input(model(input_ids=input_ids, attention_mask=attention_mask))


def decoder_input(output: ModelOutput) -> Tensor:
    """What the decoder would get, from the output of a model whose decoder is nn.Identity, or that has none."""
    return output.logits if "logits" in output else output.last_hidden_state


@torch.no_grad()
def final_norm(model: PreTrainedModel) -> str:
    """Module name of the normalisation whose output the decoder gets.

    Multiplying its weight and bias by a number multiplies the decoder's input by it exactly; that is how
    ``logit_scale`` reaches a model that stock tools load. It is found by identity: its output is the model's output.

    Raises:
        ValueError: if the decoder's input comes from anything else.
    """
    outputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _module, _args, output, name=name: outputs.__setitem__(name, output))
        for name, module in model.named_modules()
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm))
    ]
    device = model.get_input_embeddings().weight.device
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        hidden = hidden_rows(model, ids, torch.ones_like(ids))
    finally:
        for hook in hooks:
            hook.remove()
    for name, output in outputs.items():
        if output is hidden:
            return name
    raise ValueError(
        f"calibrate: expected a normalisation right before the decoder, {type(model).__name__} has none to take the "
        "scale; set calibrate.documents=0"
    )


@contextmanager
def decoder_in_place(model: PreTrainedModel, name: str, head: nn.Module) -> Iterator[PreTrainedModel]:
    """The masked language model with its decoder back under ``name``, for as long as the context lasts."""
    weight, bias = head.weight, head.bias
    decoder = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    decoder.weight, decoder.bias = weight, bias
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    setattr(parent, leaf, decoder)
    try:
        yield model
    finally:
        setattr(parent, leaf, nn.Identity())
