"""New words are tokens for each kind of tokenizer: in texts, as fills, as targets, under masks."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DebertaV2Tokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
    XLMRobertaTokenizer,
)

from mlm_scratch.data.tables import read_words
from mlm_scratch.fill_mask import fill_mask
from mlm_scratch.hf.checks import longest_input
from mlm_scratch.hf.encode import spell_target
from mlm_scratch.hf.load import load_model, load_tokenizer
from mlm_scratch.hf.new_words import add_words, how_to_load
from mlm_scratch.run.build import prepare
from mlm_scratch.run.directory import resumed_config
from mlm_scratch.run.session import train
from mlm_scratch.util.errors import UserError
from tests.support.tiny import (
    bert_config,
    byte_level_tokenizer,
    roberta,
    small_config,
    wordpiece_tokenizer,
    write_text,
)

LETTERS = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyzPTMCW.,-"]
WORDS = [("▁The", -2.0), ("▁is", -2.0), ("▁a", -2.0), ("un", -3.0), ("able", -3.0), ("▁", -3.0)]
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SMALL = LAYERS | {"hidden_size": 32, "max_position_embeddings": 70}


def sentencepiece_with_its_mask_outside():
    """DeBERTa-v3's kind: the mask's id follows the last piece."""
    special = [("[PAD]", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("[UNK]", 0.0)]
    tokenizer = DebertaV2Tokenizer(vocab=[*special, *WORDS, *LETTERS])
    assert tokenizer.mask_token_id == len(special + WORDS + LETTERS)
    config = DebertaV2Config(
        **SMALL, vocab_size=60, relative_attention=True, pos_att_type=["c2p", "p2c"]
    )
    return tokenizer, DebertaV2ForMaskedLM(config)


def sentencepiece():
    """XLM-RoBERTa's kind."""
    special = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = XLMRobertaTokenizer(vocab=[*special, *WORDS, *LETTERS, ("<mask>", 0.0)])
    config = XLMRobertaConfig(**SMALL, vocab_size=len(tokenizer), pad_token_id=1)
    return tokenizer, XLMRobertaForMaskedLM(config)


def byte_level():
    """RoBERTa's kind."""
    tokenizer = byte_level_tokenizer()
    return tokenizer, roberta(tokenizer)


def untied_wordpiece():
    """BERT's kind, with a head of its own."""
    torch.manual_seed(0)
    tokenizer = wordpiece_tokenizer()
    config = bert_config(tie_word_embeddings=False, vocab_size=len(tokenizer))
    return tokenizer, BertForMaskedLM(config)


KINDS = [byte_level, untied_wordpiece, sentencepiece, sentencepiece_with_its_mask_outside]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_new_word_is_a_word(tmp_path, kind):
    old, model = kind()
    word = "misunderstand" if kind is untied_wordpiece else "chloroplasts"
    others = ["The heart pumps, unable.", "the", "a chlor opl asts", f"A {old.mask_token} is a."]
    texts = [f"The {word} is a heart.", f"{word}, the heart ({word})"]
    before = [old(text)["input_ids"] for text in others]
    decoded = [old.decode(ids_of(old, text)) for text in texts]
    pieces = ids_of(old, f" {word}")
    old_size = len(old)
    old_weights = [p.clone() for p in model.parameters() if len(p) == model.config.vocab_size]

    tokenizer = add_words(old, model, [word])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, model = AutoTokenizer.from_pretrained(tmp_path), load_model(tmp_path)
    assert [loaded(text)["input_ids"] for text in others] == before
    assert [loaded.decode(ids_of(loaded, text)) for text in texts] == decoded
    ids = ids_of(loaded, texts[0])
    (id,) = set(ids) & set(range(old_size, len(loaded)))
    assert loaded.decode([id]).strip() == word and len(pieces) > 1
    assert len(ids) == len(ids_of(old, texts[0])) - len(pieces) + 1
    # Its weights are the mean of its pieces', wherever tokens have weights.
    weights = [p for p in model.parameters() if len(p) == model.config.vocab_size]
    assert len(weights) == len(old_weights) == (4 if kind is untied_wordpiece else 2)
    for now, then in zip(weights, old_weights, strict=True):
        torch.testing.assert_close(now[id], then[pieces].mean(dim=0))
        torch.testing.assert_close(now[:old_size], then[:old_size])

    masked = f"The {loaded.mask_token} is a."
    (fill,) = fill_mask(model, loaded, masked, targets=[spell_target(loaded, word, "The ")])
    assert fill["token"] == id and fill["sequence"].lower().startswith(f"the {word} is a")


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_all_that_is_said_to_load_the_new_words_gives_the_same_ids(tmp_path, kind):
    """AutoTokenizer, the tokenizers library, and what each of the two saves again."""
    words = ["misunderstand"] if kind is untied_wordpiece else ["chloroplasts", "unable"]
    old, model = kind()
    tokenizer = add_words(old, model, words)
    text = f"The {words[0]} is a {words[-1]}, ({words[0]})."
    expected = tokenizer(text)["input_ids"]
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.model_max_length == longest_input(old, model) < 100
    loaded.save_pretrained(tmp_path / "again")
    library = Tokenizer.from_file(str(tmp_path / "saved/tokenizer.json"))
    library.save(str(tmp_path / "library.json"))
    assert loaded(text)["input_ids"] == expected
    assert AutoTokenizer.from_pretrained(tmp_path / "again")(text)["input_ids"] == expected
    for file in ("saved/tokenizer.json", "library.json"):
        assert Tokenizer.from_file(str(tmp_path / file)).encode(text).ids == expected
    own_class = type(old) if kind is not byte_level else RobertaTokenizer
    same = own_class.from_pretrained(tmp_path / "saved")(text)["input_ids"] == expected
    assert same == (how_to_load(loaded) == "")
    assert how_to_load(old) == ""


def test_a_vocabulary_with_holes_keeps_its_embeddings(tmp_path):
    """Its largest id is 400, though it has 320 tokens: new ones come after that."""
    tokenizer = byte_level_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    token = max(state["model"]["vocab"], key=state["model"]["vocab"].get)
    state["model"]["vocab"][token] = 400
    holes = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), **tokenizer.special_tokens_map
    )
    model = roberta(holes, vocab_size=401)
    before = model.get_input_embeddings().weight.detach().clone()  # (401, H)
    pieces = holes(" chloroplasts", add_special_tokens=False)["input_ids"]
    extended = add_words(holes, model, ["chloroplasts"])
    after = model.get_input_embeddings().weight  # (403, H)
    assert extended.convert_tokens_to_ids(["Ġchloroplasts", "chloroplasts"]) == [401, 402]
    assert torch.equal(after[:401], before)
    torch.testing.assert_close(after[401], before[pieces].mean(dim=0))


def test_byte_level_words_are_tokens_with_and_without_a_space_before_them():
    tokenizer = add_words(*byte_level(), ["chloroplasts"])
    for text in ("chloroplasts", " chloroplasts", "(chloroplasts)", "a chloroplasts, b"):
        tokens = tokenizer.tokenize(text)
        assert any(token.lstrip("Ġ") == "chloroplasts" for token in tokens), tokens
    assert "chloroplasts" not in "".join(tokenizer.tokenize("chloroplastsy")[:1])


def test_words_that_a_tokenizer_cuts_are_reported(capsys):
    tokenizer = add_words(*byte_level(), ["COVID-19", "two words", "insulin"])
    assert "Ġinsulin" in tokenizer.get_vocab()
    err = capsys.readouterr().err
    assert err == (
        "warning: --add-tokens: not one word for this tokenizer: 'COVID-19', 'two words'\n"
    )
    with pytest.raises(UserError, match="none of the words can be added"):
        add_words(*byte_level(), ["COVID-19", "is"])


def test_another_kind_of_tokenizer_is_refused():
    model = models.WordLevel({"[UNK]": 0, "a": 1, "[MASK]": 2}, unk_token="[UNK]")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), mask_token="[MASK]", unk_token="[UNK]"
    )
    with pytest.raises(UserError, match="not possible with a WordLevel tokenizer"):
        add_words(tokenizer, BertForMaskedLM(bert_config()), ["chloroplasts"])


def test_a_run_with_new_words_trains_saves_and_resumes(files, tmp_path, capsys):
    """With whole words masked: the new word is one."""
    words, text = tmp_path / "words.txt", tmp_path / "plants.txt"
    write_text(words, ["chloroplasts", "", "chloroplasts", "mitochondria"])
    write_text(text, [f"{i} The chloroplasts and mitochondria of a plant" for i in range(20)])
    settings = {"add_tokens": str(words), "train_file": (str(text),)}
    settings |= {"whole_word": True, "max_steps": 4}
    t = prepare(small_config(files, **settings))
    tokens = set(t.tokenizer.convert_ids_to_tokens(t.loader.rows.tokens))
    assert {"Ġchloroplasts", "Ġmitochondria"} <= tokens and len(t.tokenizer) == 324
    run_dir = train(small_config(files, **settings))
    words.unlink()  # it is not read again
    train(resumed_config(run_dir, {"max_steps": 6}), resume=True)
    assert "load its tokenizer with AutoTokenizer" in capsys.readouterr().out
    assert "Load its tokenizer with AutoTokenizer" in (run_dir / "model/README.md").read_text()
    model, tokenizer = load_model(run_dir / "model"), load_tokenizer(run_dir / "model")
    assert model.config.vocab_size == len(tokenizer) == 324
    assert "Ġchloroplasts" in tokenizer.get_vocab()


@pytest.mark.parametrize("name", ["words.csv", "words.tsv", "words.txt", "words.jsonl"])
@pytest.mark.parametrize("header", [["word"], []])
def test_every_kind_of_table_has_the_same_words(tmp_path, name, header):
    """With a header that is called so, or without."""
    lines = [*header, "foo", "bar", "foo"]
    if name == "words.jsonl":
        lines = [json.dumps({"word": word}) for word in lines[len(header) :]]
    (tmp_path / name).write_text("\n".join(lines))
    assert read_words(str(tmp_path / name)) == ["foo", "bar"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        ("\n \n", "has no words"),
        (b"\xff\xfe", "cannot"),
        ("a\tb\n", "line 1 of"),
    ],
)
def test_a_file_without_words_is_reported(files, tmp_path, content, message):
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=f"--add-tokens: .*{message}"):
        prepare(small_config(files, add_tokens=str(path)))
