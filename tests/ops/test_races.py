"""Kernels in CUDA C++ have no races in shared memory: run on a CPU that looks for them.

So are those of test_prompt_norm.py and test_projected.py.
"""

import ctypes
from pathlib import Path
from types import SimpleNamespace

import hopper_on_cpu
import pytest
import torch
from cuda_on_cpu import CXX, Kernel, kernels
from torch import Tensor

from blackmamba.ops import selective_scan
from blackmamba.ops.expert_mlp import hopper
from blackmamba.ops.gpu import cuda
from blackmamba.ops.selective_scan import gpu as scan
from blackmamba.ops.selective_scan import plan

pytestmark = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler")
_SHARED = "extern __shared__ __align__(16) char memory[];\n"
_HEAD = "struct Arguments { int* out; };" + _SHARED
_BETWEEN = {
    "nothing": "",
    "a shuffle": "v = __shfl_xor_sync(0xffffffffu, v, 1);",
    "a barrier of the warp": "__syncwarp();",
    "a barrier of the block": "__syncthreads();",
    "an mbarrier": "arrive(shared.barrier); wait(shared.barrier, 0);",
    "an mbarrier at which a lane arrives": (
        "if (threadIdx.x % 32 == 0) arrive(shared.barrier); wait(shared.barrier, 0);"
    ),
}


class _Out(ctypes.Structure):
    _fields_ = (("out", ctypes.c_void_p),)


def _ran(folder: Path, apart: int, between: str, arrivals: int) -> None:
    """Threads write a number each, and read what the one `apart` from them wrote."""
    source = folder / "exchange.cu"
    source.write_text(
        _HEAD + "struct Shared { int numbers[64]; u64 barrier; };"
        'extern "C" __global__ void grouped_product(const Arguments a) {'
        "    Shared& shared = *reinterpret_cast<Shared*>(memory);"
        f"    if (threadIdx.x == 0) make_barrier(shared.barrier, {arrivals});"
        "    __syncthreads();"
        "    float v = threadIdx.x;"
        "    shared.numbers[threadIdx.x] = threadIdx.x;"
        f"    {between}"
        f"    a.out[threadIdx.x] = shared.numbers[threadIdx.x ^ {apart}] + (v < 0.f);"
        "}"
    )
    sources = (cuda.NUMBERS, cuda.HOPPER, source)
    out = torch.empty(64, dtype=torch.int32)
    kernel = Kernel(sources, "grouped_product", {"TURNED": 0}, folder, races=True)
    kernel.launch(1, 64, _Out(out.data_ptr()), 64 * 4 + 8)
    assert torch.equal(out, torch.arange(64, dtype=torch.int32) ^ apart)


@pytest.mark.parametrize(
    ("between", "apart", "arrivals"),
    [
        ("a barrier of the warp", 1, 64),
        ("a barrier of the block", 32, 64),
        ("an mbarrier", 32, 64),
        ("nothing", 0, 64),
    ],
)
def test_what_orders_accesses(between: str, apart: int, arrivals: int, tmp_path: Path):
    _ran(tmp_path, apart, _BETWEEN[between], arrivals)


@pytest.mark.parametrize(
    ("between", "apart", "arrivals"),
    [
        ("nothing", 1, 64),
        ("a shuffle", 1, 64),
        ("a barrier of the warp", 32, 64),
        ("an mbarrier at which a lane arrives", 1, 2),
    ],
)
def test_a_race_is_told(between: str, apart: int, arrivals: int, tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"a race: thread \d+ (reads|overwrites)"):
        _ran(tmp_path, apart, _BETWEEN[between], arrivals)


def test_a_write_before_another_has_read_is_told(tmp_path: Path):
    even, odd = "v = shared.numbers[threadIdx.x + 1];", "shared.numbers[threadIdx.x] = threadIdx.x;"
    between = f"__syncthreads(); if (threadIdx.x % 2 == 0) {{ {even} }} else {{ {odd} }}"
    with pytest.raises(RuntimeError, match=r"thread \d+ overwrites, unread"):
        _ran(tmp_path, 0, between, 64)


# ---- the kernels -----------------------------------------------------------------------------


@pytest.fixture
def looked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the kernels that were made; the CPU runs them, as a Hopper, and looks for races."""
    names: list[str] = []
    monkeypatch.setattr(cuda, "kernel", kernels(tmp_path, names.append, races=True))
    monkeypatch.setattr(cuda, "runs_on", lambda _: True)
    hopper_on_cpu.take_place(monkeypatch)
    return names


def _scan_inputs(b: int, l: int, d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"x": (b, l, d), "dt": (b, l, d), "B": (b, l, 16), "C": (b, l, 16), "z": (b, l, d)}
    inputs = {k: torch.randn(shape, generator=g).to(dtype) for k, shape in shapes.items()}
    inputs |= {"A": -torch.rand(d, 16, generator=g), "D": torch.randn(d, generator=g)}
    return inputs | {"dt_bias": torch.randn(d, generator=g)}


@pytest.mark.parametrize(
    ("units", "shape"),
    [
        (False, (5, 60, 56)),
        (True, (2, 330, 56)),
        (True, (5, 20, 56)),
        (True, (3, 49, 40)),
        (True, (9, 16, 24)),
    ],
    ids=str,
)
def test_scan_forward(
    units: bool,
    shape: tuple[int, int, int],
    looked_for: list[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """In shares, so that blocks end within rows, or do several."""
    monkeypatch.setattr("blackmamba.ops.gpu.processors", lambda _: 2)
    monkeypatch.setattr(scan, "CUDA_FORWARD", () if units else plan.CUDA_FORWARD[4:5])
    monkeypatch.setattr(scan, "CUDA_FORWARD_UNITS", plan.CUDA_FORWARD_UNITS if units else ())
    inputs = _scan_inputs(*shape, torch.bfloat16)
    seq_idx = torch.arange(shape[1]).expand(shape[0], -1) // 50
    selective_scan(**inputs, dt_softplus=True, seq_idx=seq_idx, backend="triton")  # pyright: ignore
    assert looked_for == ["scan_forward_units" if units else "scan_forward"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_scan_backward(dtype: torch.dtype, looked_for: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("blackmamba.ops.gpu.processors", lambda _: 1)
    leaves = {k: v.requires_grad_() for k, v in _scan_inputs(3, 40, 40, dtype).items()}
    y, _ = selective_scan(**leaves, dt_softplus=True, backend="triton")  # pyright: ignore
    y.float().sum().backward()
    assert "scan_backward" in looked_for


def test_products(looked_for: list[str], monkeypatch: pytest.MonkeyPatch):
    """A block makes several tiles, of a group and of the next one."""
    gpu = SimpleNamespace(multi_processor_count=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    sizes = [130, 0, 65]
    x, ends = torch.randn(sum(sizes), 72).bfloat16(), torch.tensor(sizes).cumsum(0).int()
    hopper.gated(x, torch.randn(3, 272, 72).bfloat16(), ends, False, True)
    order = torch.randperm(len(x)).int()
    hopper.placed(x, torch.randn(3, 136, 72).bfloat16(), ends, order, torch.rand(len(x)))
    hopper.product(x, torch.randn(3, 72, 136).bfloat16(), ends)
    assert looked_for == ["grouped_product"] * 3
