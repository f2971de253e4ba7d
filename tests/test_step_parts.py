"""StepParts: a step of known parts is split into them; every head of a real encoder is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch._inductor
from hydra import compose, initialize_config_dir
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import train
from lightning_modules.callbacks import StepParts, Throughput
from lightning_modules.resolvers import CONF

PARTS = ("backbone", "head", "loss", "optimizer", "other")
TINY = [
    "model.config.num_hidden_layers=2", "model.config.hidden_size=16", "model.config.intermediate_size=16",
    "model.config.vocab_size=16000", "model.max_query_length=16", "model.max_doc_length=32", "trainer=cpu",
    "data=synthetic", "data.size=64", "logger=csv", "batch.size=4", "calibrate.documents=4", "data.val_pool=4",
    "callbacks.step_parts.warmup_steps=2", "callbacks.throughput.warmup_steps=2", "callbacks.step_parts.log_every=1",
    "trainer.log_every_n_steps=1",
]  # fmt: skip


class Clock:
    """Stands in for the module time: a clock that only work moves, by as many milliseconds as the work says."""

    now = 0.0

    @classmethod
    def work(cls, milliseconds: float) -> None:
        cls.now += milliseconds / 1e3

    @classmethod
    def perf_counter(cls) -> float:
        return cls.now


class Work(torch.autograd.Function):
    """The identity, which takes so many milliseconds forward and so many backward."""

    @staticmethod
    def forward(ctx, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.backward_ms = backward
        Clock.work(forward)
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        Clock.work(ctx.backward_ms)
        return gradient, None, None


class KnownHead(nn.Module):
    """A head of 20 ms forward and 30 ms backward."""

    def forward(self, hidden: Tensor) -> Tensor:
        return Work.apply(hidden, 20, 30)


class KnownEncoder(nn.Module):
    """A backbone of 10 ms forward and 15 ms backward below the head, which is called on so many sides apart."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.weight, self.head, self.calls = nn.Parameter(torch.ones(2)), KnownHead(), calls

    def forward(self, x: Tensor) -> Tensor:
        hidden = Work.apply(x * self.weight, 10, 15)
        return torch.cat([self.head(side) for side in hidden.chunk(self.calls)])


class KnownRetriever(LightningModule):
    """A loss of 8 ms forward and 12 ms backward, an optimizer of 25 ms, validation through the same head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def training_step(self, x: Tensor, batch_idx: int) -> Tensor:
        return Work.apply(self.encoder(x), 8, 12).sum()

    def validation_step(self, x: Tensor, batch_idx: int) -> None:
        self.encoder(x)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        Clock.work(25)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Slow(torch.utils.data.Dataset):
    """Six batches, 5 ms each."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        Clock.work(5)
        return torch.ones(2)


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, float]]:
    """Trains a KnownRetriever and hands back the summary of StepParts."""

    monkeypatch.setattr("lightning_modules.callbacks.clock.time", Clock)

    def run(encoder: nn.Module, *, warmup: int = 1, **settings: object) -> dict[str, float]:
        parts = StepParts(warmup_steps=warmup, log_every=2)
        trainer = Trainer(
            default_root_dir=tmp_path, accelerator="cpu", devices=1, max_steps=6, max_epochs=-1, callbacks=[parts],
            logger=False, num_sanity_val_steps=1, enable_checkpointing=False, enable_model_summary=False,
            enable_progress_bar=False, **settings,
        )  # fmt: skip
        slow = DataLoader(Slow(), batch_size=None)
        trainer.fit(KnownRetriever(encoder), slow, slow)
        assert not encoder.head._forward_hooks and not encoder.head._forward_pre_hooks
        return parts.summary()

    return run


def test_a_step_is_split_into_its_parts(fit):
    summary = fit(KnownEncoder(), val_check_interval=2, limit_val_batches=1)
    parts = dict(zip(PARTS, (25, 50, 20, 25, 3), strict=True))  # 5 ms for 3 of 5 batches: 2 follow a validation
    expected = {f"perf/{name}_ms": milliseconds for name, milliseconds in parts.items()}
    assert summary == pytest.approx(expected | {"perf/head_share": 50 / 123})


def test_accumulated_gradients_and_an_optimizer_step_every_third_batch(fit):
    summary = fit(KnownEncoder(), warmup=0, accumulate_grad_batches=3)
    expected = dict(zip(PARTS, (25, 50, 20, 25 / 3), strict=False))
    assert {name: summary[f"perf/{name}_ms"] for name in expected} == pytest.approx(expected)


def test_calls_on_each_side_apart_are_one_part(fit):
    summary = fit(KnownEncoder(calls=2))
    expected = dict(zip(PARTS, (25, 100, 20, 25, 5), strict=True))
    assert {name: summary[f"perf/{name}_ms"] for name in expected} == pytest.approx(expected)


def test_what_cannot_be_split_is_not_recorded():
    frozen = KnownEncoder()
    frozen.weight.requires_grad_(False)
    frozen.head.register_parameter("bias", nn.Parameter(torch.zeros(())))
    frozen.head.register_forward_hook(lambda head, inputs, rep: rep + head.bias, prepend=True)
    parts = StepParts(warmup_steps=0)
    parts.on_train_start(None, KnownRetriever(frozen))
    parts.on_train_batch_start(None, KnownRetriever(frozen), None, 0)
    frozen(torch.ones(2)).sum().backward()
    assert parts._take(None) is None


def test_an_experiment_with_settings_for_callbacks_that_are_left_out(tmp_path):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"paths.output_dir={tmp_path}", "experiment=throughput", "model=tiny", "callbacks=none",
                                "trainer=cpu", "logger=csv"])  # fmt: skip
    kinds = {type(callback).__name__ for callback in train.build(cfg)[2].callbacks}
    assert "BatchFinder" in kinds and not kinds & {"DictConfig", "PeakMemory", "Throughput", "StepParts"}


@pytest.mark.parametrize(
    "settings",
    [
        ["head=naive"],
        ["head=tiled", "model.gradient_checkpointing=true", "model.packed=true", "model.attention_dropout=0"],
        ["head=tiled", "model.gradient_checkpointing=32", "trainer.accumulate_grad_batches=2"],
        ["head=compiled", "trainer.precision=bf16-mixed"],
    ],
    ids=lambda settings: " ".join(settings[:2]),
)
def test_every_head_of_a_real_encoder(settings, tmp_path, request, monkeypatch):
    if "head=compiled" in settings:  # dynamo's part alone: inductor takes twenty seconds
        monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs: graph)
        torch._dynamo.reset()
        request.addfinalizer(torch._dynamo.reset)
    steps = ["trainer.max_steps=6", "trainer.limit_val_batches=0", "test.enabled=false"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"paths.output_dir={tmp_path}", *TINY, *steps, *settings])
    module, datamodule, trainer = train.build(cfg)
    trainer.fit(module, datamodule)
    parts, throughput = (
        next(c for c in trainer.callbacks if isinstance(c, kind)) for kind in (StepParts, Throughput)
    )
    batches = 6 * trainer.accumulate_grad_batches - 2
    assert parts._total[0] == throughput._total[0] == batches
    summary = parts.summary() | throughput.summary()
    assert all(summary[f"perf/{name}_ms"] > 0 for name in PARTS)
    assert sum(summary[f"perf/{name}_ms"] for name in PARTS) == pytest.approx(summary["perf/step_ms"], rel=0.02)
    assert "perf/head_ms" in (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert ("perf/compiled_graphs" in summary) == ("head=compiled" in settings)
    if "head=compiled" in settings:
        assert summary["perf/compiled_graphs"] >= 1
