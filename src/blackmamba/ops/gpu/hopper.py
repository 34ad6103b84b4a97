"""What launches of kernels need that are for NVIDIA's Hopper (9.0) alone; hopper.cu is theirs."""

import ctypes
import functools

import torch

COLUMNS = 64
"""Numbers of a row of what is copied at once: 128 bytes of bfloat16."""


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the device is one."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) == (9, 0)
    )


class TensorMap(ctypes.Structure):
    """How TMA finds its way in a matrix, as the CUDA driver writes it."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


@functools.lru_cache(1024)
def tensor_map(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...], box: int
) -> TensorMap:
    """How TMA reads boxes of `box` rows and `COLUMNS` columns of a bfloat16 matrix, or of one of
    several: the CUDA driver's `cuTensorMapEncodeTiled`.

    Args:
        address: of the first number.
        shape: ([matrices,] rows, columns).
        strides: how many numbers apart matrices and rows are; columns lie side by side.
        box: rows of one.
    """
    rank = len(shape)
    bytes_apart = [2 * stride for stride in reversed(strides)]
    memory = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + 64)
    aligned = -(-ctypes.addressof(memory) // 64) * 64
    u32, u64 = ctypes.c_uint32, ctypes.c_uint64
    bfloat16, not_interleaved, swizzle_128, promote_128, zeros = 9, 0, 3, 2, 0
    code = ctypes.CDLL("libcuda.so.1").cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned), bfloat16, u32(rank), ctypes.c_void_p(address),
        (u64 * rank)(*reversed(shape)), (u64 * (rank - 1))(*bytes_apart),
        (u32 * rank)(COLUMNS, box, *[1] * (rank - 2)), (u32 * rank)(*[1] * rank),
        not_interleaved, swizzle_128, promote_128, zeros,
    )  # fmt: skip
    if code != 0:
        raise RuntimeError(
            f"CUDA error {code}: no tensor map of {tuple(shape)} numbers at {address:#x}"
        )
    return TensorMap.from_buffer_copy(ctypes.string_at(aligned, ctypes.sizeof(TensorMap)))
