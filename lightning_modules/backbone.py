"""Loading a masked language model and its tokenizer: from a directory, the hub or a configuration alone."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

log = logging.getLogger(__name__)

BUNDLED_TOKENIZER = Path(__file__).resolve().parents[1] / "data" / "tiny"
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"
)
HIDDEN_DROPOUTS = ("hidden_dropout_prob", "dropout", "embedding_dropout", "mlp_dropout")
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")
WAYS_ON = (
    "give a local directory in model.name_or_path, or model.pretrained=false for random weights of that architecture"
)


class LanguageModel(NamedTuple):
    """A masked language model as loaded: model, tokenizer, and the parameters that the checkpoint lacks."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    missing_keys: set[str]


def hub_reachable(timeout: float = 5.0) -> bool:
    """Whether the Hugging Face hub answers; one attempt, where its client would retry for a minute a file."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # the HTTP client's own hierarchy differs between versions of the hub's library
        return False
    return True


def packaged_directory(package_path: str | None) -> Path | None:
    """Directory ``package/folder`` of an installed Python package, or None where it is not installed."""
    if not package_path:
        return None
    package, _, folder = package_path.partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    directory = Path(next(iter(spec.submodule_search_locations))) / folder
    return directory if directory.is_dir() else None


def local_directory(name_or_path: str) -> Path | None:
    """The directory that ``name_or_path`` names, None for a hub id.

    Raises:
        FileNotFoundError: if it is written like a path and no such directory exists.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name_or_path.startswith((".", "~")) or name_or_path.count("/") > 1:
        raise FileNotFoundError(
            f"model.name_or_path: expected a model directory or a hub id, got {name_or_path!r}, which does not exist; "
            "check the path"
        )
    return None


def check_directory(directory: Path, *, weights: bool) -> None:
    """Checks that a directory holds a model's configuration and, if asked, its weights.

    Raises:
        FileNotFoundError: one line that says which file is missing.
    """
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"model.name_or_path: expected a model directory with config.json, found none in {directory}; "
            "name the folder that save_pretrained wrote"
        )
    if weights and not any((directory / name).is_file() for name in WEIGHT_FILES):
        raise FileNotFoundError(
            f"model.name_or_path: expected weights (model.safetensors) in {directory}, found none; "
            "copy them there or set model.pretrained=false for random ones"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def resolve_source(name_or_path: str, packaged: str | None) -> tuple[str, bool]:
    """Where a pretrained model comes from: a directory, the hub, its local cache, or an installed package.

    Args:
        name_or_path: directory or hub id.
        packaged: ``package/folder`` of a Python package with the same weights, taken where the hub does not answer.

    Returns:
        (directory or hub id, whether only files on this machine may be read).
    """
    directory = local_directory(name_or_path)
    if directory is not None:
        check_directory(directory, weights=True)
        return str(directory), True
    if hub_reachable():
        return name_or_path, False
    try:
        AutoConfig.from_pretrained(name_or_path, local_files_only=True)
    except (OSError, ValueError):
        directory = packaged_directory(packaged)
        if directory is not None:
            log.warning("hub not reachable: %s taken from the installed package %s", name_or_path, packaged)
            return str(directory), True
        hint = f", or install the package {packaged.partition('/')[0].replace('_', '-')}" if packaged else ""
        raise FileNotFoundError(
            f"model.name_or_path: {name_or_path!r} could not be fetched from the Hugging Face hub, which does not "
            f"answer, and is not in its local cache; {WAYS_ON}{hint}"
        ) from None
    return name_or_path, True


def load_config(
    name_or_path: str | None, config: Mapping[str, Any] | None, *, pretrained: bool, local_only: bool
) -> PretrainedConfig:
    """The architecture: a checkpoint's own configuration, else the plain dict ``config``.

    Raises:
        ValueError, FileNotFoundError: one line, if there is none or it cannot be read.
    """
    directory = local_directory(name_or_path) if name_or_path else None
    if not pretrained and directory is None:
        if not config:
            raise ValueError(
                f"model.config: expected the architecture of {name_or_path!r} (model_type, hidden_size, ...) because "
                "model.pretrained=false touches no network, got nothing; name a local directory or fill model.config"
            )
        fields = dict(config)
        model_type = fields.pop("model_type", None)
        if model_type is None:
            raise ValueError("model.config: expected the key model_type (bert, xlm-roberta, ...), got none; add it")
        return AutoConfig.for_model(model_type, **fields)
    if directory is not None:
        check_directory(directory, weights=pretrained)
    try:
        return AutoConfig.from_pretrained(str(directory or name_or_path), local_files_only=local_only)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.name_or_path: no usable configuration in {name_or_path!r} ({first_line(error)}); {WAYS_ON}"
        ) from error


def load_tokenizer(source: str | None, tokenizer: str | Path | None, *, local_only: bool) -> PreTrainedTokenizerBase:
    """The tokenizer at ``tokenizer``, else at ``source``, else the one bundled with this repository.

    Args:
        source: the model's directory or hub id; None for an architecture with random weights.
        tokenizer: directory or hub id that overrides it.
        local_only: reads files on this machine only.

    Raises:
        FileNotFoundError, ValueError: one line, if it cannot be loaded.
    """
    where = str(tokenizer) if tokenizer is not None else source
    if where is None:
        where = str(BUNDLED_TOKENIZER)
        log.warning("model.pretrained=false: texts are cut by the bundled tokenizer (data/tiny), ids below 16,000")
    if Path(where).is_dir():
        names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")
        if not any((Path(where) / name).is_file() for name in (*names, "sentencepiece.bpe.model", "spm.model")):
            raise FileNotFoundError(
                f"model.tokenizer: expected tokenizer.json in {where}, found no tokenizer; "
                "copy the checkpoint's tokenizer there or name its directory in model.tokenizer"
            )
    try:
        return AutoTokenizer.from_pretrained(where, local_files_only=local_only)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model.tokenizer: none could be loaded from {where!r} ({first_line(error)})") from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Raises ValueError if the tokenizer makes ids that the model has no embedding for."""
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= config.vocab_size:
        raise ValueError(
            f"model: expected a tokenizer of at most {config.vocab_size} words (the checkpoint's vocabulary), got ids "
            f"up to {highest}; tokenizer and checkpoint belong to different models, set model.tokenizer"
        )


def set_dropout(config: PretrainedConfig, dropout: float | None, attention_dropout: float | None) -> None:
    """Writes the dropout rates into whichever fields this family of models has; None leaves them as they are."""
    attention = dropout if attention_dropout is None else attention_dropout
    for names, value in ((HIDDEN_DROPOUTS, dropout), (ATTENTION_DROPOUTS, attention)):
        if value is None:
            continue
        if not 0 <= value < 1:
            raise ValueError(f"model.dropout: expected a rate in [0, 1), got {value}; set for example 0.1")
        for name in names:
            if hasattr(config, name):
                setattr(config, name, float(value))


@contextmanager
def quiet(*, progress_bars: bool = False) -> Iterator[None]:
    """Silences transformers' report of missing keys, which mlm_transform acts upon, and bars for what takes no time."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not progress_bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def random_masked_lm(config: PretrainedConfig, options: Mapping[str, Any]) -> PreTrainedModel:
    """A masked language model with random weights; ``embedding_range`` in the configuration sets its embeddings apart.

    A word that stands out from positions and layers makes its own logit the largest from the start.
    """
    model = AutoModelForMaskedLM.from_config(config, **options)
    embedding_range = getattr(config, "embedding_range", None)
    if embedding_range is not None:
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=embedding_range)
    return model


def load_masked_lm(
    source: str, config: PretrainedConfig, *, pretrained: bool, local_only: bool, attn_implementation: str | None
) -> tuple[PreTrainedModel, set[str]]:
    """The masked language model in float32, and the names of the parameters that its checkpoint lacks.

    Raises:
        ValueError: one line, if the architecture has no masked language model or the weights do not fit.
    """
    options = {"dtype": torch.float32} | ({"attn_implementation": attn_implementation} if attn_implementation else {})
    try:
        with quiet(progress_bars=not local_only):
            if not pretrained:
                return random_masked_lm(config, options), set()
            model, info = AutoModelForMaskedLM.from_pretrained(
                source, config=config, local_files_only=local_only, output_loading_info=True, **options
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ValueError(f"model: {source!r} does not load as a masked LM: {first_line(error)}") from error
    return model, set(info["missing_keys"])


def load_language_model(
    name_or_path: str | None,
    *,
    pretrained: bool,
    config: Mapping[str, Any] | None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None,
    packaged: str | None,
    attn_implementation: str | None,
    dropout: float | None,
    attention_dropout: float | None,
    seed: int,
) -> LanguageModel:
    """A masked language model with the tokenizer that belongs to it; arguments as in ``SparseEncoder``.

    Raises:
        ValueError, FileNotFoundError: one line with argument, expected, got and remedy.
    """
    if pretrained and not name_or_path:
        raise ValueError("model.name_or_path: expected a directory or hub id, got none; or set model.pretrained=false")
    source, local_only = resolve_source(name_or_path, packaged) if pretrained else (name_or_path, True)
    model_config = load_config(source, config, pretrained=pretrained, local_only=local_only)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        own = source if pretrained or (source and Path(source).expanduser().is_dir()) else None
        tokenizer = load_tokenizer(own, tokenizer, local_only=local_only)
    check_vocabulary(tokenizer, model_config)
    if not pretrained:  # the RoBERTa family counts positions from the padding id
        model_config.pad_token_id = tokenizer.pad_token_id
    set_dropout(model_config, dropout, attention_dropout)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the GPU's generators too
        model, missing_keys = load_masked_lm(
            source, model_config, pretrained=pretrained, local_only=local_only, attn_implementation=attn_implementation
        )
    return LanguageModel(model, tokenizer, missing_keys)
