"""SparseEncoder against stock masked language models: vectors, gradients, calibration, options, rebuilding."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from model_families import FAMILIES, SIZES, TEXTS, VOCAB_SIZE, make_tokenizer, naive_reps, save_family
from torch import nn

from lightning_modules.encoder import SparseEncoder, resolve_head

# DeBERTa in transformers 5.17 scripts a function at import.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
LENGTHS = {"max_query_length": 16, "max_doc_length": 32}
# Heads of 16 dimensions, the least that packed attention takes in float32 on a GPU.
WIDE = {"model_type": "bert"} | FAMILIES["bert"] | {"hidden_size": 32}


def small(**changes: object) -> SparseEncoder:
    """A small BERT with random weights, without touching the disk."""
    config = {"model_type": "bert"} | FAMILIES["bert"]
    arguments = {"pretrained": False, "config": config, "tokenizer": make_tokenizer(), "head": "naive"}
    return SparseEncoder("small", **LENGTHS | arguments | changes)


def seen_shapes(encoder: SparseEncoder) -> list[torch.Size]:
    """The shapes of the token ids of each call of the backbone from now on."""
    shapes = []
    encoder.backbone.register_forward_pre_hook(
        lambda *call: shapes.append(call[2]["input_ids"].shape), with_kwargs=True
    )
    return shapes


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    return save_family(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("pool_special_tokens", [True, False])
def test_forward_is_the_naive_formula_on_stock_logits(saved, pool_special_tokens):
    encoder = SparseEncoder(
        str(saved), head="tiled", **LENGTHS, pool_special_tokens=pool_special_tokens
    ).eval()
    batch = encoder.doc_tokenizer(TEXTS)
    assert encoder.mlm_transform == "keep"
    torch.testing.assert_close(encoder(batch), naive_reps(saved, batch), atol=1e-5, rtol=1e-5)


def test_gradients_reach_every_parameter(saved):
    encoder = SparseEncoder(str(saved), head="naive", **LENGTHS)
    query, doc = encoder(encoder.query_tokenizer(TEXTS[:2]), encoder.doc_tokenizer(TEXTS))
    (query.sum() + doc.sum()).backward()
    names = dict(encoder.named_parameters())
    assert [name for name, parameter in names.items() if parameter.grad is None] == []
    assert len({parameter.data_ptr() for parameter in names.values()}) == len(names)


def test_weight_and_bias_are_the_models_own(saved):
    encoder = SparseEncoder(str(saved), head="naive", **LENGTHS)
    assert encoder.head.weight is encoder.backbone.get_input_embeddings().weight
    assert isinstance(encoder.backbone.get_submodule(encoder.decoder_name), nn.Identity)
    twice = encoder.state_dict()
    assert twice["head.weight"].data_ptr() == encoder.head.weight.data_ptr()


def test_untied_bert_leaves_no_parameter_without_gradient(tmp_path):
    directory = save_family("bert", tmp_path, tie_word_embeddings=False)
    encoder = SparseEncoder(str(directory), head="naive", **LENGTHS).eval()
    batch = encoder.doc_tokenizer(TEXTS)
    assert encoder.head.weight is not encoder.backbone.get_input_embeddings().weight
    torch.testing.assert_close(encoder(batch), naive_reps(directory, batch), atol=1e-5, rtol=1e-5)
    encoder(batch).sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())


def test_decoder_without_bias_keeps_none(tmp_path):
    directory = save_family("modernbert", tmp_path, decoder_bias=False)
    encoder = SparseEncoder(str(directory), head="tiled", **LENGTHS).eval()
    batch = encoder.doc_tokenizer(TEXTS)
    assert encoder.head.bias is None
    torch.testing.assert_close(encoder(batch), naive_reps(directory, batch), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="decoder with a bias"):
        encoder.calibrate(TEXTS)


@pytest.mark.parametrize("head", ["tiled", "naive"])
def test_several_batches_go_through_the_head_once_or_each_at_its_own_length(head):
    encoder = small(head=head).eval()
    lengths = []
    encoder.head.register_forward_pre_hook(lambda *call: lengths.append(call[2]["max_seqlen"]), with_kwargs=True)
    query, doc = encoder.query_tokenizer(TEXTS[:2]), encoder.doc_tokenizer(TEXTS)
    together = encoder(query, doc)
    assert query.max_seqlen < doc.max_seqlen
    assert lengths == ([query.max_seqlen, doc.max_seqlen] if head == "naive" else [doc.max_seqlen])
    for rep, batch in zip(together, (query, doc), strict=True):
        assert rep.shape == (batch.input_ids.shape[0], VOCAB_SIZE)
        torch.testing.assert_close(rep, encoder(batch))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_change_the_vectors(side, tmp_path):
    encoder = SparseEncoder(str(save_family("roberta", tmp_path)), head="tiled", **LENGTHS).eval()
    encoder.tokenizer.padding_side = side
    batch = encoder.doc_tokenizer(TEXTS)
    alone = torch.cat([encoder(encoder.doc_tokenizer([text])) for text in TEXTS])
    torch.testing.assert_close(encoder(batch), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_wider_padding_does_not_change_the_vectors(saved, side, monkeypatch):
    encoder = SparseEncoder(str(saved), head="tiled", **LENGTHS, pool_special_tokens=False).eval()
    encoder.tokenizer.padding_side = side
    batch = encoder.doc_tokenizer(TEXTS)
    expected, (texts, width) = encoder(batch), batch.input_ids.shape
    shapes = seen_shapes(encoder)
    monkeypatch.setattr(encoder, "padded_width", lambda before: before + 5)
    torch.testing.assert_close(encoder(batch), expected, atol=1e-5, rtol=1e-5)
    assert shapes == [(texts, width + 5)]


def test_wider_padding_counts_among_the_tokens_at_a_time(monkeypatch):
    encoder = small(packed=False, gradient_checkpointing=30)
    shapes = seen_shapes(encoder)
    monkeypatch.setattr(encoder, "padded_width", lambda before: before + 5)
    encoder(encoder.doc_tokenizer(TEXTS))  # 3 texts, 12 wide
    assert shapes == [(1, 17)] * 3


def test_padded_widths_are_multiples_on_a_gpu_as_far_as_positions_go():
    def width(tokens: int, longest: int | None, gpu: bool = True) -> int:
        weight = SimpleNamespace(is_cuda=gpu)
        encoder = SimpleNamespace(head=SimpleNamespace(weight=weight), _longest=longest)
        return SparseEncoder.padded_width(encoder, tokens)

    assert [width(tokens, 512) for tokens in (1, 16, 17, 497, 512)] == [16, 16, 32, 512, 512]
    assert [width(tokens, 40) for tokens in (32, 33, 40)] == [32, 40, 40]
    assert width(513, None) == 528 and width(513, None, gpu=False) == 513


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_backbone_on_a_gpu_sees_multiples():
    encoder = small(packed=False).cuda()
    batch, shapes = encoder.doc_tokenizer(TEXTS).to("cuda"), seen_shapes(encoder)
    encoder(batch)
    assert shapes == [(3, 16)] and batch.input_ids.shape == (3, 12)


def test_calibration_makes_a_share_of_the_vocabulary_active():
    encoder = small()
    encoder.train()
    encoder.calibrate(TEXTS * 10, quantile=0.9)
    encoder_again = small()
    encoder_again.calibrate(TEXTS * 10, quantile=0.9)
    assert encoder.training
    encoder.eval()
    active = (encoder(encoder.doc_tokenizer(TEXTS)) > 0).float().mean()
    assert abs(active.item() - 0.1) < 0.02
    batch = encoder.doc_tokenizer(TEXTS)
    logits = encoder.pooled_rows(batch) @ encoder.head.weight.T
    assert abs(logits.std(correction=0).item() - 1) < 1e-4
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, encoder_again.state_dict()[name]), name


def test_calibration_counts_the_decoders_bias(saved):
    encoder = SparseEncoder(str(saved), head="naive", **LENGTHS).eval()
    batch = encoder.doc_tokenizer(TEXTS)
    logits = encoder.pooled_rows(batch) @ encoder.head.weight.T + encoder.head.bias
    encoder.calibrate(TEXTS)
    torch.testing.assert_close(encoder.logit_scale, 1 / logits.std(correction=0), rtol=1e-4, atol=0)
    active = (encoder(batch) > 0).float().mean()
    assert abs(active.item() - 0.1) < 0.02


def test_skip_pools_the_last_hidden_state(tmp_path):
    directory = save_family("bert", tmp_path)
    encoder = SparseEncoder(
        str(directory), head="naive", mlm_transform="skip", **LENGTHS
    ).eval()
    batch = encoder.doc_tokenizer(TEXTS)
    hidden = encoder.backbone(batch.input_ids, batch.attention_mask).last_hidden_state
    logits = hidden @ encoder.backbone.get_input_embeddings().weight.T
    expected = (logits.relu().log1p() * batch.attention_mask[..., None]).amax(1)
    torch.testing.assert_close(encoder(batch), expected, atol=1e-5, rtol=1e-5)
    assert not [name for name, _ in encoder.named_parameters() if "cls" in name or "pooler" in name]


def test_rebuilt_from_a_checkpoint_without_the_original(saved):
    encoder = SparseEncoder(str(saved), head="naive", **LENGTHS).eval()
    encoder.calibrate(TEXTS)
    buffer = io.BytesIO()
    torch.save({"hparams": encoder.hparams(), "state_dict": encoder.state_dict()}, buffer)
    buffer.seek(0)
    stored = torch.load(buffer, weights_only=True)
    again = SparseEncoder.from_hparams(stored["hparams"], head="tiled")
    again.load_state_dict(stored["state_dict"])
    batch = again.eval().doc_tokenizer(TEXTS)
    torch.testing.assert_close(again(batch), encoder(batch), atol=1e-6, rtol=1e-6)
    before, after = encoder.hparams(), again.hparams()
    assert before.pop("tokenizer_files").keys() == after.pop("tokenizer_files").keys()
    assert before == after


def test_random_weights_follow_the_seed_only():
    states = []
    for outer, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(outer)
        before = torch.get_rng_state()
        states.append(small(seed=seed).state_dict())
        assert torch.equal(before, torch.get_rng_state())
    weight = "backbone.bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(states[0][weight], states[1][weight])
    assert not torch.equal(states[0][weight], states[2][weight])


def test_a_copy_keeps_its_ties():
    clone = copy.deepcopy(small())
    assert clone.head.weight is clone.backbone.get_input_embeddings().weight


def test_dropout_and_checkpointing_reach_the_backbone():
    encoder = small(dropout=0.3, attention_dropout=0.2, gradient_checkpointing=True)
    assert encoder.backbone.config.hidden_dropout_prob == 0.3
    assert encoder.backbone.config.attention_probs_dropout_prob == 0.2
    encoder.train()
    encoder(encoder.doc_tokenizer(TEXTS)).sum().backward()
    assert any(getattr(module, "gradient_checkpointing", False) for module in encoder.backbone.modules())
    assert all(parameter.grad is not None for parameter in encoder.parameters())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("gradient_checkpointing", [True, 20])
def test_gradient_checkpointing_gives_the_same_gradients(device, gradient_checkpointing, packed):
    plain, recomputed = (
        small(config=WIDE, dropout=0.0, packed=packed, gradient_checkpointing=flag).to(device)
        for flag in (False, gradient_checkpointing)
    )
    for encoder in (plain, recomputed):
        query, doc = (encoder.doc_tokenizer(texts).to(device) for texts in (TEXTS[:2], TEXTS))
        sum(reps.square().sum() for reps in encoder(query, doc)).backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), recomputed.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@pytest.mark.parametrize("packed", [True, False])
def test_tokens_at_a_time_run_twice_with_the_same_dropout(device, packed, monkeypatch):
    gradients, calls = [], []
    for twice in (True, False):
        rates = {"dropout": 0.3, "attention_dropout": 0.0}
        encoder = small(config=WIDE, **rates, packed=packed, gradient_checkpointing=20).to(device)
        encoder.backbone.register_forward_pre_hook(lambda *_, twice=twice: calls.append(twice))
        if not twice:
            monkeypatch.setattr("lightning_modules.encoder.checkpoint", lambda run, piece, use_reentrant: run(piece))
        batch = encoder.doc_tokenizer(TEXTS).to(device)
        torch.manual_seed(0)
        encoder(batch).sum().backward()
        gradients.append([parameter.grad for parameter in encoder.parameters()])
    pieces = len(batch.split(20, padded=not packed))
    assert pieces > 1 and calls.count(True) == 2 * pieces and calls.count(False) == pieces
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_of_few_tokens_runs_once_whatever_its_checkpointing():
    encoder, calls = small(gradient_checkpointing=1000), []
    encoder.backbone.register_forward_pre_hook(lambda *_: calls.append(1))
    encoder(encoder.doc_tokenizer(TEXTS)).sum().backward()
    assert len(calls) == 1


@pytest.mark.parametrize("number", [1, 0, -5, 2.5, "layers"])
def test_bad_gradient_checkpointing_is_one_line(number):
    with pytest.raises(ValueError, match=r"model.gradient_checkpointing: expected false, true or a number of tokens"):
        small(gradient_checkpointing=number)


def test_heads_are_resolved(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_head("auto") == "sparton"
    assert resolve_head("auto", torch.device("cpu")) == "tiled"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_head("auto") == "tiled"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_head("sparton") == "sparton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="head=auto"):
        resolve_head("sparton")
    with pytest.raises(ValueError, match="expected one of auto, naive"):
        resolve_head("fast")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlm_transform": "drop"}, "mlm_transform: expected one of auto, keep, skip"),
        ({"max_doc_length": 64}, "max_doc_length: expected at most the 40 positions"),
        ({"dropout": 1.5}, r"dropout: expected a rate in \[0, 1\)"),
        ({"config": {"model_type": "bert"} | SIZES | {"vocab_size": 9, "num_attention_heads": 2}}, "at most 9 words"),
        ({"config": None}, "expected the architecture of 'small'"),
        ({"config": {"hidden_size": 8}}, "expected the key model_type"),
        ({"pretrained": True}, "model.pretrained=false"),
        ({"attn_implementation": "no_such"}, "does not load as a masked LM"),
    ],
)
def test_bad_arguments_are_one_line(changes, message, monkeypatch):
    monkeypatch.setattr("lightning_modules.backbone.hub_reachable", lambda: False)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        small(**changes)
    assert "\n" not in str(caught.value)


def test_bad_directories_are_one_line(tmp_path):
    directory = save_family("bert", tmp_path / "model")
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = {str(empty): "config.json", str(tmp_path / "none" / "such"): "does not exist"}
    for path, message in cases.items():
        with pytest.raises(FileNotFoundError, match=message):
            SparseEncoder(path)
    (directory / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="expected weights"):
        SparseEncoder(str(directory))
    random = SparseEncoder(str(directory), pretrained=False, max_doc_length=32, max_query_length=8)
    assert random.vocab_size == VOCAB_SIZE
    (tmp_path / "elsewhere").rename(directory / "model.safetensors")
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="found no tokenizer"):
        SparseEncoder(str(directory))


def test_skip_needs_embeddings_as_wide_as_the_hidden_state(tmp_path):
    with pytest.raises(ValueError, match="use model.mlm_transform=keep"):
        SparseEncoder(str(save_family("albert", tmp_path)), mlm_transform="skip")


def test_checkpoint_of_another_vocabulary_is_one_line():
    other = small(config={"model_type": "bert"} | FAMILIES["bert"] | {"vocab_size": 128})
    with pytest.raises(ValueError, match="expected a vocabulary and hidden size") as caught:
        small().load_state_dict(other.state_dict())
    assert "\n" not in str(caught.value)


def test_albert_cannot_recompute_and_says_so(tmp_path):
    with pytest.raises(ValueError, match="gradient_checkpointing: expected false"):
        SparseEncoder(str(save_family("albert", tmp_path)), gradient_checkpointing=True)


def test_keeping_a_transform_that_the_checkpoint_lacks_is_logged(tmp_path, caplog):
    directory = save_family("bert", tmp_path)
    SparseEncoder(str(directory), mlm_transform="skip", **LENGTHS).backbone.save_pretrained(directory)
    assert SparseEncoder(str(directory), **LENGTHS).mlm_transform == "skip"
    assert not caplog.records
    assert SparseEncoder(str(directory), mlm_transform="keep", **LENGTHS).mlm_transform == "keep"
    assert "random" in caplog.text
