"""Packed attention: the backbone runs on the tokens of all texts in one row, without padding.

A registered attention function takes the place of sdpa in the backbone's configuration. Called with ``packed_texts``,
it lets tokens see their own text only; without, it is sdpa. ``packed_texts`` travels as an argument of the model's call,
which every supported family hands down to its attention, so that it is there again when a layer is recomputed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from datamodules.collate import TextBatch
from lightning_modules.backbone import ATTENTION_DROPOUTS
from lightning_modules.decoder import decoder_input

# Families whose position ids and attention are tested against the padded model.
FAMILIES = ("bert", "camembert", "distilbert", "electra", "modernbert", "roberta", "xlm-roberta")
ATTENTION = "sparton_packed"
OPTIONS = ("auto", True, False)
HALF = (torch.bfloat16, torch.float16)
BLOCK = 128  # rows and columns of a FlexAttention block


class Packing(NamedTuple):
    """How the backbone runs.

    Attributes:
        mode: ``varlen`` (torch's variable-length flash attention), ``flex`` (FlexAttention), ``text`` (text by text,
            for the CPU) or ``padded``.
        reason: why it is padded; empty otherwise.
    """

    mode: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.mode} ({self.reason})" if self.reason else self.mode


@dataclass
class PackedTexts:
    """Where the texts lie in a packed row of T tokens, for the attention.

    Attributes:
        cu_seqlens: (B + 1,) int32, text b owns tokens cu_seqlens[b] .. cu_seqlens[b + 1] - 1.
        longest: tokens of the longest text, known on the host.
        mode: varlen, flex or text.
        block_masks: FlexAttention's masks by window, each made by the first layer that needs it.
    """

    cu_seqlens: Tensor
    longest: int
    mode: str
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict)


def attention_dropout(config: PretrainedConfig) -> float:
    """The rate of the attention's dropout, under whichever name the family has it."""
    rates = (getattr(config, name, 0.0) for name in ATTENTION_DROPOUTS)
    return max(float(rate or 0.0) for rate in rates)


def check_option(packed: str | bool) -> None:
    """Raises ValueError unless ``packed`` is auto, true or false."""
    if packed not in OPTIONS:
        raise ValueError(f"model.packed: expected auto, true or false, got {packed!r}; set model.packed=auto")


def obstacle(config: PretrainedConfig, attn_implementation: str | None) -> str:
    """Why this model can't run packed whatever the device; empty where it can."""
    if config.model_type not in FAMILIES:
        return f"{config.model_type} has no packed attention, {', '.join(FAMILIES)} have"
    if attn_implementation not in (None, "sdpa"):
        return f"model.attn_implementation={attn_implementation} asks for another attention"
    if getattr(config, "is_decoder", False):
        return "the model is a decoder, whose attention is causal"
    return ""


def refusal(why: str) -> ValueError:
    """The error for ``packed`` that is True where it can't be."""
    return ValueError(f"model.packed: expected auto or false here, got true: {why}; or set model.packed=auto")


def choose(
    packed: str | bool,
    obstacle: str,
    config: PretrainedConfig,
    *,
    device: torch.device,
    dtype: torch.dtype,
    training: bool,
) -> Packing:
    """How a backbone runs on a device in a dtype; see :meth:`SparseEncoder.packing`.

    Raises:
        ValueError: where ``packed`` is True and it can't.
    """
    if packed is False:
        return Packing("padded", "model.packed=false")
    if not obstacle and device.type == "cpu" and packed == "auto":
        return Packing("padded", "on the CPU")
    dropout = attention_dropout(config)
    if not obstacle and training and dropout:
        obstacle = f"packed attention has no dropout, this model's rate is {dropout:g}, set model.attention_dropout=0"
    mode, obstacle = _mode(config, device, dtype) if not obstacle else ("", obstacle)
    if not obstacle:
        return Packing(mode)
    if packed is True:
        raise refusal(obstacle)
    return Packing("padded", obstacle)


def _mode(config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The kind of attention for a device and dtype, and, where there is none, why."""
    width = config.hidden_size // config.num_attention_heads
    if device.type == "cpu":
        return "text", ""
    if device.type != "cuda":
        return "", f"there is no packed attention on {device.type}"
    if dtype in HALF:
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "", "variable-length attention needs a GPU of compute capability 8.0 or newer"
        if width % 8 or width > 256:
            return "", f"variable-length attention takes heads of 8, 16, ... 256 dimensions, these have {width}"
        return "varlen", ""
    if dtype == torch.float32:
        return ("flex", "") if width >= 16 else ("", f"FlexAttention takes heads of 16 dimensions or more, not {width}")
    return "", f"there is no packed attention in {dtype}"


def training_dtype(precision: str) -> torch.dtype:
    """The dtype that a backbone computes in under a precision of Lightning: ``32-true``, ``bf16-mixed``, ..."""
    kind = precision.partition("-")[0]
    return {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}.get(kind, torch.float32)


def prepare(model: PreTrainedModel) -> None:
    """Puts the attention that can run packed into a backbone; its padded calls are sdpa's, as before."""
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.config._attn_implementation = ATTENTION  # transformers leaves this field out of what it saves


def pooled_rows(model: PreTrainedModel, batches: Sequence[TextBatch], mode: str, first_position: int) -> Tensor:
    """Hidden rows that the head pools over, (N, D), of several batches in one call of the backbone.

    Args:
        model: prepared backbone.
        batches: one or more, on the model's device.
        mode: varlen, flex or text.
        first_position: position id of a text's first token in this model.
    """
    ids, positions = (_cat([getattr(batch, name) for batch in batches]) for name in ("token_ids", "token_positions"))
    bounds, pooled, tokens = [], [], 0
    for batch in batches:
        bounds.append(batch.token_cu_seqlens[bool(bounds) :] + tokens)
        pooled.append(batch.pooled_tokens + tokens)
        tokens += batch.token_ids.shape[0]
    texts = PackedTexts(_cat(bounds), max(batch.longest for batch in batches), mode)
    positions = position_ids(ids, positions, first_position)[None]
    output = model(
        input_ids=ids[None],
        position_ids=positions,
        attention_mask=positions[None, None],  # transformers builds no mask where it gets one of four dimensions
        packed_texts=texts,
    )
    hidden = decoder_input(output).squeeze(0)
    everything = sum(index.shape[0] for index in pooled) == tokens
    return hidden if everything else hidden.index_select(0, _cat(pooled))


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def position_ids(token_ids: Tensor, token_positions: Tensor, first_position: int) -> Tensor:
    """Position ids (T,) int64 of packed tokens as the family counts them: anew in each text.

    The RoBERTa family starts at ``padding_idx + 1``, gives a padding token ``padding_idx`` and does not count it, also
    where one stands in a text as a word.
    """
    if first_position == 0:
        return token_positions
    padding = first_position - 1
    counted = token_ids != padding
    so_far = counted.cumsum(0)
    text_start = torch.arange(len(token_ids), device=token_ids.device) - token_positions
    before = (so_far - counted.long()).index_select(0, text_start)
    return (so_far - before) * counted + padding


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packed_texts: PackedTexts | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: query, key and value (B, H, S, D) to (B, S, H, D) and no weights.

    With ``packed_texts`` B is 1, S the tokens of all texts, and ``attention_mask`` and dropout (0, see :func:`choose`)
    are not used. ``sliding_window`` is one more than the tokens seen on each side, as ModernBERT counts.
    """
    if packed_texts is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **others
        )
    window = None if sliding_window is None else sliding_window - 1
    return _KINDS[packed_texts.mode](query, key, value, packed_texts, scaling, window), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, texts: PackedTexts, scale: float | None, window: int | None
) -> Tensor:
    # Of what the projections wrote, (S, H, D), transformers handed over a transposed view: this is no copy.
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    sides = (-1, -1) if window is None else (window, window)
    bounds, longest = texts.cu_seqlens, texts.longest
    return varlen_attn(query, key, value, bounds, bounds, longest, longest, scale=scale, window_size=sides)[None]


def _flex(
    query: Tensor, key: Tensor, value: Tensor, texts: PackedTexts, scale: float | None, window: int | None
) -> Tensor:
    if window not in texts.block_masks:
        texts.block_masks[window] = block_mask(texts.cu_seqlens, query.shape[2], window)
    mask = texts.block_masks[window]
    return _compiled_flex()(query, key, value, block_mask=mask, scale=scale).transpose(1, 2)


def _text(
    query: Tensor, key: Tensor, value: Tensor, texts: PackedTexts, scale: float | None, window: int | None
) -> Tensor:
    lengths = texts.cu_seqlens.diff().tolist()
    outputs = []
    for parts in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True):
        near = None
        if window is not None:
            places = torch.arange(parts[0].shape[2], device=query.device)
            near = (places[:, None] - places).abs() <= window
        outputs.append(F.scaled_dot_product_attention(*parts, attn_mask=near, scale=scale))
    return torch.cat(outputs, dim=2).transpose(1, 2)


_KINDS: dict[str, Callable[..., Tensor]] = {"varlen": _varlen, "flex": _flex, "text": _text}


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention, dynamic=True)


def block_mask(cu_seqlens: Tensor, tokens: int, window: int | None) -> BlockMask:
    """FlexAttention's mask of packed texts, made from their bounds: no (T, T) matrix and no wait for the device.

    A token sees the tokens ``low .. high - 1``; both rise from token to token, so that a block of rows sees a range of
    blocks.

    Args:
        cu_seqlens: (B + 1,) int32.
        tokens: T, known on the host.
        window: tokens seen on each side, None for the whole text.
    """
    rows = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    text = torch.searchsorted(cu_seqlens[1:], rows, right=True)
    low, high = cu_seqlens[text], cu_seqlens[text + 1]
    if window is not None:
        low, high = torch.maximum(low, rows - window), torch.minimum(high, rows + window + 1)
    first, last = low[::BLOCK] // BLOCK, high[BLOCK - 1 :: BLOCK]
    if tokens % BLOCK:
        last = torch.cat([last, high[-1:]])
    count = (last - 1) // BLOCK - first + 1
    blocks = torch.arange(len(first), dtype=torch.int32, device=rows.device)
    indices = (first[:, None] + blocks) % len(first)

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return (column >= low[row]) & (column < high[row])

    return BlockMask.from_kv_blocks(
        count[None, None], indices[None, None], BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(tokens, tokens)
    )
