"""BatchFinder: the largest batch whose whole training step fits the device's memory or a limit; training takes it."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_modules.callbacks.trial import Outcome, Trials

GIB = 2**30
TOLERANCE = 0.03  # the search ends once the smallest failing batch is within so much of the largest that fits
CSV_NAME = "find_batch.csv"


def largest_that_fits(start: int, bound: int, fits: Callable[[int], bool]) -> tuple[int, int | None]:
    """Returns the largest amount that fits and the smallest that doesn't, by doubling or halving and then bisection.

    Args:
        start: the first amount to try.
        bound: the largest amount to try.
        fits: tries an amount; what fits is taken to fit in smaller amounts too.

    Returns:
        0 where even 1 does not fit, None where ``bound`` does; else they are within ``TOLERANCE``, or 1, of each other.
    """
    fitting, failing, size = 0, math.inf, min(start, bound)
    while fitting < bound and failing - fitting > max(1, int(TOLERANCE * fitting)):
        if fits(size):
            fitting = size
        else:
            failing = size
        if failing == math.inf:
            size = min(2 * fitting, bound)
        else:
            size = (fitting + failing) // 2
    return fitting, None if failing == math.inf else failing


class BatchFinder(Callback):
    """Before training, finds the largest batch that fits, and makes the training batches so large.

    Each try takes two whole training steps (forward and backward pass, clipping, optimizer) on the costliest batch of
    the first epoch, were its batches so large: the one with the most tokens or, where backbone or head pads, with the
    longest pair. It begins with the memory that training begins with; what it changed is put back, so that the run is
    the same as one with the found batch given. With several processes the smallest of their answers counts. Where the
    data has a budget of tokens, the budget is what is found.

    The tries leave a margin: batches of later epochs may have more tokens, and what the allocator can't use between
    its blocks differs from step to step. Without one, a batch may run out of memory steps after it fitted.

    The limit is one of PyTorch's allocator; CUDA's own context comes on top. One that is given holds until training
    ends; else tries may take what the device has free now, and training what it can get. Only CUDA has such an
    allocator: on the CPU a process that takes too much is killed, so the finder refuses to run there.

    Args:
        output_dir: where ``find_batch.csv`` goes, a line for each try.
        enabled: False does nothing.
        limit_gib: GiB that the process may take; None: what the device has free.
        margin: share of the limit that the tries leave free, in [0, 1).
        ckpt_path: the checkpoint that the run resumes from: there must be none, as its position counts batches.

    Raises:
        ValueError: for an argument outside of these, and without CUDA; when training starts, where even the smallest
            batch doesn't fit and where the finder can't run.
    """

    DEVICES = ("cuda",)

    def __init__(
        self,
        output_dir: str | Path,
        *,
        enabled: bool = False,
        limit_gib: float | None = None,
        margin: float = 0.05,
        ckpt_path: str | None = None,
    ) -> None:
        if not isinstance(enabled, bool):
            raise ValueError(f"find_batch: expected true or false, got {enabled!r}; a limit goes to batch.limit_gib=")
        number = isinstance(limit_gib, (int, float)) and not isinstance(limit_gib, bool)
        if limit_gib is not None and not (number and 0 < limit_gib < math.inf):
            raise ValueError(
                f"batch.limit_gib: expected GiB > 0, or null for the whole device, got {limit_gib!r}; use 24 or so"
            )
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 <= margin < 1:
            raise ValueError(
                "callbacks.batch_finder.margin: expected a share of the limit in [0, 1), got"
                f" {margin!r}; use 0.05 or so"
            )
        if enabled and ckpt_path:
            raise ValueError(
                f"find_batch=true: expected a run from its start, got ckpt_path={ckpt_path}; a checkpoint counts"
                " batches, so resume with find_batch=false and the run's own batch (find_batch/... in its summary.json)"
            )
        if enabled and not torch.cuda.is_available():  # before anything is evaluated
            self._check_device("cpu")
        self.output_dir = Path(output_dir)
        self.enabled = enabled
        self.limit_gib = limit_gib
        self.margin = margin
        self._limited: torch.device | None = None
        self._summary: dict[str, int | float | None] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Searches; the module is on its device, processes are connected, no batch has been loaded."""
        if not self.enabled:
            return
        self._check(trainer, pl_module)
        data, started = trainer.datamodule, time.perf_counter()
        unit, bound = data.batch_unit, data.largest_batch
        limit = self._limit(pl_module.device)
        room = f"within {_gib(limit)}" + (f", {self.margin:g} of it left free" if self.margin else "")
        self._say(trainer, f"find_batch: from {data.batch_amount} ({_words(unit)}) on, {room}")
        self._allow(pl_module.device, limit, 1 - self.margin)
        with trainer.precision_plugin.train_step_context():  # how the backbone runs depends on autocast
            padded = pl_module.encoder.packed == "padded" or pl_module.encoder.head.pads
        tries: dict[int, Outcome] = {}

        with Trials(trainer, pl_module) as trials:

            def fits(amount: int) -> bool:
                outcome = trials.run(data.costliest_batch(amount, padded=padded))
                everywhere = trainer.strategy.reduce_boolean_decision(outcome.fits)
                if outcome.fits and not everywhere:
                    outcome = outcome._replace(fits=False, error="another process is out of memory")
                tries[amount] = outcome
                if trainer.is_global_zero:
                    self._write(unit, tries)
                return everywhere

            found, failed = largest_that_fits(data.batch_amount, bound, fits)
            if not found:
                raise ValueError(
                    f"find_batch=true: expected memory for a batch of one pair, got {tries[1].error}; raise"
                    " batch.limit_gib, lower callbacks.batch_finder.margin, shorten the texts or set"
                    " model.gradient_checkpointing=true"
                )
            data.set_batch(found)
            self._allow(pl_module.device, self.limit_gib)
            trainer.fit_loop._combined_loader = None  # as Lightning's own finder: the loader is asked for anew
        self._summary = {
            f"find_batch/{unit}": found, "find_batch/limit_gib": limit, "find_batch/margin": self.margin,
            "find_batch/tries": len(tries),
        }  # fmt: skip
        self._summary |= {"find_batch/failed": failed} if failed else {}
        best = tries[found]
        if best.peak_reserved_mib is not None:
            self._summary["find_batch/peak_allocated_mib"] = best.peak_allocated_mib
            self._summary["find_batch/peak_reserved_mib"] = best.peak_reserved_mib
        self._summary["find_batch/seconds"] = seconds = time.perf_counter() - started
        for logger in trainer.loggers:
            logger.log_hyperparams({f"find_batch/{unit}": found})
        peak = "" if best.peak_reserved_mib is None else f", peak {best.peak_reserved_mib / 1024:.2f} GiB reserved"
        end = f"{failed} does not fit" if failed else f"all that an epoch has for {trainer.world_size} process(es)"
        self._say(
            trainer,
            f"find_batch: {found} ({_words(unit)}){peak}; {end}; {len(tries)} tries, {seconds:.0f} s;"
            f" {data.steps_per_epoch:,} batches an epoch",
        )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._lift_limit()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._lift_limit()

    def summary(self) -> dict[str, int | float | None]:
        """Returns what was found, by name; empty when nothing was searched."""
        return dict(self._summary)

    def _check(self, trainer: Trainer, module: LightningModule) -> None:
        self._check_device(module.device.type)
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                "find_batch=true: expected one device or trainer.strategy=ddp, got"
                f" {type(trainer.strategy).__name__}; set batch.size= there"
            )

    def _check_device(self, kind: str) -> None:
        if kind not in self.DEVICES:
            raise ValueError(
                f"find_batch=true: expected a CUDA device, whose allocator says what fits, got {kind};"
                " set batch.size= there"
            )

    def _limit(self, device: torch.device) -> float | None:
        """The GiB that this process may take, None where nobody counts."""
        if device.type != "cuda":
            return self.limit_gib
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        available = free + torch.cuda.memory_reserved(device)
        if self.limit_gib is None:
            return available / GIB
        if self.limit_gib * GIB > available:
            raise ValueError(
                f"batch.limit_gib: expected at most the {available / GIB:.2f} GiB that are free, got {self.limit_gib};"
                " batch.limit_gib=null takes them all"
            )
        return float(self.limit_gib)

    def _allow(self, device: torch.device, limit_gib: float | None, share: float = 1.0) -> None:
        """Lets the allocator take a share of so many GiB, or all that there is."""
        self._lift_limit()
        if device.type == "cuda" and limit_gib is not None:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share * limit_gib * GIB / total), device)
            self._limited = device

    def _lift_limit(self) -> None:
        if self._limited is not None:
            torch.cuda.set_per_process_memory_fraction(1.0, self._limited)
            self._limited = None

    def _write(self, unit: str, tries: dict[int, Outcome]) -> None:
        """Writes all tries so far: a search that is killed leaves them too."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with (self.output_dir / CSV_NAME).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([unit, *Outcome._fields])
            writer.writerows([amount, *outcome] for amount, outcome in tries.items())

    @staticmethod
    def _say(trainer: Trainer, line: str) -> None:
        if trainer.is_global_zero:
            print(line, flush=True)


def _words(unit: str) -> str:
    return "pairs" if unit == "size" else "tokens"


def _gib(limit: float | None) -> str:
    return "the device's memory" if limit is None else f"{limit:.2f} GiB"
