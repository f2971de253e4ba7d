"""Times in steady state, ceilings of the card, its clocks and power, peak memory."""

from __future__ import annotations

import contextlib
import gc
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparton.testing import relative_error

QUANTILES = (0.2, 0.5, 0.8)
MIB = 2**20
LEAD = 24  # writes of the buffer, each about 0.07 ms on an H200: more than a backward pass takes the host
TELEMETRY = {"sm_clock_mhz": "clocks.sm", "power_w": "power.draw", "temperature_c": "temperature.gpu"}


class Meter:
    """Measures on one device; holds the buffers that this takes.

    Args:
        device: CUDA, or the CPU (a few calls by the wall clock, no ceilings: for tests).
        warm_s: seconds of products before a ceiling is measured.
        repeat_s: seconds of calls that a time is the quantile of, after half as many that aren't counted.
    """

    def __init__(self, device: torch.device, *, warm_s: float = 2.0, repeat_s: float = 0.6) -> None:
        self.device, self.warm_s, self.repeat_s = device, warm_s, repeat_s
        self.cuda = device.type == "cuda"
        if self.cuda:
            # Larger than any second-level cache; written before each call, so that none finds its inputs there.
            self.flush = torch.empty(256 * MIB, dtype=torch.uint8, device=device)
            self.square = [torch.randn(8192, 8192, device=device).bfloat16() for _ in range(3)]
            self.copied = [torch.ones(512 * MIB, dtype=torch.uint8, device=device) for _ in range(2)]

    def times(
        self, region: Callable[[object], object], prepare: Callable[[], object] = lambda: None
    ) -> tuple[float, float, float]:
        """Quantiles 0.2, 0.5 and 0.8 of the milliseconds that ``region(prepare())`` takes, without ``prepare``.

        The host runs ahead of the device, as in a training step, so that it is the device's time; where that is 0.5 ms or
        more and the host takes even longer, it is the host's.
        """
        if not self.cuda:
            return self._wall_times(region, prepare, calls=3)
        # What is shorter on the device than its launch on the host would be timed with gaps: the buffer is written more
        # often there, which gives the host its lead. Elsewhere once, as the card would cool and clock up meanwhile.
        estimate = self._events(region, prepare, calls=3, fills=LEAD)[-1]
        fills = 1 if estimate >= 0.5 else LEAD
        began = time.perf_counter()
        self._events(region, prepare, calls=3, fills=fills)
        calls = max(3, round(self.repeat_s / ((time.perf_counter() - began) / 3)))
        self._events(region, prepare, calls=max(1, calls // 2), fills=fills)
        return _quantiles(self._events(region, prepare, calls=calls, fills=fills))

    def latency(self, region: Callable[[], object]) -> float:
        """Median milliseconds from a call to its result on an idle device, the host's share included."""
        if not self.cuda:
            return self._wall_times(lambda _: region(), lambda: None, calls=3)[1]

        def call(_: object) -> None:
            region()
            torch.cuda.synchronize()

        return self._wall_times(call, torch.cuda.synchronize, calls=30)[1]

    def ceilings(self) -> tuple[float, float]:
        """TFLOP/s of an 8192^3 bfloat16 product and TB/s of a device copy (read + written); NaN on the CPU."""
        if not self.cuda:
            return math.nan, math.nan
        a, b, c = self.square
        source, target = self.copied
        until = time.perf_counter() + self.warm_s
        while time.perf_counter() < until:
            for _ in range(20):
                torch.mm(a, b, out=c)
            torch.cuda.synchronize()
        product = _quantiles(self._events(lambda _: torch.mm(a, b, out=c), lambda: None, calls=100, fills=1))[1]
        copy = _quantiles(self._events(lambda _: target.copy_(source), lambda: None, calls=50, fills=1))[1]
        return 2 * 8192**3 / product / 1e9, 2 * source.numel() / copy / 1e9

    def peak_memory(self, region: Callable[[], object]) -> float:
        """MiB that a call allocates beyond what is there before it; NaN on the CPU."""
        if not self.cuda:
            return math.nan
        self.tidy()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        region()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated(self.device) - before) / MIB

    def tidy(self) -> None:
        """Frees what failed or finished rows left behind."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    @contextlib.contextmanager
    def telemetry(self) -> Iterator[dict[str, float]]:
        """A dict that holds, afterwards, the medians of clock, power and temperature inside; NaN where unknown."""
        medians = dict.fromkeys(TELEMETRY, math.nan)
        tool = shutil.which("nvidia-smi")
        if not (self.cuda and tool):
            yield medians
            return
        device = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        query = [tool, f"--query-gpu={','.join(TELEMETRY.values())}", "--format=csv,noheader,nounits", "-i", device]
        lines, done = [], threading.Event()

        def sample() -> None:
            while not done.wait(0.2):
                lines.append(subprocess.run(query, capture_output=True, text=True).stdout)

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            yield medians
        finally:
            done.set()
            sampler.join()
            medians.update(parse_telemetry("".join(lines)))

    def _events(
        self, region: Callable[[object], object], prepare: Callable[[], object], *, calls: int, fills: int
    ) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, stop in pairs:
            state = prepare()
            for _ in range(fills):
                self.flush.zero_()
            start.record()
            region(state)
            stop.record()
            del state
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in pairs]

    def _wall_times(
        self, region: Callable[[object], object], prepare: Callable[[], object], *, calls: int
    ) -> tuple[float, float, float]:
        milliseconds = []
        for _ in range(calls + 1):
            state = prepare()
            began = time.perf_counter()
            region(state)
            milliseconds.append((time.perf_counter() - began) * 1e3)
        return _quantiles(milliseconds[1:])


def parse_telemetry(text: str) -> dict[str, float]:
    """Medians of the lines that ``nvidia-smi`` printed, NaN for what the card doesn't say."""
    rows = [line.split(",") for line in text.splitlines() if line.count(",") == len(TELEMETRY) - 1]
    medians = {}
    for name, values in zip(TELEMETRY, zip(*rows, strict=True) if rows else [()] * len(TELEMETRY), strict=True):
        numbers = [float(value) for value in values if value.strip().replace(".", "", 1).isdigit()]
        medians[name] = torch.tensor(numbers).median().item() if numbers else math.nan
    return medians


def errors(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Relative Frobenius errors, one for each tensor."""
    return [relative_error(a.detach(), b) for a, b in zip(got, expected, strict=True)]


def _quantiles(milliseconds: list[float]) -> tuple[float, float, float]:
    return tuple(torch.tensor(milliseconds, dtype=torch.float64).quantile(torch.tensor(QUANTILES).double()).tolist())
