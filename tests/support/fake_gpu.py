"""A stand-in for a GPU: what would make the CPU wait is noted, and mixing devices is an error.

A tensor on cuda:0 is a GpuTensor. It has the device, the autograd keys and the autocast rules of a
GPU's tensor; its numbers lie on the CPU, where every operator is computed. So a step, a checkpoint
and a fill can be compared with those of a CPU. `fake_gpu` turns the stand-in on:

    with fake_gpu() as gpu:
        record = gpu.begin()
        ...  # code with device="cuda"
        print(record.waits, record.copies)

fake_gpu.cpp holds what only C++ can supply. It has to be loaded before torch: `environment` gives
the variables for another process.
"""

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import _foreach_supported_types as OPTIMIZED
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _foreach_supported_types as CLIPPED
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.recorded import Recorded, leaves, mapped

SHIM, LIBRARY = Path(__file__).with_suffix(".cpp"), "libfakegpu.so"
ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "mlm_scratch"
TORCH = Path(torch.__file__).parent
# Between a line of Python and this file, torch guards every mode against torch.compile.
NO_PLACE = (__file__, f"{TORCH}/_compile.py", f"{TORCH}/_dynamo/")
GPU, CPU = torch.device("cuda:0"), torch.device("cpu")

aten = torch.ops.aten
# Operators that return numbers, or tensors whose shape depends on numbers, of a GPU.
WAITS = {
    aten._local_scalar_dense: "item",  # also bool(), int() and float()
    aten.equal: "equal",
    aten.allclose: "allclose",
    aten.nonzero: "nonzero",
    aten.masked_select: "masked_select",
    aten._unique2: "unique",
    aten.unique_dim: "unique",
    aten.unique_consecutive: "unique",
    aten.bincount: "bincount",
}
INDEXING = (
    aten.index,
    aten._unsafe_index,
    aten.index_put,
    aten.index_put_,
    aten._unsafe_index_put,
    aten._index_put_impl_,
)
# The first letters of operators of which not even a tensor of no dimensions may lie on the CPU.
STRICT = ("_foreach_", "_fused_", "_amp_", "stack", "embedding", "gather", "scatter", "index_sel")


def why_not() -> str:
    """Return why there cannot be a stand-in here; "" if there can be one."""
    if sys.platform != "linux":
        return "LD_PRELOAD needs Linux"
    if torch.version.cuda is not None or torch.version.hip is not None:
        return "this build of torch has a GPU backend of its own"
    if not shutil.which("g++"):
        return "there is no g++"
    return ""


def environment(directory: Path) -> dict[str, str]:
    """Compile the shim into `directory`; return the environment of a process that loads it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_dir, library = Path(spec.origin).parent, directory / LIBRARY
    command: list[str | Path] = ["g++", "-std=c++20", "-shared", "-fPIC", SHIM, "-o", library]
    command += [f"-I{torch_dir}/include", f"-L{torch_dir}/lib", f"-Wl,-rpath,{torch_dir}/lib"]
    subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
    return os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}


@dataclass
class Record:
    """What happened between two calls of `FakeGpu.begin`, in order.

    Each event is (kind, place). The place is the innermost line of this project, as "loop.py:52";
    where none is running, that of transformers or torch.
    """

    waits: list[tuple[str, str]] = field(default_factory=list)
    copies: list[tuple[str, str]] = field(default_factory=list)  # to the device


class GpuTensor(Tensor):
    """A tensor on cuda:0; `numbers` is the same on the CPU."""

    numbers: Tensor
    # Operators come to FakeGpu, below autograd: nothing has to be done above it.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, numbers: Tensor) -> "GpuTensor":
        """Make a tensor of the same shape and layout, without memory."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            layout=numbers.layout,
            device=GPU,
        )

    def __init__(self, numbers: Tensor):
        self.numbers = numbers

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GpuTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute what torch asks for while FakeGpu is off: it is, within its own calls."""
        return compute(func, args, kwargs or {})

    # Where two weights share memory is found by these; the wrapper has no memory of its own.

    def data_ptr(self) -> int:
        """Return the address of the numbers."""
        return self.numbers.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return the memory of the numbers."""
        return self.numbers.untyped_storage()

    # Torch refuses the first for a subclass; the second, as for every tensor on a GPU.

    def tolist(self) -> Any:
        """Copy the numbers to the CPU."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Raise TypeError unless `force`."""
        if not force:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return self.detach().cpu().numpy()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the numbers as a tensor on the CPU. torch.save copies them from a GPU, too."""
        return self.detach().cpu().__reduce_ex__(protocol)


class FakeGpu(TorchDispatchMode):
    """Sees every operator below autograd, those that C++ calls included.

    Args:
        answer: what every bool on the GPU reads as; None: what it is.
    """

    def __init__(self, answer: bool | None = None):
        super().__init__()
        self.answer, self.record = answer, Record()
        self.is_capturing = self.is_invalid = False
        self.pinned: dict[int, StorageWeakRef] = {}  # by the address of the memory

    def begin(self) -> Record:
        """Return a new record; whatever happens from now on goes there."""
        self.record = Record()
        return self.record

    def wait(self, kind: str) -> None:
        """Note that the CPU waits for the GPU."""
        self.check_not_capturing()
        self.record.waits.append((kind, place()))

    @contextlib.contextmanager
    def capture(self, graph: Recorded, capture_error_mode: str = "global") -> Iterator[None]:
        """Capture a CUDA graph, as torch.cuda.graph does: what is not permitted makes it fail."""
        self.is_capturing, self.is_invalid = True, False
        try:
            with graph:
                yield
        finally:
            self.is_capturing = False
            if self.is_invalid:
                raise RuntimeError("operation failed due to a previous error during capture")

    def check_not_capturing(self) -> None:
        """Raise RuntimeError if what the CPU would wait for is only being captured."""
        if self.is_capturing:
            self.is_invalid = True
            raise RuntimeError("operation not permitted when stream is capturing")

    def copy(self, source: Tensor, non_blocking: bool) -> None:
        """Note a copy to the GPU. It is asynchronous only if the GPU can read the memory alone."""
        kind = "asynchronous" if non_blocking and self.is_pinned(source) else "blocking"
        if kind == "blocking":
            self.check_not_capturing()
        self.record.copies.append((kind, place()))

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a CPU tensor lies in pinned memory that is still the same memory."""
        reference = self.pinned.get(tensor.untyped_storage().data_ptr())
        return reference is not None and not reference.expired()

    def pin(self, tensor: Tensor) -> Tensor:
        """Remember the memory of a CPU tensor as pinned."""
        storage = tensor.untyped_storage()
        self.pinned[storage.data_ptr()] = StorageWeakRef(storage)
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Check the devices, note what waits, and compute."""
        kwargs = dict(kwargs or {})
        op = func.overloadpacket
        if op is aten.is_pinned:
            return not isinstance(args[0], GpuTensor) and self.is_pinned(args[0])
        if op is aten._pin_memory:
            return self.pin(args[0].clone())
        if kwargs.pop("pin_memory", None):
            return self.pin(compute(func, args, kwargs))
        if op is aten._to_copy:
            self.note_copy(args[0], kwargs.get("device") or args[0].device, kwargs)
        elif op is aten.copy_:
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            self.note_copy(args[1], args[0].device, {"non_blocking": non_blocking}, args[0])
        else:
            check_devices(func, args, kwargs)
            self.note_wait(op, args, kwargs)
        result = compute(func, args, kwargs)
        if op is aten._local_scalar_dense and isinstance(result, bool) and self.answer is not None:
            return self.answer if isinstance(args[0], GpuTensor) else result
        return result

    def note_copy(
        self,
        source: Tensor,
        target: torch.device | str,
        options: dict[str, Any],
        destination: Tensor | None = None,
    ) -> None:
        """Note a copy from one device to the other."""
        non_blocking = bool(options.get("non_blocking"))
        was_on_gpu, will_be = isinstance(source, GpuTensor), torch.device(target).type == "cuda"
        if will_be and not was_on_gpu:
            self.copy(source, non_blocking)
        elif was_on_gpu and not will_be:
            # Without waiting, torch itself pins what it allocates; the reader has to wait later.
            pinned = destination is None or self.is_pinned(destination)
            self.wait("to cpu, unfinished" if non_blocking and pinned else "to cpu")

    def note_wait(self, op: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note a wait within an operator."""
        if not any(isinstance(leaf, GpuTensor) for leaf in leaves((args, kwargs))):
            return
        if op in WAITS:
            self.wait(WAITS[op])
        elif op is aten.repeat_interleave and kwargs.get("output_size") is None:
            self.wait("repeat_interleave")
        elif op in INDEXING:
            self.note_indexing(*args)

    def note_indexing(
        self,
        tensor: Tensor,
        indices: list[Tensor | None],
        values: Tensor | None = None,
        accumulate: bool = False,
        unsafe: bool = False,
    ) -> None:
        """Note what waits when a tensor on the GPU is read or, with `values`, written."""
        given = [index for index in indices if index is not None]
        if not all(isinstance(index, GpuTensor) for index in given):
            self.wait("cpu index")
        masks = [index for index in given if index.dtype in (torch.bool, torch.uint8)]
        one_value = values is not None and values.numel() == 1
        if one_value and not accumulate and len(masks) == len(given):
            return  # torch turns it into masked_fill_
        if any(isinstance(mask, GpuTensor) for mask in masks):
            self.wait("mask index")
        if values is not None and not isinstance(values, GpuTensor):
            self.copy(values, non_blocking=False)


class TensorsFromData(TorchFunctionMode):
    """Moves what Python numbers are made into: there torch allocates behind FakeGpu's back."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make the tensor on the CPU, then copy it: a blocking copy, as on a GPU."""
        kwargs = dict(kwargs or {})
        is_maker = func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
        device = kwargs.get("device")
        if func is Tensor.new_tensor and device is None:
            device = args[0].device
        if not is_maker or device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)
        made = func(*args, **kwargs | {"device": CPU}).to(GPU)
        return made.requires_grad_(requires_grad)


def compute(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Call an operator on the numbers of its arguments; return tensors on the device it names."""
    kwargs = dict(kwargs)
    gpu_tensors = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, GpuTensor)]
    wrappers = {id(tensor.numbers): tensor for tensor in gpu_tensors}
    target = kwargs.get("device")
    if target is not None:
        kwargs["device"] = CPU
    if "non_blocking" in kwargs:
        kwargs["non_blocking"] = False
    to_gpu = bool(wrappers) if target is None else torch.device(target).type == "cuda"
    if func.overloadpacket is aten.copy_:
        to_gpu = isinstance(args[0], GpuTensor)

    def unwrapped(leaf: Any) -> Any:
        return leaf.numbers if isinstance(leaf, GpuTensor) else leaf

    def on_device(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not to_gpu:
            return leaf
        wrapper = wrappers.get(id(leaf))  # of an operator that changes its argument
        if wrapper is not None and wrapper.shape != leaf.shape:
            raise NotImplementedError(f"{func} changes the shape of a tensor in place")
        return GpuTensor(leaf) if wrapper is None else wrapper

    result = func(*mapped(unwrapped, args), **mapped(unwrapped, kwargs))
    return mapped(on_device, result)


def check_devices(func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError, as a GPU does, if an operator gets tensors of both devices.

    A tensor of no dimensions may lie on the CPU, and so may the indices of a tensor on the GPU.
    """
    if not any(isinstance(leaf, GpuTensor) for leaf in leaves((args, kwargs))):
        return
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{func}: expected a generator on cuda, found one on cpu")
    may_index = func.overloadpacket in INDEXING and isinstance(args[0], GpuTensor)
    checked = leaves((args[2:] if may_index else args, kwargs))
    on_cpu = [x for x in checked if isinstance(x, Tensor) and not isinstance(x, GpuTensor)]
    is_strict = func.overloadpacket.__name__.startswith(STRICT)
    changed = [
        value
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    for tensor in on_cpu:
        if is_strict or tensor.dim() > 0 or any(tensor is value for value in changed):
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu, "
                f"the latter of shape {tuple(tensor.shape)}"
            )


def place() -> str:
    """Return the line that runs: the project's innermost one, else that of a library."""
    frames = list(callers(sys._getframe(1)))
    own = next(filter(of_project, frames), None)
    if own is None and (ident := threading.main_thread().ident) is not None:
        # Autograd has a thread for each device: the line is that which called backward.
        own = next(filter(of_project, callers(sys._current_frames()[ident])), None)
    if own is not None:
        return f"{Path(own.f_code.co_filename).relative_to(PROJECT)}:{own.f_lineno}"
    others = (frame for frame in frames if not frame.f_code.co_filename.startswith(NO_PLACE))
    other = next(others, frames[0])
    return f"{other.f_code.co_filename.removeprefix(f'{TORCH.parent}/')}:{other.f_lineno}"


def of_project(frame: FrameType) -> bool:
    """Whether a frame runs a line of mlm_scratch/."""
    return frame.f_code.co_filename.startswith(f"{PROJECT}{os.sep}")


def callers(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame, its caller, and so on."""
    while frame is not None:
        yield frame
        frame = frame.f_back


@contextlib.contextmanager
def fake_gpu(answer: bool | None = None) -> Iterator[FakeGpu]:
    """Let this process have cuda:0. Needs the shim: see `environment`.

    Args:
        answer: what every bool on the GPU reads as; None: what it is.
    """
    assert LIBRARY in os.environ.get("LD_PRELOAD", ""), "see `environment`"
    gpu = FakeGpu(answer)

    def get_rng_state(device: Any = "cuda") -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)  # seed and offset

    def set_rng_state(state: Tensor, device: Any = "cuda") -> None:
        assert state.shape == (16,) and state.dtype == torch.uint8 and state.device == CPU

    generator = SimpleNamespace(clone_state=lambda: None, graphsafe_set_state=lambda state: None)
    replaced: list[tuple[Any, str, Any]] = [
        (torch.cuda, "default_generators", [generator]),
        # A build without CUDA has none of these, or they say that there is no GPU.
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "get_device_name", lambda device=None: "a GPU's stand-in"),
        (torch.cuda, "is_bf16_supported", lambda including_emulation=True: True),
        (torch.cuda, "synchronize", lambda device=None: gpu.wait("synchronize")),
        (torch.cuda, "get_rng_state", get_rng_state),
        (torch.cuda, "set_rng_state", set_rng_state),
        # torch calls it before it makes a tensor on a GPU; here it raises.
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "CUDAGraph", Recorded),
        (torch.cuda, "graph", gpu.capture),
        (torch.cuda, "current_stream", lambda: None),
        (torch.cuda, "set_stream", lambda stream: None),
        # It asks the current stream whether a CUDA graph is being captured; there is no stream.
        (torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None),
    ]
    swap = torch.__future__.get_swap_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in replaced:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        # torch has the fast kernels for lists of tensors of these types only.
        fast: Any
        for fast in (CLIPPED, OPTIMIZED):
            fast.append(GpuTensor)
            stack.callback(fast.remove, GpuTensor)
        # A weight cannot become a GpuTensor in place; swapped, it stays the same object, as on a
        # GPU, so that tied weights stay tied.
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        stack.enter_context(TensorsFromData())
        stack.enter_context(gpu)
        yield gpu
