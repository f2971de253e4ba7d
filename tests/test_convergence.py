"""Naive and sparton heads, same seed and same data: 50 steps give the same losses and the same parameters."""

from __future__ import annotations

import torch

from datamodules.collate import TextBatch
from lightning_modules.encoder import SparseEncoder
from sparton.losses import FLOPS, InfoNCE
from model_families import make_tokenizer

STEPS = 50
# Through the interpreter a step costs its programs; compiled, the size of model=tiny and beyond.
SMALL = {"words": 96, "hidden": 16, "batch": 4, "tokens": 6}
FULL = {"words": 16_000, "hidden": 384, "batch": 32, "tokens": 128}


def _texts(size: dict[str, int], count: int, generator: torch.Generator, device: torch.device) -> TextBatch:
    ids = torch.randint(5, 96, (count, size["tokens"]), generator=generator)
    mask = (torch.arange(size["tokens"]) < torch.randint(2, size["tokens"], (count, 1), generator=generator)).long()
    return TextBatch.from_masks(ids * mask, mask, mask.bool()).to(device)


def _train(head: str, size: dict[str, int], device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    config = {
        "model_type": "bert", "vocab_size": size["words"], "hidden_size": size["hidden"], "num_hidden_layers": 1,
        "num_attention_heads": 2, "intermediate_size": 2 * size["hidden"], "max_position_embeddings": 256,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }
    encoder = SparseEncoder("small", pretrained=False, config=config, tokenizer=make_tokenizer(), head=head).to(device)
    # Not Adam: it scales a gradient of rounding noise up to a full step, and so the two heads' noise apart.
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.03, momentum=0.9)
    ranking, sparsity = InfoNCE(), FLOPS(weight=1e-3)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(STEPS):
        query, doc = encoder(*(_texts(size, size["batch"], generator, device) for _ in range(2)))
        loss = ranking(query, doc, teacher_scores=None, false_negatives=None) + 1e-3 * (sparsity(query) + sparsity(doc))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).cpu(), {name: p.detach().cpu() for name, p in encoder.named_parameters()}


def test_same_losses_and_parameters(device):
    size = FULL if device.type == "cuda" else SMALL
    naive_losses, naive = _train("naive", size, device)
    losses, trained = _train("sparton", size, device)
    assert naive_losses[-5:].mean() < naive_losses[:5].mean()
    torch.testing.assert_close(losses, naive_losses, rtol=1e-3, atol=1e-4)
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter, naive[name], rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
