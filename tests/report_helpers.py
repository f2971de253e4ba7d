"""Folders such as train.py leaves behind, with made-up figures, for the tests of the report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from omegaconf import OmegaConf

MACHINE = {
    "device": "a card", "python_version": "3.12", "torch_version": "2.11", "triton_version": "3.6", "commit": "abc",
    "date": "2026-01-02T03:04:05+00:00",
}  # fmt: skip
FULL = {"status": "failed", "error": "OutOfMemoryError: CUDA out of memory. Tried to allocate 7.00 GiB. GPU 0 has"}
PARTS = {"backbone": 0.5, "head": 0.3, "loss": 0.05, "optimizer": 0.1, "other": 0.05}


def configuration(head: str, changes: dict) -> OmegaConf:
    """The settings that a report reads, with interpolations as Hydra writes them."""
    data = "datamodules.synthetic.SyntheticDataModule"
    cfg = OmegaConf.create({
        "seed": 1, "head": {"name": head}, "batch": {"size": 8, "tokens": None, "limit_gib": None}, "flops_weight": 0.001,
        "find_batch": False, "paths": {"output_dir": "${hydra:runtime.output_dir}"}, "ckpt_path": None,
        "model": {
            "name_or_path": "hub/xlmr", "config": {"vocab_size": 250002}, "max_doc_length": 512,
            "max_query_length": 64, "gradient_checkpointing": True, "packed": "auto", "seed": "${seed}",
        },
        "data": {"_target_": data, "lengths": "${repo:data}/lengths/scifact.csv", "batch_size": "${batch.size}"},
        "regularizer": {"query": {"flops": {"weight": "${flops_weight}"}}},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.01}, "trainer": {"precision": "bf16-mixed", "max_steps": 12},
    })  # fmt: skip
    for name, value in changes.items():
        OmegaConf.update(cfg, name, value)
    return cfg


def write_run(folder, head, summary=None, *, changes=None, losses=(), tries=(), overrides=(), **more) -> Path:
    """A run; ``more`` are settings at the top, ``summary`` None leaves no file, a text is written as it is."""
    hidden = folder / ".hydra"
    hidden.mkdir(parents=True)
    OmegaConf.save(configuration(head, (changes or {}) | more), hidden / "config.yaml")
    OmegaConf.save(OmegaConf.create([*(overrides or [f"head={head}"])]), hidden / "overrides.yaml")
    if isinstance(summary, str):
        (folder / "summary.json").write_text(summary)
    elif summary is not None:
        (folder / "summary.json").write_text(json.dumps({"status": "finished", "head": head} | MACHINE | summary))
    if losses:
        lines = [f"{step},{loss}" for step, loss in enumerate(losses)]
        (folder / "metrics.csv").write_text("step,train/loss\n" + "\n".join(lines) + "\n")
    if tries:
        with (folder / "find_batch.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(tries[0]))
            writer.writeheader()
            writer.writerows(tries)
    return folder


def speed(batch: int, samples: float, mib: float, **more) -> dict[str, object]:
    """The figures of a timed run: samples a second, peak memory, the parts of a step."""
    step = 1000 * batch / samples
    parts = {f"perf/{name}_ms": share * step for name, share in PARTS.items()}
    return {
        "perf/step_ms": step, "perf/samples_per_sec": samples, "perf/tokens_per_sec": 300 * samples,
        "perf/peak_mem_allocated_mib": mib, "perf/peak_mem_reserved_mib": 1.5 * mib, "perf/batch_size": batch,
        "perf/head_share": PARTS["head"], "perf/first_step_s": 3.0, "perf/warmup_s": 4.0,
    } | parts | more  # fmt: skip


def write_study(root: Path) -> Path:
    """A small study of everything: batches, lengths, vocabularies, the batch finder, quality over seeds, failures."""
    for head, fast, mode in (("naive", 1, "padded"), ("sparton", 5, "varlen")):
        for batch in (8, 16, 32):
            if head == "naive" and batch == 32:
                write_run(root / f"batch/{head}{batch}", head, FULL, changes={"batch.size": batch})
                continue
            timed = speed(batch, 100 * fast, 1024 * batch / fast) | {"packed": mode}
            write_run(root / f"batch/{head}{batch}", head, timed, changes={"batch.size": batch})
        for axis, values in (("max_doc_length", (64, 128)), ("config.vocab_size", (1000, 2000))):
            for value in values:
                timed = speed(8, fast * 10 * 64 / value, value / fast) | {"packed": mode}
                write_run(root / f"{axis}/{head}{value}", head, timed, changes={f"model.{axis}": value})
        found = {"find_batch/size": 10 if head == "naive" else 410, "find_batch/limit_gib": 80.0 - 0.1 * fast, "find_batch/tries": 9}
        timed = speed(10, 100, 70000) if head == "naive" else speed(410, 810, 70000)
        tries = [{"size": s, "fits": True, "peak_reserved_mib": 1000 * s / fast, "error": ""} for s in (1, 2, 4)]
        write_run(root / f"find/{head}", head, timed | found | {"packed": mode}, find_batch=True, tries=tries)
        for seed in (1, 2, 3):
            quality = {"test/ndcg@10": 0.8 + 0.02 * seed + (0.01 if fast > 1 else 0), "bm25/test/ndcg@10": 0.68}
            quality |= {"test/ndcg@10/de": 0.7, "test/ndcg@10/en": 0.8, "test/flops": 4.0 + seed}
            quality |= {"test/active_dims_doc": 170.0 + seed, "packed": "padded"}
            real = {"data": {"_target_": "BeirDataModule", "path": "${paths.data_dir}/xquad"}}
            write_run(root / f"quality/{head}{seed}", head, quality, losses=(3.0, 2.0, 1.5), changes=real, seed=seed)
    write_run(root / "bad/typo", "sparton", {"status": "failed", "error": "optimizer.lr must be positive, got -1"})
    write_run(root / "bad/stopped", "naive", {"status": "interrupted"})
    write_run(root / "bad/killed", "naive")
    return root
