"""Evaluate a model on a collection: `python evaluate.py model_path=<run, folder or hub id> data=scifact`."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_modules.encoder import resolve_head
from lightning_modules.launch import main
from retrieval.encode import resolve_compute
from retrieval.evaluate import evaluate_bm25, evaluate_collection, open_collection, split_qrels
from retrieval.export import load_encoder
from retrieval.report_table import results_table


def task(cfg: DictConfig) -> None:
    """Prints the figures with BM25's beside them, and leaves ``evaluate.json`` and ``run.trec``."""
    if not cfg.model_path:
        raise ValueError("model_path: expected a checkpoint, a folder or a hub id, got nothing; add model_path=<one>")
    device, autocast_dtype = resolve_compute(cfg.device, cfg.precision)
    where = (OmegaConf.select(cfg, f"data.{name}") for name in ("path", "group_separator"))
    same_group = OmegaConf.select(cfg, "data.same_group", default="relevant")
    collection, output_dir = open_collection(*where, same_group), Path(cfg.paths.output_dir)
    split_qrels(collection, cfg.split)  # a split that isn't there shows before a large model is loaded
    encoder = load_encoder(cfg.model_path, head=resolve_head(cfg.head.name, device))
    rows = {"BM25": evaluate_bm25(collection, cfg.split)[0]}
    rows["model"], _ = evaluate_collection(
        encoder,
        collection,
        cfg.split,
        batch_size=cfg.batch.size,
        batch_tokens=cfg.batch.tokens,
        device=device,
        output_dir=output_dir,
        autocast_dtype=autocast_dtype,
    )
    summary = {"model_path": str(cfg.model_path), "collection": collection.name, "split": cfg.split}
    for prefix, row in (("", "model"), ("bm25/", "BM25")):
        summary |= {f"{prefix}{cfg.split}/{name}": value for name, value in rows[row].items()}
    report = output_dir / "evaluate.json"
    report.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    console = Console()
    console.print(results_table(rows, title=f"{collection.name}, {cfg.split}"))
    for path in (report, output_dir / "run.trec"):
        console.print(f"{path.name:>13}  {path}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    main(task, config_name="evaluate")
