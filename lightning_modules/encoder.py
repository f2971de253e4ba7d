"""SparseEncoder: any Hugging Face masked language model whose decoder is one of sparton's heads."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import sparton
from datamodules.collate import TextBatch, TextTokenizer
from lightning_modules import backbone as loading
from lightning_modules import decoder as surgery
from lightning_modules import packed as packed_attention
from lightning_modules.calibration import document_maxima, logit_deviation

HEADS = {"naive": "NaiveHead", "compiled": "CompiledHead", "tiled": "TiledHead", "sparton": "SpartonHead"}
TRANSFORMS = ("auto", "keep", "skip")
CALIBRATION_BATCH = 32  # texts
PADDED_STEP = 16  # tokens


def resolve_head(head: str, device: torch.device | None = None) -> str:
    """The head's name: ``auto`` becomes sparton on a GPU and tiled elsewhere.

    Args:
        head: auto or one of HEADS.
        device: where the model will run; None: on the GPU if there is one.

    Raises:
        ValueError: for an unknown name, or sparton without a GPU (unless ``TRITON_INTERPRET=1``).
    """
    if head != "auto" and head not in HEADS:
        raise ValueError(f"head: expected one of auto, {', '.join(HEADS)}, got {head!r}")
    gpu = torch.cuda.is_available() if device is None else device.type == "cuda"
    if head == "auto":
        return "sparton" if gpu else "tiled"
    if head == "sparton" and not gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("head=sparton: expected a CUDA device, got the CPU; use head=auto, which takes tiled there")
    return head


class SparseEncoder(nn.Module):
    """Encodes texts as sparse vectors over the vocabulary: backbone, pooled rows, one call of the head.

    ``rep[b, v] = max over pooled tokens s of log1p(relu(logit_scale * hidden[b, s] . W[v] + bias[v]))``
    (SPLADE-max, Formal et al. 2021, arXiv 2109.10086, eq. 4; ``logit_scale`` is 1 unless :meth:`calibrate` sets it).

    The head's weight and bias are the language model's own decoder, tied to the input embeddings where the model ties
    them. A decoder without bias keeps none, so that stock tools load the export and give the same vectors.

    Args:
        name_or_path: directory or hub id of a masked language model. With ``pretrained=False`` a directory gives the
            architecture; a hub id is a label and ``config`` the architecture.
        head: auto, naive, compiled, tiled or sparton; ``head_name`` holds what auto became.
        pretrained: loads weights. False draws random ones from ``seed`` and touches no network.
        config: the architecture as a plain dict with ``model_type``; used by ``pretrained=False`` only.
        tokenizer: directory, hub id or object; by default the checkpoint's own, and the bundled one where
            ``pretrained=False`` leaves none.
        packaged: ``package/folder`` of an installed Python package with the same weights, used where the hub does not
            answer.
        mlm_transform: keep pools what the decoder of the language model sees; skip pools the last hidden state with
            the input embeddings as weight and a new zero bias; auto skips where the checkpoint lacks the transform
            (a sentence encoder), whose random weights would make noise of the expansion.
        max_query_length, max_doc_length: in tokens, special tokens included.
        pool_special_tokens: False leaves [CLS], [SEP] and their like out of the pooling.
        activation: ``log1p``, or ``log1p_log1p`` (log1p twice).
        gradient_checkpointing: True runs each layer of the backbone again in the backward pass. A number of tokens
            runs the whole backbone again, so many tokens at a time: of the backbone no batch, however large, keeps
            more than its output and the activations of that many tokens. A batch of fewer is not run again.
        attn_implementation: ``sdpa``, ``eager``, ``flash_attention_2``; None lets transformers choose (sdpa where the
            family of models has it).
        dropout: rate of every dropout in the backbone; None keeps the checkpoint's.
        attention_dropout: rate of the attention's dropout; None follows ``dropout``.
        packed: True runs the backbone on packed tokens, queries and documents together, without padding; False on
            padded batches; auto packs on a GPU where it can (:meth:`packing`). Never saved: it belongs to the run.
        seed: of random weights.

    Raises:
        ValueError, FileNotFoundError: one line with argument, expected, got and remedy.
    """

    def __init__(
        self,
        name_or_path: str | None = None,
        *,
        head: str = "auto",
        pretrained: bool = True,
        config: Mapping[str, Any] | None = None,
        tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
        packaged: str | None = None,
        mlm_transform: str = "auto",
        max_query_length: int = 64,
        max_doc_length: int = 256,
        pool_special_tokens: bool = True,
        activation: str = "log1p",
        gradient_checkpointing: bool | int = False,
        attn_implementation: str | None = None,
        dropout: float | None = None,
        attention_dropout: float | None = None,
        packed: str | bool = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        packed_attention.check_option(packed)
        if mlm_transform not in TRANSFORMS:
            raise ValueError(f"model.mlm_transform: expected one of {', '.join(TRANSFORMS)}, got {mlm_transform!r}")
        self.head_name = resolve_head(head)
        loaded = loading.load_language_model(
            name_or_path,
            pretrained=pretrained,
            config=config,
            tokenizer=tokenizer,
            packaged=packaged,
            attn_implementation=attn_implementation,
            dropout=dropout,
            attention_dropout=attention_dropout,
            seed=seed,
        )
        self.tokenizer = loaded.tokenizer
        parts = surgery.cut(loaded.model, loaded.missing_keys, mlm_transform)
        self.backbone, self.decoder_name = parts.model, parts.decoder_name
        self.backbone.train()
        self._tokens_at_a_time = 0
        if not isinstance(gradient_checkpointing, bool):
            self._tokens_at_a_time = _check_tokens(gradient_checkpointing)
        elif gradient_checkpointing:
            surgery.recompute_layers(self.backbone)
        self._packed = packed
        self._obstacle = packed_attention.obstacle(self.backbone.config, attn_implementation)
        if packed is True and self._obstacle:
            raise packed_attention.refusal(self._obstacle)
        if packed is not False and not self._obstacle:
            packed_attention.prepare(self.backbone)
        self._first_position = surgery.first_position(self.backbone)
        self._longest = surgery.longest_input(self.backbone)
        self.head = getattr(sparton, HEADS[self.head_name]).from_linear(parts.decoder, activation=activation)
        self.register_buffer("logit_scale", torch.ones((), device=parts.decoder.weight.device))
        self.register_load_state_dict_pre_hook(_check_same_vocabulary)

        self._options = {
            "name_or_path": name_or_path,
            "mlm_transform": "skip" if parts.decoder_name is None else "keep",
            "max_query_length": max_query_length,
            "max_doc_length": max_doc_length,
            "pool_special_tokens": pool_special_tokens,
            "activation": activation,
            "gradient_checkpointing": gradient_checkpointing,
            "attn_implementation": attn_implementation,
        }
        self._check_lengths()
        self.query_tokenizer = TextTokenizer(
            self.tokenizer, max_query_length, pool_special_tokens=pool_special_tokens
        )
        self.doc_tokenizer = TextTokenizer(self.tokenizer, max_doc_length, pool_special_tokens=pool_special_tokens)

    @property
    def vocab_size(self) -> int:
        """Dimension V of the vectors."""
        return self.head.weight.shape[0]

    @property
    def mlm_transform(self) -> str:
        """``keep`` or ``skip``: what ``auto`` became."""
        return self._options["mlm_transform"]

    @property
    def options(self) -> dict[str, Any]:
        """The options that do not stand in the backbone's own configuration, as plain values."""
        return dict(self._options)

    def _check_lengths(self) -> None:
        for side in ("max_query_length", "max_doc_length"):
            if self._longest is not None and self._options[side] > self._longest:
                raise ValueError(
                    f"model.{side}: expected at most the {self._longest} positions of this backbone, got "
                    f"{self._options[side]}; lower model.{side}"
                )

    def packing(self, device: torch.device, dtype: torch.dtype, *, training: bool) -> packed_attention.Packing:
        """How the backbone runs on a device, and why where it is padded.

        On CUDA it packs the families in ``packed.FAMILIES``, in bfloat16 and float16 through torch's variable-length
        attention, in float32 through FlexAttention. Neither has dropout, so that a model whose attention has it stays
        padded in training. On the CPU it packs if told to, text by text.

        Args:
            device: where it will run.
            dtype: what it computes in: autocast's dtype, else the weights'.
            training: whether dropout is active.

        Raises:
            ValueError: where ``packed`` is True and it can't.
        """
        return packed_attention.choose(
            self._packed, self._obstacle, self.backbone.config, device=device, dtype=dtype, training=training
        )

    @property
    def packed(self) -> str:
        """How the backbone runs now: ``varlen``, ``flex``, ``text`` or ``padded``."""
        weight = self.head.weight
        device = weight.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        return self.packing(device, dtype, training=self.training).mode

    def pooled_rows(self, *batches: TextBatch) -> Tensor:
        """Hidden rows that the head pools over: (N, D), text by text, times ``logit_scale``."""
        padded, limit = self.packed == "padded", self._tokens_at_a_time
        if padded:
            batches = tuple(self._widened(batch) for batch in batches)
        tokens = sum((batch.input_ids if padded else batch.token_ids).numel() for batch in batches)
        if not (limit and torch.is_grad_enabled() and tokens > limit):
            return self._rows(*batches) * self.logit_scale
        pieces = [piece for batch in batches for piece in batch.split(limit, padded=padded)]
        rows = torch.cat([checkpoint(self._rows, piece, use_reentrant=False) for piece in pieces])
        return rows * self.logit_scale

    def _rows(self, *batches: TextBatch) -> Tensor:
        mode = self.packed
        if mode != "padded":
            return packed_attention.pooled_rows(self.backbone, batches, mode, self._first_position)
        if len(batches) == 1:
            return self._padded_rows(batches[0])
        return torch.cat([self._padded_rows(batch) for batch in batches])

    def padded_width(self, width: int) -> int:
        """Tokens to which the padded backbone widens texts of ``width``: on CUDA the next multiple of 16.

        On an H200 in bf16 sdpa takes cuDNN's attention, which makes a plan for each new shape: about 0.1 s of a
        training step in which the GPU waits for the host. Multiples keep the shapes few.
        """
        if not self.head.weight.is_cuda:
            return width
        wide = width + -width % PADDED_STEP
        return wide if self._longest is None else max(width, min(wide, self._longest))

    def _widened(self, batch: TextBatch) -> TextBatch:
        width = self.padded_width(batch.input_ids.shape[1])
        return batch.widened(width, self.backbone.config.pad_token_id or 0)

    def _padded_rows(self, batch: TextBatch) -> Tensor:
        hidden = surgery.hidden_rows(self.backbone, batch.input_ids, batch.attention_mask)
        return hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.pool_index)

    def forward(self, *batches: TextBatch) -> Tensor | tuple[Tensor, ...]:
        """Encodes batches of texts: the backbone once on all (packed) or on each (padded), the head once on all.

        A head that pads (naive, compiled) is called on each: queries padded to the length of documents would cost it
        memory and time that nobody has who encodes the two sides apart.

        Args:
            batches: one or more batches, for example queries and documents, on the encoder's device.

        Returns:
            (B, V) for one batch, else a tuple with (B_i, V) for each.
        """
        if not batches:
            raise ValueError("batches: expected at least one TextBatch, got none")
        rows = self.pooled_rows(*batches)
        if len(batches) == 1:
            return self.head(rows, cu_seqlens=batches[0].cu_seqlens, max_seqlen=batches[0].max_seqlen)
        counts = [batch.pool_index.shape[0] for batch in batches]
        if self.head.pads:
            return tuple(
                self.head(own, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
                for own, batch in zip(rows.split(counts), batches, strict=True)
            )
        bounds, offset = [], 0
        for batch, count in zip(batches, counts, strict=True):
            bounds.append(batch.cu_seqlens[bool(bounds) :] + offset)
            offset += count
        reps = self.head(rows, cu_seqlens=torch.cat(bounds), max_seqlen=max(batch.max_seqlen for batch in batches))
        return reps.split([batch.input_ids.shape[0] for batch in batches])

    @torch.no_grad()
    def calibrate(self, texts: Sequence[str], quantile: float = 0.9) -> None:
        """Scales the logits to unit deviation and starts the bias so that a share of the vocabulary is active.

        ``logit_scale`` becomes 1 / std of the logits over every pooled token and word; the bias is divided by the same
        figure, then lowered by the ``quantile`` of the maxima over (document, word), so that ``1 - quantile`` of the
        vocabulary is active in a document. The (B, S, V) logits are never stored: their deviation comes from the
        weight's (D, D) Gram matrix in float64, the maxima tile by tile. Two calls give the same result.

        Args:
            texts: documents, 512 are plenty.
            quantile: in (0, 1).

        Raises:
            ValueError: if the decoder has no bias, or there is no text.
        """
        if self.head.bias is None:
            raise ValueError(
                "calibrate: expected a decoder with a bias, this model's has none; set calibrate.documents=0"
            )
        if not texts or not 0 < quantile < 1:
            raise ValueError(f"calibrate: expected texts and a quantile in (0, 1), got {len(texts)} and {quantile}")
        was_training = self.training
        self.eval()
        if self.decoder_name is not None:
            surgery.final_norm(self.backbone)  # what cannot be exported later is refused now
        starts = range(0, len(texts), CALIBRATION_BATCH)
        batches = [self._calibration_rows(texts[start : start + CALIBRATION_BATCH]) for start in starts]
        deviation = logit_deviation([rows for rows, _ in batches], self.head.weight, self.head.bias)
        self.logit_scale /= deviation
        self.head.bias /= deviation
        maxima = torch.cat(
            [document_maxima(rows / deviation, counts, self.head.weight, self.head.bias) for rows, counts in batches]
        )
        rank = max(1, round(quantile * maxima.numel()))
        self.head.bias -= maxima.flatten().kthvalue(rank).values.to(self.head.bias.device)
        self.train(was_training)

    def _calibration_rows(self, texts: Sequence[str]) -> tuple[Tensor, list[int]]:
        """Pooled rows (N, D) of documents, and how many belong to each (texts without one are left out)."""
        batch = self.doc_tokenizer(texts)
        counts = [count for count in batch.cu_seqlens.diff().tolist() if count]
        return self.pooled_rows(batch.to(self.logit_scale.device)).float(), counts

    def tokenizer_files(self) -> dict[str, str]:
        """The tokenizer as save_pretrained writes it: file name to text.

        Raises:
            ValueError: if it is not one of the tokenizers library, whose files are text.
        """
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"model.tokenizer: expected one of the tokenizers library, got {type(self.tokenizer).__name__}; "
                "choose a checkpoint with a tokenizer.json"
            )
        self.tokenizer.backend_tokenizer.no_truncation()  # left over from the last call, which sets them anew
        self.tokenizer.backend_tokenizer.no_padding()
        with tempfile.TemporaryDirectory() as folder:
            self.tokenizer.save_pretrained(folder)
            return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}

    def hparams(self) -> dict[str, Any]:
        """Everything but the weights, as plain values: options, architecture and the tokenizer's files.

        A checkpoint that carries it can be rebuilt on a machine that has neither a network nor the original weights.
        """
        config = json.loads(self.backbone.config.to_json_string(use_diff=False))
        return self.options | {"config": config, "tokenizer_files": self.tokenizer_files()}

    @classmethod
    def from_hparams(cls, hparams: Mapping[str, Any], head: str = "auto") -> SparseEncoder:
        """The encoder that :meth:`hparams` describes, with random weights; a state_dict is loaded afterwards."""
        options = {name: value for name, value in hparams.items() if name not in ("tokenizer_files", "name_or_path")}
        with tempfile.TemporaryDirectory() as folder:
            for name, text in hparams["tokenizer_files"].items():
                (Path(folder) / Path(name).name).write_text(text, encoding="utf-8")
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        encoder = cls(None, head=head, pretrained=False, tokenizer=tokenizer, **options)
        encoder._options["name_or_path"] = hparams["name_or_path"]
        return encoder


def _check_tokens(number: object) -> int:
    """Returns the number of tokens that ``gradient_checkpointing`` gives."""
    if not isinstance(number, int) or number < 2:
        raise ValueError(
            f"model.gradient_checkpointing: expected false, true or a number of tokens, got {number!r}; "
            "set for example 16384"
        )
    return number


def _check_same_vocabulary(
    module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *unused: object
) -> None:
    """Turns a checkpoint of another model into one line; PyTorch would print every parameter."""
    weight = state_dict.get(f"{prefix}head.weight")
    if weight is not None and weight.shape != module.head.weight.shape:
        expected, got = (tuple(w.shape) for w in (module.head.weight, weight))
        raise ValueError(
            f"checkpoint: expected a vocabulary and hidden size of {expected}, got {got}; "
            "it belongs to another model, choose that one with model="
        )
