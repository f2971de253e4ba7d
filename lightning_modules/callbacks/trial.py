"""Tries of the training step before training: whether a batch fits the device's memory. They leave no trace."""

from __future__ import annotations

import gc
import time
from contextlib import ExitStack
from typing import NamedTuple

import torch
from lightning import LightningModule, Trainer
from torch import Tensor

from datamodules.collate import TrainBatch
from lightning_modules.callbacks.memory import MIB
from lightning_modules.callbacks.resume import get_random_states, set_random_states
from lightning_modules.errors import drop_frames, is_out_of_memory
from lightning_modules.overrides import one_line
from sparton.losses import local_sums

STEPS = 2  # the first allocates the optimizer's states, the second runs beside them


class Outcome(NamedTuple):
    """What came of a try; peaks are None where the device's allocator counts none (the CPU)."""

    fits: bool
    peak_allocated_mib: float | None
    peak_reserved_mib: float | None
    seconds: float
    error: str | None


class Trials:
    """Runs the training step on given batches, to the end or until the memory is spent.

    Used as a context manager around all tries. Callbacks and loggers hear nothing of them. After each try and at the
    end everything that a step changes is what it was, bit for bit: weights and buffers (kept on the CPU meanwhile),
    random states. At the end optimizer and scheduler are new ones, as the strategy sets them up. In float16 the tries
    don't scale: a scaler that meets an infinity would leave out the step that allocates the optimizer's states.

    A try calls the LightningModule itself, not what the strategy wraps around it, and sums of the losses stay local:
    a process that runs out of memory leaves no other one waiting. DDP's buckets are there before the first try, and
    stay.

    Args:
        trainer: in ``fit``, its module on the device, the optimizer not used yet.
        module: the trainer's module.
    """

    def __init__(self, trainer: Trainer, module: LightningModule) -> None:
        self.trainer = trainer
        self.module = module
        self._exit = ExitStack()

    def __enter__(self) -> Trials:
        module, trainer = self.module, self.trainer
        self._parameters = [(parameter, _kept(parameter)) for parameter in module.parameters()]
        self._buffers = [
            (owner, name, buffer, _kept(buffer))
            for owner in module.modules()
            for name, buffer in owner.named_buffers(recurse=False)
        ]
        self._random = get_random_states()
        self._scaler = getattr(trainer.precision_plugin, "scaler", None)
        if self._scaler is not None:
            trainer.precision_plugin.scaler = None
        self._callbacks, trainer.callbacks = trainer.callbacks, []
        module.log = module.log_dict = lambda *args, **kwargs: None
        self._exit.enter_context(local_sums())
        self._free()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit.close()
        del self.module.log, self.module.log_dict
        self.trainer.callbacks = self._callbacks
        if self._scaler is not None:
            self.trainer.precision_plugin.scaler = self._scaler
        self._restore()
        self.trainer.strategy.setup_optimizers(self.trainer)

    def run(self, batch: TrainBatch) -> Outcome:
        """Takes ``STEPS`` training steps on a batch; errors other than of memory are raised."""
        device, failure = self.module.device, None
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        started = time.perf_counter()
        try:
            self._steps(batch)
            if cuda:
                torch.cuda.synchronize(device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = one_line(error)
            drop_frames(error)
        # Outside of the except block: there the error, and with it every tensor of its frames, would still be alive.
        seconds = time.perf_counter() - started
        peaks = (None, None)
        if cuda:
            peaks = torch.cuda.max_memory_allocated(device) / MIB, torch.cuda.max_memory_reserved(device) / MIB
        self._restore()
        self._free()
        return Outcome(failure is None, *peaks, seconds, failure)

    def _steps(self, batch: TrainBatch) -> None:
        """Steps as Lightning's loop takes them: gradients of the last step live until the next backward pass."""
        module, trainer, strategy = self.module, self.trainer, self.trainer.strategy
        strategy.setup_optimizers(trainer)
        (optimizer,) = strategy.optimizers
        batch = strategy.batch_to_device(batch)
        for step in range(STEPS):

            def closure(accumulates: bool = step > 0 and trainer.accumulate_grad_batches > 1) -> Tensor:
                with trainer.precision_plugin.train_step_context():
                    loss = module.training_step(batch, 0)
                if not accumulates:
                    optimizer.zero_grad()
                strategy.backward(loss, optimizer)
                return loss.detach()

            trainer.precision_plugin.optimizer_step(optimizer, model=module, closure=closure)
            module.on_train_batch_end(None, batch, 0)

    @torch.no_grad()
    def _restore(self) -> None:
        self.module.on_train_batch_end(None, None, 0)  # lets go of the representations
        self.trainer.strategy.optimizers, self.trainer.strategy.lr_scheduler_configs = [], []
        for parameter, kept in self._parameters:
            parameter.grad = None
            parameter.copy_(kept)
        for owner, name, buffer, kept in self._buffers:
            setattr(owner, name, buffer.copy_(kept))
        set_random_states(self._random)

    def _free(self) -> None:
        gc.collect()
        if self.module.device.type == "cuda":
            torch.cuda.empty_cache()


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
