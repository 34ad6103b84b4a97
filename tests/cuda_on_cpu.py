"""Runs CUDA C++ kernels on a CPU: their text as C++, each thread of a block a coroutine.

What they have in assembler is replaced by what it means (so that a number which matrix units read
is cut to their 11 bits); a barrier is where coroutines wait for each other, and when all do, for
what never comes, the launch fails. Blocks run one after the other. Slow, for tests.

What Hopper has alone is in hopper_on_cpu.py.
"""

import ctypes
import functools
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import hopper_on_cpu
import races_on_cpu

from blackmamba.ops.gpu.cuda import one_text

CXX = shutil.which("c++") or shutil.which("g++")
_COMES_FIRST = r"""
#include <cmath>
#include <csetjmp>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __builtin_assume(x)
#define __grid_constant__
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }
static struct { int x; } threadIdx, blockIdx, gridDim;
inline void copy(void* to, const void* from, unsigned long n) {
    race_access(from, n, false), race_access(to, n, true);
    __builtin_memcpy(to, from, n);
}
#define memcpy copy

// Shared memory. Its first address is not 0, so that a kernel has to align by itself.
alignas(16) static char memory[1 << 18];
static const unsigned first_address = 16;
#define __cvta_generic_to_shared(p) (first_address + ((const char*)(p) - memory))
#define __cvta_shared_to_generic(address) ((void*)at_address(address))
inline char* at_address(unsigned address) { return memory + address - first_address; }

// Threads. Each but the first switch to one is a longjmp, as swapcontext asks the system each time.
static const int stack_bytes = 1 << 15;
struct Thread {
    ucontext_t first;
    jmp_buf at;
    bool begun, done;
    const char* waits_for;  // with two numbers in it
    unsigned values[2];
};
static Thread threads[1024];
alignas(64) static char stacks[1024][stack_bytes];
static jmp_buf outside;
static int current, n_threads, moves;  // `moves` counts what waiting threads cannot do
static int acts_for = -1;  // whose accesses to memory are made now, if not the current thread's
extern "C" __attribute__((no_sanitize_thread)) int race_thread() {
    return acts_for < 0 ? current : acts_for;
}
static char trouble[1024];
static void leave() { if (!_setjmp(threads[current].at)) _longjmp(outside, 1); }
static void fail(const char* text, ...) {
    va_list values;
    va_start(values, text);
    const int length = snprintf(trouble, sizeof trouble, "thread %d: ", current);
    vsnprintf(trouble + length, sizeof trouble - length, text, values);
    va_end(values);
    leave();
}
template <typename Condition>
void wait_until(const Condition& holds, const char* what, unsigned a, unsigned b = 0) {
    moves++;
    Thread& thread = threads[current];
    thread.waits_for = what, thread.values[0] = a, thread.values[1] = b;
    while (!holds()) leave();
    moves++;
}

struct Barrier { int arrived = 0, turn = 0; };
static Barrier of_warp[32], of_block[16];  // number 0 is __syncthreads
// Whether it is the last that comes, which goes on at once.
static bool wait(Barrier& b, int n, const char* what) {
    const int turn = b.turn;
    if (++b.arrived == n) { b.arrived = 0, b.turn++, moves++; return true; }
    wait_until([&] { return b.turn != turn; }, what, n);
    return false;
}
// The same, and what was done to memory is done, for all.
static void order(Barrier& b, int n, const char* what) {
    race_arrive(current, &b);
    if (b.arrived == n - 1) race_all_arrived(&b);
    wait(b, n, what);
    race_go_on(current, &b);
}
inline void meet() { wait(of_warp[current / 32], 32, "its warp"); }
inline void __syncwarp() { order(of_warp[current / 32], 32, "its warp"); }
inline void __syncthreads() { order(of_block[0], n_threads, "all %d threads"); }

// What threads pass on in a turn is read before the next turn but one.
static unsigned passed_on[2][1024], turns[1024];
template <typename T> T __shfl_xor_sync(unsigned, T v, int mask) {
    unsigned* const values = passed_on[turns[current]++ % 2];
    memcpy(&values[current], &v, 4);
    meet();
    memcpy(&v, &values[current ^ mask], 4);
    return v;
}
template <typename T> T __shfl_sync(unsigned, T v, int lane) {
    unsigned* const values = passed_on[turns[current]++ % 2];
    memcpy(&values[current], &v, 4);
    meet();
    memcpy(&v, &values[current / 32 * 32 + lane], 4);
    return v;
}
inline unsigned __ballot_sync(unsigned, bool holds) {
    unsigned* const values = passed_on[turns[current]++ % 2];
    values[current] = holds;
    meet();
    unsigned those = 0;
    for (int lane = 0; lane < 32; lane++) those |= values[current / 32 * 32 + lane] << lane;
    return those;
}
inline int __popc(unsigned those) { return __builtin_popcount(those); }
inline void __threadfence() {}
inline int atomicAdd(int* to, int n) { return (*to += n) - n; }
static float shared_by_warp[1024][6];
inline unsigned bits(float f) {  // of the nearest bfloat16
    const unsigned u = __float_as_uint(f);
    return f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline float cut(float f) { return __uint_as_float(__float_as_uint(f) & 0xffffe000u); }
inline void by_units(float* d, const float* a, float b0, float b1) {
    float* const mine = shared_by_warp[current];
    for (int j = 0; j < 4; j++) mine[j] = cut(a[j]);
    mine[4] = cut(b0), mine[5] = cut(b1);
    meet();
    const int first = current / 32 * 32, g = current % 32 / 4, k = current % 4;
    for (int j = 0; j < 4; j++) {
        const int row = g + j / 2 * 8, column = 2 * k + j % 2;
        for (int i = 0; i < 8; i++)
            d[j] += shared_by_warp[first + row % 8 * 4 + i % 4][row / 8 + i / 4 * 2] *
                    shared_by_warp[first + column * 4 + i % 4][4 + i / 4];
    }
    meet();
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
    meet();
    const int first = current / 32 * 32, g = current % 32 / 4, k = current % 4;
    for (int j = 0; j < 4; j++) {
        const int row = g + j / 2 * 8, column = 2 * k + j % 2;
        for (int i = 0; i < 16; i++) {
            const unsigned* const of_row = pairs_by_warp[first + row % 8 * 4 + i % 8 / 2];
            const unsigned* const of_column = pairs_by_warp[first + column * 4 + i % 8 / 2];
            d[j] += of_pair(of_row[row / 8 + i / 8 * 2], i) * of_pair(of_column[4 + i / 8], i);
        }
    }
    meet();
}
// Four 8 x 8 matrices of 16 bits, of which thread 8 i + j knows where row j of the i-th is.
static unsigned rows_by_warp[1024];
static char* of_matrix(int i) {
    const int first = current / 32 * 32, g = current % 32 / 4, k = current % 4;
    return at_address(rows_by_warp[first + i * 8 + g] + k * 4);
}
inline void know_row(unsigned address) {
    if (address % 16) fail("a row at %u, not at a multiple of 16 bytes", address);
    rows_by_warp[current] = address;
    meet();
}
inline void matrices_from(unsigned* v, unsigned address) {
    know_row(address);
    for (int i = 0; i < 4; i++) memcpy(v + i, of_matrix(i), 4);
    meet();
}
inline void matrices_to(unsigned address, const unsigned* v) {
    know_row(address);
    for (int i = 0; i < 4; i++) memcpy(of_matrix(i), v + i, 4);
    meet();
}
// A says which numbers of B are taken; one that is infinite or NaN as float16 makes all of its
// column NaN.
inline void halves_by_units(unsigned* d, const unsigned* a, unsigned b0, unsigned b1) {
    unsigned* const mine = pairs_by_warp[current];
    for (int j = 0; j < 4; j++) mine[j] = a[j];
    mine[4] = b0, mine[5] = b1;
    meet();
    const int first = current / 32 * 32, g = current % 32 / 4, k = current % 4;
    for (int j = 0; j < 4; j++) {
        const int row = g + j / 2 * 8, column = 2 * k + j % 2;
        unsigned taken = 0, number = 0;
        for (int i = 0; i < 16; i++) {
            const unsigned* const of_row = pairs_by_warp[first + row % 8 * 4 + i % 8 / 2];
            const unsigned* const of_column = pairs_by_warp[first + column * 4 + i % 8 / 2];
            const unsigned one = of_row[row / 8 + i / 8 * 2] >> 16 * (i % 2) & 0xffff;
            const unsigned from = of_column[4 + i / 8] >> 16 * (i % 2) & 0xffff;
            if (one == 0x3c00) number |= from, taken++;
            else if (one) fail("neither 0 nor 1: %d", one);
            if ((from & 0x7c00) == 0x7c00) number |= 0x7fff;
        }
        if (taken != 1) fail("%d numbers would be added", taken);
        d[j / 2] = j % 2 ? d[j / 2] & 0xffff | number << 16 : number;
    }
    meet();
}
"""
_COMES_LAST = r"""
static ARGUMENTS given;
static void thread() {
    KERNEL_NAME(given);
    threads[current].done = true, moves++;
    leave();
}
static void tell_who_waits() {
    int length = snprintf(trouble, sizeof trouble, "deadlock in block %d", blockIdx.x);
    char before[100] = "", what[100];
    for (int i = 0; i < n_threads && length < sizeof trouble; i++) {
        const Thread& thread = threads[i];
        snprintf(what, sizeof what, thread.done ? "nothing more" : thread.waits_for,
                 thread.values[0], thread.values[1]);
        if (strcmp(what, before))
            length += snprintf(trouble + length, sizeof trouble - length,
                               "; from thread %d on they wait for %s", i, what);
        strcpy(before, what);
    }
}
static void go_on(Thread& thread) {
    if (_setjmp(outside)) return;
    threadIdx.x = current;
    if (thread.begun) _longjmp(thread.at, 1);
    thread.begun = true, setcontext(&thread.first);
}
static void run_block(int shared_bytes) {
    memset(memory, 0xff, sizeof memory);  // NaN, until written
    memset(stacks, 0xff, n_threads * sizeof *stacks);  // what registers are in
    for (Barrier& b : of_warp) b = {};
    for (Barrier& b : of_block) b = {};
    memset(queues, 0, sizeof queues);
    for (int i = 0; i < n_threads; i++) {
        threads[i] = Thread();
        getcontext(&threads[i].first);
        threads[i].first.uc_stack.ss_sp = stacks[i];
        threads[i].first.uc_stack.ss_size = stack_bytes;
        makecontext(&threads[i].first, thread, 0);
    }
    acts_for = -1;  // where a launch before has failed
    race_begin(memory, sizeof memory, n_threads);
    unsigned random = blockIdx.x;
    int held_back = -1;  // a warp, or none
    for (int left = n_threads; left;) {
        left = n_threads, moves = 0;
        for (current = 0; current < n_threads; current++) {
            if (!threads[current].done && current / 32 != held_back) go_on(threads[current]);
            if (*trouble) return;
            left -= threads[current].done;
        }
        if (left && !moves && held_back < 0) return tell_who_waits();
        random = random * 1664525 + 1013904223;
        if (!moves) held_back = -1;
        else if (SOME_WAIT && held_back < 0) held_back = random % 0x10000 * (n_threads / 32) >> 16;
    }
    if (const char* what = race_end()) snprintf(trouble, sizeof trouble, "%s", what);
    if (const char* what = not_ended()) snprintf(trouble, sizeof trouble, "%s", what);
    for (int i = shared_bytes; i < sizeof memory; i++)
        if (memory[i] != -1)
            snprintf(trouble, sizeof trouble, "byte %d of shared memory was written", i);
}
// What went wrong, or nothing.
extern "C" const char* run(int blocks, int n, const void* arguments, int bytes, int shared_bytes) {
    if (bytes != sizeof given) return "the arguments have another size";
    memcpy((void*)&given, arguments, sizeof given);
    n_threads = n, gridDim.x = blocks, *trouble = 0;
    for (blockIdx.x = 0; blockIdx.x < blocks && !*trouble; blockIdx.x++) run_block(shared_bytes);
    return *trouble ? trouble : nullptr;
}
"""
_MEANINGS = (
    (r'asm\("ex2[^;]*;" : "=f"\(y\) : "f"\(x\)\);', "y = exp2f(x);"),
    (r'asm\("rcp[^;]*;" : "=f"\(y\) : "f"\(x\)\);', "y = 1.f / x;"),
    (
        r'asm\("cvt\.rn\.bf16x2[^:]*: "=r"\((\S+)\) : "f"\((\S+)\), "f"\((\S+)\)\);',
        r"\1 = bits(\2) << 16 | bits(\3);",
    ),
    (r'asm\("(\{\.reg \.b16|cvt\.rn\.f16x2)[^;]*;.*?\)\);', "abort();"),  # no float16 here
    (r'asm\("mad\.wide[^;]*;" : [^;]*;', "to = (T*)((char*)from + (i64)count * bytes);"),
    (r'asm volatile\("" : "\+[rl]"\(\w+\)\);', ""),
    (r'asm\("mma\.sync\.aligned\.m16n8k8.*?\)\)\);', "by_units(d, a, b0, b1);"),
    (r'asm\("mma\.sync\.aligned\.m16n8k4.*?\)\)\);', "by_units(d, a0, a1, b);"),
    (r'asm\("mma\.sync\.aligned\.m16n8k16\.row\.col\.f16.*?\(0\)\);',
     "halves_by_units(d, a, b0, b1);"),
    (r'asm\("mma\.sync\.aligned\.m16n8k16.*?\(b1\)\);', "pairs_by_units(d, a, b0, b1);"),
    (r'asm volatile\("ld\.shared.*?: "memory"\);', "memcpy(&v, at_address(from), sizeof v);"),
    (r'asm volatile\("st\.shared\.f32.*?: "memory"\);', "*(float*)at_address(to) = a;"),
    (r'asm volatile\("st\.shared\.v2\.f32.*?: "memory"\);',
     "*(float2*)at_address(to) = make_float2(a, b);"),
    (r'asm volatile\("st\.shared.*?: "memory"\);',
     "*(float4*)at_address(to) = make_float4(a, b, c, d);"),
    (r'asm volatile\("\{\.reg \.pred p; setp[^"]*cp\.async.*?: "memory"\);',
     "if (condition) memcpy(at_address(to), from, 16);"),
    (r'asm volatile\("\{\.reg \.pred p; setp.*?: "memory"\);',
     "if (condition) memcpy(at_address(to), v, 16);"),
    (r'asm volatile\("ldmatrix[^;]*;".*?: "memory"\);', "matrices_from(v, row);"),
    (r'asm volatile\("stmatrix[^;]*;".*?: "memory"\);', "matrices_to(row, v);"),
    (r'const u32 address = [^;]*;\s*asm volatile\("cp\.async\.cg.*?: "memory"\);',
     "memcpy(to, from, 16);"),
    (r'asm volatile\("cp\.async\.cg[^"]*%2;" ::"r"\(to\).*?: "memory"\);',
     "if (bytes) memcpy(at_address(to), from, 16); else memset(at_address(to), 0, 16);"),
    (r'asm volatile\("cp\.async\.cg[^"]*" ::"r"\(to\).*?: "memory"\);',
     "memcpy(at_address(to), from, 16);"),
    (r'asm volatile\("cp\.async\.ca[^"]*%3;".*?: "memory"\);',
     "if (condition) memcpy(at_address(to), from, bytes); else memset(at_address(to), 0, bytes);"),
    (r'asm volatile\("cp\.async\.ca[^"]*".*?: "memory"\);',
     "memcpy(at_address(to), from, sizeof(T));"),
    (r'asm volatile\("cp\.async\.(wait_all|commit_group|wait_group)[^"]*" ::.*?"memory"\);', ""),
    (r'asm volatile\("st\.release\.gpu.*?: "memory"\);', "*there = 1;"),
    (r'while \(v == 0\) asm volatile\("ld\.acquire\.gpu.*?: "memory"\);',
     'if (!*there) fail("what is waited for was not handed over");'),
    (r'asm volatile\("mbarrier\.init[^"]*" ::"n"\(barrier\).*?: "memory"\);',
     "make_arrivals(first_address + barrier, arrivals);"),
    (r'asm volatile\("(cp\.async\.)?mbarrier\.arrive[^"]*" ::"n"\(barrier\) : "memory"\);',
     "arrive_at(first_address + barrier);"),
    (r'asm volatile\(\s*"\{\\n\.reg \.pred done;(?:(?!asm).)*?"n"\(barrier\), "r"\(parity\)'
     r' : "memory"\);',
     "wait_for_phase(first_address + barrier, parity);"),
    (r'asm volatile\("red\.global\.add\.v4\.f32.*?: "memory"\);',
     'if ((unsigned long long)to % 16) fail("16 bytes at %p", to);'
     "to[0] += a, to[1] += b, to[2] += c, to[3] += d;"),
    (r'asm volatile\("griddepcontrol\.[^"]*" ::: "memory"\);', ""),
    (r"extern __shared__ (__align__\(16\) )?char memory\[\];", ""),
)  # fmt: skip
_ARGUMENTS = {
    "scan_forward": "Forward",
    "scan_forward_units": "Forward",
    "grouped_product": "Arguments",
    "norm_and_choice": "Arguments",
    "few_product": "Arguments",
    "projected": "Arguments",
}


class Kernel:
    """Takes the place of `blackmamba.ops.gpu.cuda.Kernel`."""

    def __init__(
        self,
        sources: Sequence[Path],
        name: str,
        defines: Mapping[str, int],
        folder: Path,
        races: bool = False,
    ):
        assert CXX is not None
        text = one_text(sources)
        for pattern, meaning in (*_MEANINGS, *hopper_on_cpu.MEANINGS):
            text = re.sub(pattern, meaning, text, flags=re.S)
        assert "asm" not in text, "something has no meaning"
        last = _COMES_LAST.replace("KERNEL_NAME", name)
        last = last.replace("ARGUMENTS", _ARGUMENTS.get(name, "Backward"))
        number = len(list(folder.glob("*.cpp")))
        code, library = folder / f"{number}.cpp", folder / f"{number}.so"
        first = races_on_cpu.DECLARATIONS + _COMES_FIRST + hopper_on_cpu.COMES_FIRST
        code.write_text(first + text + last)
        flags = [f"-D{key}={value}" for key, value in defines.items()]
        command = [
            CXX,
            "-O1",
            "-U_FORTIFY_SOURCE",  # it would take a change of threads for a broken stack
            "-fno-strict-aliasing",
            "-std=c++17",
            "-w",
            "-Wno-psabi",
            "-fPIC",
        ]
        if races:  # linked without the library that would look for them
            binary = code.with_suffix(".o")
            looked_for = [*races_on_cpu.FLAGS, "-c", "-o", binary, code]
            subprocess.run([*command, *flags, *looked_for], check=True)
            linked = [binary, races_on_cpu.compiled(folder, CXX)]
            subprocess.run([CXX, "-shared", "-o", library, *linked], check=True)
        else:
            subprocess.run([*command, *flags, "-shared", "-o", library, code], check=True)
        self._name = name
        self._run = ctypes.CDLL(str(library)).run
        self._run.restype = ctypes.c_char_p

    def launch(
        self,
        blocks: int,
        threads: int,
        arguments: ctypes.Structure,
        shared_bytes: int = 0,
        overlap: bool = False,
    ) -> None:
        """Run it to its end."""
        assert not overlap
        bytes_ = ctypes.sizeof(arguments)
        trouble = self._run(blocks, threads, ctypes.byref(arguments), bytes_, shared_bytes)
        if trouble is not None:
            raise RuntimeError(f"{self._name}: {trouble.decode()}")


def kernels(
    folder: Path, made: Callable[[str], object] = str, races: bool = False
) -> Callable[..., Kernel]:
    """Takes the place of `blackmamba.ops.gpu.cuda.kernel`; `made` is told the name of each, a race
    in shared memory fails the launch if `races`."""

    @functools.cache
    def kernel(
        sources: tuple[Path, ...], name: str, defines: tuple[tuple[str, int], ...]
    ) -> Kernel:
        made(name)
        return Kernel(sources, name, dict(defines), folder, races)

    return lambda sources, name, defines, *_: kernel(sources, name, defines)
