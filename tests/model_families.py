"""Small masked language models of every family, saved to disk, for the tests of the encoder and its export."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedTokenizerFast

from datamodules.collate import TextBatch

WORDS = "gene cell protein mouse human cancer study the of in and is a response immune blood risk drug dose".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB_SIZE = 96  # more words than the tokenizer has, as in checkpoints padded to a round size
TEXTS = ["gene response in the mouse", "cancer", "immune cell study of human blood and drug dose risk"]
COMMON = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 40}
SIZES = {"hidden_size": 16, "intermediate_size": 32}
PAD_IS_ONE = ("camembert", "roberta", "xlm-roberta")
FAMILIES: dict[str, dict] = {
    "bert": COMMON | SIZES,
    "distilbert": {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 40,
        "dim": 16,
        "hidden_dim": 32,
        "n_layers": 2,
        "n_heads": 2,
    },
    "roberta": COMMON | SIZES | {"type_vocab_size": 1},
    "camembert": COMMON | SIZES | {"type_vocab_size": 1},
    "xlm-roberta": COMMON | SIZES | {"type_vocab_size": 1},
    "modernbert": COMMON | SIZES,
    "deberta-v2": COMMON | SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "albert": COMMON | SIZES | {"embedding_size": 12},
    "electra": COMMON | SIZES | {"embedding_size": 12},
}


def make_tokenizer(pad_first: bool = True) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; with ``pad_first=False`` the padding id is 1, as XLM-RoBERTa has it."""
    special = SPECIAL if pad_first else ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    vocab = {word: i for i, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names, model_max_length=38)


def save_family(family: str, directory: Path, **changes: object) -> Path:
    """Saves a small model of a family with random weights (biases and norms too) and its tokenizer."""
    tokenizer = make_tokenizer(pad_first=family not in PAD_IS_ONE)
    config = AutoConfig.for_model(family, **FAMILIES[family] | {"pad_token_id": tokenizer.pad_token_id} | changes)
    torch.manual_seed(1)
    model = AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@torch.no_grad()
def naive_reps(directory: Path, batch: TextBatch) -> Tensor:
    """The definition on stock logits: max over pooled tokens of log1p(relu(logits)), (B, V)."""
    model = AutoModelForMaskedLM.from_pretrained(directory).eval()
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    pooled = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
    pooled[batch.pool_index] = True
    scores = logits.relu().log1p() * pooled.view(*batch.input_ids.shape, 1)
    return scores.amax(1)
