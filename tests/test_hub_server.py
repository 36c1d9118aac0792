"""The stand-in for the Hub, seen through the real clients, each time in a new process."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hub_server import StandInHub
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizer

MODEL_ID = "distilbert/distilroberta-base"
DATASET_ID = "dany0407/eli5_category"
PARTS_ID = "somebody/parts"
SENTENCE = "The Milky Way is a <mask> galaxy."

# What the clients make of the repositories, as JSON. A checksum covers every weight by name.
LOAD_EVERYTHING = f"""
import hashlib, json
from datasets import load_dataset
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

def checksum(tensor):
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()

model = AutoModelForMaskedLM.from_pretrained("{MODEL_ID}")
rows = {{
    "train": load_dataset("{DATASET_ID}", split="train[:5000]"),
    "slice": load_dataset("{DATASET_ID}", split="train[1:2]"),
    "other split": load_dataset("{DATASET_ID}", split="validation1"),
    "first part": load_dataset("{PARTS_ID}", "first", split="train"),
    "second part": load_dataset("{PARTS_ID}", "second", split="test"),
}}
print(json.dumps({{
    "layers": AutoConfig.from_pretrained("{MODEL_ID}").num_hidden_layers,
    "token ids": AutoTokenizer.from_pretrained("{MODEL_ID}")("{SENTENCE}")["input_ids"],
    "weights": {{name: checksum(weight) for name, weight in model.state_dict().items()}},
    "rows": {{name: list(dataset) for name, dataset in rows.items()}},
}}))
"""

# The exception that each call ends in, with those that caused it, as JSON.
ASK_FOR_WHAT_IS_MISSING = f"""
import json
from datasets import load_dataset
from huggingface_hub import HfApi, hf_hub_download
from transformers import AutoConfig

def failure(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except Exception as error:
        names = []
        while error is not None:
            names.append(type(error).__name__)
            error = error.__cause__
        return names

print(json.dumps({{
    "model info": failure(HfApi().model_info, "no/such"),
    "dataset info": failure(HfApi().dataset_info, "{MODEL_ID}"),
    "download": failure(hf_hub_download, "no/such", "config.json"),
    "transformers": failure(AutoConfig.from_pretrained, "no/such"),
    "datasets": failure(load_dataset, "no/such"),
    "file": failure(hf_hub_download, "{MODEL_ID}", "no.txt"),
    "revision": failure(hf_hub_download, "{MODEL_ID}", "config.json", revision="v9"),
}}))
"""


def make_rows(first: int, count: int) -> list[dict]:
    """Questions and answers in the schema of ELI5-category."""
    return [
        {
            "q_id": f"q{i}",
            "title": f"Why is number {i} here?",
            "selftext": "",
            "category": "Physics",
            "subreddit": "explainlikeimfive",
            "answers": {
                "a_id": [f"a{i}", f"b{i}"],
                "text": [f"Because {i} is the successor of {i - 1}.", "Nobody knows. \N{SNOWMAN}"],
                "score": [i, -1],
                "text_urls": [[f"https://example.org/{i}"], []],
            },
            "title_urls": ["url"],
            "selftext_urls": ["url"],
        }
        for i in range(first, first + count)
    ]


ROWS = {
    "train": make_rows(1, 3),
    "slice": make_rows(2, 1),
    "other split": make_rows(10, 2),
    "first part": make_rows(20, 2),
    "second part": make_rows(30, 2),
}

# Which files belong to which split of which configuration. Without such a card `datasets` goes
# by the names of files and directories.
PARTS_CARD = """---
configs:
- config_name: first
  data_files: first.jsonl
- config_name: second
  data_files: [{split: test, path: second/*.jsonl}]
---
"""


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_tokenizer() -> RobertaTokenizer:
    """A byte-level BPE of a few hundred tokens, in RoBERTa's layout."""
    texts = [text for row in ROWS["train"] for text in row["answers"]["text"]] + [SENTENCE]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    trained = json.loads(bpe.to_str())["model"]
    return RobertaTokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        mask_token=AddedToken("<mask>", lstrip=True, special=True),
    )


def make_model(tokenizer: RobertaTokenizer) -> RobertaForMaskedLM:
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=40,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return RobertaForMaskedLM(config)


def run_client(script: str, environment: dict[str, str], directory: Path) -> dict:
    """Run a script in a new process and read the JSON it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # Neither trouble in a background thread, nor a failed request that was tried again.
    assert "Traceback" not in done.stderr, done.stderr
    assert "Retrying" not in done.stderr, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def tokenizer() -> RobertaTokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer) -> RobertaForMaskedLM:
    return make_model(tokenizer)


@pytest.fixture(scope="module")
def hub(model, tokenizer, tmp_path_factory) -> StandInHub:
    """The stand-in with a tiny model and two small data sets, not yet listening."""
    root = tmp_path_factory.mktemp("repositories")
    tokenizer.save_pretrained(root / "model")
    model.save_pretrained(root / "model")
    write_parquet(root / "data/data/train-00000-of-00001.parquet", ROWS["train"])
    write_parquet(root / "data/data/validation1-00000-of-00001.parquet", ROWS["other split"])
    write_jsonl(root / "parts/first.jsonl", ROWS["first part"])
    write_jsonl(root / "parts/second/a.jsonl", ROWS["second part"])
    (root / "parts/README.md").write_text(PARTS_CARD)
    return StandInHub(
        models={MODEL_ID: root / "model"},
        datasets={DATASET_ID: root / "data", PARTS_ID: root / "parts"},
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The clients' cache directory, empty at first."""
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="module")
def loaded(hub, home) -> dict:
    """What the clients load through the stand-in; it is in their cache afterwards."""
    with hub:
        return run_client(LOAD_EVERYTHING, hub.environment(home), home)


def test_clients_load_what_the_directories_hold(loaded, hub, model, tokenizer):
    assert loaded["rows"] == ROWS
    assert loaded["layers"] == 2
    assert loaded["token ids"] == tokenizer(SENTENCE)["input_ids"]
    assert tokenizer.mask_token_id in loaded["token ids"]
    assert loaded["weights"] == {
        name: hashlib.sha256(weight.numpy().tobytes()).hexdigest()
        for name, weight in model.state_dict().items()
    }
    commit = hub.repository("models", MODEL_ID).sha
    assert f"GET /{MODEL_ID}/resolve/{commit}/model.safetensors" in hub.requests


def test_the_cache_is_enough_when_the_server_is_gone(loaded, hub, home):
    before = list(hub.requests)
    offline = run_client(LOAD_EVERYTHING, hub.environment(home, offline=True), home)
    assert offline == loaded
    assert hub.requests == before


def test_what_is_missing_raises_the_clients_own_exceptions(hub, tmp_path):
    with hub:
        failures = run_client(ASK_FOR_WHAT_IS_MISSING, hub.environment(tmp_path), tmp_path)
    assert {call: names[0] for call, names in failures.items()} == {
        "model info": "RepositoryNotFoundError",
        "dataset info": "RepositoryNotFoundError",
        "download": "RepositoryNotFoundError",
        "transformers": "OSError",
        "datasets": "DatasetNotFoundError",
        "file": "RemoteEntryNotFoundError",
        "revision": "RevisionNotFoundError",
    }
    assert failures["transformers"][1] == "RepositoryNotFoundError"
