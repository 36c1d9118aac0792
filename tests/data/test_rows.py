"""Documents to rows of ids, and their cache."""

import json
import multiprocessing
from itertools import chain, pairwise
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from mlm_scratch.config import changed, resolve
from mlm_scratch.data import rows as rows_module
from mlm_scratch.data.documents import load_documents
from mlm_scratch.data.rows import prepare_rows
from mlm_scratch.util.errors import UserError
from mlm_scratch.util.files import cache_dir
from tests.support.tiny import (
    SENTENCES,
    byte_level_tokenizer,
    text_config,
    wordpiece_tokenizer,
    write_text,
)

TOKENIZER = byte_level_tokenizer()


def test_blocks_are_the_concatenated_documents_chunked(tmp_path):
    write_text(tmp_path / "a.txt")
    settings = text_config(tmp_path / "a.txt", block_size=8)
    rows = prepare_rows(load_documents(settings)[0], TOKENIZER, settings)
    stream = list(chain.from_iterable(TOKENIZER(SENTENCES)["input_ids"]))
    blocks = [stream[i : i + 8] for i in range(0, len(stream) - 7, 8)]
    assert [rows.tokens[a:b].tolist() for a, b in pairwise(rows.starts)] == blocks


def test_lines_are_one_document_each_truncated_to_block_size(tmp_path):
    write_text(tmp_path / "a.txt", ["Water boils.", "", "  ", SENTENCES[5]])
    settings = text_config(tmp_path / "a.txt", block_size=16, grouping="lines")
    rows = prepare_rows(load_documents(settings)[0], TOKENIZER, settings)
    expected = TOKENIZER(["Water boils.", SENTENCES[5]], truncation=True, max_length=16)
    got = [rows.tokens[a:b].tolist() for a, b in pairwise(rows.starts)]
    assert got == expected["input_ids"]
    assert len(got[1]) == 16 and got[1][-1] == TOKENIZER.eos_token_id


def test_rows_are_memory_mapped_and_cached(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", [*SENTENCES, "found again"])
    settings = text_config(tmp_path / "a.txt", block_size=8, whole_word=True)
    documents, _ = load_documents(settings)
    rows = prepare_rows(documents, TOKENIZER, settings)
    assert isinstance(rows.tokens.base, np.memmap) and rows.tokens.dtype == np.uint16
    assert len(rows.gap_before) == len(rows.tokens)

    def never(*args):
        raise AssertionError("tokenized twice")

    monkeypatch.setattr(rows_module, "tokenize", never)
    again = prepare_rows(documents, TOKENIZER, settings)
    assert np.array_equal(again.tokens, rows.tokens)
    # Another block size chunks the same stream; other settings need another file.
    assert len(prepare_rows(documents, TOKENIZER, changed(settings, block_size=16))) < len(rows)
    with pytest.raises(AssertionError, match="tokenized twice"):
        prepare_rows(documents, TOKENIZER, changed(settings, whole_word=False))


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_words_start_at_gaps_whether_or_not_offsets_include_them(tmp_path, trim_offsets):
    tokenizer = byte_level_tokenizer()
    if not trim_offsets:  # as in the tokenizers of many models
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    write_text(tmp_path / "a.txt", ["Unbelievable misunderstandings,\u3000Milky Café!"])
    settings = text_config(tmp_path / "a.txt", whole_word=True, grouping="lines")
    rows = prepare_rows(load_documents(settings)[0], tokenizer, settings)
    words, tokens = [], tokenizer.convert_ids_to_tokens(rows.tokens.tolist())
    for token, starts in zip(tokens[1:-1], rows.gap_before[1:-1], strict=True):
        words += [""] if starts or not words else []  # the masking starts a word after <s> anyway
        words[-1] += token.replace("Ġ", "")
    assert words == ["Unbelievable", "misunderstandings,", "ãĢĢMilky", "CafÃ©!"]
    assert len(tokens) > 10  # words have several pieces, é and the wide space too


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_file_in_the_cache_is_rewritten(tmp_path, damage):
    write_text(tmp_path / "a.txt", [*SENTENCES, "cut short"])
    settings = text_config(tmp_path / "a.txt", block_size=8)
    documents, _ = load_documents(settings)
    expected = prepare_rows(documents, TOKENIZER, settings).tokens.tolist()
    for path in cache_dir().glob("*/tokens.bin"):
        content = path.read_bytes()
        flipped = bytes([content[0] ^ 1]) + content[1:]
        path.write_bytes(content[:-3] if damage == "cut" else flipped)
    assert prepare_rows(documents, TOKENIZER, settings).tokens.tolist() == expected


def test_a_half_written_cache_is_not_used(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", [*SENTENCES, "half written"])
    settings = text_config(tmp_path / "a.txt", block_size=8)
    documents, _ = load_documents(settings)
    tokenize = rows_module.tokenize

    def broken(*args):
        yield from list(tokenize(*args))[:3]
        raise KeyboardInterrupt

    monkeypatch.setattr(rows_module, "tokenize", broken)
    with pytest.raises(KeyboardInterrupt):
        prepare_rows(documents, TOKENIZER, settings)
    monkeypatch.setattr(rows_module, "tokenize", tokenize)
    rows = prepare_rows(documents, TOKENIZER, settings)
    stream = list(chain.from_iterable(TOKENIZER(list(documents))["input_ids"]))
    assert rows.tokens.tolist() == stream


def test_the_bundled_corpus_loads_like_any_text():
    settings = resolve("bundled", {})
    train, held_out = load_documents(settings)
    assert train.column == "answers.text" and len(train) > len(held_out) > 0
    assert any("Milky Way" in text for text in train)


def test_too_little_text_is_reported(tmp_path):
    write_text(tmp_path / "a.txt", ["short"])
    settings = text_config(tmp_path / "a.txt")
    with pytest.raises(UserError, match="too few for one row of 128"):
        prepare_rows(load_documents(settings)[0], TOKENIZER, settings)
    with pytest.raises(UserError, match="none can be held out"):
        load_documents(text_config(tmp_path / "a.txt", eval_fraction=0.5))


def test_a_text_of_blank_documents_is_reported(tmp_path):
    write_text(tmp_path / "a.txt", ["", "  "] * 500)
    settings = text_config(tmp_path / "a.txt")
    with pytest.raises(UserError, match="every document is empty"):
        prepare_rows(load_documents(settings)[0], TOKENIZER, settings)


def test_processes_can_prepare_the_same_text_at_the_same_time(tmp_path):
    write_text(tmp_path / "a.txt", [f"both {i}: {' '.join(SENTENCES)}" for i in range(2000)])
    settings = text_config(tmp_path / "a.txt", block_size=16)
    documents, _ = load_documents(settings)

    def prepare():
        assert len(prepare_rows(documents, TOKENIZER, settings)) > 2000

    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=prepare) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert not list(cache_dir().glob("unfinished-*"))


@pytest.mark.parametrize("word", ["galaxy\u0301s", "galaxy\u00ads", "galaxys"])
def test_characters_that_a_tokenizer_drops_do_not_cut_a_word(tmp_path, word):
    """A decomposed accent, a soft hyphen: the second piece, ##s, belongs to the same word."""
    tokenizer = wordpiece_tokenizer()
    write_text(tmp_path / "a.txt", [f"the {word} is"])
    settings = text_config(tmp_path / "a.txt", whole_word=True, grouping="lines")
    rows = prepare_rows(load_documents(settings)[0], tokenizer, settings)
    tokens = tokenizer.convert_ids_to_tokens(rows.tokens.tolist())
    assert tokens == ["[CLS]", "the", "galaxy", "##s", "is", "[SEP]"]
    assert rows.gap_before.tolist()[1:5] == [False, True, False, True]


def test_a_text_without_spaces_is_warned_of(tmp_path, capsys):
    for text, warned in (("\u94f6\u6cb3\u7cfb" * 8, True), ("the milky way is a galaxy", False)):
        write_text(tmp_path / "a.txt", [text] * 20)
        settings = text_config(tmp_path / "a.txt", whole_word=True, grouping="lines")
        prepare_rows(load_documents(settings)[0], TOKENIZER, settings)
        assert ("most words of the text have more than 16" in capsys.readouterr().err) == warned


def keys_of(text_digest="t", tokenizer=TOKENIZER, **settings):
    config = changed(text_config("a.txt"), **settings)
    return rows_module._cache_key(text_digest, tokenizer, config)


def test_every_ingredient_of_the_cache_key_counts(monkeypatch):
    slow = MagicMock(is_fast=False)
    slow.__len__.return_value = 2
    keys = [
        keys_of(),
        keys_of(text_digest="another"),
        keys_of(whole_word=True),
        keys_of(grouping="lines"),
        keys_of(grouping="lines", block_size=16),
        keys_of(tokenizer=other_merges()),
        keys_of(tokenizer=wordpiece_tokenizer()),
    ]
    for vocabulary in ({"a": 0, "b": 1}, {"b": 0, "a": 1}):
        slow.get_vocab = Mock(return_value=vocabulary)
        keys.append(keys_of(tokenizer=slow))
    monkeypatch.setattr(rows_module, "ROWS_VERSION", 0)
    keys.append(keys_of())
    assert len(set(keys)) == len(keys)
    # The same rows of ids, cut another way: one file for both.
    assert keys_of(block_size=8) == keys_of(block_size=16)


def other_merges():
    """A tokenizer of the same size and vocabulary whose merges come in another order."""
    tokenizer = byte_level_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"].reverse()
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), **tokenizer.special_tokens_map
    )


def test_a_tokenizer_of_equal_size_does_not_get_the_ids_of_another(tmp_path):
    write_text(tmp_path / "a.txt", ["equal sizes", *SENTENCES])
    settings = text_config(tmp_path / "a.txt", block_size=8)
    documents, _ = load_documents(settings)
    for tokenizer in (TOKENIZER, other_merges()):
        rows = prepare_rows(documents, tokenizer, settings)
        expected = list(chain.from_iterable(tokenizer(list(documents))["input_ids"]))
        assert rows.tokens.tolist() == expected and len(tokenizer) == len(TOKENIZER)


def test_a_text_is_more_than_the_sum_of_its_documents():
    documents = [["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], ["c", "ab"]]
    digests = [rows_module._text_digest(texts) for texts in documents]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("largest, bits", [(2**16 - 1, 16), (2**16, 32), (2**31 - 1, 32)])
def test_ids_of_any_size_come_back(tmp_path, largest, bits):
    rows_module.write_rows(tmp_path / "rows", [([0, largest], [])], largest)
    rows = rows_module._open_rows(tmp_path / "rows", text_config("a.txt", grouping="lines"))
    assert rows.tokens.tolist() == [0, largest] and rows.tokens.dtype.itemsize == bits // 8


def test_looking_into_the_cache_leaves_the_tokenizer_as_it_is(tmp_path):
    tokenizer = byte_level_tokenizer()
    write_text(tmp_path / "a.txt", ["kept as it is", *SENTENCES])
    settings = text_config(tmp_path / "a.txt", block_size=8)
    documents, _ = load_documents(settings)
    rows = prepare_rows(documents, tokenizer, settings)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(pad_id=1)
    before = tokenizer.backend_tokenizer.to_str()
    assert np.array_equal(prepare_rows(documents, tokenizer, settings).tokens, rows.tokens)
    assert tokenizer.backend_tokenizer.to_str() == before
