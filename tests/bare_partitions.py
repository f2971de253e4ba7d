"""A Gluon kernel whose partitions share no memory: what racecheck says of it, it says of Triton's own handover."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _store(out_ptr, value: gl.constexpr):
    gl.store(out_ptr + value, value)


@gluon.jit
def bare_partitions_kernel(out_ptr):
    """One program: three partitions, with the warps and registers of the head's kernel, write a number each."""
    first: gl.constexpr = 0  # a bare number in a tuple of arguments would become a tensor
    second: gl.constexpr = 1
    third: gl.constexpr = 2
    gl.warp_specialize(
        [(_store, (out_ptr, first)), (_store, (out_ptr, second)), (_store, (out_ptr, third))], [4, 1], [240, 24]
    )


def main() -> None:
    """Runs it on the GPU."""
    out = torch.full((3,), -1, dtype=torch.int32, device="cuda")
    bare_partitions_kernel[(1,)](out, num_warps=4)
    if out.tolist() != [0, 1, 2]:
        raise RuntimeError(f"expected each partition to write its number, got {out.tolist()}")
    print("finished")


if __name__ == "__main__":
    main()
