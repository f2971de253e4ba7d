"""Train a sparse retriever: compose, seed, instantiate, fit, test.  `python train.py --help` shows every choice."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_modules.callbacks import BatchFinder
from lightning_modules.callbacks.checkpoint import load_best
from lightning_modules.encoder import resolve_head
from lightning_modules.launch import environment, main, resolve_precision, write_summary
from lightning_modules.packed import training_dtype
from lightning_modules.retriever import SparseRetriever
from lightning_modules.summary import training_figures
from retrieval.evaluate import evaluate_bm25, evaluate_collection
from retrieval.export import export_model
from retrieval.report_table import results_table


def build(cfg: DictConfig) -> tuple[SparseRetriever, L.LightningDataModule, L.Trainer]:
    """Instantiates everything that the configuration names, with plain arguments."""
    loggers = [logger for logger in instantiate(cfg.logger).values() if logger is not None]
    for logger in loggers:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    precision = resolve_precision(cfg.trainer.precision, cfg.trainer.accelerator)
    # An experiment may have settings for a callback that callbacks=none leaves out.
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values() if callback and "_target_" in callback]
    if cfg.find_batch and not any(isinstance(callback, BatchFinder) for callback in callbacks):
        raise ValueError(
            "find_batch: expected callbacks.batch_finder with find_batch=true, got none; keep "
            "the callback or set find_batch=false"
        )
    trainer = instantiate(cfg.trainer, precision=precision, callbacks=callbacks, logger=loggers)
    encoder = instantiate(cfg.model, head=resolve_head(cfg.head.name, trainer.strategy.root_device))
    tokenizers = {"tokenize_query": encoder.query_tokenizer, "tokenize_doc": encoder.doc_tokenizer}
    datamodule = instantiate(cfg.data, **tokenizers)
    module = SparseRetriever(
        encoder,
        instantiate(cfg.loss),
        query_regularizers=instantiate(cfg.regularizer.query),
        doc_regularizers=instantiate(cfg.regularizer.doc),
        **OmegaConf.to_container(cfg.optimizer, resolve=True),
        **OmegaConf.to_container(cfg.scheduler, resolve=True),
    )
    return module, datamodule, trainer


def train(cfg: DictConfig) -> None:
    """One run, from an instantiated configuration to ``summary.json``, ``model/`` and the table of results."""
    L.seed_everything(cfg.seed, workers=True)
    output_dir = Path(cfg.paths.output_dir)
    module, datamodule, trainer = build(cfg)
    leads, console = trainer.is_global_zero, Console(quiet=not trainer.is_global_zero)
    encoder, device = module.encoder, trainer.strategy.root_device
    packing = encoder.packing(device, training_dtype(trainer.precision), training=True)
    name, head = cfg.model.name_or_path, encoder.head_name
    console.print(f"model {name}, backbone {packing}, head {head}, {device}, {trainer.precision}", soft_wrap=True)
    datamodule.setup("fit")
    console.print(datamodule.describe())
    if cfg.calibrate.documents and not cfg.ckpt_path:
        encoder.to(device).calibrate(datamodule.train_documents(cfg.calibrate.documents), cfg.calibrate.quantile)

    split = cfg.test.split or datamodule.test_split
    collection, rows = datamodule.collection if cfg.test.enabled and split and leads else None, {}
    settings = {"split": split, "batch_size": cfg.test.batch_size, "device": device}
    if collection:
        rows["BM25"], _ = evaluate_bm25(collection, split)
        if cfg.test.untrained:
            rows["untrained"], _ = evaluate_collection(encoder, collection, **settings)
    trainer.fit(module, datamodule, ckpt_path=cfg.ckpt_path)
    if not leads:  # what follows is done once, by the first process
        return
    best = load_best(module, trainer)
    if collection:
        rows["trained"], _ = evaluate_collection(encoder, collection, output_dir=output_dir, **settings)
    if cfg.export:
        export_model(encoder, output_dir / "model")

    prefix = {"BM25": "bm25/test/", "untrained": "untrained/test/", "trained": "test/"}
    summary = {prefix[row] + name: value for row, figures in rows.items() for name, value in figures.items()}
    summary |= training_figures(trainer)
    summary |= {"status": "finished", "head": head, "packed": packing.mode, "precision": trainer.precision}
    summary |= {"best_checkpoint": best} | environment()
    write_summary(output_dir, summary)
    for logger in trainer.loggers:
        logger.log_metrics({k: v for k, v in summary.items() if isinstance(v, (int, float))}, step=trainer.global_step)
        logger.finalize("success")
    if rows:
        console.print(results_table(rows))
    for what in ("model", "metrics.csv", "summary.json", "checkpoints", "wandb"):
        if (output_dir / what).exists():
            console.print(f"{what:>12}  {output_dir / what}", soft_wrap=True)


if __name__ == "__main__":
    main(train, config_name="train")
