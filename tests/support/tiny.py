"""Small real tokenizers, models and texts that tests can follow by eye."""

from pathlib import Path

from transformers import (
    BertTokenizerFast,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from mlm_scratch.config import TrainConfig, resolve
from mlm_scratch.hf.small_modernbert import train_tokenizer

SENTENCES = [
    "The Milky Way is a spiral galaxy.",
    "Paris is the capital of France, and Rome is the capital of Italy.",
    "Water boils at one hundred degrees; it freezes at zero.",
    "A whale is a mammal that lives in the sea.",
    "The heart pumps blood through the body.",
    "Unbelievable misunderstandings happen occasionally.",
]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """RoBERTa's kind: byte-level BPE, <mask>. Long words fall into several pieces."""
    return train_tokenizer(SENTENCES, vocab_size=320)


def wordpiece_tokenizer() -> BertTokenizerFast:
    """BERT's kind: lower-cased WordPiece, [MASK]."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["the", "milky", "way", "is", "a", "spiral", "galaxy", "paris", "capital", "of"]
    words += ["france", "and", "water", "heart"]
    pieces = ["un", "##believ", "##able", "mis", "##under", "##stand", "##ings", ".", ",", "##s"]
    vocab = {token: id for id, token in enumerate([*special, *words, *pieces])}
    return BertTokenizerFast(vocab=vocab, do_lower_case=True)


def roberta(tokenizer: PreTrainedTokenizerFast, **overrides) -> RobertaForMaskedLM:
    """A RoBERTa of 2 layers, width 32, for sequences of up to 64 tokens. Random weights."""
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


def save_roberta(directory: Path, **overrides) -> Path:
    """Write such a model and its tokenizer where from_pretrained finds them."""
    tokenizer = byte_level_tokenizer()
    roberta(tokenizer, **overrides).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def small_config(files: Path, **settings) -> TrainConfig:
    """A run of seconds on the model and the text in `files`."""
    return resolve(
        "tutorial",
        {
            "model": str(files / "model"),
            "train_file": (str(files / "a.txt"),),
            "block_size": 16,
            "lr": 1e-3,
            "log_every": 3,
            "device": "cpu",
            "eval_fraction": 0.0,
            **settings,
        },
    )
