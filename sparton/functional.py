"""lsr_head(): checks its input once and dispatches to one of the implementations."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from sparton.naive import naive_head
from sparton.ops import fused_head
from sparton.packing import pack

ACTIVATIONS = ("log1p", "log1p_log1p")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IMPLS = ("auto", "triton", "tiled", "naive")
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(device: torch.device) -> str | None:
    """Says why the Triton kernels can't run on a device; None where they can."""
    if not HAS_TRITON:
        return "impl='triton' needs the package triton, which is not installed (Linux only): use impl='tiled'"
    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return (
            f"impl='triton' needs tensors on a CUDA device, got {device.type}: move them there, use impl='auto', "
            "or set TRITON_INTERPRET=1 to run the kernels slowly in Triton's interpreter"
        )
    return None


def lsr_head(
    hidden: Tensor,  # (B, S, D) or (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    attention_mask: Tensor | None = None,  # (B, S)
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    max_seqlen: int | None = None,
    activation: str = "log1p",
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """Computes ``rep[b, v] = max_s log1p(relu(hidden[b, s] . weight[v] + bias[v]))``, the SPLADE-max head.

    Equivalent PyTorch, for a padded batch::

        logits = hidden @ weight.T + bias
        rep = (logits.relu().log1p() * attention_mask[..., None]).max(dim=1).values

    SPLADE v2 (Formal et al., arXiv 2109.10086, eq. 2); fused as in Sparton (arXiv 2603.25011). "triton" and "tiled"
    never store a (B, S, V) tensor: they keep the factor (2 bytes for 16-bit operands, else 4) and the position (1, 2 or
    4) of each of the B * V outputs. Their backward pass is deterministic, bit for bit.

    Args:
        hidden: padded (B, S, D), or packed (N, D) with ``cu_seqlens``; fp32, bf16, fp16 (naive, tiled: float64).
        weight: (V, D), may have another dtype than hidden: the product runs in autocast's dtype or else hidden's, its
            sums in float32, and the gradient comes in weight's own dtype. Products of float32 run in TF32 on CUDA where
            ``torch.set_float32_matmul_precision`` or ``torch.backends.cuda.matmul.fp32_precision`` allows it, else
            (from sm_80 on) as three products of TF32, whose error is below that of ``torch.matmul``.
        bias: (V,) or None.
        attention_mask: (B, S) bool or integers, any pattern; every number but 0 keeps its token, and what is masked is
            never read, not even a NaN. To leave tokens such as [CLS] out of the maximum, mask them here as well, or
            leave their rows out of a packed ``hidden``.
        cu_seqlens: (B + 1,) int32 or int64, ascending from 0: text b owns rows ``cu_seqlens[b]:cu_seqlens[b + 1]``.
        max_seqlen: upper bound of the lengths, an int on the host; S or N without it.
        activation: "log1p", or "log1p_log1p" (the ``log1p_relu`` of sentence-transformers).
        out_dtype: of the result, one of those of hidden; without it, the dtype that the product runs in. More bits than
            16-bit operands have are not all there: "triton" keeps about 15 of a logit (it is too small by 2^-15 of it
            at most), and the digits after them depend on the rest of the batch.
        impl: "auto" (triton on CUDA, tiled elsewhere), "triton", "tiled" or "naive".

    Returns:
        (B, V), non-negative; an infinite logit gives infinity. A text without a token gives zeros and gets no gradient.
        A tie goes to the lowest position. Differentiable once; "naive" is for second derivatives.

    Raises:
        ValueError, TypeError: for shapes, dtypes, devices or values outside of these, and for an implementation that
            can't run here. Values of ``cu_seqlens`` are checked on the CPU, on CUDA only with ``SPARTON_CHECK=1``.
    """
    _check_layout(hidden, attention_mask, cu_seqlens, max_seqlen)
    _check_tensors(hidden, weight, bias)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    out_dtype = dtype if out_dtype is None else out_dtype
    if out_dtype not in DTYPES:
        raise TypeError(f"out_dtype: expected float32, bfloat16, float16, float64 or None, got {out_dtype}")
    impl = _resolve(impl, hidden.device, dtype)
    if impl == "naive":
        return naive_head(
            hidden, weight, bias, attention_mask, cu_seqlens, max_seqlen, activation, dtype, out_dtype
        )
    if cu_seqlens is None:
        max_seqlen = hidden.shape[1]
        hidden, cu_seqlens = pack(hidden, attention_mask)
    elif max_seqlen is None:
        max_seqlen = len(hidden)
    leaves = (hidden, weight) if bias is None else (hidden, weight, bias)
    trains = torch.is_grad_enabled() and any(leaf.requires_grad for leaf in leaves)
    return fused_head(hidden, weight, bias, cu_seqlens, max_seqlen, activation, dtype, out_dtype, impl, trains)


def _resolve(impl: str, device: torch.device, dtype: torch.dtype) -> str:
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "auto":
        impl = "triton" if device.type == "cuda" and HAS_TRITON else "tiled"
    if impl == "triton":
        reason = why_not_triton(device)
        if reason is None and dtype == torch.float64:
            reason = "impl='triton' runs in fp32, bf16 and fp16, got float64: use impl='tiled' or impl='naive'"
        if reason is not None:
            raise ValueError(reason)
    return impl


def _check_tensors(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: expected a float32, bfloat16, float16 or float64 tensor, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: expected device {hidden.device} like hidden, got {tensor.device}: move it there")
    if hidden.is_meta:
        raise ValueError("hidden: expected values, got a tensor on device meta, which has none: move it to a real one")
    if hidden.shape[-1] == 0:
        raise ValueError(f"hidden: expected at least one column, got {tuple(hidden.shape)}: check its last dimension")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight: expected (V, D) with D = {hidden.shape[-1]} as in hidden, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias: expected ({weight.shape[0]},) as weight has rows, got {tuple(bias.shape)}")


def _check_layout(
    hidden: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> None:
    if cu_seqlens is None:
        if hidden.ndim != 3:
            raise ValueError(
                f"hidden: expected (B, S, D), or (N, D) together with cu_seqlens, got {tuple(hidden.shape)}: pass both"
            )
        if max_seqlen is not None:
            raise ValueError("max_seqlen goes with cu_seqlens, got it for a padded batch: leave it out")
        if attention_mask is not None:
            _check_mask(attention_mask, hidden)
        return
    if attention_mask is not None:
        raise ValueError("attention_mask and cu_seqlens exclude each other, got both: packed rows need no mask")
    if hidden.ndim != 2:
        raise ValueError(f"hidden: expected packed rows (N, D) with cu_seqlens, got {tuple(hidden.shape)}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens: expected (B + 1,) int32 or int64, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if cu_seqlens.device != hidden.device:
        raise ValueError(f"cu_seqlens: expected device {hidden.device} like hidden, got {cu_seqlens.device}")
    if max_seqlen is not None and (not isinstance(max_seqlen, (int, torch.SymInt)) or max_seqlen < 0):
        raise ValueError(f"max_seqlen: expected an int >= 0, got {max_seqlen!r}: pass int() of the longest text's rows")
    checked = cu_seqlens.device.type == "cpu" or os.environ.get("SPARTON_CHECK") == "1"
    if checked and not torch.compiler.is_compiling():
        _check_offsets(cu_seqlens.tolist(), hidden.shape[0], max_seqlen)


def _check_mask(attention_mask: Tensor, hidden: Tensor) -> None:
    if attention_mask.shape != hidden.shape[:2]:
        raise ValueError(
            f"attention_mask: expected {tuple(hidden.shape[:2])} as in hidden, got {tuple(attention_mask.shape)}"
        )
    if attention_mask.is_floating_point():
        raise TypeError(f"attention_mask: expected bool or integers of 0 and 1, got {attention_mask.dtype}")
    if attention_mask.device != hidden.device:
        raise ValueError(
            f"attention_mask: expected device {hidden.device} like hidden, got {attention_mask.device}: move it there"
        )


def _check_offsets(offsets: list[int], rows: int, max_seqlen: int | None) -> None:
    lengths = [stop - start for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
    if offsets[0] != 0 or offsets[-1] > rows or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens: expected ascending offsets from 0 to at most the {rows} rows of hidden, got {offsets[:8]}..."
            if len(offsets) > 8
            else f"cu_seqlens: expected ascending offsets from 0 to at most the {rows} rows of hidden, got {offsets}"
        )
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"max_seqlen: expected an upper bound of the lengths, got {max_seqlen} with a text of {max(lengths)} rows"
        )
