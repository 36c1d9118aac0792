"""Sources of text: kinds of files, columns, splits."""

import csv
import gzip
import json
import shutil
from dataclasses import replace

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from mlm_scratch.config import changed, resolve
from mlm_scratch.data.documents import count_shared, load_documents
from mlm_scratch.parallel.ranks import ALONE
from mlm_scratch.run.load import load
from mlm_scratch.util.errors import UserError
from tests.support.tiny import SENTENCES, small_config, text_config, write_text


def write_gz(path):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(json.dumps({"text": text}) for text in SENTENCES))


def write_jsonl(path):
    path.write_text("\n".join(json.dumps({"text": text}) for text in SENTENCES), encoding="utf-8")


def write_csv(path):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["number", "text"], *enumerate(SENTENCES)])


def write_txt_with_mark(path):
    path.write_text("\n".join(SENTENCES), encoding="utf-8-sig")


def write_parquet_gz(path):
    write_parquet(path.with_suffix(""))
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))


def write_parquet(path):
    pyarrow.parquet.write_table(pa.table({"text": SENTENCES}), path)


@pytest.mark.parametrize(
    "name, write",
    [
        ("a.txt", write_text),
        ("a.jsonl", write_jsonl),
        ("a.jsonl.gz", write_gz),
        ("a.csv", write_csv),
        ("a.parquet", write_parquet),
        ("a.parquet.gz", write_parquet_gz),
        ("mark.TXT", write_txt_with_mark),
    ],
)
def test_every_kind_of_file_gives_the_same_documents(tmp_path, name, write):
    write(tmp_path / name)
    documents, evaluation = load_documents(text_config(tmp_path / name))
    assert list(documents) == SENTENCES
    assert evaluation is None


def test_several_files_and_a_slice(tmp_path):
    write_text(tmp_path / "a.txt")
    write_text(tmp_path / "b.txt", ["one more"])
    files = (tmp_path / "a.txt", tmp_path / "b.txt")
    assert list(load_documents(text_config(*files))[0]) == [*SENTENCES, "one more"]
    assert list(load_documents(text_config(*files, split="train[5:]"))[0]) == [
        SENTENCES[5],
        "one more",
    ]


ANSWERS = [["first", "second"], [], ["third"]]


@pytest.mark.parametrize(
    "rows, column",
    [
        ([{"answers": {"text": texts}} for texts in ANSWERS], "answers.text"),
        ([{"answers": [{"text": text} for text in texts]} for texts in ANSWERS], "answers.text"),
        ([{"answers.text": texts} for texts in ANSWERS], "answers.text"),
        ([{"answers": texts} for texts in ANSWERS], "answers"),
    ],
    ids=["struct of lists", "list of structs", "flattened", "list"],
)
def test_both_schemas_of_answers(tmp_path, rows, column):
    for name in ("a.json", "a.jsonl"):  # by `datasets`, and line by line
        path = tmp_path / name
        path.write_text("\n".join(map(json.dumps, rows)))
        documents, _ = load_documents(text_config(path, text_column=column))
        assert list(documents) == ["first second", "", "third"]


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_may_have_other_types_in_other_files(tmp_path, streaming):
    """As in ELI5, whose first questions have no links."""
    files = (
        [{"text": "a", "links": {"url": []}}, {"text": None, "links": 3}],
        [{"text": "b", "links": {"url": ["x"]}}, {"links": None}, {"text": "c", "more": [1, "2"]}],
    )
    for number, rows in enumerate(files):
        (tmp_path / f"{number}.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    paths = tuple(str(tmp_path / f"{number}.jsonl") for number in range(2))
    settings = changed(text_config(paths[0], streaming=streaming, max_steps=9), train_file=paths)
    documents, _ = load_documents(settings)
    assert list(documents) == ["a", "", "b", "", "c"]


def test_a_file_name_is_not_a_pattern(tmp_path):
    write_text(tmp_path / "x[1].txt", ["this one"])
    write_text(tmp_path / "x1.txt", ["not this one"])
    assert list(load_documents(text_config(tmp_path / "x[1].txt"))[0]) == ["this one"]


def test_a_data_set_that_is_a_script_is_not_run(tmp_path):
    script = tmp_path / "script"
    script.mkdir()
    (script / "script.py").write_text("raise SystemExit('it was run')")
    with pytest.raises(UserError, match=r"cannot load data set .*script"):
        load_documents(resolve("tutorial", {"dataset": str(script)}))


def test_the_held_out_part_is_fixed_by_the_seed_and_disjoint_from_the_rest(tmp_path):
    texts = [f"text {i}" for i in range(50)]
    write_text(tmp_path / "a.txt", texts)
    train, held_out = load_documents(text_config(tmp_path / "a.txt", eval_fraction=0.2))
    assert len(held_out) == 10 and sorted([*train, *held_out]) == sorted(texts)
    again = load_documents(text_config(tmp_path / "a.txt", eval_fraction=0.2))[1]
    other = load_documents(text_config(tmp_path / "a.txt", eval_fraction=0.2, seed=1))[1]
    assert list(again) == list(held_out) != list(other)


def test_separate_evaluation_files(tmp_path):
    write_text(tmp_path / "a.txt")
    write_text(tmp_path / "b.txt", ["held out"])
    settings = resolve(
        "tutorial",
        {"train_file": (str(tmp_path / "a.txt"),), "eval_file": (str(tmp_path / "b.txt"),)},
    )
    train, held_out = load_documents(settings)
    assert list(train) == SENTENCES and list(held_out) == ["held out"]


def test_the_word_na_in_a_table_is_a_word(tmp_path):
    (tmp_path / "a.csv").write_text("text\nNA\nnull\n")
    assert list(load_documents(text_config(tmp_path / "a.csv"))[0]) == ["NA", "null"]


def test_a_missing_inner_column_is_reported(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"answers": {"text": ["a"]}}))
    with pytest.raises(UserError, match=r"no column 'answers.body'; it has answers"):
        load_documents(text_config(path, text_column="answers.body"))


# ---- Which text is evaluated on ------------------------------------------------------------------


@pytest.fixture
def with_splits(tmp_path):
    """A data set with three splits, as files and as written by save_to_disk."""
    splits = {"train": SENTENCES, "validation": ["valid"] * 2, "test": ["tested"] * 3}
    for name, texts in splits.items():
        (tmp_path / "files").mkdir(exist_ok=True)
        write_text(tmp_path / f"files/{name}.txt", texts)
    datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
    ).save_to_disk(tmp_path / "saved")
    return tmp_path


@pytest.mark.parametrize("name", ["files", "saved"])
def test_a_data_set_has_its_own_text_to_evaluate_on(with_splits, name):
    """Unless another is named."""

    def texts(**given):
        given |= {"dataset": str(with_splits / name)}
        train, evaluation = load_documents(resolve("tutorial", given))
        return list(train), evaluation and list(evaluation), evaluation and evaluation.held_out

    assert texts() == (SENTENCES, ["valid"] * 2, False)
    assert texts(eval_split="test") == (SENTENCES, ["tested"] * 3, False)
    assert texts(eval_split="test[:1]") == (SENTENCES, ["tested"], False)
    assert texts(eval_fraction=0.0) == (SENTENCES, None, None)
    train, held_out, is_held_out = texts(eval_fraction=0.5)
    assert sorted(train + held_out) == sorted(SENTENCES) and is_held_out
    streamed = {"streaming": True, "max_steps": 1}
    assert texts(**streamed) == (SENTENCES, None, None)
    assert texts(**streamed, eval_split="test") == (SENTENCES, ["tested"] * 3, False)
    with pytest.raises(UserError, match='Unknown split "other"'):
        texts(eval_split="other")
    (with_splits / "files/validation.txt").unlink()
    shutil.rmtree(with_splits / "saved/validation")
    (with_splits / "saved/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    train, held_out, is_held_out = texts()
    assert sorted(train + held_out) == sorted(SENTENCES) and is_held_out and len(held_out) == 1


@pytest.mark.parametrize(
    "given, message",
    [
        ({"eval_split": "test"}, "--eval-split goes with a --dataset"),
        ({"eval_split": "a", "eval_fraction": 0.1}, "--eval-split and --eval-fraction contradict"),
    ],
)
def test_what_to_evaluate_on_is_named_once(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        resolve("tutorial", {"train_file": ("a.txt",), **given})


def test_documents_on_both_sides_are_counted_and_named(files, tmp_path, capsys):
    """Word for word; empty ones are not text that a model could remember."""
    write_text(tmp_path / "a.txt", [*SENTENCES, "", "", SENTENCES[0]])
    write_text(tmp_path / "b.txt", [SENTENCES[0], SENTENCES[0], SENTENCES[1], "new", "", "Water"])
    eval_file = (str(tmp_path / "b.txt"),)
    both = load_documents(changed(text_config(tmp_path / "a.txt"), eval_file=eval_file))
    assert count_shared(*both) == 3 and count_shared(both[0], replace(both[0])) == 7
    config = small_config(files, train_file=(str(tmp_path / "a.txt"),), grouping="lines")
    load(changed(config, eval_file=eval_file), None, ALONE)
    assert ", 3 of them also in the training text\n" in capsys.readouterr().out
