"""torch.library registration of the head: schema, fake, autograd; one operator pair for Triton and the tiles."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from sparton.tiled import factor_dtype, position_dtype, sum_dtype, tiled_backward, tiled_forward


def _compute_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    activation: str,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    impl: str,
    need_positions: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the head on packed rows.

    Args:
        hidden: (N, D); weight: (V, D); bias: (V,) or None; cu_seqlens: (B + 1,) int32 or int64.
        max_seqlen: upper bound of the lengths; decides the dtype of the positions.
        dtype: of the product's operands; out_dtype: of the output.
        impl: "triton" or "tiled".
        need_positions: False where no gradient will be asked for: the tiles then look for the maximum alone.

    Returns:
        ``out`` (B, V) in ``out_dtype``; ``factor`` (B, V) in :func:`~sparton.tiled.factor_dtype`, the derivative of
        the output by the maximal logit, taken before any rounding; ``positions`` (B, V), the maximum's place in its
        sequence, in the smallest integer that fits. The last two and the inputs are all that the backward pass keeps.
    """
    arguments = (hidden, weight, bias, cu_seqlens, max_seqlen, activation, dtype, out_dtype)
    if impl == "triton":
        from sparton.kernels.forward import triton_forward

        # Triton launches on the current GPU, whichever its tensors are on.
        with torch.cuda.device_of(hidden):
            return triton_forward(*arguments)
    # The dtypes are settled; autocast must not settle them again inside.
    with torch.autocast(hidden.device.type, enabled=False):
        return tiled_forward(*arguments, need_positions=need_positions)


lsr_forward = torch.library.custom_op("sparton::lsr_forward", _compute_forward, mutates_args=())


@lsr_forward.register_fake
def _(hidden, weight, bias, cu_seqlens, max_seqlen, activation, dtype, out_dtype, impl, need_positions=True):
    shape = (cu_seqlens.shape[0] - 1, weight.shape[0])
    return (
        hidden.new_empty(shape, dtype=out_dtype),
        hidden.new_empty(shape, dtype=factor_dtype(dtype)),
        hidden.new_empty(shape, dtype=position_dtype(max_seqlen)),
    )


def _compute_backward(
    grad: Tensor,
    factor: Tensor,
    positions: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of the forward pass, deterministically.

    Args:
        grad: (B, V), the gradient by ``out``; the others as given to and saved by the forward pass.
        need_hidden, need_weight, need_bias: what is not needed is not computed.

    Returns:
        Gradients by hidden (N, D), weight (V, D) and bias (V,), each in the dtype of its tensor and summed in float32;
        an empty tensor for what is not needed.
    """
    need = (need_hidden, need_weight, need_bias)
    if impl == "triton":
        from sparton.kernels.backward import triton_backward

        with torch.cuda.device_of(hidden):
            grads = triton_backward(grad, factor, positions, hidden, weight, bias, cu_seqlens, max_seqlen, need)
    else:
        with torch.autocast(hidden.device.type, enabled=False):
            # Not a plain product: an infinite gradient of an inactive entry must stay without effect.
            dtype = sum_dtype(factor.dtype)
            g = torch.where(factor > 0, grad.to(dtype) * factor.to(dtype), 0)
            d_hidden, d_weight = tiled_backward(g, positions, hidden, weight, cu_seqlens, need[:2])
            grads = (d_hidden, d_weight, g.sum(0).to(bias.dtype) if need_bias else None)
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in grads)


lsr_backward = torch.library.custom_op("sparton::lsr_backward", _compute_backward, mutates_args=())


@lsr_backward.register_fake
def _(grad, factor, positions, hidden, weight, bias, cu_seqlens, max_seqlen, need_hidden, need_weight, need_bias, impl):
    wanted = ((hidden, need_hidden), (weight, need_weight), (bias, need_bias))
    return tuple(
        tensor.new_empty(tensor.shape) if need else hidden.new_empty(0) for tensor, need in wanted
    )


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError(
        "lsr_head: expected gradients that nothing differentiates, got a backward pass through them: the heads with "
        "kernels or tiles have no second derivative, use impl='naive'"
    )


lsr_backward.register_autograd(_no_second_derivative)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, cu_seqlens, max_seqlen, *_, impl, _ = inputs
    _, factor, positions = output
    ctx.save_for_backward(factor, positions, hidden, weight, bias, cu_seqlens)
    ctx.set_materialize_grads(False)
    ctx.max_seqlen, ctx.impl = max_seqlen, impl


def _gradients(ctx, grad, backward):
    if grad is None:
        return (None,) * 10
    need = [bool(wanted) for wanted in ctx.needs_input_grad[:3]]
    factor, positions, hidden, weight, bias, cu_seqlens = ctx.saved_tensors
    grads = backward(grad, factor, positions, hidden, weight, bias, cu_seqlens, ctx.max_seqlen, *need, ctx.impl)
    return (*(value if wanted else None for value, wanted in zip(grads, need, strict=True)), *(None,) * 7)


lsr_forward.register_autograd(
    lambda ctx, grad, _grad_factor, _grad_positions: _gradients(ctx, grad, lsr_backward), setup_context=_setup_context
)


class _EagerHead(torch.autograd.Function):
    """The operator pair without the dispatcher, whose Python takes the host as long as the launches do."""

    @staticmethod
    def forward(ctx, *arguments):
        outputs = _compute_forward(*arguments)
        _setup_context(ctx, arguments, outputs)
        return outputs[0]

    @staticmethod
    def backward(ctx, grad):
        # Gradients are recorded for create_graph=True: the operator says that it has none itself.
        watched = torch.is_grad_enabled() or _is_watched()
        return _gradients(ctx, grad, lsr_backward if watched else _compute_backward)


# Private to torch: without them the operator is always taken, which is slower and no less right.
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def _is_watched() -> bool:
    """Whether a compiler, a dispatch mode or a functorch transform looks at the operators that run."""
    return torch.compiler.is_compiling() or _dispatch_modes() > 0 or _transforms_active()


def fused_head(hidden: Tensor, *arguments) -> Tensor:
    """The output of the operator ``lsr_forward`` for its arguments, with gradients by hidden, weight and bias.

    Whoever watches operators, and tensors that stand for others, get the operator; plain tensors its function.
    """
    tensors = (hidden, *(value for value in arguments if isinstance(value, Tensor)))
    if _is_watched() or any(type(tensor) not in (Tensor, Parameter) for tensor in tensors):
        return lsr_forward(hidden, *arguments)[0]
    return _EagerHead.apply(hidden, *arguments)
