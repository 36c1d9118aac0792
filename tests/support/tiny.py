"""Small real tokenizers, models and texts that tests can follow by eye."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from mlm_scratch.config import TrainConfig, resolve
from mlm_scratch.hf.small_modernbert import train_tokenizer
from mlm_scratch.loader import Batch
from mlm_scratch.masking import IGNORE

SENTENCES = [
    "The Milky Way is a spiral galaxy.",
    "Paris is the capital of France, and Rome is the capital of Italy.",
    "Water boils at one hundred degrees; it freezes at zero.",
    "A whale is a mammal that lives in the sea.",
    "The heart pumps blood through the body.",
    "Unbelievable misunderstandings happen occasionally.",
]
NUMBERED = [f"{i}: {sentence}" for i in range(8) for sentence in SENTENCES]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """RoBERTa's kind: byte-level BPE, <mask>. Long words are split into several pieces."""
    return train_tokenizer(SENTENCES, vocab_size=320)


def wordpiece_tokenizer() -> BertTokenizer:
    """BERT's kind: lower-cased WordPiece, [MASK]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["the", "milky", "way", "is", "a", "spiral", "galaxy", "paris", "capital", "of"]
    words += ["france", "and", "water", "heart"]
    pieces = ["un", "##believ", "##able", "mis", "##under", "##stand", "##ings", ".", ",", "##s"]
    vocab = {token: id for id, token in enumerate([*special, *words, *pieces])}
    return BertTokenizer(vocab=vocab, do_lower_case=True)


def roberta(tokenizer: PreTrainedTokenizerFast, **overrides: Any) -> RobertaForMaskedLM:
    """A RoBERTa of 2 layers, width 32, for inputs of up to 64 tokens. Random weights."""
    config = RobertaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 66,
            "type_vocab_size": 1,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            **overrides,
        }
    )
    return RobertaForMaskedLM(config)


def bert_config(**overrides: Any) -> BertConfig:
    """A BERT of 2 layers, width 32, for inputs of up to 40 tokens."""
    return BertConfig(
        **{
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "max_position_embeddings": 40,
            "pad_token_id": 0,
            **overrides,
        }
    )


def save_roberta(directory: Path, **overrides: Any) -> Path:
    """Save a `roberta` and its tokenizer for from_pretrained."""
    tokenizer = byte_level_tokenizer()
    roberta(tokenizer, **overrides).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_files(directory: Path, texts: Iterable[str] = NUMBERED, **overrides: Any) -> Path:
    """Save what `small_config` trains and reads: model/ and a.txt, a document per line."""
    torch.manual_seed(1)
    save_roberta(directory / "model", **overrides)
    write_text(directory / "a.txt", texts)
    return directory


def small_config(files: Path, **settings: Any) -> TrainConfig:
    """A run of less than a second on what `save_files` saved in `files`."""
    return resolve(
        "tutorial",
        {
            "model": str(files / "model"),
            "train_file": (str(files / "a.txt"),),
            "block_size": 16,
            "lr": 1e-3,
            "log_every": 3,
            "device": "cpu",
            "precision": "fp32",
            "eval_fraction": 0.0,
            **settings,
        },
    )


def small_flags(files: Path) -> list[Any]:
    """Flags of train.py for the same model, text and block size."""
    return [
        *("--model", files / "model"),
        *("--train-file", files / "a.txt"),
        *("--block-size", 16),
        *("--device", "cpu"),
        *("--precision", "fp32"),
    ]


def batch_of(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> Batch:
    """A batch of (B, T) tensors, with the positions of its masked tokens."""
    positions = (labels.flatten() != IGNORE).nonzero().squeeze(1)  # (N,)
    return Batch(input_ids, attention_mask, labels, positions)


def write_text(path: Path, texts: Iterable[str] = SENTENCES) -> None:
    """Write a document per line."""
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")


def text_config(*files: Path, **settings: Any) -> TrainConfig:
    """The settings that read these files; nothing is held out."""
    settings = {"eval_fraction": 0.0} | settings
    return resolve("tutorial", {"train_file": tuple(map(str, files)), **settings})
