"""The opt-in search for a tile, with a clock that the test sets: what is kept, where, and what survives damage."""

from __future__ import annotations

import json

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources  # noqa: E402

from sparton.kernels import autotune, forward  # noqa: E402
from sparton.kernels.configs import TILES, forward_plan  # noqa: E402
from sparton.tiled import tiled_forward  # noqa: E402
from tests.test_forward_kernel import rows_and_offsets  # noqa: E402


@pytest.fixture
def clock(tmp_path, monkeypatch):
    """Counts timings, in which tiles with fewer words and more rows are faster; a folder of its own for the file."""
    monkeypatch.setenv("SPARTON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "_tiles", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # torch for CPUs hasn't got it
    timed = []

    def do_bench(run, **_):
        run()
        return next(reversed(timed))

    def run(tile):
        timed.append(tile.block_v - tile.block_s)

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    return timed, run


def restart(monkeypatch) -> None:
    monkeypatch.setattr(autotune, "_tiles", {})


def test_the_fastest_is_kept_in_memory_and_on_disk(clock, tmp_path, monkeypatch):
    timed, run = clock
    best = autotune.best_tile("a", "ieee", run)
    assert best in autotune.candidates("ieee") and best.block_v - best.block_s == min(timed)
    count = len(timed)
    assert count == len(autotune.candidates("ieee"))
    assert autotune.best_tile("a", "ieee", run) == best
    restart(monkeypatch)
    assert autotune.best_tile("a", "ieee", run) == best and len(timed) == count
    assert len(list(tmp_path.iterdir())) == 1  # nothing temporary stays


def test_processes_keep_each_other_s_choices(clock, monkeypatch):
    timed, run = clock
    autotune.best_tile("a", "ieee", run)
    path = autotune._path()
    # Another process, which has read the file before, writes as well.
    monkeypatch.setattr(autotune, "_tiles", {path: {}})
    autotune.best_tile("b", "ieee", run)
    assert set(json.loads(path.read_text())) == {"a", "b"}


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"a": 3}', '{"a": {"block_v": 64}}', '{"a": {"words": 64}}', "tile", "\x00"]
)
def test_a_damaged_file_is_replaced_after_one_warning(content, clock, monkeypatch):
    timed, run = clock
    autotune._path().write_text(content)
    with pytest.warns(UserWarning, match="timed anew") as warned:
        best = autotune.best_tile("a", "ieee", run)
        autotune.best_tile("b", "ieee", run)
    assert len(warned) == 1 and timed
    restart(monkeypatch)
    assert autotune.best_tile("a", "ieee", run) == best


def test_a_size_that_is_no_number_is_damage(clock):
    _, run = clock
    autotune.best_tile("a", "ieee", run)
    autotune._path().write_text(autotune._path().read_text().replace('"num_warps": 4', '"num_warps": "4"'))
    with pytest.raises(ValueError, match="positive integer"):
        autotune._read(autotune._path())


def test_a_folder_that_can_t_be_written_costs_a_warning(clock, tmp_path, monkeypatch):
    _, run = clock
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARTON_CACHE_DIR", str(tmp_path / "file" / "folder"))
    with pytest.warns(UserWarning, match="can't be"):
        assert autotune.best_tile("a", "ieee", run) is not None


def test_nothing_is_timed_while_a_graph_is_captured(clock, monkeypatch):
    timed, run = clock
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert autotune.best_tile("a", "ieee", run) is None and not timed
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    best = autotune.best_tile("a", "ieee", run)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert autotune.best_tile("a", "ieee", run) == best


def test_a_tile_that_does_not_fit_is_passed_over(clock):
    _, run = clock

    def short_of_memory(tile):
        if tile.block_v == 32:
            raise OutOfResources(2, 1, "shared memory")
        run(tile)

    assert autotune.best_tile("a", "ieee", short_of_memory).block_v == 64


def test_a_choice_is_not_shared_between_batches_of_another_kind():
    def name(batch, tokens, longest, vocab=30_522, dim=768):
        return autotune.problem(torch.device("cpu"), "ieee", torch.float32, batch, tokens, longest, vocab, dim)

    assert name(32, 32 * 500, 500) == name(33, 33 * 500, 512) == name(40, 20_000, 512, vocab=32_000)
    others = [name(1, 32, 32), name(1, 512, 512), name(512, 512 * 32, 32), name(32, 32 * 500, 500, vocab=250_002)]
    assert len({name(32, 32 * 500, 500), *others}) == 5


def test_the_head_takes_the_tile_that_was_found(clock, monkeypatch, device):
    timed, _ = clock
    used = []

    def plan(*arguments):
        used.append(forward_plan(*arguments).tile)
        timed.append(used[-1].block_v - used[-1].block_s)
        return forward_plan(*arguments)

    monkeypatch.setattr(forward, "forward_plan", plan)
    monkeypatch.setattr(autotune, "wanted", lambda device: True)
    hidden, cu_seqlens = (t.to(device) for t in rows_and_offsets([20, 3, 40], 16))
    weight = torch.randint(-2, 3, (37, 16), device=device).float()
    arguments = (hidden, weight, None, cu_seqlens, 40, "log1p", torch.float32, torch.float32)
    out, _, positions = forward.triton_forward(*arguments)
    expected, _, expected_positions = tiled_forward(*arguments)
    torch.testing.assert_close(out, expected)
    assert torch.equal(positions[expected > 0].long(), expected_positions[expected > 0].long())
    assert used[-1].block_v - used[-1].block_s == min(timed) and used[-1] not in TILES["ieee"]
