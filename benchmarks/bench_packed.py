"""A training step on packed and on padded tokens at real lengths.  python -m benchmarks.bench_packed --out OUT.csv"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from datamodules.collate import TextBatch
from datamodules.synthetic import SyntheticAssembler, SyntheticExamples, read_lengths
from lightning_modules.encoder import SparseEncoder
from lightning_modules.environment import environment
from lightning_modules.resolvers import REPOSITORY

MODELS = ("xlmr", "bert")
CHECKPOINTING = (False, True, 16_384)
WARM, TIMED = 2, 5
COLUMNS = [
    "model", "part", "pairs", "gradient_checkpointing", "attention", "precision", "real_tokens", "padded_tokens",
    "padding_ratio", "padded_ms", "packed_ms", "speedup", "speedup_over_padding_ratio", "padded_peak_mib",
    "packed_peak_mib",
]  # fmt: skip


def make_encoder(model: str, head: str, packed: bool, checkpointing: bool | int, device: torch.device) -> SparseEncoder:
    """The architecture of ``conf/model/<model>.yaml`` with random weights, dropout as published, none of attention."""
    config = OmegaConf.to_container(OmegaConf.load(REPOSITORY / "conf" / "model" / f"{model}.yaml").config)
    with torch.device(device):
        return SparseEncoder(
            model, pretrained=False, config=config, head=head, dropout=0.1, attention_dropout=0.0, packed=packed,
            gradient_checkpointing=checkpointing, max_query_length=64,
            max_doc_length=512 if config.get("max_position_embeddings", 512) >= 512 else 64,
        ).train()  # fmt: skip


def make_batches(vocab: int, padding: int, lengths: Path, pairs: int, seed: int) -> tuple[TextBatch, TextBatch]:
    """Queries and documents of random tokens, with lengths drawn from a table."""
    rng, sides = np.random.default_rng(seed), read_lengths(lengths)
    drawn = [rng.choice(np.array(sides[side]), pairs) for side in ("query", "doc")]
    maker = SyntheticAssembler(SyntheticExamples(drawn[0], drawn[1][:, None]), torch.arange(5, vocab), padding, seed)
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        maker.texts(lengths.clip(3, limit), generator) for lengths, limit in zip(drawn, (64, 512), strict=True)
    )


def measure(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Median milliseconds of a step and the peak in MiB above what was allocated before; NaN when out of memory."""
    if device.type != "cuda":
        began = time.perf_counter()
        step()
        return (time.perf_counter() - began) * 1e3, float("nan")
    before = torch.cuda.memory_allocated()
    try:
        for _ in range(WARM):
            step()
        torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(TIMED):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return float("nan"), float("nan")
    return statistics.median(a.elapsed_time(b) for a, b in times), (torch.cuda.max_memory_allocated() - before) / 2**20


def step_of(encoder: SparseEncoder, part: str, batches: tuple[TextBatch, ...]) -> Callable[[], None]:
    """Forward and backward pass of the backbone, or of the whole encoder, under bfloat16 autocast."""

    def loss() -> Tensor:
        if part == "backbone":
            return encoder.pooled_rows(*batches).float().sum()
        return sum(rep.sum(dtype=torch.float32) for rep in encoder(*batches))

    def step() -> None:
        encoder.zero_grad(set_to_none=False)
        with torch.autocast(batches[0].input_ids.device.type, dtype=torch.bfloat16):
            total = loss()
        total.backward()

    return step


def row_of(model: str, part: str, pairs: int, checkpointing: bool | int, device: torch.device, lengths: Path) -> dict:
    """Both layouts of one case."""
    results, attention = {}, []
    for packed in (False, True):
        head = "sparton" if device.type == "cuda" else "tiled"
        encoder = make_encoder(model, head, packed, checkpointing, device)
        padding = encoder.backbone.config.pad_token_id or 0
        batches = tuple(
            batch.to(device) for batch in make_batches(encoder.vocab_size, padding, lengths, pairs, seed=0)
        )
        with torch.autocast(device.type, dtype=torch.bfloat16):
            attention.append(encoder.packed)
        results[packed] = measure(step_of(encoder, part, batches), device)
        real = sum(batch.token_ids.numel() for batch in batches)
        padded = sum(pairs * encoder.padded_width(batch.input_ids.shape[1]) for batch in batches)
        del encoder, batches
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    speedup = results[False][0] / results[True][0]
    return {
        "model": model, "part": part, "pairs": pairs, "gradient_checkpointing": checkpointing,
        "attention": "/".join(attention), "precision": "bf16-mixed", "real_tokens": real, "padded_tokens": padded,
        "padding_ratio": padded / real, "padded_ms": results[False][0], "packed_ms": results[True][0],
        "speedup": speedup, "speedup_over_padding_ratio": speedup / (padded / real),
        "padded_peak_mib": results[False][1], "packed_peak_mib": results[True][1],
    }  # fmt: skip


def main() -> None:
    """Writes one row per case as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=Path, default=REPOSITORY / "data" / "lengths" / "scifact.csv")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--pairs", nargs="+", type=int, default=(64, 256))
    parser.add_argument("--parts", nargs="+", choices=("backbone", "encoder"), default=("backbone", "encoder"))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = environment()
    with open(arguments.out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS + list(about))
        writer.writeheader()
        for model in arguments.models:
            for pairs in arguments.pairs:
                for checkpointing in CHECKPOINTING:
                    for part in arguments.parts:
                        row = row_of(model, part, pairs, checkpointing, device, arguments.lengths)
                        writer.writerow(row | about)
                        file.flush()
                        print(*(f"{row[name]:.4g}" if isinstance(row[name], float) else row[name] for name in COLUMNS))


if __name__ == "__main__":
    main()
