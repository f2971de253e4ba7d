"""The backbone on packed tokens against the padded one: vectors, gradients, positions, windows, who stays padded."""

from __future__ import annotations

import json

import pytest
import torch
from model_families import FAMILIES, TEXTS, WORDS, make_tokenizer, save_family

from datamodules.collate import TextBatch
from lightning_modules import packed
from lightning_modules.encoder import SparseEncoder

# DeBERTa in transformers 5.17 scripts a function at import.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
LENGTHS = {"max_query_length": 16, "max_doc_length": 38}
# Heads of 16 dimensions, the least that FlexAttention takes.
WIDE = {"hidden_size": 32, "intermediate_size": 64}
WIDE_DISTILBERT = {"dim": 32, "hidden_dim": 64}
LOCAL = {"modernbert": {"local_attention": 8, "layer_types": ["sliding_attention", "full_attention"]}}
# From one token between [CLS] and [SEP] to all positions of the table.
RAGGED = [*TEXTS, "gene", " ".join(WORDS * 2), "", "human [PAD] blood risk"]
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module", params=packed.FAMILIES)
def saved(request, tmp_path_factory):
    sizes = WIDE_DISTILBERT if request.param == "distilbert" else WIDE
    return save_family(request.param, tmp_path_factory.mktemp(request.param), **sizes | LOCAL.get(request.param, {}))


def encoder_of(directory, how: bool, device: torch.device, **changes: object) -> SparseEncoder:
    arguments = {"head": "naive", "dropout": 0.0, "packed": how} | LENGTHS
    return SparseEncoder(str(directory), **arguments | changes).to(device)


def run(encoder: SparseEncoder, device: torch.device) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Vectors of queries and documents and the gradients of a sum that weighs every entry otherwise."""
    query, doc = encoder.query_tokenizer(TEXTS[:2]).to(device), encoder.doc_tokenizer(RAGGED).to(device)
    reps = encoder(query, doc)
    for rep in reps:
        weights = torch.linspace(0.5, 1.5, rep.numel(), device=device).view_as(rep)
        (rep.float() * weights).sum().backward(retain_graph=True)
    gradients = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    return [rep.detach() for rep in reps], gradients


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-12))


@pytest.mark.parametrize("training", [True, False])
def test_vectors_and_gradients_are_those_of_the_padded_model(saved, device, training):
    results = [run(encoder_of(saved, how, device).train(training), device) for how in (True, False)]
    for got, want in zip(results[0][0], results[1][0], strict=True):
        assert want.count_nonzero() > 20
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    for name, want in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], want, atol=1e-4, rtol=1e-4, msg=name)


@on_cuda
@pytest.mark.parametrize("gradient_checkpointing", [False, True, 60])
def test_bfloat16_is_within_the_padded_models_own_error_on_cuda(saved, device, gradient_checkpointing):
    want, want_gradients = run(encoder_of(saved, False, device), device)
    errors = []
    for how in (True, False):
        encoder = encoder_of(saved, how, device, gradient_checkpointing=gradient_checkpointing)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert encoder.packed == ("varlen" if how else "padded")
            reps, gradients = run(encoder, device)
        errors.append([relative_error(a, b) for a, b in zip(reps, want, strict=True)])
        errors[-1] += [relative_error(gradients[name], want_gradients[name]) for name in want_gradients]
    for name, packed_error, padded_error in zip(["query", "doc", *want_gradients], *errors, strict=True):
        assert packed_error <= 1.5 * padded_error + 2**-8, name


@pytest.mark.parametrize("gradient_checkpointing", [True, 60])
def test_recomputed_layers_see_their_texts_again(saved, device, gradient_checkpointing):
    results = [
        run(encoder_of(saved, True, device, gradient_checkpointing=how), device)
        for how in (gradient_checkpointing, False)
    ]
    for name, want in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], want, atol=1e-4, rtol=1e-4, msg=name)


def test_a_text_is_the_same_alone_and_among_others(saved, device):
    encoder = encoder_of(saved, True, device).eval()
    together = encoder(encoder.doc_tokenizer(RAGGED).to(device))
    for text, rep in zip(RAGGED, together, strict=True):
        alone = encoder(encoder.doc_tokenizer([text]).to(device))[0]
        torch.testing.assert_close(rep, alone, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_position_ids_begin_anew_in_each_text(family, tmp_path):
    """As the model itself counts them in a padded batch, a padding token in a text included."""
    encoder = encoder_of(save_family(family, tmp_path), True, torch.device("cpu"))
    batch = encoder.doc_tokenizer(RAGGED)
    first = encoder._first_position
    assert first == (2 if family == "roberta" else 0)
    got = packed.position_ids(batch.token_ids, batch.token_positions, first)
    texts = got.split(batch.token_cu_seqlens.diff().tolist())
    for ids, mask, positions in zip(batch.input_ids, batch.attention_mask, texts, strict=True):
        ids, want, count = ids[mask.bool()].tolist(), [], 0
        for token in ids:
            if family == "roberta":
                count += token != 1
                want.append(1 + count if token != 1 else 1)
            else:
                want.append(len(want))
        assert positions.tolist() == want


@pytest.mark.parametrize("window", [None, 0, 5, 200])
@pytest.mark.parametrize("lengths", [[1], [128, 128], [3, 300, 1, 0, 40, 129], [256]])
def test_block_mask_sees_exactly_the_own_text_and_window(lengths, window):
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    tokens = int(bounds[-1])
    mask = packed.block_mask(bounds, tokens, window)
    text = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    row, column = torch.arange(tokens)[:, None], torch.arange(tokens)
    want = text[:, None] == text
    if window is not None:
        want &= (row - column).abs() <= window
    zero = torch.zeros((), dtype=torch.long)
    assert torch.equal(mask.mask_mod(zero, zero, row.int(), column.int()), want)
    blocks = -(-tokens // packed.BLOCK)
    listed = torch.zeros(blocks, blocks, dtype=torch.bool)
    for block in range(blocks):
        listed[block, mask.kv_indices[0, 0, block, : mask.kv_num_blocks[0, 0, block]].long()] = True
    padding = blocks * packed.BLOCK - tokens
    whole = torch.nn.functional.pad(want, (0, padding, 0, padding)).view(blocks, packed.BLOCK, blocks, packed.BLOCK)
    needed = whole.any(3).any(1)
    assert bool((listed | ~needed).all())


def test_dropout_of_attention_is_never_dropped_silently(tmp_path, device):
    directory = save_family("bert", tmp_path, **WIDE)
    refusal = "rate is 0.1, set model.attention_dropout=0; or set model.packed=auto"
    with pytest.raises(ValueError, match=refusal) as error:
        encoder_of(directory, True, device, dropout=0.1).train()(make_batch(device))
    assert "\n" not in str(error.value)
    auto = encoder_of(directory, "auto", device, dropout=0.1)
    choice = auto.packing(torch.device("cuda"), torch.float16, training=True)
    assert choice.mode == "padded" and "set model.attention_dropout=0" in str(choice)
    encoder = encoder_of(directory, True, device, dropout=0.1, attention_dropout=0.0).train()
    assert encoder.packed in ("text", "varlen", "flex") and encoder.backbone.config.hidden_dropout_prob == 0.1
    assert encoder_of(directory, True, device, dropout=0.1).eval().packed != "padded"


def make_batch(device: torch.device) -> TextBatch:
    ids = torch.tensor([[2, 7, 8, 3], [2, 9, 3, 0]])
    mask = (ids != 0).long()
    return TextBatch.from_masks(ids, mask, mask).to(device)


@pytest.mark.parametrize("family", ["deberta-v2", "albert"])
def test_other_families_stay_padded_and_say_so(family, tmp_path, device):
    directory = save_family(family, tmp_path)
    encoder = encoder_of(directory, "auto", device)
    choice = encoder.packing(torch.device("cuda"), torch.bfloat16, training=False)
    assert choice == ("padded", f"{family} has no packed attention, {', '.join(packed.FAMILIES)} have")
    assert encoder.packed == "padded"
    with pytest.raises(ValueError, match=f"model.packed: expected auto or false here, got true: {family} has no"):
        encoder_of(directory, True, device)


def test_where_it_packs(tmp_path):
    cpu, directory = torch.device("cpu"), save_family("bert", tmp_path, **WIDE)
    encoder = encoder_of(directory, "auto", cpu)
    assert encoder.packing(cpu, torch.float32, training=True) == ("padded", "on the CPU")
    assert encoder.packing(torch.device("cuda"), torch.float32, training=True).mode == "flex"
    assert encoder.packing(torch.device("cuda"), torch.float64, training=True).mode == "padded"
    assert encoder_of(directory, True, cpu).packing(cpu, torch.float32, training=True).mode == "text"
    padded = encoder_of(directory, False, cpu).packing(torch.device("cuda"), torch.float32, training=True)
    assert padded == ("padded", "model.packed=false")
    narrow = encoder_of(save_family("bert", tmp_path / "narrow"), "auto", cpu)
    assert "16 dimensions" in narrow.packing(torch.device("cuda"), torch.float32, training=True).reason
    eager = encoder_of(directory, "auto", cpu, attn_implementation="eager")
    assert "attn_implementation=eager" in eager.packing(torch.device("cuda"), torch.float32, training=True).reason
    with pytest.raises(ValueError, match=r"model.packed: expected auto, true or false, got 'yes'"):
        encoder_of(directory, "yes", cpu)


def test_nothing_of_it_is_saved(tmp_path):
    """Neither in the configuration that a checkpoint carries nor in what an export writes."""
    encoder = encoder_of(save_family("bert", tmp_path), True, torch.device("cpu"))
    assert packed.ATTENTION not in json.dumps(encoder.hparams())
    encoder.backbone.save_pretrained(tmp_path / "again")
    assert packed.ATTENTION not in (tmp_path / "again" / "config.json").read_text()
    assert "packed" not in encoder.options


def test_packed_batches_have_no_padding():
    """What the backbone is called with: one row of the real tokens of queries and documents."""
    config = {"model_type": "bert"} | FAMILIES["bert"]
    arguments = {"pretrained": False, "config": config, "tokenizer": make_tokenizer(), "head": "naive"}
    encoder = SparseEncoder("small", **arguments, dropout=0.0, packed=True, **LENGTHS)
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda *call: seen.append(call[2]["input_ids"].shape), with_kwargs=True)
    query, doc = encoder.query_tokenizer(TEXTS[:2]), encoder.doc_tokenizer(RAGGED)
    encoder(query, doc)
    assert seen == [(1, len(query.token_ids) + len(doc.token_ids))]
    assert len(doc.token_ids) == int(doc.attention_mask.sum()) < doc.input_ids.numel()
