"""The code of a GPU, on a machine without one: no device mixed, no wait that is not known.

All scenarios run once, in one other process that has the stand-in (support/fake_gpu.py); each test
looks at the result of one.
"""

import io
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import infer
from mlm_scratch import loop, speed
from mlm_scratch.config import TUTORIAL, changed
from mlm_scratch.explain.trace import trace
from mlm_scratch.hf.load import load_model, load_tokenizer
from mlm_scratch.inference.fill import fill_mask
from mlm_scratch.inference.joint import ORDERS, fill_jointly
from mlm_scratch.inference.score import score_sentence
from mlm_scratch.loader import Batch, Loader, Step
from mlm_scratch.masking import IGNORE
from mlm_scratch.model import MaskedLM
from mlm_scratch.precision import Precision
from mlm_scratch.report.log import NoReport
from mlm_scratch.report.metrics import read_metrics
from mlm_scratch.run import session
from mlm_scratch.run.build import prepare
from mlm_scratch.run.session import train
from mlm_scratch.run.signals import StopRequest
from mlm_scratch.run.steps import run_steps
from mlm_scratch.speed import checks
from mlm_scratch.speed.graph import WARM_UP
from mlm_scratch.util.runs import MODEL, checkpoints
from tests.support.fake_gpu import FakeGpu, Record, environment, fake_gpu, why_not
from tests.support.processes import TIMEOUT, forget_after
from tests.support.same import WEIGHTS, assert_same_run
from tests.support.tiny import NO_DROPOUT, save_files, small_config

pytestmark = pytest.mark.slow  # its process takes 40 s
MUST_RUN = "MLM_SCRATCH_NEED_STAND_IN"  # if it is set, a skip is a failure

# ---- What one optimizer step does, without logging, evaluation or a checkpoint: settings, waits,
# copies to the GPU. A batch has three tensors, input_ids, labels and positions; with padding also a
# mask, packed also position ids.

COPY = "asynchronous loader.py"
FP16 = {"item loop.py": 1}  # whether the scaler skipped the step
LINES = {"grouping": "lines", "block_size": 64}
MODERNBERT = {"model": "bundled", "init": "scratch"}

STEPS: dict[str, tuple[dict[str, Any], dict[str, int], dict[str, int]]] = {
    "fp32": ({"precision": "fp32"}, {}, {COPY: 3}),
    "bf16": ({"precision": "bf16"}, {}, {COPY: 3}),
    "fp16": ({"precision": "fp16"}, FP16, {COPY: 3}),
    "bf16, two batches": ({"precision": "bf16", "accumulate": 2}, {}, {COPY: 6}),
    "fp16, two batches": ({"precision": "fp16", "accumulate": 2}, FP16, {COPY: 6}),
    "dense head": ({"precision": "bf16", "dense_head": True}, {}, {COPY: 3}),
    "whole words": ({"precision": "bf16", "whole_word": True}, {}, {COPY: 3}),
    "padded": ({"precision": "bf16", "no_packing": True, **LINES}, {}, {COPY: 4}),
    "packed": ({"precision": "bf16", **LINES}, {}, {COPY: 4}),
    "packed, two batches": (
        {"precision": "bf16", "accumulate": 2, "batch_size": 4, **LINES},
        {},
        {COPY: 8},
    ),
    "packed, whole words": ({"precision": "bf16", "whole_word": True, **LINES}, {}, {COPY: 4}),
    "packed, fp16": ({"precision": "fp16", **LINES}, FP16, {COPY: 4}),
    "bundled": ({"precision": "bf16", **MODERNBERT}, {}, {COPY: 3}),
    "bundled, packed": (
        {"precision": "bf16", **MODERNBERT, **LINES},
        {},
        {COPY: 4},
    ),
}
N_STEPS = 5  # the last one saves a checkpoint

# ---- The steps of a run that logs every third and evaluates (two batches) after every second.

OFTEN = {"precision": "bf16", **LINES, "log_every": 3, "eval_every": 2}
OFTEN |= {"eval_fraction": 0.2, "eval_batch_size": 8}
EVALUATION = ({"to cpu evaluate.py": 1}, {COPY: 11})  # the second batch is one row
LOGGING = ({"item run/losses.py": 2, "item run/steps.py": 1}, {COPY: 4})
PERIODIC: list[tuple[dict[str, int], dict[str, int]]] = [
    ({}, {COPY: 4}),
    EVALUATION,
    LOGGING,
    EVALUATION,
]

# ---- What a step does with a fault in it: precision, waits, copies.

FAULTS: dict[str, tuple[str, dict[str, int], dict[str, int]]] = {
    "the loss read": ("bf16", {"item loop.py": 1}, {COPY: 3}),
    "the gradient norm read": ("bf16", {"item loop.py": 1}, {COPY: 3}),
    "one wait more in fp16": ("fp16", {"item loop.py": 2}, {COPY: 3}),
    "a scaler for bf16": ("bf16", FP16, {COPY: 3}),
    "a rate read": ("bf16", {"item loop.py": 1}, {COPY: 3}),
    "a blocking copy": ("bf16", {}, {"blocking loader.py": 3}),
    "memory that is not pinned": ("bf16", {}, {"blocking loader.py": 3}),
    "a number copied in the step": ("bf16", {}, {COPY: 3, "blocking loop.py": 1}),
    "positions left on the CPU": (
        "bf16",
        {"cpu index model.py": 2, "cpu index loop.py": 1},  # once more in the backward pass
        {COPY: 2},
    ),
    "labels found by a mask": ("bf16", {"mask index loop.py": 1}, {COPY: 3}),
}
MIXED = "labels left on the CPU"  # raises

# ---- Runs whose steps are replayed as a CUDA graph: settings, and the scale of the loss in fp16.
# What must not be a Python number.

GRAPHS: dict[str, tuple[dict[str, Any], float]] = {
    "fp32": ({"precision": "fp32"}, 1.0),
    "bf16": ({"precision": "bf16"}, 1.0),
    "fp16": ({"precision": "fp16"}, 2.0**10),
    "fp16, skipped steps": ({"precision": "fp16"}, 2.0**24),
    "two batches": ({"precision": "fp32", "accumulate": 2}, 1.0),
    "nothing masked": ({"precision": "fp32", "batch_size": 1, "mlm_probability": 0.02}, 1.0),
    "dense head": ({"precision": "fp32", "dense_head": True}, 1.0),
    "short epochs": ({"precision": "fp32", "dense_head": True, "batch_size": 32}, 1.0),
}
# A short last step, here of another shape, comes between steps that could be captured.
TWO_EPOCHS = {"dense_head": True, "batch_size": 16}
BAKED_IN = ("the count of masked tokens", "the rate")
WAIT = "operation not permitted when stream is capturing"
NOT_CAPTURED = {
    "a wait": ("bf16", WAIT),
    "a wait of the optimizer": ("fp16", WAIT),
    "a handled error": ("fp32", "what really is wrong"),
    "a draw on the CPU": ("fp32", "the model draws random numbers on the CPU"),
}

# ---- What predictions with a model on the GPU do, from the text to the result: waits, copies.

ONE_MASK = "A whale is a <mask> that lives in the sea."
TWO_MASKS = "The <mask> Way is a <mask> galaxy."

PREDICTIONS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "fill_mask": (
        {"item fill_mask.py": 1, "to cpu fill_mask.py": 1},
        {"blocking fill_mask.py": 3},
    ),
    "fill_mask, padded": (
        {"item fill_mask.py": 1, "to cpu fill_mask.py": 2},
        {"blocking fill_mask.py": 4},
    ),
    "fill_jointly": (
        {"to cpu hf/encode.py": 2},
        {"blocking hf/encode.py": 4},
    ),
    "score_sentence": (
        {"to cpu hf/encode.py": 1},
        {"blocking hf/encode.py": 2},
    ),
    "trace": (
        {
            "item model.py": 2,
            "allclose hf/checks.py": 1,
            "to cpu explain/trace.py": 2,
            "item explain/trace.py": 1,
        },
        {"blocking hf/checks.py": 1, COPY: 3},
    ),
}

# ---- The stand-in itself: x and i are on the GPU, c and j on the CPU.

WAYS: dict[str, str | None] = {
    "x.sum().item()": "item",
    "bool(x.any())": "item",
    "int(i[0])": "item",
    "float(x[0])": "item",
    "range(5)[i[0]]": "item",
    "2 in i": "item",
    "x.tolist()": "to cpu",
    "x.cpu()": "to cpu",
    "c.copy_(x)": "to cpu",
    "x.to('cpu', non_blocking=True)": "to cpu, unfinished",
    "x[j]": "cpu index",
    "x[x > 0]": "mask index",
    "x[i]": None,
    "x.__setitem__(x > 9, 0.0)": None,
    "x.__setitem__(j, 0.0)": "cpu index",
    "x.masked_fill_(x > 9, 0.0)": None,
    "x.nonzero()": "nonzero",
    "x.masked_select(x > 0)": "masked_select",
    "torch.equal(x, x)": "equal",
    "torch.allclose(x, x)": "allclose",
    "i.unique()": "unique",
    "i.repeat_interleave(i)": "repeat_interleave",
    "torch.cuda.synchronize()": "synchronize",
    "(x * 2 + 1).softmax(0)": None,
    "x + torch.tensor(1.0)": None,
    "torch.save(x, 'x.pt')": "to cpu",
}
WAYS_TO_COPY = {
    "c.to('cuda')": ["blocking"],
    "c.cuda()": ["blocking"],
    "c.to(x)": ["blocking"],
    "c.to('cuda', non_blocking=True)": ["blocking"],
    "c.pin_memory().to('cuda')": ["blocking"],
    "c.pin_memory().to('cuda', non_blocking=True)": ["asynchronous"],
    "c.pin_memory()[1:].to('cuda', non_blocking=True)": ["asynchronous"],
    "x.copy_(c.pin_memory(), non_blocking=True)": ["asynchronous"],
    "x.copy_(c)": ["blocking"],
    "torch.tensor([1.0, 2.0], device='cuda')": ["blocking"],
    "x.new_tensor([1.0, 2.0])": ["blocking"],
    "x.__setitem__(i, 0.0)": ["blocking"],
    "x.__setitem__(0, 0.0)": ["blocking"],
    "x.__setitem__(slice(2), 0.0)": [],
    "x.to('cuda').to(torch.float16)": [],
    "torch.zeros(3, device='cuda')": [],
    "torch.arange(3, device=x.device)": [],
}
MIXTURES = {
    "x + c": True,
    "x + c[0]": False,
    "c + x[0]": True,
    "c[0].add_(x[0])": True,
    "c[i]": True,
    "torch.cat([x, c])": True,
    "torch.stack([x[0], c[0]])": True,
    "torch.where(x > 0, x, c)": True,
    "torch.nn.functional.embedding(j, x[:, None])": True,
    "torch._foreach_mul_([x], c[0])": True,
    "torch._foreach_add([x], [c])": True,
    "x.bernoulli_(0.5, generator=torch.Generator())": True,
    "x.numpy()": True,
    "x + x": False,
    "c + c": False,
}


# ---- In the process of pytest


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model without dropout, whose vocabulary is no multiple of 64."""
    return save_files(tmp_path_factory.mktemp("files"), vocab_size=333, **NO_DROPOUT)


@pytest.fixture(scope="module")
def found(files, tmp_path_factory):
    """What every scenario returned, by its name."""
    if reason := why_not():
        if os.environ.get(MUST_RUN):
            pytest.fail(f"{MUST_RUN} is set, but {reason}")
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("stand_in")
    program = "import sys; from tests.test_gpu_stand_in import main; main(sys.argv[1])"
    run = subprocess.run(
        [sys.executable, "-c", program, files],
        cwd=directory,
        env=environment(directory) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((directory / "found.json").read_text()) | {"stderr": run.stderr}


def result_of(found: dict[str, Any], name: str) -> Any:
    assert found[name]["error"] is None, found[name]["error"]
    return found[name]["result"]


def by_file(events: list[list[str]]) -> dict[str, int]:
    """Count events without their line numbers."""
    return dict(Counter(f"{kind} {where.rpartition(':')[0]}" for kind, where in events))


def assert_each_step(steps: list[Any], waits: dict[str, int], copies: dict[str, int]) -> None:
    assert len(steps) == N_STEPS
    for step in steps[1:-1]:  # before the first one, the scale is not on the GPU yet
        assert (by_file(step["waits"]), by_file(step["copies"])) == (waits, copies), step


@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_and_copies_where_it_is_known_to(found, name):
    _, waits, copies = STEPS[name]
    result = result_of(found, f"step {name}")
    assert_each_step(result["steps"], waits, copies)
    assert all(map(math.isfinite, result["losses"]))
    assert result["probed on"] in (["cpu"], [])  # the dense head needs no probe
    assert not any(width % 8 for width in result["widths"])
    assert bool(result["widths"]) == ("padded" in name or "packed" in name)


@pytest.mark.parametrize("answer", [True, False])
def test_a_step_does_the_same_whatever_the_gpu_answers(found, answer):
    """Whether a mask is all ones, for example; the numbers alone would give one answer only."""
    _, waits, copies = STEPS["padded"]
    assert_each_step(result_of(found, f"every bool is {answer}")["steps"], waits, copies)


def test_logging_and_evaluation_wait_once_per_number(found):
    result = result_of(found, "periodic")
    steps = result["steps"]
    assert not any(width % 8 for width in result["widths"])
    for step, (waits, copies) in zip(steps, PERIODIC, strict=False):
        assert (by_file(step["waits"]), by_file(step["copies"])) == (waits, copies), step


def test_a_save_waits_once_and_copies_into_pinned_memory(found):
    """The copies are asynchronous; they are complete once the weights are known to be finite."""
    step = result_of(found, "save")["steps"][1]
    waits, copies = by_file(step["waits"]), by_file(step["copies"])
    assert waits.pop("to cpu, unfinished run/saver.py") > 100  # weights, two moments of each, ...
    assert waits == {"item hf/checks.py": 1} and copies == {COPY: 3}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(found, name):
    precision, waits, copies = FAULTS[name]
    assert (waits, copies) != STEPS[precision][1:]
    assert_each_step(result_of(found, f"fault {name}")["steps"], waits, copies)


def test_labels_left_on_the_cpu_are_noticed(found):
    assert "expected all tensors to be on the same device" in found[f"fault {MIXED}"]["error"]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_on_a_gpu_leaves_what_one_on_a_cpu_leaves(found, precision):
    """With logging, evaluation, checkpoints and the final model. bf16 has 8 bits of mantissa."""
    result = result_of(found, f"run {precision}")
    assert set(result["tf32"]) == {"high" if precision == "fp32" else "highest"}
    assert len(result["gpu"]) == 7
    assert_close(result["gpu"], result["cpu"], rel=1e-4 if precision == "fp32" else 0.01)
    assert result["difference"] < (1e-5 if precision == "fp32" else 0.01)
    assert result["names"] == ["checkpoint-4", "checkpoint-2"]


@pytest.mark.parametrize("name", GRAPHS)
def test_replayed_steps_are_the_same_steps(found, name):
    """The rate falls, each step has its own data, dropout and number of masked tokens, the last one
    fewer rows."""
    result = result_of(found, f"graph {name}")
    plain, replayed = result["plain"], result["replayed"]
    masked = [n_masked for n_masked, *_ in plain["steps"]]
    assert len(set(masked)) > 1 and (0 in masked) == (name == "nothing masked")
    assert replayed["steps"] == plain["steps"]
    assert result["difference"] == 0
    assert plain["skipped"] == replayed["skipped"]
    assert plain["skipped"] == {"fp16, skipped steps": 7}.get(name, masked.count(0))
    short = {"dense head": 1, "short epochs": 4}.get(name, 0)  # steps that are not filled up
    assert replayed["computed"] == WARM_UP + 1 + short and plain["computed"] == 0


@pytest.mark.parametrize("name", BAKED_IN)
def test_a_number_that_a_graph_has_baked_in_shows(found, name):
    result = result_of(found, f"graph {name}")
    assert result["replayed"]["steps"] != result["plain"]["steps"]


@pytest.mark.parametrize("name", NOT_CAPTURED)
def test_a_step_that_cannot_be_captured_is_computed(found, name):
    result = result_of(found, f"graph {name}")
    assert result["replayed"]["steps"] == result["plain"]["steps"]
    assert result["difference"] == 0
    assert result["replayed"]["computed"] == 12 + 1  # it is tried once
    reasons = [reason for _, reason in NOT_CAPTURED.values()]
    _, reason = NOT_CAPTURED[name]
    line = f"warning: steps are not replayed as a CUDA graph: {reason}\n"
    assert found["stderr"].count(line) == reasons.count(reason)


def test_runs_with_and_without_a_graph_resume_into_each_other(found):
    """In fp16 with dropout: metrics, checkpoints and weights are the same, bit for bit."""
    assert result_of(found, "resume graph") == [True, False, True, True, False]


def test_a_step_that_overflows_is_skipped(found):
    result = result_of(found, "overflow")
    rates = [line["learning_rate"] for line in result["gpu"] if "loss" in line]
    assert len(rates) == 4 and len(set(rates)) == 1
    assert result["difference"] == 0


@pytest.mark.parametrize("begun, ended", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_begun_on_one_device_goes_on_on_the_other(found, begun, ended):
    result = result_of(found, f"resume {begun} {ended}")
    assert len(result["gpu"]) == 4
    assert_close(result["gpu"], result["cpu"])
    assert result["difference"] < 1e-5
    # The optimizer's own: a graph may read it there.
    assert result["rate"] == (["cuda", True] if ended == "cuda" else ["a number", False])


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_model_on_a_gpu_predicts_what_one_on_a_cpu_predicts(found, name):
    waits, copies = PREDICTIONS[name]
    result = result_of(found, name)
    assert_close(result["gpu"], result["cpu"])
    assert (by_file(result["waits"]), by_file(result["copies"])) == (waits, copies), result


def test_infer_py_prints_the_same_on_a_gpu_as_on_a_cpu(found):
    on_gpu, on_cpu = result_of(found, "infer.py")
    assert on_gpu == on_cpu
    assert len(on_gpu) > 20


def assert_close(one: Any, other: Any, rel: float = 1e-4) -> None:
    """Assert that nested results are equal, numbers up to rounding."""
    if isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_close(a, b, rel)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key], rel)
    else:
        assert one == (pytest.approx(other, rel=rel) if isinstance(other, float) else other)


def test_the_stand_in_sees_every_way_to_wait(found):
    expected = {code: [kind] if kind else [] for code, kind in WAYS.items()}
    assert result_of(found, "waits") == expected


def test_the_stand_in_tells_blocking_copies_from_others(found):
    assert result_of(found, "copies") == WAYS_TO_COPY


def test_the_stand_in_mixes_no_devices(found):
    result = result_of(found, "mixtures")
    assert {code: error is not None for code, error in result.items()} == MIXTURES, result


# ---- In the process that has the stand-in


def main(files: str) -> None:
    """Run every scenario; write what it returns, or its traceback, to found.json."""
    found: dict[str, Any] = {}
    for name, scenario in scenarios(Path(files)).items():
        found[name] = {"error": None, "result": None}
        try:
            found[name]["result"] = scenario()
        except Exception:
            found[name]["error"] = traceback.format_exc()
    Path("found.json").write_text(json.dumps(found))


def scenarios(files: Path) -> dict[str, Callable[[], Any]]:
    padded = STEPS["padded"][0]
    return {
        **{f"step {name}": partial(take_steps, files, STEPS[name][0]) for name in STEPS},
        **{f"every bool is {a}": partial(take_steps, files, padded, a) for a in (True, False)},
        "periodic": partial(take_steps, files, OFTEN),
        "save": partial(take_steps, files, {"precision": "bf16", "save_every": 2}, save=True),
        **{
            f"fault {name}": partial(with_fault, files, name, precision)
            for name, (precision, _, _) in FAULTS.items()
        },
        f"fault {MIXED}": partial(with_fault, files, MIXED, "bf16"),
        **{f"graph {name}": partial(replayed_steps, files, *GRAPHS[name]) for name in GRAPHS},
        **{
            f"graph {name}": partial(replayed_steps, files, *GRAPHS["fp32"], name)
            for name in BAKED_IN
        },
        **{
            f"graph {name}": partial(
                replayed_steps, files, {**TWO_EPOCHS, "precision": precision}, 2.0**10, name
            )
            for name, (precision, _) in NOT_CAPTURED.items()
        },
        **{f"run {name}": partial(whole_runs, files, name) for name in ("fp32", "bf16", "fp16")},
        "overflow": partial(whole_runs, files, "fp16", init_scale=2.0**40),
        "resume graph": partial(resumed_with_and_without_a_graph, files),
        "resume cpu cuda": partial(resumed_run, files, "cpu", "cuda"),
        "resume cuda cpu": partial(resumed_run, files, "cuda", "cpu"),
        **{name: partial(predictions, files / "model", name) for name in PREDICTIONS},
        "infer.py": lambda: [printed(files / "model", device) for device in ("cuda", "cpu")],
        "waits": lambda: {code: [kind for kind, _ in evaluated(code).waits] for code in WAYS},
        "copies": lambda: {
            code: [kind for kind, _ in evaluated(code).copies] for code in WAYS_TO_COPY
        },
        "mixtures": lambda: {code: error_of(code) for code in MIXTURES},
    }


def take_steps(
    files: Path, settings: dict[str, Any], answer: bool | None = None, save: bool = False
) -> Any:
    """Take N_STEPS steps; return what each of them did, and their losses."""
    losses: list[Tensor] = []
    settings = {"device": "cuda", "max_steps": N_STEPS, "log_every": 100} | settings
    probed, widths = [], []
    works, masked_logits = checks.sparse_head_works, MaskedLM.masked_logits

    def probe(model: MaskedLM) -> bool:
        probed.extend(parameter.device.type for parameter in model.parameters())
        return works(model)

    def noted(self: MaskedLM, batch: Batch) -> tuple[Tensor, Tensor]:
        if batch.attention_mask is not None:
            widths.append(batch.input_ids.shape[1])
        return masked_logits(self, batch)

    with (
        fake_gpu() as gpu,
        patch.object(checks, "sparse_head_works", probe),
        patch.object(MaskedLM, "masked_logits", noted),
    ):
        t = prepare(small_config(files, **settings))
        gpu.answer = answer
        add = t.losses.add

        def keep(loss: Tensor, n_masked: int) -> None:
            losses.append(loss)
            add(loss, n_masked)

        records = record_steps(gpu, t.loader)
        t.run_dir = Path(tempfile.mkdtemp(dir="."))
        no_save = nullcontext() if save else patch.object(t, "save")
        with patch.object(t.losses, "add", keep), no_save, t.saver:
            run_steps(t, NoReport(), StopRequest())
        assert all(parameter.is_cuda for parameter in t.model.parameters())
        assert len(t.hf_model.get_input_embeddings().weight) % 64 == 0
        return {
            "steps": [vars(record) for record in records],
            "losses": [loss.item() for loss in losses],
            "probed on": sorted(set(probed)),
            "widths": widths,
        }


def record_steps(gpu: FakeGpu, loader: Loader) -> list[Record]:
    """Let each step of a loader begin a new record, before its data is fetched."""
    fetch, records = loader.steps, []

    def steps(first: int, last: int) -> Iterator[Step]:
        fetched = fetch(first, last)
        for _ in range(first, last):
            records.append(gpu.begin())
            yield next(fetched)

    loader.steps = steps  # type: ignore[method-assign]
    return records


# ---- Faults


def with_fault(files: Path, name: str, precision: str) -> Any:
    with planted(name):
        return take_steps(files, {**STEPS[precision][0], "no_graph": True})


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Replace a part of the step by one with a fault."""
    forward, clip, to = MaskedLM.forward, loop.clip_grad_norm_, Batch.to

    def loss_then(also: Callable[[Tensor, Batch], Tensor]) -> Callable:
        return lambda model, batch: also(forward(model, batch), batch)

    def read(loss: Tensor, batch: Batch) -> Tensor:
        loss.item()
        return loss

    def scale(loss: Tensor, batch: Batch) -> Tensor:
        return loss * torch.tensor(1.0, device="cuda")

    def find_labels(loss: Tensor, batch: Batch) -> Tensor:
        return loss + 0 * batch.labels[batch.labels != IGNORE].sum()

    def read_norm(*args: Any) -> Tensor:
        norm = clip(*args)
        float(norm)
        return norm

    def read_rate(schedule: Any) -> float:
        return float(schedule.get_last_lr()[0])

    def leave(field: str) -> Callable:
        def to_device(batch: Batch, device: torch.device) -> Batch:
            kept: dict[str, Any] = {field: getattr(batch, field)}
            without: dict[str, Any] = {field: None}
            return to(batch._replace(**without), device)._replace(**kept)

        return to_device

    def copy(pin: bool, non_blocking: bool) -> Callable:
        def to_device(batch: Batch, device: torch.device) -> Batch:
            sources = [x.pin_memory() if pin and x is not None else x for x in batch]
            return Batch._make(
                x if x is None else x.to(device, non_blocking=non_blocking) for x in sources
            )

        return to_device

    owner, attribute, fault = {
        "the loss read": (MaskedLM, "forward", loss_then(read)),
        "one wait more in fp16": (MaskedLM, "forward", loss_then(read)),
        "a number copied in the step": (MaskedLM, "forward", loss_then(scale)),
        "labels found by a mask": (MaskedLM, "forward", loss_then(find_labels)),
        "the gradient norm read": (loop, "clip_grad_norm_", read_norm),
        "a scaler for bf16": (Precision, "grad_scaler", lambda self: torch.amp.GradScaler("cuda")),
        "a rate read": (loop, "next_rate", read_rate),
        "a blocking copy": (Batch, "to", copy(pin=True, non_blocking=False)),
        "memory that is not pinned": (Batch, "to", copy(pin=False, non_blocking=True)),
        "positions left on the CPU": (Batch, "to", leave("positions")),
        MIXED: (Batch, "to", leave("labels")),
    }[name]
    with patch.object(owner, attribute, fault):
        yield


# ---- Steps replayed as a graph


def replayed_steps(files: Path, settings: dict[str, Any], scale: float, fault: str = "") -> Any:
    """Take 12 steps, the last of each epoch short, without a graph and with one."""
    plain, replayed = (graph_run(files, settings, scale, fault, no) for no in (True, False))
    one, other = (run.pop("weights") for run in (plain, replayed))
    difference = max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))
    return {"plain": plain, "replayed": replayed, "difference": difference}


def graph_run(
    files: Path, settings: dict[str, Any], scale: float, fault: str, no_graph: bool
) -> dict[str, Any]:
    """Return (masked tokens, loss, norm) of each step, and what else can be compared."""
    computed = []

    def compute(*arguments: Any) -> tuple[Tensor, Tensor]:
        computed.append(1)
        _, optimizer, _, _, n_masked, *_ = arguments
        # `numbers` is read behind the stand-in's back: a Python number, without waiting for it.
        if fault == "the count of masked tokens":
            n_masked.fill_(n_masked.numbers.item())
        elif fault == "the rate":
            for group in optimizer.param_groups:
                group["lr"].fill_(group["lr"].numbers.item())
        elif fault == "a wait":
            n_masked.item()
        elif fault == "a wait of the optimizer" and len(computed) == 1:  # after unscaling
            optimizer.register_step_pre_hook(lambda *_: n_masked.item() and None)
        elif fault == "a handled error":
            try:
                n_masked.item()
            except RuntimeError as error:
                raise ValueError("what really is wrong") from error
        elif fault == "a draw on the CPU":
            n_masked = n_masked * random.choice((1, 2))
        return loop.compute_step(*arguments)

    random.seed(0)
    settings = {"device": "cuda", "max_steps": 12, "no_graph": no_graph, **settings}
    in_chunks = patch.object(speed.cross_entropy, "LOGITS_OF_A_GPU", 0)
    with fake_gpu(), patch.object(speed.graph, "compute_step", compute), in_chunks:
        t = prepare(small_config(files, **settings))
        for module in t.hf_model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        if t.scaler.is_enabled():
            t.scaler = torch.amp.GradScaler("cuda", init_scale=scale)
        steps = loop.run_steps(t.loader.steps(0, 12), **t.step_arguments())
        return {
            "steps": [[d.step.n_masked, d.loss.item(), d.grad_norm.item()] for d in steps],
            "computed": len(computed),
            "skipped": 12 - t.scheduler.last_epoch,
            "weights": [p.detach().cpu() for p in t.hf_model.parameters()],
        }


# ---- Runs and predictions on both devices


def whole_runs(files: Path, precision: str, init_scale: float = 2.0**16) -> Any:
    """Train with everything that happens once in a while."""
    build = Precision.grad_scaler

    def grad_scaler(self: Precision) -> torch.amp.GradScaler:
        return torch.amp.GradScaler("cuda", init_scale=init_scale, enabled=build(self).is_enabled())

    settings: dict[str, Any] = {"max_steps": 4, "log_every": 1, "save_every": 2}
    settings |= {"eval_every": 2, "eval_fraction": 0.2, "precision": precision}
    products: list[str] = []
    masked_logits = MaskedLM.masked_logits

    def noted(self: MaskedLM, batch: Batch) -> tuple[Tensor, Tensor]:
        products.append(torch.get_float32_matmul_precision())
        return masked_logits(self, batch)

    with fake_gpu(), patch.object(Precision, "grad_scaler", grad_scaler):
        with patch.object(MaskedLM, "masked_logits", noted):
            on_gpu = train(small_config(files, device="cuda", **settings))
        on_cpu = train(small_config(files, **settings))
    names = [path.name for path in checkpoints(on_gpu)]
    return compared(on_gpu, on_cpu) | {"names": names, "tf32": products}


def resumed_run(files: Path, begun: str, ended: str) -> Any:
    """Train for four steps on the CPU; and for two on one device, then for two on the other."""
    settings: dict[str, Any] = {"max_steps": 4, "log_every": 1, "save_every": 2}
    settings |= {"precision": "fp32", "weight_decay": 0.1}
    with fake_gpu():
        on_cpu = train(small_config(files, **settings))
        on_both = train(small_config(files, device=begun, **settings))
        forget_after(2, on_both)
        config = small_config(files, device=ended, output_dir=str(on_both), **settings)
        train(config, resume=True)
        t = prepare(config, on_both / "checkpoint-4")
        (group, _) = t.optimizer.param_groups
        rate = group["lr"].device.type if isinstance(group["lr"], Tensor) else "a number"
    return compared(on_both, on_cpu) | {"rate": [rate, group["capturable"]]}


def resumed_with_and_without_a_graph(files: Path) -> list[bool]:
    """Train for 12 steps; and for 6 without a graph, then for 6 with one, and the reverse.

    Returns:
        which of the five runs captured a graph.
    """
    files = save_files(Path(tempfile.mkdtemp(dir=".")))  # with dropout
    settings: dict[str, Any] = {"max_steps": 12, "log_every": 1, "save_every": 6, "keep": 9}
    settings |= {"device": "cuda", "precision": "fp16"}
    prepared = []

    def noted(*arguments: Any) -> Any:
        prepared.append(prepare(*arguments))
        return prepared[-1]

    with fake_gpu(), patch.object(session, "prepare", noted):
        whole = train(small_config(files, **settings))
        for no_graph in (True, False):
            config = small_config(files, no_graph=no_graph, output_dir=f"{no_graph}", **settings)
            forget_after(6, train(config))
            assert_same_run(whole, train(changed(config, no_graph=not no_graph), resume=True))
    return [getattr(t.compute, "graph", None) is not None for t in prepared]


def compared(on_gpu: Path, on_cpu: Path) -> dict[str, Any]:
    """Return the metrics of both runs, and the largest difference of a weight."""
    one, other = (load_file(run / MODEL / WEIGHTS) for run in (on_gpu, on_cpu))
    kinds = [{name: (x.shape, x.dtype) for name, x in weights.items()} for weights in (one, other)]
    assert kinds[0] == kinds[1]
    return {
        "gpu": read_metrics(on_gpu),
        "cpu": read_metrics(on_cpu),
        "difference": max((one[name] - other[name]).abs().max().item() for name in one),
    }


def predictions(directory: Path, name: str) -> Any:
    """Predict with the model on the CPU, then on the GPU."""
    predict = partial(predict_by(name), directory)
    with fake_gpu() as gpu:
        on_cpu = predict(load_model(directory))
        model: Any = load_model(directory)
        model.to("cuda")
        record = gpu.begin()
        on_gpu = predict(model)
        return {"gpu": on_gpu, "cpu": on_cpu, **vars(record)}


def predict_by(name: str) -> Callable[[Path, Any], Any]:
    def traced(directory: Path, model: Any) -> Any:
        config = changed(TUTORIAL, model=str(directory), block_size=64, mlm_probability=0.5)
        text = ONE_MASK.replace("<mask>", "mammal")
        found = trace(MaskedLM(model), load_tokenizer(directory), text, config)
        assert found.predictions
        return [[p.loss, p.probability, p.top] for p in found.predictions] + [found.loss_sum]

    def call(function: Callable, *args: Any, **options: Any) -> Callable:
        return lambda directory, model: function(model, load_tokenizer(directory), *args, **options)

    by_name: dict[str, Callable[[Path, Any], Any]] = {
        "fill_mask": call(fill_mask, TWO_MASKS, targets=["whale", "a", "heart"]),
        "fill_mask, padded": call(fill_mask, [TWO_MASKS, ONE_MASK], batch_size=2),
        "fill_jointly": call(fill_jointly, TWO_MASKS, ORDERS[0]),
        "score_sentence": call(score_sentence, "Water boils."),
        "trace": traced,
    }
    return by_name[name]


def printed(directory: Path, device: str) -> list[str]:
    """Return what infer.py prints for two texts, which it tries to pad, with all steps."""
    argv = ["infer.py", "--model", str(directory), "--device", device, ONE_MASK, TWO_MASKS]
    with fake_gpu(), patch("sys.argv", argv), redirect_stdout(io.StringIO()) as out:
        infer.main()
    return out.getvalue().splitlines()


# ---- The stand-in itself


def evaluated(code: str) -> Record:
    """Run one expression."""
    with fake_gpu() as gpu:
        c, j = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2])
        names = {"torch": torch, "c": c, "j": j, "x": c.cuda(), "i": j.cuda()}
        record = gpu.begin()
        eval(code, names)
        return record


def error_of(code: str) -> str | None:
    try:
        evaluated(code)
    except (RuntimeError, TypeError) as error:
        return str(error)
    return None
