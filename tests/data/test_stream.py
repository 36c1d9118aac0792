"""Streaming: every document once, exact resume, the same rows for any number of ranks."""

import json
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch

from mlm_scratch.config import changed
from mlm_scratch.data.documents import load_documents
from mlm_scratch.data.stream import ShardedStream, StreamLoader
from mlm_scratch.hf.load import load_tokenizer
from mlm_scratch.loader import Collator
from mlm_scratch.model import MaskedLM
from mlm_scratch.parallel.ranks import Ranks
from mlm_scratch.run.session import train
from mlm_scratch.util.errors import UserError
from tests.support.processes import finish, forget_after, forked
from tests.support.same import assert_same_curve, assert_same_run
from tests.support.tiny import NO_DROPOUT, SENTENCES, save_files, small_config, write_text

TEXTS = [f"{i} {SENTENCES[i % len(SENTENCES)]}" for i in range(501)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model without dropout, and 501 documents of about 20 tokens."""
    directory = save_files(tmp_path_factory.mktemp("files"), TEXTS, **NO_DROPOUT)
    (directory / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    for part in range(16):
        write_text(directory / f"part-{part}.txt", TEXTS[part::16])
    return directory


@pytest.fixture
def small_buffers(monkeypatch):
    """10 documents per buffer, so that a shard of 31 soon reaches the next one, and its end."""
    monkeypatch.setattr("mlm_scratch.data.documents.TEXTS_PER_BATCH", 10)


def config(files, **settings):
    """70 steps of 16 rows from 16 shards: a little more than one pass."""
    return small_config(
        files,
        **{
            "streaming": True,
            "max_steps": 70,
            "batch_size": 16,
            "log_every": 1,
            "save_every": 10,
            "keep": 9,
            **settings,
        },
    )


@pytest.mark.parametrize("names", [["a.txt"], [f"part-{part}.txt" for part in range(16)]])
def test_a_pass_has_every_document_of_a_shard_once_and_shuffled(files, small_buffers, names):
    settings = config(files, train_file=tuple(str(files / name) for name in names))
    tokenizer = load_tokenizer(settings.model.name)
    stream = ShardedStream(load_documents(settings)[0], tokenizer, settings)
    size = settings.optimization.batch_size
    collator = Collator(tokenizer, **settings.masking.of_collator())
    loader = StreamLoader(stream, collator, rows_per_step=size, batch_size=size)
    shards = [[] for _ in range(16)]
    for step in loader.steps(0, 70):
        (batch,) = step.batches
        ids = torch.where(batch.labels == -100, batch.input_ids, batch.labels)  # (16, T) unmasked
        for shard in range(16):
            shards[shard] += ids[shard].tolist()
    orders = []
    for shard, ids in enumerate(shards):
        own = TEXTS[shard::16]
        texts = tokenizer.decode(ids).removeprefix("<s>").split("</s><s>")
        assert Counter(texts[: len(own)]) == Counter(own)
        assert texts[:10] != own[:10] and Counter(texts[:10]) == Counter(own[:10])
        for start in (0, 10):  # each buffer in an order of its own, in each shard
            orders.append(tuple(own[start:].index(text) for text in texts[start : start + 10]))
    assert len({*orders}) == len(orders) == 32


@pytest.mark.parametrize(
    "names, settings",
    [
        (["a.txt"], {"whole_word": True, "accumulate": 2, "batch_size": 6}),
        pytest.param(["b.jsonl"], {}, marks=pytest.mark.slow),
        pytest.param([f"part-{part}.txt" for part in range(16)], {}, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_stream_goes_on_where_it_was(files, small_buffers, names, settings):
    paths = tuple(str(files / name) for name in names)
    settings = config(files, train_file=paths, output_dir="stopped", **settings)
    whole = train(changed(settings, output_dir="whole"))
    run = train(settings)
    for step in (50, 20):
        forget_after(step, run)
        assert_same_run(whole, train(settings, resume=True))


@pytest.mark.slow
def test_any_number_of_ranks_streams_the_same(files):
    alone = train(config(files, output_dir="alone", batch_size=20, whole_word=True))
    for ranks, step in ((2, 0), (4, 30)):
        settings = config(files, output_dir="run", batch_size=20 // ranks, whole_word=True)
        flags = [settings] if step == 0 else ["--resume", "--output-dir", "run"]
        forget_after(step, Path("run"))
        code, _, err = finish(forked(ranks, *flags))
        assert code == 0, err
        assert_same_curve(alone, Path("run"))


def test_errors_in_a_stream_are_reported_in_one_line(files, tmp_path):
    def error(text, **settings):
        path = tmp_path / "b.jsonl"
        path.write_text(text)
        with pytest.raises(UserError) as raised:
            train(config(files, train_file=(str(path),), **settings))
        return str(raised.value)

    good = "\n".join(json.dumps({"text": text}) for text in TEXTS)
    assert "has too little text for 16 shards" in error('{"text": "one"}\n{"text": "two"}')
    assert "has no column 'answer'" in error(good, text_column="answer")
    broken = f"{good}\n" * 4 + '{"text": "no end\n'  # beyond what is read before training
    assert str(tmp_path / "b.jsonl") in error(broken, max_steps=10_000, lr=1e-9)
    assert "contains a NUL" in error('{"text": "a\\u0000b"}\n' * 8)


def test_the_workers_are_there_before_ddp_is(files, monkeypatch):
    """DDP on GPUs starts NCCL, and a process with NCCL must not fork."""
    wrap, workers = Ranks.wrap, []

    def noted(*arguments):
        workers.append(len(multiprocessing.active_children()))
        return wrap(*arguments)

    monkeypatch.setattr(Ranks, "wrap", noted)
    train(config(files))
    (count,) = workers
    assert count > 0 and not multiprocessing.active_children()


def test_a_killed_worker_is_reported_in_one_line(files, monkeypatch):
    forward, children = MaskedLM.forward, Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    others = children.read_text().split()

    def kill_workers(*args, **kwargs):
        for child in children.read_text().split():
            if child not in others:
                os.kill(int(child), signal.SIGKILL)
        return forward(*args, **kwargs)

    monkeypatch.setattr(MaskedLM, "forward", kill_workers)
    with pytest.raises(UserError, match="a process that reads the stream ahead was killed"):
        train(config(files))
