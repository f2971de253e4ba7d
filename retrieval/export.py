"""Saving a trained encoder for transformers and sentence-transformers, and loading one from whatever was saved."""

from __future__ import annotations

import inspect
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lightning_modules.backbone import quiet
from lightning_modules.decoder import decoder_in_place, final_norm
from lightning_modules.encoder import SparseEncoder

CONFIG_NAME = "sparton_config.json"
DENSE = "1_Dense"
# Module paths that sentence-transformers 5 wrote and 6 still reads.
TRANSFORMER = "sentence_transformers.models.Transformer"
MLM_TRANSFORMER = "sentence_transformers.sparse_encoder.models.MLMTransformer"
DENSE_TYPE = "sentence_transformers.models.Dense"
MASK = "sentence_transformers.multi_vector_encoder.modules.MultiVectorMask"
SPLADE_POOLING = "sentence_transformers.sparse_encoder.models.SpladePooling"
ACTIVATIONS = {"log1p": "relu", "log1p_log1p": "log1p_relu"}
MACHINE_OPTIONS = ("gradient_checkpointing", "attn_implementation")  # of the training run, not of the model


@torch.no_grad()
def export_model(encoder: SparseEncoder, directory: str | Path) -> Path:
    """Writes a directory that ``transformers`` and ``sentence_transformers.SparseEncoder`` load as it is.

    The language model gets its decoder back (``mlm_transform=keep``), with ``logit_scale`` multiplied into the
    normalisation before it; for ``skip`` the encoder is followed by a Dense module over the token embeddings, whose
    weight is the tied one times ``logit_scale``. Special tokens are left out of the pooling by the stock module
    MultiVectorMask (sentence-transformers 6). That library knows one maximum length: the documents' is written;
    ``sparton_config.json`` records both. The encoder itself is unchanged.

    Args:
        encoder: any device and dtype.
        directory: created where needed; files of an earlier export are overwritten.

    Returns:
        The directory.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if encoder.decoder_name is None:
        modules = _save_bare_encoder(encoder, directory)
    else:
        modules = _save_masked_lm(encoder, directory)
    encoder.tokenizer.save_pretrained(directory)
    settings = {"max_seq_length": encoder.doc_tokenizer.max_length, "do_lower_case": False}
    if encoder.decoder_name is None and "add_pooling_layer" in inspect.signature(type(encoder.backbone)).parameters:
        settings["model_args"] = {"add_pooling_layer": False}  # nothing reads it, and a random one would be reported
    _write_json(directory / "sentence_bert_config.json", settings)
    if not encoder.options["pool_special_tokens"]:
        tokens = encoder.tokenizer.convert_ids_to_tokens(encoder.tokenizer("")["input_ids"])
        mask = {"skiplist_words": sorted(set(tokens)), "skiplist_tasks": ["query", "document"]}
        modules.append((MASK, f"{len(modules)}_MultiVectorMask", mask | {"keep_only_token_ids": None}))
    pooling = {"pooling_strategy": "max", "activation_function": ACTIVATIONS[encoder.options["activation"]]}
    modules.append(
        (SPLADE_POOLING, f"{len(modules)}_SpladePooling", pooling | {"word_embedding_dimension": encoder.vocab_size})
    )
    for _, folder, config in modules[1:]:
        (directory / folder).mkdir(exist_ok=True)
        _write_json(directory / folder / "config.json", config)
    _write_json(
        directory / "modules.json",
        [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (kind, path, _) in enumerate(modules)],
    )
    _write_json(
        directory / "config_sentence_transformers.json",
        {
            "model_type": "SparseEncoder",
            "__version__": {"transformers": version("transformers"), "pytorch": torch.__version__},
            "prompts": {"query": "", "document": ""},
            "default_prompt_name": None,
            "similarity_fn_name": "dot",
        },
    )
    options = {name: value for name, value in encoder.options.items() if name not in MACHINE_OPTIONS}
    scale = encoder.logit_scale.item() if encoder.decoder_name is None else 1.0
    _write_json(directory / CONFIG_NAME, options | {"logit_scale": scale})
    return directory


def _save_masked_lm(encoder: SparseEncoder, directory: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Saves the whole masked language model; returns the modules that sentence-transformers builds from it."""
    model, scale = encoder.backbone, encoder.logit_scale
    norm = None if scale == 1 else final_norm(model)
    with decoder_in_place(model, encoder.decoder_name, encoder.head):
        state = model.state_dict()
        if norm is not None:
            state |= {name: value * scale for name, value in state.items() if name.rpartition(".")[0] == norm}
        with quiet():
            model.save_pretrained(directory, state_dict=state)
    return [(MLM_TRANSFORMER, "", {})]


def _save_bare_encoder(encoder: SparseEncoder, directory: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Saves the encoder without MLM transform and the head as a Dense module over its token embeddings."""
    with quiet():
        encoder.backbone.save_pretrained(directory)
    head = encoder.head
    dense = {
        "in_features": head.weight.shape[1],
        "out_features": head.weight.shape[0],
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
        "module_input_name": "token_embeddings",
        "module_output_name": "token_embeddings",
    }
    (directory / DENSE).mkdir(exist_ok=True)
    weights = {"linear.weight": head.weight * encoder.logit_scale, "linear.bias": head.bias}
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()},
        directory / DENSE / "model.safetensors",
    )
    return [(TRANSFORMER, "", {}), (DENSE_TYPE, DENSE, dense)]


def load_encoder(
    model_path: str | Path, head: str = "auto", device: torch.device | str | None = None
) -> SparseEncoder:
    """Loads an encoder for inference from whatever holds one.

    Args:
        model_path: a Lightning checkpoint (``.ckpt``), a directory that :func:`export_model` wrote, the output folder
            of a run (its ``model/``), the directory of a masked language model, or a hub id.
        head: auto, naive, compiled, tiled or sparton; any of them fits any checkpoint.
        device: where to put it; None leaves it on the CPU.

    Returns:
        The encoder in evaluation mode.

    Raises:
        FileNotFoundError, ValueError: one line, if nothing there can be loaded.
    """
    path = Path(model_path).expanduser()
    if path.suffix == ".ckpt" or path.is_file():
        encoder = _load_checkpoint(path, head)
    else:
        if path.is_dir() and not (path / "config.json").is_file() and (path / "model").is_dir():
            path = path / "model"
        exported = (path / CONFIG_NAME).is_file()
        encoder = _load_export(path, head) if exported else SparseEncoder(_name(model_path, path), head=head)
    return encoder.eval().to(device)


def _name(model_path: str | Path, path: Path) -> str:
    """A hub id stays as written; a directory is named by its path."""
    return str(path) if path.is_dir() else str(model_path)


def _load_checkpoint(path: Path, head: str) -> SparseEncoder:
    """The encoder in a Lightning checkpoint: rebuilt from its hyperparameters, without network or original weights."""
    if not path.is_file():
        raise FileNotFoundError(f"model_path: expected a checkpoint file, {path} does not exist; check the path")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        hparams, state = checkpoint["hyper_parameters"]["encoder"], checkpoint["state_dict"]
    except Exception as error:  # torch.load raises whatever its unpickler meets
        raise ValueError(
            f"model_path: expected a checkpoint of train.py, {path} is none ({type(error).__name__}); "
            "name a file in the checkpoints/ folder of a run"
        ) from error
    encoder = SparseEncoder.from_hparams(hparams | dict.fromkeys(MACHINE_OPTIONS[1:]), head=head)
    prefix = "encoder."
    encoder.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return encoder


def _load_export(path: Path, head: str) -> SparseEncoder:
    """The encoder in a directory that export_model wrote, with the options it was trained with."""
    options = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
    scale = options.pop("logit_scale")
    encoder = SparseEncoder(**options | {"name_or_path": str(path)}, head=head)
    if encoder.decoder_name is None:
        with torch.no_grad():
            encoder.head.bias.copy_(load_file(path / DENSE / "model.safetensors")["linear.bias"])
        encoder.logit_scale.fill_(scale)
    return encoder


def _write_json(path: Path, content: dict | list) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
