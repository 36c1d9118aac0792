"""Tokenizer and model: from the Hub, a directory, a checkpoint, or built from scratch."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import set_verbosity_error

from mlm_scratch.config import BUNDLED, TrainConfig
from mlm_scratch.hf.checks import check_fit, longest_input
from mlm_scratch.hf.hub import why_not_found
from mlm_scratch.hf.new_words import add_words
from mlm_scratch.hf.small_modernbert import small_modernbert_config, train_tokenizer
from mlm_scratch.util.errors import UserError, first_line
from mlm_scratch.util.runs import MODEL, RUN_JSON


def load_tokenizer_and_model(
    config: TrainConfig,
    texts: Iterable[str],
    new_words: list[str],
    checkpoint: Path | None = None,
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Load or build the tokenizer and the model (fp32, in train mode) that `config` names.

    Args:
        config: the settings of the run.
        texts: read only for the bundled model, whose tokenizer is trained on them.
        new_words: each becomes a token.
        checkpoint: load both from there instead, to resume a run.

    Raises:
        UserError: something cannot be loaded, or cannot do masked-language modelling.
    """
    torch.manual_seed(config.optimization.seed)  # new weights are drawn from here
    if checkpoint is not None:
        tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint)
    elif config.model.name == BUNDLED:
        tokenizer = train_tokenizer(texts)
        model = AutoModelForMaskedLM.from_config(small_modernbert_config(tokenizer))
    else:
        revision = config.model.model_commit or config.model.revision
        tokenizer = load_tokenizer(config.model.name, revision)
        model = load_model(config.model.name, config.model.init, revision=revision)
    check_fit(tokenizer, model, config.model.name)
    if new_words and checkpoint is None:
        tokenizer = add_words(tokenizer, model, new_words)
    if model.config.is_encoder_decoder:  # a decoder would learn to copy the input
        raise UserError(f"{config.model.name} has a decoder: choose an encoder-only model")
    limit = longest_input(tokenizer, model)
    if (size := config.text.block_size) > limit:
        raise UserError(
            f"--block-size {size} is over the limit of {config.model.name}, which takes {limit} "
            f"tokens at most: use --block-size {limit} (longer documents become several rows), or "
            "a model for long texts (answerdotai/ModernBERT-base takes 8192; see "
            "mlm_scratch/ADAPTING.md)"
        )
    return tokenizer, model.train()


def load_tokenizer(name: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hub id, at a commit or tag, or of a directory. Raises UserError."""
    set_verbosity_error()  # what is wrong is reported below, in one line
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, revision=revision)
    except Exception as error:  # the libraries raise a dozen types; the message says which
        raise UserError(_cannot_load("tokenizer", name, error)) from error
    tokenizer.chat_template = None  # unused, and it would be saved under file names of its choice
    return tokenizer


def load_model(
    name: str | Path,
    init: str = "pretrained",
    dtype: torch.dtype | str = torch.float32,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load the masked-LM of a Hub id or directory, or build it with random weights in fp32.

    Args:
        name: a Hub id or a directory.
        init: "pretrained"; "new-head" if only the head has no weights; "encoder" if the head is
            not used, with or without weights; or "scratch".
        dtype: dtype of the weights; "auto" keeps the one that they were saved in.
        revision: commit, tag or branch on the Hub; None: its main branch.

    Raises:
        UserError: it cannot be loaded, or weights are missing that would silently start at random.
    """
    set_verbosity_error()  # errors are reported below
    try:
        if init == "scratch":
            model_config = AutoConfig.from_pretrained(
                name, trust_remote_code=False, revision=revision
            )
            return AutoModelForMaskedLM.from_config(model_config, dtype=torch.float32)
        model, info = AutoModelForMaskedLM.from_pretrained(
            name,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below
            trust_remote_code=False,
            revision=revision,
        )
    except Exception as error:
        raise UserError(_cannot_load("model", name, error)) from error
    if info["mismatched_keys"]:
        weight, saved, configured = sorted(info["mismatched_keys"])[-1]
        raise UserError(
            f"{name}: {weight} has the shape {tuple(saved)} in the weights, but "
            f"{tuple(configured)} in config.json (was the vocabulary resized?): save both together"
        )
    _check_missing(name, sorted(info["missing_keys"]), model.base_model_prefix, init)
    return model


def _check_missing(name: str | Path, missing: list[str], encoder: str, init: str) -> None:
    """Raise UserError unless the missing weights are those that `init` expects to be missing."""
    weights = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
    if any(weight.startswith(f"{encoder}.") for weight in missing):
        raise UserError(
            f"{name} has no weights for {weights}: its encoder is not that of a masked-language "
            "model (--init scratch starts all of it at random)"
        )
    if missing and init == "pretrained":
        raise UserError(
            f"{name} has no LM head (no weights for {weights}): train.py --init new-head starts "
            "the head at random and trains both"
        )
    if not missing and init == "new-head":
        raise UserError(f"{name} has an LM head: leave out --init new-head to train it")


def _cannot_load(what: str, name: str | Path, error: Exception) -> str:
    if os.path.isfile(os.path.join(name, RUN_JSON)):
        return f"{name} is a run directory: pass {name}/{MODEL} or one of its checkpoints"
    reason = why_not_found("model", str(name), error) or first_line(error)
    if os.path.isfile(name):
        reason = "it is a file: pass the directory that it is in"
    elif inner := [*Path(name).glob("*_Transformer/config.json")]:
        reason = f"its files are in a folder of sentence-transformers: pass {inner[0].parent}"
    elif "instantiate the backend tokenizer" in reason:
        reason = "it has no files of a tokenizer, such as tokenizer.json"
    return f"cannot load a {what} from {name}: {reason}"
