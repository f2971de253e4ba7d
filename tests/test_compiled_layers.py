"""Compiled layers of the backbone against the same ones run as they are: vectors, gradients, graphs, calibration."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from model_families import TEXTS, save_family
from test_packed import CHANGES, CUDA, LENGTHS, WIDTHS, assert_same, step
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_modules import decoder, packed
from lightning_modules.encoder import SparseEncoder
from retrieval.export import export_model, load_encoder

FAMILIES = ("bert", "xlm-roberta", "modernbert")  # modernbert has layers of two kinds


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Compiles as model.compile does but for the generated code, which takes a CPU minutes; counts graphs."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(decoder, "COMPILATION", decoder.COMPILATION | {"backend": counter})
    yield counter
    torch.compiler.reset()


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        family: save_family(family, tmp_path_factory.mktemp(family), **CHANGES.get(family, WIDTHS))
        for family in FAMILIES
    }


def load(directory: Path, **changes: object) -> SparseEncoder:
    return SparseEncoder(str(directory), **LENGTHS | {"head": "naive", "dropout": 0.0} | changes)


@pytest.mark.parametrize(
    ("family", "options"),
    [*((family, {}) for family in FAMILIES), ("bert", {"gradient_checkpointing": True}), ("bert", {"packed": True})],
    ids=str,
)
def test_vectors_and_gradients_are_those_of_the_layers_as_they_are(directories, counted, family, options):
    result = step(load(directories[family], compile=True, **options))
    assert counted.frame_count > 0
    assert_same(result, step(load(directories[family], **options)), 2e-5)


def test_one_graph_serves_all_layers_and_batches(directories, counted, monkeypatch):
    """As on a GPU, where packed attention is an operator and breaks no graph."""

    def neighbours(query, key, value, texts, scale, window):
        return (query * key + value).transpose(1, 2) * texts.longest + texts.cu_seqlens.sum()

    monkeypatch.setitem(packed._KINDS, "text", neighbours)
    encoder = load(directories["bert"], packed=True, compile=True)
    for texts in (TEXTS, TEXTS[:2], [*TEXTS, "fox " * 9]):
        encoder(encoder.doc_tokenizer(texts)).sum().backward()
    assert len([graph for graph in counted.graphs if len(graph.graph.nodes)]) == 1  # an empty one is there too


def test_calibration_and_export_of_compiled_layers(directories, counted, tmp_path):
    """The normalisation that takes the scale is in the last layer where the transform of the language model is left out."""
    encoder = load(directories["bert"], compile=True, mlm_transform="skip")
    encoder(encoder.doc_tokenizer(TEXTS)).sum().backward()
    assert counted.frame_count > 0
    encoder.calibrate(TEXTS)
    export_model(encoder, tmp_path / "model")
    plain, batch = load_encoder(tmp_path / "model", head="naive", device="cpu"), encoder.doc_tokenizer(TEXTS)
    torch.testing.assert_close(encoder.eval()(batch), plain(batch), atol=1e-5, rtol=1e-5)
    assert "compile" not in encoder.hparams()


def test_what_cannot_be_compiled_is_one_line(directories, monkeypatch):
    with pytest.raises(ValueError, match="model.compile: expected true or false, got 'layers'"):
        load(directories["bert"], compile="layers")
    monkeypatch.setattr(decoder, "GradientCheckpointingLayer", torch.nn.Bilinear)
    with pytest.raises(ValueError, match="model.compile: expected false, BertForMaskedLM has no layers"):
        load(directories["bert"], compile=True)


@CUDA
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_on_a_gpu(directories, family, dtype, checkpointing):
    """With the generated code; in bfloat16 within what separates the layers as they are from float32."""
    torch.compiler.reset()
    options = {"gradient_checkpointing": checkpointing, "attention_dropout": 0.0}
    encoders = [load(directories[family], compile=flag, **options).cuda() for flag in (True, False, False)]
    result, plain = step(encoders[0], dtype), step(encoders[1], dtype)
    if dtype is None:
        return assert_same(result, plain, 1e-4)
    exact = step(encoders[2])
    for name, value in exact.items():
        allowed = 2 * (plain[name] - value).norm() + 1e-3 * value.norm()
        assert (result[name] - value).norm() <= allowed, name
