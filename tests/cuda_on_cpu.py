"""Runs the scan's CUDA C++ kernels on a CPU: their text as C++, each thread of a block a coroutine.

What they have in assembler is replaced by what it means (so that a number which matrix units read
is cut to their 11 bits); a barrier is where coroutines wait for each other. Slow, for tests.
"""

import ctypes
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from blackmamba.ops.gpu.cuda import one_text

_COMES_FIRST = r"""
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __builtin_assume(x)
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
static struct { int x; } threadIdx, blockIdx;
alignas(16) static char memory[1 << 18];

struct Barrier { int arrived = 0, turn = 0; };
static Barrier of_warp[32], of_block;
static int current, n_threads;
static ucontext_t outside;
static std::vector<ucontext_t> threads;
static std::vector<char> done;
static std::vector<std::vector<char>> stacks;
static void wait(Barrier& b, int n) {
    const int turn = b.turn;
    if (++b.arrived == n) { b.arrived = 0, b.turn++; return; }
    while (b.turn == turn) { swapcontext(&threads[current], &outside); threadIdx.x = current; }
}
inline void __syncwarp() { wait(of_warp[current / 32], 32); }
inline void __syncthreads() { wait(of_block, n_threads); }

static float shared_by_warp[1024][6];
inline float __shfl_xor_sync(unsigned, float v, int mask) {
    shared_by_warp[current][0] = v;
    __syncwarp();
    const float other = shared_by_warp[current ^ mask][0];
    __syncwarp();
    return other;
}
inline unsigned __shfl_sync(unsigned, unsigned v, int lane) { return v; }  // one's own
#define __cvta_generic_to_shared(p) ((const char*)(p) - memory)
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
inline unsigned bits(float f) {  // of the nearest bfloat16
    const unsigned u = __float_as_uint(f);
    return (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline float cut(float f) { return __uint_as_float(__float_as_uint(f) & 0xffffe000u); }
inline void by_units(float* d, const float* a, float b0, float b1) {
    float* const mine = shared_by_warp[current];
    for (int j = 0; j < 4; j++) mine[j] = cut(a[j]);
    mine[4] = cut(b0), mine[5] = cut(b1);
    __syncwarp();
    const int first = current / 32 * 32, g = current % 32 / 4, k = current % 4;
    for (int j = 0; j < 4; j++) {
        const int row = g + j / 2 * 8, column = 2 * k + j % 2;
        for (int i = 0; i < 8; i++)
            d[j] += shared_by_warp[first + row % 8 * 4 + i % 4][row / 8 + i / 4 * 2] *
                    shared_by_warp[first + column * 4 + i % 4][4 + i / 4];
    }
    __syncwarp();
}
inline void by_units(float* d, float a0, float a1, float b) {
    const float a[4] = {a0, a1, 0.f, 0.f};
    by_units(d, a, b, 0.f);
}

static unsigned pairs_by_warp[1024][6];
inline float of_pair(unsigned pair, int i) {
    return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
}
inline void pairs_by_units(float* d, const unsigned* a, unsigned b0, unsigned b1) {
    unsigned* const mine = pairs_by_warp[current];
    for (int j = 0; j < 4; j++) mine[j] = a[j];
    mine[4] = b0, mine[5] = b1;
    __syncwarp();
    const int first = current / 32 * 32, g = current % 32 / 4, k = current % 4;
    for (int j = 0; j < 4; j++) {
        const int row = g + j / 2 * 8, column = 2 * k + j % 2;
        for (int i = 0; i < 16; i++) {
            const unsigned* const of_row = pairs_by_warp[first + row % 8 * 4 + i % 8 / 2];
            const unsigned* const of_column = pairs_by_warp[first + column * 4 + i % 8 / 2];
            d[j] += of_pair(of_row[row / 8 + i / 8 * 2], i) * of_pair(of_column[4 + i / 8], i);
        }
    }
    __syncwarp();
}
static const unsigned short* row_of_lane[1024];
inline void transposed(unsigned* r, const void* row) {
    row_of_lane[current] = (const unsigned short*)row;
    __syncwarp();
    const int first = current / 32 * 32, g = current % 32 / 4, k = current % 4;
    for (int i = 0; i < 4; i++) {
        const unsigned short* const* const rows = &row_of_lane[first + 8 * i + 2 * k];
        r[i] = rows[0][g] | rows[1][g] << 16;
    }
    __syncwarp();
}
"""
_COMES_LAST = r"""
static ARGUMENTS given;
static void thread() {
    threadIdx.x = current;
    KERNEL_NAME(given);
    done[current] = 1;
    swapcontext(&threads[current], &outside);
}
extern "C" void run(int blocks, int n, const void* arguments) {
    memcpy((void*)&given, arguments, sizeof given);
    n_threads = n, threads.resize(n), done.resize(n), stacks.resize(n);
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++) {
        memset(memory, 0xff, sizeof memory);  // NaN, until written
        for (int i = 0; i < n; i++) {
            done[i] = 0, stacks[i].resize(1 << 15);
            getcontext(&threads[i]);
            threads[i].uc_stack.ss_sp = stacks[i].data(), threads[i].uc_stack.ss_size = 1 << 15;
            makecontext(&threads[i], thread, 0);
        }
        for (int left = n; left;) {
            left = n;
            for (current = 0; current < n; current++) {
                if (!done[current]) swapcontext(&outside, &threads[current]);
                left -= done[current];
            }
        }
    }
}
"""
_MEANINGS = (
    (r'asm\("ex2[^;]*;" : "=f"\(y\) : "f"\(x\)\);', "y = exp2f(x);"),
    (r'asm\("rcp[^;]*;" : "=f"\(y\) : "f"\(x\)\);', "y = 1.f / x;"),
    (
        r'asm\("cvt\.rn\.bf16x2[^:]*: "=r"\((\S+)\) : "f"\((in\[\d\])\), "f"\((in\[\d\])\)\);',
        r"\1 = bits(\2) << 16 | bits(\3);",
    ),
    (r'asm\("(\{\.reg \.b16|cvt\.rn\.f16x2)[^;]*;.*?\)\);', "abort();"),  # no float16 here
    (r'asm\("mad\.wide[^;]*;" : [^;]*;', "to = (T*)((char*)from + (i64)count * bytes);"),
    (r'asm volatile\("" : "\+[rl]"\(\w+\)\);', ""),
    (r'asm\("mma\.sync\.aligned\.m16n8k8.*?\)\)\);', "by_units(d, a, b0, b1);"),
    (r'asm\("mma\.sync\.aligned\.m16n8k4.*?\)\)\);', "by_units(d, a0, a1, b);"),
    (r'asm\("mma\.sync\.aligned\.m16n8k16.*?\(b1\)\);', "pairs_by_units(d, a, b0, b1);"),
    (r'asm volatile\("ld\.shared.*?: "memory"\);', "memcpy(&v, memory + from, sizeof v);"),
    (r'asm volatile\("st\.shared.*?: "memory"\);',
     "*(float4*)(memory + to) = make_float4(a, b, c, d);"),
    (r'asm volatile\("\{\.reg \.pred p; setp.*?: "memory"\);',
     "if (condition) *(float2*)(memory + to) = make_float2(a, b);"),
    (r'asm volatile\("ldmatrix.*?: "memory"\);', "transposed(r, memory + row);"),
    (r'const u32 address = [^;]*;\s*asm volatile\("cp\.async\.cg.*?: "memory"\);',
     "memcpy(to, from, 16);"),
    (r'const u32 address = [^;]*;\s*(constexpr int bytes[^;]*;\s*static_assert[^;]*;)\s*'
     r'asm volatile\("cp\.async\.ca.*?: "memory"\);',
     r"\1 if (inside) memcpy(to, from, bytes); else memset(to, 0, bytes);"),
    (r'asm volatile\("cp\.async\.wait_all;" ::: "memory"\);', ""),
    (r"extern __shared__ __align__\(16\) char memory\[\];", ""),
)  # fmt: skip
_ARGUMENTS = {"scan_forward": "Forward"}


class Kernel:
    """Takes the place of `blackmamba.ops.gpu.cuda.Kernel`."""

    def __init__(
        self,
        sources: Sequence[Path],
        name: str,
        defines: Mapping[str, int],
        folder: Path,
        cxx: str,
    ):
        text = one_text(sources)
        for pattern, meaning in _MEANINGS:
            text = re.sub(pattern, meaning, text, flags=re.S)
        assert "asm" not in text, "something has no meaning"
        last = _COMES_LAST.replace("KERNEL_NAME", name)
        last = last.replace("ARGUMENTS", _ARGUMENTS.get(name, "Backward"))
        number = len(list(folder.glob("*.cpp")))
        code, library = folder / f"{number}.cpp", folder / f"{number}.so"
        code.write_text(_COMES_FIRST + text + last)
        flags = [f"-D{key}={value}" for key, value in defines.items()]
        command = [cxx, "-O0", "-std=c++17", "-w", "-shared", "-fPIC", *flags, "-o", library, code]
        subprocess.run(command, check=True)
        self._run = ctypes.CDLL(str(library)).run

    def launch(
        self, blocks: int, threads: int, arguments: ctypes.Structure, shared_bytes: int = 0
    ) -> None:
        """Run it to its end."""
        self._run(blocks, threads, ctypes.byref(arguments))
