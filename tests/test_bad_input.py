"""Mistakes of a user: one line that says what is wrong, exit code 2, nothing left half-made."""

import gzip
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import infer
import train
from mlm_scratch.explain import __main__ as explain
from mlm_scratch.hf.small_modernbert import train_tokenizer
from mlm_scratch.util.errors import run_command
from tests.support.tiny import NUMBERED, bert_config, byte_level_tokenizer, save_roberta

TEXT = "\n".join(NUMBERED)
MILKY_WAY = "The Milky Way is a <mask> galaxy."


class Payload:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory of models: one is good, the others are not."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    save_roberta(root / "good")
    for name in (
        "no-weights",
        "cut-short",
        "no-tokenizer",
        "broken-json",
        "pickle",
        "remote-code",
        "no-mask",
        "no-words",
        "resized",
        "holes",
    ):
        shutil.copytree(root / "good", root / name)
    weights = "model.safetensors"
    (root / "no-weights" / weights).unlink()
    cut_short = (root / "good" / weights).read_bytes()[:-100]
    (root / "cut-short" / weights).write_bytes(cut_short)
    for path in (root / "no-tokenizer").glob("tokenizer*"):
        path.unlink()
    (root / "broken-json/config.json").write_text('{"model_type": ')
    (root / "pickle" / weights).unlink()
    torch.save({"weight": Payload()}, root / "pickle/pytorch_model.bin")
    config = json.loads((root / "good/config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (root / "remote-code/config.json").write_text(json.dumps(config))
    (root / "remote-code/own.py").write_text("from pathlib import Path; Path('was-run').touch()")
    tokenizer = byte_level_tokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>"
    ).save_pretrained(root / "no-mask")
    for path in (root / "no-words").glob("tokenizer*"):
        path.unlink()
    (root / "no-words/tokenizer_config.json").write_text(
        '{"tokenizer_class": "RobertaTokenizer", "mask_token": "<mask>"}'
    )
    config = json.loads((root / "good/config.json").read_text()) | {"vocab_size": 329}
    (root / "resized/config.json").write_text(json.dumps(config))
    holes = json.loads((root / "holes/tokenizer.json").read_text())
    vocabulary = holes["model"]["vocab"]  # the last token gets an id far behind the others
    vocabulary[max(vocabulary, key=vocabulary.get)] = 340
    (root / "holes/tokenizer.json").write_text(json.dumps(holes))
    save_roberta(root / "large-vocabulary", vocab_size=300)
    (root / "large-vocabulary" / "tokenizer.json").unlink()
    train_tokenizer([TEXT], vocab_size=400).save_pretrained(root / "large-vocabulary")
    BertModel(bert_config(vocab_size=len(tokenizer))).save_pretrained(root / "no-head")
    tokenizer.save_pretrained(root / "no-head")
    GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=len(tokenizer))
    ).save_pretrained(root / "gpt")
    tokenizer.save_pretrained(root / "gpt")
    return root


def write_files():
    """Good and bad files in the current directory."""
    Path("good.txt").write_text(TEXT)
    Path("a_file").touch()
    Path("a_run").mkdir()
    Path("a_run/run.json").touch()
    Path("foreign/checkpoint-500").mkdir(parents=True)
    Path("dir.txt").mkdir()
    Path("empty.txt").touch()
    Path("blank.txt").write_text("  \n" * 50)
    Path("short.txt").write_text("short\nshort")
    Path("one-line.txt").write_text("word " * 10)
    Path("a.docx").touch()
    Path("binary.txt").write_bytes(bytes(range(256)) * 9)
    Path("zeros.txt").write_bytes(bytes(900))
    Path("nul.txt").write_text("a\nb\0c\n" * 9)
    Path("latin.txt").write_bytes("café\n".encode("latin-1") * 9)
    Path("utf16.txt").write_bytes(TEXT.encode("utf-16"))
    Path("broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    Path("half.jsonl").write_text('{"text": "a \\ud83d b"}\n' * 9)
    Path("list.jsonl").write_text("[1, 2]\n[3]\n")
    Path("number.jsonl").write_text('{"text": 1}\n' * 9)
    Path("nested.jsonl").write_text('{"answers": {"text": ["a"]}}\n' * 9)
    Path("columns.csv").write_text("a,b\n1,2\n3,4\n")
    Path("number.csv").write_text("text\n1\n2\n")
    Path("headed.csv").write_text("text\n")
    Path("empty.csv.gz").write_bytes(gzip.compress(b""))
    Path("ragged.csv").write_text("text\na\nb,c,d\n")
    Path("not.parquet").write_text("PAR1?")
    packed = gzip.compress(TEXT.encode())
    Path("short.txt.gz").write_bytes(packed[:-20])
    Path("short.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a b"}\n' * 90)[:-12])
    Path("not.txt.gz").write_text(TEXT)
    Path("short.parquet.gz").write_bytes(packed[:-20])


# What follows flags that would work.
FLAGS = [
    (["--recipe", "tutorials"], "invalid choice: 'tutorials'"),
    (["--init", "random"], "invalid choice: 'random'"),
    (["--block-size", 1], "--block-size must be at least 2"),
    (["--block-size", 65], "--block-size 65 is over the limit"),
    (["--block-size", 1.5], "--block-size: invalid int value: '1.5'"),
    (["--grouping", "pages"], "invalid choice: 'pages'"),
    (["--mlm-probability", 0], "--mlm-probability must be above 0"),
    (["--mlm-probability", 1.5], "--mlm-probability must be above 0 and at most 1, got 1.5"),
    (["--mlm-probability", "0.3:0"], "--mlm-probability must be above 0 and at most 1, got 0.0"),
    (["--mlm-probability", "x"], "--mlm-probability: invalid share value"),
    (["--mlm-probability", "0.3:x"], "--mlm-probability: invalid share value"),
    (["--decay-steps", 5], "--decay-steps goes with --schedule wsd only"),
    (["--dataset-revision", "v1"], "--dataset-revision goes with a --dataset"),
    (["--warmup-steps", 2.5], "--warmup-steps must be a whole number, or a share below 1"),
    (["--mask-replace-prob", -0.1], "--mask-replace-prob must be at least 0"),
    (["--mask-replace-prob", 0.95], "add up to more than 1"),
    (["--random-replace-prob", 2], "--random-replace-prob must be at most 1"),
    (["--whole-word", "yes"], "unrecognized arguments: yes"),
    (["--epochs", "many"], "--epochs: invalid float value: 'many'"),
    (["--epochs", 0], "--epochs must be above 0"),
    (["--epochs", "nan"], "--epochs must be a number"),
    (["--max-steps", 0], "--max-steps must be at least 1"),
    (["--batch-size", -1], "--batch-size must be at least 1"),
    (["--eval-batch-size", 0], "--eval-batch-size must be at least 1"),
    (["--accumulate", 0], "--accumulate must be at least 1"),
    (["--lr", 0], "--lr must be above 0"),
    (["--lr", "inf"], "--lr must be a number"),
    (["--warmup-steps", -1], "--warmup-steps must be at least 0"),
    (["--weight-decay", -1], "--weight-decay must be at least 0"),
    (["--max-grad-norm", 0], "--max-grad-norm must be above 0"),
    (["--seed", -1], "--seed must be at least 0"),
    (["--seed", 2**63 - 1], "--seed must be at most"),
    (["--device", "abacus"], "--device abacus cannot be used"),
    (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
    (["--device", "meta"], "--device meta cannot be used"),
    (["--precision", "fp8"], "invalid choice: 'fp8'"),
    (["--log-every", 0], "--log-every must be at least 1"),
    (["--save-every", -1], "--save-every must be at least 0"),
    (["--keep", 0], "--keep must be at least 1"),
    (["--eval-every", -1], "--eval-every must be at least 0"),
    (["--eval-fraction", 1], "--eval-fraction must be below 1"),
    (["--eval-file", "e.txt"], "e.txt: no such file"),
    (["--eval-file", "good.txt", "--eval-fraction", 0.1], "contradict each other"),
    (["--dataset", "x/y"], "--dataset and --train-file contradict each other"),
    (["--dataset-config"], "--dataset-config: expected one argument"),
    (["--split", "train[:"], "good.txt: ValueError: Unrecognized instruction format: train[:"),
    (["--split", "train[:0]"], 'Instruction "train[:0]" corresponds to no data'),
    (["--text-column", "body"], "has no column 'body'; it has text"),
    (["--output-dir", "a_file"], "a_file is not a directory"),
    (["--output-dir", "a_file/run"], "cannot make the run directory"),
    (["--output-dir", "x" * 300], "--output-dir cannot be used: File name too long"),
    (["--output-dir", "a\udcff"], "--output-dir is not printable text"),
    (["--max-steps", 10**30], "--max-steps must fit into 64 bits"),
    (["--epochs", "1e308"], "--epochs must be at most"),
    (["--output-dir", ""], "--output-dir is empty"),
    (["--output-dir", "foreign"], "foreign holds models that are not from a run"),
    (["--output-dir", "a_run"], "a_run already holds a run: add --resume"),
    (["--output-dir", "a_run", "--resume"], "run.json cannot be read"),
    (["--resume"], "there is no run in"),
    (["--streaming"], "--streaming needs --max-steps"),
    (["--streaming", "--max-steps", 3, "--grouping", "lines"], "use --grouping blocks"),
    (["--streaming", "--max-steps", 3, "--eval-fraction", 0.1], "evaluate on an --eval-file"),
    (["--streaming", "--max-steps", 3, "--split", "train[:9]"], "good.txt: ValueError: Bad split"),
    (["--streaming", "--max-steps", 3, "--text-column", "body"], "has no column 'body'"),
    (
        ["--eval-fraction", 0, "--eval-batch-size", 4],
        "--eval-batch-size has no effect: there is no",
    ),
    (
        ["--eval-file", "good.txt", "--eval-mlm-probability", 1e-9, "--best"],
        "--best needs an evaluation loss, but no token of ",
    ),
    (["--eval-fraction", 0, "--eval-mlm-probability", 0.2], "--eval-mlm-probability has no effect"),
    (["--eval-fraction", 0, "--eval-every", 5], "--eval-every has no effect: there is no text"),
    (["--eval-fraction", 0, "--no-eval-first"], "--no-eval-first has no effect: there is no text"),
    (["--no-packing"], "--no-packing has no effect: blocks are full: it goes with lines"),
    (["--no-graph", "--grouping", "lines"], "only steps of blocks are replayed"),
    (["--dataset-config", "x"], "--dataset-config has no effect: the text is not from a --dataset"),
    (["--speed", 3], "unrecognized arguments: --speed 3"),
    (["--epoch", 3], "unrecognized arguments: --epoch 3"),
]

FILES = [
    ("missing.txt", "missing.txt: no such file"),
    ("x" * 300 + ".txt", "File name too long"),
    ("dir.txt", "dir.txt: a directory"),
    ("empty.txt", "empty.txt: the file is empty"),
    ("blank.txt", "every document is empty"),
    ("short.txt", "too few for one row of 16"),
    ("one-line.txt", "none can be held out"),
    ("a.docx", "unknown kind of file"),
    ("binary.txt", "UnicodeDecodeError"),
    ("zeros.txt", "zeros.txt: there is no text in it"),
    ("nul.txt", "nul.txt contains a NUL character: it is not text"),
    ("latin.txt", "UnicodeDecodeError"),
    ("utf16.txt", "UnicodeDecodeError"),
    ("broken.jsonl", "broken.jsonl: Expecting value: line 1 column 10 (char 9) in the line"),
    ("half.jsonl", "half.jsonl: 'a \\ud83d b' in row 1 is not Unicode text"),
    ("list.jsonl", "list.jsonl: not a JSON object: '[1, 2]'"),
    ("number.jsonl", "holds int, not text"),
    ("nested.jsonl", "no column 'text'; it has answers"),
    ("columns.csv", "no column 'text'; it has a, b"),
    ("number.csv", "too few for one row of 16"),
    ("headed.csv", "headed.csv: there is no text in it"),
    ("empty.csv.gz", "empty.csv.gz: there is no text in it"),
    ("ragged.csv", "ragged.csv: row 2 has 3 fields, the header 1: quote texts"),
    ("not.parquet", "not.parquet: ArrowInvalid: Parquet file size is 5 bytes"),
    ("short.txt.gz", "short.txt.gz: EOFError: Compressed file ended"),
    ("short.jsonl.gz", "short.jsonl.gz: EOFError: Compressed file ended"),
    ("not.txt.gz", "not.txt.gz: BadGzipFile: Not a gzipped file"),
    ("short.parquet.gz", "short.parquet.gz: EOFError: Compressed file ended"),
]

MODELS = [
    ("nowhere", "cannot load a tokenizer from"),
    ("no-weights", "cannot load a model from"),
    ("cut-short", "cannot load a model from"),
    ("no-tokenizer", "its vocabulary file is missing (merges.txt or tokenizer.json or vocab.json)"),
    ("resized", "has the shape (320, 32) in the weights, but (329, 32) in config.json"),
    ("holes", "has ids up to 340, its model only 320 embeddings"),
    ("broken-json", "cannot load a"),
    ("pickle", "cannot load a model from"),
    ("remote-code", "cannot load a"),
    ("no-mask", "has no mask token"),
    ("no-words", "no-words"),
    ("large-vocabulary", "its model only 300 embeddings"),
    ("no-head", "has no LM head"),
    ("gpt", "cannot load a model from"),
]

TEXTS = [
    (["no mask"], "no <mask> in the text 'no mask'"),
    ([""], "no <mask> in the text ''"),
    ([], "no text: python infer.py"),
    (["long " * 99 + "<mask>"], "the model takes 64"),
    (["<mask>" * 1000], "the model takes 64"),
    (["\x00\x07\x1b[2J"], "no <mask> in the text '\\x00\\x07\\x1b[2J'"),
    (["\udcff <mask>"], "is not UTF-8"),
    ([MILKY_WAY, "no mask"], "no <mask> in the text 'no mask'"),
    (["words", "--score", "--top-k", 5], "--top-k does not go with --score: leave it out"),
    (["words", "--generate", 2, "--top-k", 5], "--top-k does not go with --generate"),
    (["--pairs", "pairs.tsv", "--top-k", 5], "--top-k does not go with --pairs"),
    ([MILKY_WAY, "--top-k", 0], "top-k must be from 1 to 320"),
    ([MILKY_WAY, "--top-k", 321], "top-k must be from 1 to 320"),
    ([MILKY_WAY, "--top-k", "x"], "--top-k: invalid int value: 'x'"),
    ([MILKY_WAY, "--device", "abacus"], "--device abacus cannot be used"),
    ([MILKY_WAY, "--targets", ""], "none of the targets"),
    ([MILKY_WAY, "--targets", "\udcff"], "the target '\\udcff' is not UTF-8"),
    (["--targets", "is", MILKY_WAY], "no text: put it before --targets"),
    ([MILKY_WAY, "--model", ""], "cannot load a tokenizer from"),
    ([MILKY_WAY, "--json", "--model"], "--model: expected one argument"),
]

CASES = [
    *[("good", "good.txt", train, arguments, message) for arguments, message in FLAGS],
    *[("good", name, train, [], message) for name, message in FILES],
    *[(name, "good.txt", train, [], message) for name, message in MODELS],
    *[("good", None, infer, arguments, message) for arguments, message in TEXTS],
    *[(name, None, infer, [MILKY_WAY], message) for name, message in MODELS],
]


@pytest.mark.parametrize(
    "model, file, module, arguments, message",
    CASES,
    ids=[
        f"{c[2].__name__} {c[0]} {c[1]} {c[3]}"[:60].encode("ascii", "replace").decode()
        for c in CASES
    ],
)
def test_mistakes_are_reported_in_one_line_and_leave_nothing(
    models, call, model, file, module, arguments, message
):
    write_files()
    before = sorted(Path().rglob("*"))
    basic = ["--model", models / model]
    if module is train:
        basic += ["--train-file", file, "--block-size", 16, "--device", "cpu"]
    code, out, err = call(module, *basic, *arguments)
    assert code == 2
    errors = [line for line in re.split(r"[\r\n]+", err) if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], err
    assert err.rstrip().endswith(errors[0]) and "Traceback" not in err
    assert module is train or out == ""
    assert sorted(Path().rglob("*")) == before  # nothing half-made, nothing run


@pytest.mark.parametrize("model", [name for name, _ in MODELS])
@pytest.mark.parametrize("script", ["train.py", "infer.py", "-m mlm_scratch.explain"])
def test_the_libraries_report_nothing_beside_our_line(models, capfd, monkeypatch, model, script):
    """Nor by their own handlers, which bypass what pytest puts in the place of sys.stderr."""
    module = {"train.py": train, "infer.py": infer}.get(script, explain)
    arguments = {"train.py": ["--train-file", "good.txt"], "infer.py": [MILKY_WAY]}
    Path("good.txt").write_text(TEXT)
    flags = ["--model", str(models / model), *arguments.get(script, ["a sentence"])]
    monkeypatch.setattr(sys, "argv", [script, *flags])
    transformers.utils.logging.set_verbosity_warning()
    assert run_command(module.main) == 2
    lines = [line for line in re.split(r"[\r\n]+", capfd.readouterr().err) if line.strip()]
    (line,) = [line for line in lines if " examples/s" not in line]  # the bar of `datasets`
    assert line.startswith("error: ")


@pytest.mark.parametrize("file", [name for name, _ in FILES])
def test_a_bad_file_is_reported_in_one_line_when_streamed(models, call, file):
    write_files()
    basic = ["--model", models / "good", "--train-file", file, "--block-size", 16]
    code, _, err = call(train, *basic, "--device", "cpu", "--streaming", "--max-steps", 99)
    errors = [line for line in re.split(r"[\r\n]+", err) if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and "Traceback" not in err, err


def test_a_line_of_50_megabytes_is_a_document_like_any_other(models, call):
    """A single document cannot be split; the error shows that it was read."""
    Path("long.jsonl").write_text(json.dumps({"text": "Water boils. " * 4_000_000}))
    basic = ["--model", models / "good", "--train-file", "long.jsonl", "--device", "cpu"]
    code, _, err = call(train, *basic, "--block-size", 16)
    assert code == 2 and "none can be held out" in err.splitlines()[-1]


def test_an_unexpected_error_keeps_its_traceback(models, call, monkeypatch):
    def broken(*args):
        raise ZeroDivisionError("our bug")

    monkeypatch.setattr("mlm_scratch.run.session.run_steps", broken)
    Path("good.txt").write_text(TEXT)
    with pytest.raises(ZeroDivisionError, match="our bug"):
        call(train, "--model", models / "good", "--train-file", "good.txt", "--block-size", 16)
