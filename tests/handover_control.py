"""A Gluon kernel whose partitions share one barrier: what racecheck says of it, it says of Triton's own handover."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier


@gluon.jit
def _wait(out_ptr, ready, value: gl.constexpr):
    mbarrier.wait(ready.index(0), 0)
    gl.store(out_ptr + value, value)


@gluon.jit
def _arrive(out_ptr, ready, value: gl.constexpr):
    mbarrier.arrive(ready.index(0))
    gl.store(out_ptr + value, value)


@gluon.jit
def handover_control_kernel(out_ptr):
    """One program: partitions with the warps and registers of the head's kernel write a number each, one before others.

    The barrier is set up before there are partitions, one of them arrives at it once, the others wait for that: there
    is nothing to race for.
    """
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=1)
    fence_async_shared()
    first: gl.constexpr = 0  # a bare number in a tuple of arguments would become a tensor
    second: gl.constexpr = 1
    third: gl.constexpr = 2
    gl.warp_specialize(
        [(_wait, (out_ptr, ready, first)), (_wait, (out_ptr, ready, second)), (_arrive, (out_ptr, ready, third))],
        [4, 1], [240, 24],
    )  # fmt: skip


def main() -> None:
    """Runs it on the GPU."""
    out = torch.full((3,), -1, dtype=torch.int32, device="cuda")
    handover_control_kernel[(4,)](out, num_warps=4)
    if out.tolist() != [0, 1, 2]:
        raise RuntimeError(f"expected each partition to write its number, got {out.tolist()}")
    print("finished")


if __name__ == "__main__":
    main()
