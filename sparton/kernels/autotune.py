"""SPARTON_AUTOTUNE=1: the plain forward kernel's tile is chosen by timing instead of the table, and kept on disk.

Not ``triton.autotune``: the tile also decides how rows are laid out, the grid and the boxes of the bulk copies. The
boxes would need a hook, and with a hook it keeps nothing on disk; a file of it that is damaged stops the program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.runtime.errors import OutOfResources

from sparton.kernels.configs import CHUNK_ROWS, GROUP, TILES, Tile, power_of_two

# Texts longer than this differ in nothing that a tile decides: they fill every tile.
LONG = 512

_tiles: dict[Path, dict[str, Tile]] = {}  # of this process, by the file they are kept in


def wanted(device: torch.device) -> bool:
    """Whether the user asks for it, where it can be done."""
    return device.type == "cuda" and os.environ.get("SPARTON_AUTOTUNE") == "1"


def problem(
    device: torch.device, kind: str, dtype: torch.dtype, batch: int, tokens: int, max_seqlen: int, vocab: int, dim: int
) -> str:
    """What a choice is kept for: device, product, D, and powers of two that bound V, the rows and the longest text.

    A choice made for one batch so never serves one of another kind: a query's tile doesn't become a document's.
    """
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    rows = power_of_two(min(tokens, batch * max_seqlen, CHUNK_ROWS))
    longest = power_of_two(min(max(max_seqlen, GROUP), LONG))
    return f"{card}, {kind}, {dtype}, D {dim}, V {power_of_two(vocab)}, rows {rows}, texts of {longest}"


def candidates(kind: str) -> list[Tile]:
    """The table's tiles, first, and each with a step in one direction."""
    tiles = list(TILES[kind])
    for tile in TILES[kind]:
        half_s, half_v = tile.block_s // 2, tile.block_v // 2
        tiles += [
            dataclasses.replace(tile, num_stages=tile.num_stages + 1),
            dataclasses.replace(tile, block_v=half_v),
            dataclasses.replace(tile, block_v=half_v, per_sm=tile.per_sm + 1),
            dataclasses.replace(tile, block_s=half_s),
            dataclasses.replace(tile, block_s=half_s, per_sm=tile.per_sm + 1),
        ]
    return list(dict.fromkeys(tiles))


def best_tile(name: str, kind: str, run: Callable[[Tile], None]) -> Tile | None:
    """The fastest tile for a problem: of this process, of the file, or else by timing, which waits for the device.

    Args:
        name: of the problem, from :func:`problem`.
        kind: key of TILES.
        run: launches the forward pass with a tile.

    Returns:
        None, for the table's tile, while a CUDA graph is captured and nothing is known, and where no tile runs.
    """
    path = _path()
    if path not in _tiles:
        _tiles[path] = _read_or_warn(path)
    known = _tiles[path]
    if name not in known and not torch.cuda.is_current_stream_capturing():
        times = {}
        for tile in candidates(kind):
            try:
                times[tile] = triton.testing.do_bench(functools.partial(run, tile), rep=50, return_mode="median")
            except OutOfResources:  # more shared memory or registers than this card has
                continue
        if times:
            known[name] = min(times, key=times.get)
            _write(path, known)
    return known.get(name)


@functools.cache
def _version() -> str:
    try:
        return importlib.metadata.version("sparton")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"


def _path() -> Path:
    folder = os.environ.get("SPARTON_CACHE_DIR") or Path.home() / ".cache" / "sparton"
    return Path(folder) / f"tiles-sparton-{_version()}-triton-{triton.__version__}.json"


def _read(path: Path) -> dict[str, Tile]:
    """Raises ValueError or TypeError for anything but a file that :func:`_write` made."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    if not isinstance(content, dict):
        raise TypeError("not a list of tiles")
    tiles = {name: Tile(**sizes) for name, sizes in content.items()}
    if any(type(size) is not int or size < 1 for tile in tiles.values() for size in dataclasses.astuple(tile)):
        raise ValueError("a size that is no positive integer")
    return tiles


def _read_or_warn(path: Path) -> dict[str, Tile]:
    try:
        return _read(path)
    except (OSError, ValueError, TypeError) as error:
        warnings.warn(f"{path}: can't be read ({error}), tiles are timed anew", stacklevel=2)
        return {}


def _write(path: Path, known: dict[str, Tile]) -> None:
    """Replaces the file at once, so that nobody reads half of it, with what other processes wrote meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        others = {}
        with contextlib.suppress(ValueError, TypeError):  # said when it was read first
            others = _read(path)
        text = json.dumps({name: dataclasses.asdict(tile) for name, tile in {**others, **known}.items()}, indent=1)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"{path}: can't be written ({error}), tiles are timed again in the next run", stacklevel=2)
