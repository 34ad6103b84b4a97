"""CUDA C++ kernels, compiled when they are first run by the NVRTC that comes with PyTorch.

Machine code is kept on disk, as Triton keeps its own, so that the next process need not compile.
For the few kernels that Triton cannot make fast: they need no compiler on the machine and no
header, and each has its counterpart in Triton, which runs where this does not.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.cuda import _utils  # pyright: ignore[reportPrivateUsage]

from blackmamba.files import atomic_file

NUMBERS = Path(__file__).with_name("numbers.cu")
HOPPER = Path(__file__).with_name("hopper.cu")
"""What other files of a kernel may stand on, the second on the first."""
_MOST_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_USUAL_SHARED_BYTES = 48 * 1024  # that a block may have without being asked


def runs_on(tensor: Tensor) -> bool:
    """Whether the tensor is on an NVIDIA GPU that knows bfloat16."""
    return (
        tensor.device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(tensor.device) >= (8, 0)
    )


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint64), ("value", ctypes.c_int), ("unused", ctypes.c_int * 15))


class _Config(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint) for name in (
            "blocks", "blocks_y", "blocks_z", "threads", "threads_y", "threads_z", "shared_bytes",
        )), ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )  # fmt: skip


class Kernel:
    """One kernel.

    Args:
        sources: files that are compiled as one text, in this order; the kernel is extern "C".
        name: of the kernel.
        defines: macros that it is compiled with.
        device: index of the GPU.
        exact: whether it needs what this generation of GPUs has alone.
    """

    def __init__(
        self,
        sources: Sequence[Path],
        name: str,
        defines: Mapping[str, int],
        device: int,
        exact: bool = False,
    ):
        architecture = _architecture(device) + "a" * exact
        binary = _compile(tuple(sources), tuple(sorted(defines.items())), architecture)
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._function = ctypes.c_void_p()
        module = ctypes.c_void_p()
        with torch.cuda.device(device):
            self._check(self._driver.cuModuleLoadData(ctypes.byref(module), binary))
            self._check(
                self._driver.cuModuleGetFunction(
                    ctypes.byref(self._function), module, name.encode()
                )
            )
        self._device = device
        self._shared_bytes = _USUAL_SHARED_BYTES

    def launch(
        self,
        blocks: int,
        threads: int,
        arguments: ctypes.Structure,
        shared_bytes: int = 0,
        overlap: bool = False,
    ) -> None:
        """Queue the kernel, which takes one struct, on the current stream.

        Args:
            overlap: it may begin when all blocks of the kernel ahead have let it or ended, and
                waits by itself for what that one writes; from Hopper on.
        """
        if shared_bytes > self._shared_bytes:
            self._check(self._driver.cuFuncSetAttribute(self._function, _MOST_SHARED, shared_bytes))
            self._shared_bytes = shared_bytes
        pointer = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        attribute = _Attribute(_SERIALIZATION, 1)
        config = _Config(
            blocks, 1, 1, threads, 1, 1, shared_bytes, stream, ctypes.pointer(attribute), overlap
        )
        self._check(
            self._driver.cuLaunchKernelEx(ctypes.byref(config), self._function, pointer, None)
        )

    def _check(self, result: int) -> None:
        if result != 0:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(result, ctypes.byref(text))
            raise RuntimeError(f"CUDA error {result}: {(text.value or b'unknown').decode()}")


@functools.cache
def kernel(
    sources: tuple[Path, ...],
    name: str,
    defines: tuple[tuple[str, int], ...],
    device: int,
    exact: bool = False,
) -> Kernel:
    """The kernel, compiled and loaded once in a process."""
    return Kernel(sources, name, dict(defines), device, exact)


def _architecture(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def _compile(
    sources: tuple[Path, ...], defines: tuple[tuple[str, int], ...], architecture: str
) -> bytes:
    """The sources as machine code, from disk if they were compiled before."""
    options = [f"--gpu-architecture={architecture}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in defines]
    text = one_text(sources).encode()
    what = "\0".join([torch.__version__, torch.version.cuda or "", *options]).encode() + text
    kept = kept_kernels() / f"{hashlib.sha256(what).hexdigest()}.cubin"
    with contextlib.suppress(OSError):
        return kept.read_bytes()
    binary = _compiled(sources[-1].name, text, options)
    with contextlib.suppress(OSError), atomic_file(kept) as temporary:  # a full or read-only disk
        temporary.write_bytes(binary)
    return binary


def one_text(sources: Sequence[Path]) -> str:
    """The files one after another; a compiler names each where it complains."""
    return "".join(f'#line 1 "{source.name}"\n{source.read_text()}' for source in sources)


def kept_kernels() -> Path:
    """The folder of machine code; it may be removed at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blackmamba" / "cuda"


def _compiled(name: str, text: bytes, options: Sequence[str]) -> bytes:
    library = _utils._get_nvrtc_library()  # pyright: ignore[reportPrivateUsage]
    program = ctypes.c_void_p()
    code = library.nvrtcCreateProgram(ctypes.byref(program), text, name.encode(), 0, None, None)
    if code == 0:
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        code = library.nvrtcCompileProgram(program, len(options), encoded)
    size = ctypes.c_size_t()
    if code != 0:
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{name} does not compile:\n{log.value.decode()}")
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    binary = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, binary)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return binary.raw
