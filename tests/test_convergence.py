"""Naive and sparton heads, same seed and same data: 50 steps give the same losses and the same parameters."""

from __future__ import annotations

import torch
from model_families import make_tokenizer

from datamodules.collate import TextBatch
from lightning_modules.encoder import SparseEncoder
from sparton.losses import FLOPS, InfoNCE

STEPS = 50
# Through the interpreter a step costs its programs; compiled, the size of model=tiny and beyond.
SMALL = {"words": 48, "hidden": 16, "batch": 4, "tokens": 4, "lr": 0.005}
FULL = {"words": 16_000, "hidden": 384, "batch": 32, "tokens": 128, "lr": 0.003}


def _pairs(size: dict[str, float], generator: torch.Generator, device: torch.device) -> list[TextBatch]:
    """Queries of random words, and documents of which every other word is the query's."""
    shape = (size["batch"], size["tokens"])
    query = torch.randint(5, size["words"], shape, generator=generator)
    shared = torch.rand(shape, generator=generator) < 0.5
    doc = torch.where(shared, query, torch.randint(5, size["words"], shape, generator=generator))
    lengths = torch.randint(2, size["tokens"], (2, size["batch"], 1), generator=generator)
    masks = (torch.arange(size["tokens"]) < lengths).long()
    return [
        TextBatch.from_masks(ids * mask, mask, mask.bool()).to(device)
        for ids, mask in zip((query, doc), masks, strict=True)
    ]


def _train(
    head: str, size: dict[str, float], device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    config = {
        "model_type": "bert", "vocab_size": size["words"], "hidden_size": size["hidden"], "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 2 * size["hidden"], "max_position_embeddings": 256,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }
    encoder = SparseEncoder("small", pretrained=False, config=config, tokenizer=make_tokenizer(), head=head)
    encoder.to(device, dtype)
    # Not Adam, which scales a gradient of rounding noise up to a full step; and slower than it could be, since at ten
    # times this rate the naive head itself parts from its float64 run.
    optimizer = torch.optim.SGD(encoder.parameters(), lr=size["lr"], momentum=0.9)
    ranking, sparsity = InfoNCE(), FLOPS(weight=1e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        query, doc = encoder(*_pairs(size, generator, device))
        loss = ranking(query, doc, teacher_scores=None, false_negatives=None) + 1e-3 * (sparsity(query) + sparsity(doc))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu(), {name: p.detach().double().cpu() for name, p in encoder.named_parameters()}


def _error(trained: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Frobenius norm of the difference of all parameters, relative to the parameters'."""
    difference = sum((trained[name] - exact[name]).square().sum() for name in exact)
    return (difference / sum(value.square().sum() for value in exact.values())).sqrt().item()


def test_same_losses_and_parameters(device):
    size = FULL if device.type == "cuda" else SMALL
    naive_losses, naive = _train("naive", size, device)
    losses, trained = _train("sparton", size, device)
    assert losses[-5:].mean() < losses[:5].mean()
    torch.testing.assert_close(losses, naive_losses, rtol=1e-3, atol=1e-4)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter, naive[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    # And the sparton head is as near as the naive one to what float64 gives.
    exact = _train("naive", size, device, torch.float64)[1]
    assert _error(trained, exact) <= 2 * _error(naive, exact) + 1e-5
