"""Where a training step's time goes: backbone, head, loss, optimizer and the rest, forward and backward together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_modules.callbacks.clock import Mark, StepClock, mark

# In the order in which a step passes them.
MARKS = ("start", "head", "head_end", "loss_end", "rep_grad", "hidden_grad", "backward_end")


class StepParts(StepClock):
    """Logs ``perf/backbone_ms``, ``perf/head_ms``, ``perf/loss_ms``, ``perf/optimizer_ms``, ``perf/other_ms``.

    They are means over the steps and add up to ``perf/step_ms``. Steps, warm-up and reading are those of
    :class:`StepClock`: marks on the stream, nothing waits. A part's time is the stream's, so that it holds what the
    stream waited for the host, too.

    | part | forward | backward |
    | --- | --- | --- |
    | backbone | start of the batch to the head's call | gradient of the head's input to the end of the backward pass |
    | head | the head's call | gradient of its output to the gradient of its input |
    | loss | end of the head's call to the backward pass | until the gradient of the head's output is there |
    | optimizer | | end of the backward pass to the end of the batch: clipping, step, schedule |
    | other | what is left: waiting for data, moving it, the host between two batches | |

    Losses and regularisers are one part. Where weights are shared with the embedding, adding up the two gradients
    belongs to the backbone; under DDP so does what is left of the reduction. ``perf/head_share`` is the head's share of
    the step. Calls of the head on each side apart are one part, from the first call to the end of the last, and back.
    Only steps with gradients down to the head's input are counted: nothing is recorded in validation, and nothing where
    the backbone is frozen.
    """

    _hooks: tuple[torch.utils.hooks.RemovableHandle, ...] = ()

    def _restart(self) -> None:
        super()._restart()
        self._marks: dict[str, Mark] | None = None  # of the batch in hand
        self._device = torch.device("cpu")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._remove_hooks()
        self._device = pl_module.device
        head = pl_module.encoder.head
        self._hooks = (
            head.register_forward_pre_hook(self._before_head), head.register_forward_hook(self._after_head)
        )  # fmt: skip

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._marks = {}
        self._set("start")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._set("loss_end")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._set("backward_end")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._remove_hooks()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._marks = None
        self._remove_hooks()

    def _before_head(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            self._set_first("head")
            self._with_gradient(inputs[0], lambda gradient: self._set("hidden_grad"))

    def _after_head(self, head: nn.Module, inputs: tuple[Tensor, ...], rep: Tensor) -> None:
        if torch.is_grad_enabled():
            self._set("head_end")
            self._with_gradient(rep, lambda gradient: self._set_first("rep_grad"))

    def _set(self, name: str) -> None:
        """Records a moment of the batch in hand; of one that comes again, the last."""
        if self._marks is not None:
            self._marks[name] = mark(self._device)

    def _set_first(self, name: str) -> None:
        if self._marks is not None and name not in self._marks:
            self._set(name)

    def _with_gradient(self, tensor: Tensor, hook: Callable[[Tensor], None]) -> None:
        if self._marks is not None and tensor.requires_grad:
            tensor.register_hook(hook)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = ()

    def _take(self, batch: Any) -> list[Mark] | None:
        marks, self._marks = self._marks, None
        return [marks[name] for name in MARKS] if marks is not None and marks.keys() == set(MARKS) else None

    def _add(self, start: Mark, end: Mark, taken: list[Mark]) -> tuple[float, ...]:
        """Milliseconds of the step, then of backbone, head, loss and optimizer."""
        moments = [*taken, end]
        spans = [a.elapsed_time(b) for a, b in zip(moments, moments[1:], strict=False)]
        backbone, head, loss, loss_back, head_back, backbone_back, optimizer = spans
        return start.elapsed_time(end), backbone + backbone_back, head + head_back, loss + loss_back, optimizer

    def _figures(self, steps: int, sums: tuple[float, ...]) -> dict[str, float]:
        step, *parts = (milliseconds / steps for milliseconds in sums)
        named = dict(zip(("backbone", "head", "loss", "optimizer"), parts, strict=True)) | {"other": step - sum(parts)}
        return {f"perf/{name}_ms": value for name, value in named.items()} | {
            "perf/head_share": named["head"] / max(step, 1e-9)
        }
