"""Callbacks and the CSV logger in short runs of a minimal LightningModule on the CPU."""

from __future__ import annotations

import csv
import logging
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from datamodules.collate import TextBatch, TrainBatch
from lightning_modules.callbacks import (
    CollapseAlarm,
    ExpansionTable,
    MetricsCSV,
    PeakMemory,
    SparsityProgressBar,
    Throughput,
)

VOCAB = 8


def text_batch(rows: list[list[int]]) -> TextBatch:
    """Texts of word numbers, padded with 0."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return TextBatch.from_masks(ids, mask, mask)


def train_batch() -> TrainBatch:
    """Two queries and two documents of 3 + 7 real tokens."""
    query, doc = text_batch([[1, 2], [3]]), text_batch([[1, 2, 4], [3, 5, 6, 7]])
    return TrainBatch(query, doc, torch.zeros(2, 2, dtype=torch.bool), None)


class WordTokenizer:
    """Stands in for a Hugging Face tokenizer."""

    def __call__(self, texts: list[str]) -> TextBatch:
        return text_batch([[int(word) for word in text.split()] for text in texts])

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"word{i}" for i in ids]


class BagEncoder(nn.Module):
    """Each text is the bag of its words times learned weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(1.0, VOCAB + 1))
        self.dropout = nn.Dropout(0.5)
        self.query_tokenizer = self.doc_tokenizer = self.tokenizer = WordTokenizer()

    def forward(self, *batches: TextBatch) -> torch.Tensor | tuple[torch.Tensor, ...]:
        reps = []
        for batch in batches:
            words = nn.functional.one_hot(batch.input_ids, VOCAB) * batch.attention_mask.unsqueeze(2)
            reps.append(self.dropout(words.amax(1) * self.weight))
        return reps[0] if len(reps) == 1 else tuple(reps)


class Retriever(LightningModule):
    """The least that the callbacks look at."""

    def __init__(self, reps: tuple[torch.Tensor, torch.Tensor] | None = None) -> None:
        super().__init__()
        self.encoder = BagEncoder()
        self.given_reps = reps
        self.last_reps = None

    def training_step(self, batch: TrainBatch, batch_idx: int) -> torch.Tensor:
        query, doc = self.encoder(batch.query, batch.doc)
        self.last_reps = self.given_reps or (query.detach(), doc.detach())
        loss = (query @ doc.T).square().mean()
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/active_dims_query", 2.0)
        self.log("train/active_dims_doc", 4.0)
        return loss

    def validation_step(self, batch: TrainBatch, batch_idx: int) -> None:
        self.log("val_pool/ndcg@10", 0.25, batch_size=2)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def loader(batches: int) -> DataLoader:
    return DataLoader([train_batch()] * batches, batch_size=None)


@pytest.fixture
def fit(tmp_path):
    """Runs a fit and hands back the trainer; sanity checks and validation on request."""

    def run(callbacks, batches=6, val_every=None, module=None, loggers=(), sanity=0, accelerator="cpu"):
        trainer = Trainer(
            default_root_dir=tmp_path,
            accelerator=accelerator,
            devices=1,
            max_steps=batches,
            callbacks=list(callbacks),
            logger=list(loggers) or False,
            log_every_n_steps=1,
            val_check_interval=val_every,
            limit_val_batches=1 if val_every else 0,
            num_sanity_val_steps=sanity,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=any(isinstance(c, SparsityProgressBar) for c in callbacks),
        )
        trainer.fit(module or Retriever(), loader(batches), loader(1))
        return trainer

    # Advice about worker processes and a logger-less run is of no concern here.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*`max_epochs` was not set.*")
        warnings.filterwarnings("ignore", message=".*isinstance.*treespec.*")
        yield run


def rows_of(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_peak_memory_on_the_cpu(fit, tmp_path):
    callback = PeakMemory(warmup_steps=2, log_every=2)
    fit([callback], loggers=[MetricsCSV(str(tmp_path / "out"))])
    assert set(callback.summary()) == {"perf/peak_rss_mib"}
    # A process that has imported torch holds far more than 50 MiB; far less than a TiB.
    assert 50 < callback.summary()["perf/peak_rss_mib"] < 2**20
    assert any(row["perf/peak_rss_mib"] for row in rows_of(tmp_path / "out" / "metrics.csv"))


def test_retries_of_the_allocator_count_from_the_warm_up_on(monkeypatch):
    counted, device = {"num_alloc_retries": 3}, torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: counted)
    for name in ("reset_peak_memory_stats", "max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    memory = PeakMemory()
    memory._reset(device)
    counted["num_alloc_retries"] = 8
    assert memory._read(device)["perf/alloc_retries"] == 5


def test_peak_memory_within_the_warmup_has_no_summary(fit):
    callback = PeakMemory(warmup_steps=10)
    fit([callback], batches=2)
    assert callback.summary() == {}


def test_throughput_counts_real_tokens_after_the_warmup(fit, tmp_path):
    callback = Throughput(warmup_steps=2, log_every=2)
    fit([callback], batches=6, loggers=[MetricsCSV(str(tmp_path / "out"))])
    steps, milliseconds, tokens, samples, padded = callback._total
    assert (steps, tokens, samples, padded) == (4, 4 * 10, 4 * 2, 4 * (2 * 2 + 2 * 4))
    summary = callback.summary()
    assert summary["perf/step_ms"] == pytest.approx(milliseconds / 4)
    assert summary["perf/tokens_per_sec"] == pytest.approx(40 / milliseconds * 1e3)
    assert summary["perf/samples_per_sec"] == pytest.approx(8 / milliseconds * 1e3)
    assert (summary["perf/batch_size"], summary["perf/real_tokens_per_batch"]) == (2, 10)
    assert 0 < summary["perf/first_step_s"] < summary["perf/warmup_s"]
    logged = [row for row in rows_of(tmp_path / "out" / "metrics.csv") if row["perf/tokens_per_sec"]]
    assert int(logged[0]["step"]) == 3


def test_throughput_leaves_validation_out(fit):
    class Slow(Retriever):
        def validation_step(self, batch, batch_idx):
            time.sleep(0.3)

    callback = Throughput(warmup_steps=0, log_every=1)
    fit([callback], batches=4, val_every=1, module=Slow())
    assert callback._total[0] == 4
    assert callback._total[1] < 300


def test_throughput_waits_for_no_event_that_is_not_there_yet(fit, monkeypatch):
    class Late:
        """A mark that the device passes only when somebody waits for it."""

        waited = False

        def query(self):
            return Late.waited

        def synchronize(self):
            Late.waited = True

        def elapsed_time(self, end):
            return 2.0

    monkeypatch.setattr("lightning_modules.callbacks.clock.mark", lambda device: Late())
    callback = Throughput(warmup_steps=0, log_every=1)
    seen = []
    monkeypatch.setattr(callback, "_figures", lambda steps, sums: seen.append(sums) or {})
    fit([callback], batches=3)
    assert seen == []
    assert callback._total == (3, 6.0, 30, 6, 36)


def test_collapse_figures_by_hand(fit, tmp_path):
    # Queries: one of two rows is empty, word 0 alone is ever active. Documents: word 1 is in each.
    query = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    doc = torch.tensor([[0.0, 1, 0, 2], [3, 1, 0, 0]])
    callback = CollapseAlarm(every_n_steps=2, window=2, warmup_steps=0)
    fit([callback], batches=4, module=Retriever((query, doc)), loggers=[MetricsCSV(str(tmp_path / "out"))])
    rows = rows_of(tmp_path / "out" / "metrics.csv")
    last = rows[-1]
    assert float(rows[1]["train/zero_rows_query"]) == 0.5
    assert rows[1]["train/dead_vocab_query"] == ""
    assert float(last["train/zero_rows_doc"]) == 0.0
    assert float(last["train/dead_vocab_query"]) == 0.75
    assert float(last["train/dead_vocab_doc"]) == 0.25
    assert float(last["train/dims_in_every_text_query"]) == 0.0
    assert float(last["train/dims_in_every_text_doc"]) == 1.0


def test_collapse_warns_once_per_kind_and_side_after_the_warmup(fit, caplog):
    zero, dense = torch.zeros(2, 4), torch.ones(2, 4)
    callback = CollapseAlarm(every_n_steps=1, window=1, warmup_steps=3)
    with caplog.at_level(logging.WARNING, logger="lightning_modules.callbacks.collapse"):
        fit([callback], batches=6, module=Retriever((zero, dense)))
    messages = [record.getMessage() for record in caplog.records if "side" in record.getMessage()]
    assert len(messages) == 3
    assert messages[0].startswith("step 3: zero_rows of the query side is 1;")
    assert {message.split(":")[1].split(" is ")[0] for message in messages} == {
        " zero_rows of the query side",
        " dead_vocab of the query side",
        " dims_in_every_text of the doc side",
    }


def test_collapse_is_silent_on_healthy_representations(fit, caplog):
    # Three of four words are used and none is in every text.
    healthy = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 0]])
    with caplog.at_level(logging.WARNING, logger="lightning_modules.callbacks.collapse"):
        fit([CollapseAlarm(every_n_steps=1, window=2, warmup_steps=0)], module=Retriever((healthy, healthy)))
    assert not [record for record in caplog.records if record.name.endswith("collapse")]


def test_expansions_are_written_at_each_validation(fit, tmp_path):
    module = Retriever()
    callback = ExpansionTable(["1 2 5", "3"], str(tmp_path / "out"), top_k=2)
    fit([callback], batches=4, val_every=2, module=module, sanity=1)
    rows = rows_of(tmp_path / "out" / "expansions.csv")
    # Weights of the words 1, 2, 5, 3 are 2, 3, 6, 4; dropout is off, or they would be doubled or gone.
    assert [row["step"] for row in rows] == ["2"] * 3 + ["4"] * 3
    assert [(row["text"], row["rank"], row["term"]) for row in rows[:3]] == [
        ("1 2 5", "1", "word5"),
        ("1 2 5", "2", "word2"),
        ("3", "1", "word3"),
    ]
    assert [float(row["weight"]) for row in rows[:3]] == pytest.approx([6.0, 3.0, 4.0], rel=1e-2)
    text = (tmp_path / "out" / "expansions.txt").read_text()
    assert text.startswith("step 2\n  1 2 5\n    word5 ")
    assert text.count("step") == 2


def test_expansions_reach_wandb_as_a_table(tmp_path, monkeypatch):
    class Recorder:
        def __init__(self):
            self.tables = []

        def log_table(self, key, columns, data):
            self.tables.append((key, columns, data))

    monkeypatch.setattr("lightning_modules.callbacks.expansions.WandbLogger", Recorder)
    logger, module = Recorder(), Retriever()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    stand_in = SimpleNamespace(
        sanity_checking=False,
        is_global_zero=True,
        global_step=7,
        loggers=[logger, MetricsCSV(str(tmp_path))],
        precision_plugin=trainer.precision_plugin,
    )
    module.encoder.train()
    ExpansionTable(["3"], str(tmp_path), side="doc").on_validation_end(stand_in, module)
    assert logger.tables == [("expansions", ["step", "text", "rank", "term", "weight"], [[7, "3", 1, "word3", 4.0]])]
    assert module.encoder.training


def test_progress_prints_plain_lines_without_a_terminal(fit, capsys):
    fit([SparsityProgressBar(plain_every=3)], batches=6, val_every=6)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["1/6", "3/6", "6/6", "6/6"]
    assert "dims q 2  dims d 4" in lines[0]
    assert "ndcg@10 0.2500" in lines[-1]
    assert lines[-1].endswith("validation")


def test_progress_shows_loss_and_sparsity_on_a_terminal(fit, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    bar = SparsityProgressBar(values_every=2)
    fit([bar], batches=4)
    assert list(bar._values) == ["loss", "dims q", "dims d"]
    assert bar._values["dims d"] == "4"


def test_progress_can_be_turned_off(fit, capsys):
    fit([SparsityProgressBar(refresh_rate=0)], batches=3)
    assert "step" not in capsys.readouterr().out


def test_metrics_csv_has_the_union_of_columns(tmp_path):
    logger = MetricsCSV(str(tmp_path / "new"))
    logger.log_metrics({"a": 0.1 + 0.2}, step=0)
    logger.log_metrics({"b": torch.tensor(2), "table": object()}, step=1)
    logger.log_metrics({"nothing": "text"}, step=2)
    rows = rows_of(tmp_path / "new" / "metrics.csv")
    assert rows == [{"step": "0", "a": "0.30000000000000004", "b": ""}, {"step": "1", "a": "", "b": "2"}]
    assert (logger.name, logger.version, logger.save_dir) == ("", "", str(tmp_path / "new"))


def test_metrics_csv_survives_resumption_and_a_cut_line(tmp_path):
    MetricsCSV(str(tmp_path)).log_metrics({"a": 1.0}, step=0)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("1,2.")
    resumed = MetricsCSV(str(tmp_path))
    resumed.log_metrics({"a": 3.0, "c": 4.0}, step=1)
    assert rows_of(tmp_path / "metrics.csv") == [
        {"step": "0", "a": "1.0", "c": ""},
        {"step": "1", "a": "3.0", "c": "4.0"},
    ]


def test_metrics_csv_rewinds_to_the_step_of_a_checkpoint(tmp_path):
    first = MetricsCSV(str(tmp_path))
    for step in range(4):
        first.log_metrics({"a": float(step)}, step=step)
    resumed = MetricsCSV(str(tmp_path))
    resumed.rewind(2)
    resumed.log_metrics({"a": 20.0}, step=2)
    assert [row["a"] for row in rows_of(tmp_path / "metrics.csv")] == ["0.0", "1.0", "20.0"]
    assert not (tmp_path / "metrics.csv.partial").exists()


def test_metrics_csv_in_a_run(fit, tmp_path):
    fit([], batches=3, val_every=3, loggers=[MetricsCSV(str(tmp_path / "out"))])
    rows = rows_of(tmp_path / "out" / "metrics.csv")
    assert [row["step"] for row in rows if row["train/loss"]] == ["0", "1", "2"]
    assert [row["val_pool/ndcg@10"] for row in rows if row["val_pool/ndcg@10"]] == ["0.25"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: PeakMemory(warmup_steps=-1),
        lambda: PeakMemory(log_every=0),
        lambda: Throughput(log_every=1.5),
        lambda: CollapseAlarm(every_n_steps=0),
        lambda: CollapseAlarm(max_zero_rows=2.0),
        lambda: ExpansionTable([], "out"),
        lambda: ExpansionTable([" "], "out"),
        lambda: ExpansionTable(["a"], "out", side="title"),
        lambda: ExpansionTable(["a"], "out", top_k=0),
        lambda: SparsityProgressBar(plain_every=0),
    ],
)
def test_bad_arguments_raise_one_line(make):
    with pytest.raises(ValueError) as error:
        make()
    assert "\n" not in str(error.value)
    assert "got" in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_and_throughput_on_cuda(fit):
    memory, throughput = PeakMemory(1, 1), Throughput(1, 1)
    fit([memory, throughput], batches=4, accelerator="cuda")
    assert memory.summary()["perf/peak_mem_allocated_mib"] > 0
    assert memory.summary()["perf/peak_mem_reserved_mib"] >= memory.summary()["perf/peak_mem_allocated_mib"]
    assert memory.summary()["perf/alloc_retries"] == 0
    assert throughput._total[0] == 3
    assert throughput.summary()["perf/tokens_per_sec"] > 0
