"""A table of the strongest terms of a few fixed texts at each validation: file, CSV and wandb."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from lightning_modules.callbacks.checks import check_int

COLUMNS = ["step", "text", "rank", "term", "weight"]


class ExpansionTable(Callback):
    """Writes which terms a few texts are expanded to, so that one sees what the model learns.

    Each validation appends to ``expansions.txt`` (to read) and ``expansions.csv`` (step, text, rank, term, weight) in
    the output folder, and logs the rows as the table ``expansions`` where a WandbLogger is attached. Texts are encoded
    as ``side``, in evaluation mode, in the trainer's precision, on the first process only. The sanity check is left
    out.

    Args:
        texts: what to encode, a few short texts.
        output_dir: folder of the two files; created where it is missing.
        top_k: terms per text.
        side: "query" or "doc": which tokenizer, with its length limit, reads the texts.

    Raises:
        ValueError: for no texts, an empty text, an unknown side or ``top_k`` below 1.
    """

    def __init__(self, texts: list[str], output_dir: str, top_k: int = 10, side: str = "query") -> None:
        texts = list(texts)
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"ExpansionTable: texts must be non-empty strings, got {texts!r}; give one or more")
        if side not in ("query", "doc"):
            raise ValueError(f"ExpansionTable: side must be query or doc, got {side!r}; use side=query")
        self.texts = texts
        self.output_dir = Path(output_dir)
        self.top_k = check_int("ExpansionTable", "top_k", top_k, 1)
        self.side = side

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        with trainer.precision_plugin.forward_context():
            expansions = self.expand(pl_module.encoder, pl_module.device)
        self._write(trainer.global_step, expansions)
        rows = self._rows(trainer.global_step, expansions)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("expansions", columns=COLUMNS, data=rows)

    @torch.no_grad()
    def expand(self, encoder: torch.nn.Module, device: torch.device) -> list[list[tuple[str, float]]]:
        """Returns the strongest terms of each text with their weights, the largest first, without zeros."""
        tokenize = encoder.query_tokenizer if self.side == "query" else encoder.doc_tokenizer
        was_training = encoder.training
        encoder.eval()
        try:
            reps = encoder(tokenize(self.texts).to(device))
        finally:
            encoder.train(was_training)
        weights, ids = reps.float().topk(min(self.top_k, reps.shape[1]), dim=1)
        expansions = []
        for row_weights, row_ids in zip(weights.tolist(), ids.tolist(), strict=True):
            terms = encoder.tokenizer.convert_ids_to_tokens(row_ids)
            expansions.append([(str(t), w) for t, w in zip(terms, row_weights, strict=True) if w > 0])
        return expansions

    def _rows(self, step: int, expansions: list[list[tuple[str, float]]]) -> list[list]:
        return [
            [step, text, rank, term, weight]
            for text, terms in zip(self.texts, expansions, strict=True)
            for rank, (term, weight) in enumerate(terms, start=1)
        ]

    def _write(self, step: int, expansions: list[list[tuple[str, float]]]) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with (self.output_dir / "expansions.txt").open("a", encoding="utf-8") as file:
            file.write(f"step {step}\n")
            for text, terms in zip(self.texts, expansions, strict=True):
                listed = ", ".join(f"{term} {weight:.2f}" for term, weight in terms) or "(no active term)"
                file.write(f"  {text}\n    {listed}\n")
        path = self.output_dir / "expansions.csv"
        is_new = not path.exists()
        with path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(COLUMNS)
            writer.writerows(self._rows(step, expansions))
