"""Encode a collection to sparse vectors on disk: `python encode.py model_path=<model> data=scifact side=doc`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_modules.encoder import resolve_head
from lightning_modules.launch import main
from retrieval.encode import SIDES, encode_texts, resolve_compute
from retrieval.evaluate import open_collection
from retrieval.export import load_encoder
from retrieval.index import Index, vocabulary_of


def task(cfg: DictConfig) -> None:
    """Leaves ``vectors.npz``, ``ids.txt`` and ``vocabulary.json`` in the output folder."""
    if not cfg.model_path:
        raise ValueError("model_path: expected a checkpoint, a folder or a hub id, got nothing; add model_path=<one>")
    if cfg.side not in SIDES:
        raise ValueError(f"side: expected one of {', '.join(SIDES)}, got {cfg.side!r}; correct side")
    device, autocast_dtype = resolve_compute(cfg.device, cfg.precision)
    collection = open_collection(OmegaConf.select(cfg, "data.path"))
    encoder = load_encoder(cfg.model_path, head=resolve_head(cfg.head.name, device))
    if cfg.side == "doc":
        ids, texts = collection.doc_ids, collection.documents()
    else:
        ids, texts = list(collection.queries), list(collection.queries.values())
    vectors = encode_texts(
        encoder,
        texts,
        cfg.side,
        batch_size=cfg.batch.size,
        batch_tokens=cfg.batch.tokens,
        device=device,
        top_k=cfg.top_k,
        progress=True,
        autocast_dtype=autocast_dtype,
    )
    folder = Path(cfg.paths.output_dir)
    Index(vectors, ids, vocabulary_of(encoder)).save(folder)
    active = vectors.nnz / len(ids)
    Console().print(f"{len(ids):,} vectors, {active:.1f} active dimensions on average: {folder}", soft_wrap=True)


if __name__ == "__main__":
    main(task, config_name="encode")
