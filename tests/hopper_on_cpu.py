"""What NVIDIA's Hopper alone has, on a CPU: barriers that count bytes, TMA, products by warpgroups.

Boxes come as soon as they are asked for. Products are made when they are waited for, and what they
read has to be the same then as when they were begun: all of it was there, and nobody wrote to it.
"""

import ctypes
import functools
from types import SimpleNamespace
from typing import Any

import pytest

from blackmamba.ops.gpu import hopper

COMES_FIRST = r"""
typedef unsigned long long u64;
// ---- mbarriers: a phase ends when all have arrived and all bytes have come
struct Arrivals {
    int bytes;
    unsigned expected : 11, missing : 11, phase : 1, mark : 8;
};
static Arrivals& arrivals_at(unsigned address) {
    Arrivals& b = *(Arrivals*)at_address(address);
    if (b.mark != 0x5a) fail("no barrier was made at %u", address);
    return b;
}
static void end_phase(Arrivals& b) {
    if (!b.missing && !b.bytes) b.missing = b.expected, b.phase ^= 1, race_all_arrived(&b);
    moves++;
}
static void make_arrivals(unsigned address, int expected) {
    const auto n = (unsigned)expected;
    race_barrier_at(at_address(address), 8);
    *(Arrivals*)at_address(address) = {0, n, n, 0, 0x5a};
}
static void arrive_at(unsigned address, int bytes = 0) {
    Arrivals& b = arrivals_at(address);
    if (!b.missing) fail("more than %d arrive at the barrier at %u", b.expected, address);
    race_arrive(current, &b);
    b.bytes += bytes, b.missing--;
    end_phase(b);
}
static void wait_for_phase(unsigned address, unsigned parity) {
    const Arrivals& b = arrivals_at(address);
    if (parity > 1) fail("parity %u", parity);
    wait_until([&] { return b.phase != parity; }, "phase %u of the barrier at %u", parity, address);
    race_go_on(current, &b);
}

// Counts from 0 to the most, and returns what it was.
static unsigned count(unsigned& n, unsigned most) {
    race_barrier_at(&n, 4);
    race_arrive(current, &n), race_all_arrived(&n), race_go_on(current, &n);
    const unsigned before = n;
    n = n == most ? 0 : n + 1;
    return before;
}

// ---- TMA
// Shared memory's pieces of 16 bytes, of which 8 are a row, change places with the row.
inline unsigned swizzled(unsigned address) { return address ^ (address >> 7 & 7) << 4; }
static void fetch_box(
    unsigned to, const u64* map, int rank, int column, int row, int group, unsigned barrier) {
    const char* const matrix = (const char*)map[0] + (long long)(group * map[7]);
    const long long columns = map[1], rows = map[2], stride = map[3], wide = map[4], high = map[5];
    if (map[6] != 0x50414d) fail("no tensor map");
    if (map[8] != rank || group < 0 || group >= map[9]) fail("matrix %d of a map", group);
    if (to % 128) fail("a box at %u, not at a multiple of 128 bytes", to);
    for (int i = 0; i < high; i++)
        for (int j = 0; j < wide; j++) {
            const long long at = row + i, of = column + j;
            unsigned short v = 0;
            if (at >= 0 && at < rows && of >= 0 && of < columns)
                memcpy(&v, matrix + at * stride + of * 2, 2);
            memcpy(at_address(swizzled(to + (i * wide + j) * 2)), &v, 2);
        }
    Arrivals& b = arrivals_at(barrier);
    race_arrive(current, &b);
    b.bytes -= wide * high * 2;
    end_phase(b);
}

// Back from there, when it is waited for: until then it has to stay the same.
struct Sent {
    unsigned from, hash;
    const u64* map;
    int column, row, group;
};
static Sent sent[1024][8];
static int n_sent[1024];
static unsigned hash_of_box(const Sent& s) {
    unsigned hash = 0;
    const char* const at = at_address(s.from);
    for (int i = 0; i < s.map[5] * s.map[4] * 2; i++)
        hash = hash * 0x01000193 + (unsigned char)at[i];
    return hash;
}
static void send_box(unsigned from, const u64* map, int column, int row, int group) {
    if (map[6] != 0x50414d) fail("no tensor map");
    if (map[8] != 3 || group < 0 || group >= map[9]) fail("matrix %d of a map", group);
    if (from % 128) fail("a box at %u, not at a multiple of 128 bytes", from);
    if (n_sent[current] == 8) fail("8 boxes that none waits for");
    Sent& s = sent[current][n_sent[current]++];
    s = {from, 0, map, column, row, group};
    s.hash = hash_of_box(s);
}
static void wait_for_sent() {
    for (int k = 0; k < n_sent[current]; k++) {
        const Sent& s = sent[current][k];
        if (hash_of_box(s) != s.hash) fail("what is on its way was written before it was read");
        char* const matrix = (char*)s.map[0] + (long long)(s.group * s.map[7]);
        for (int i = 0; i < s.map[5]; i++)
            for (int j = 0; j < s.map[4]; j++)
                if (s.row + i < s.map[2] && s.column + j < s.map[1])
                    memcpy(matrix + (s.row + i) * s.map[3] + (s.column + j) * 2,
                           at_address(swizzled(s.from + (i * s.map[4] + j) * 2)), 2);
    }
    n_sent[current] = 0, moves++;
}

// ---- products
struct Product {
    float* sums[32];  // of a warp's threads
    u64 a, b;
    bool add, a_turned, b_turned;
    int columns;
    unsigned read;  // a hash of the numbers in shared memory
    bool last_of_group;
};
struct Queue {
    Product of[64];
    int n, begun;
    bool fenced;  // since sums were last at hand: registers are ready
};
static Queue queues[32];  // of warps: nothing but the kernel makes one wait for another
static float* sums_of[1024];

// `turned`: rows lie side by side, 64 of them, and then others `leading` bytes further.
static float number(u64 matrix, bool turned, int row, int k) {
    const unsigned leading = (matrix >> 16 & 0x3fff) << 4, stride = (matrix >> 32 & 0x3fff) << 4;
    unsigned at = (matrix & 0x3fff) << 4;
    if (turned) at += row / 64 * leading + row % 64 * 2 + k / 8 * stride + k % 8 * 128;
    else at += row / 8 * stride + row % 8 * 128 + k * 2;
    unsigned short v;
    memcpy(&v, at_address(swizzled(at)), 2);
    return __uint_as_float((unsigned)v << 16);
}
static float of_a[16][16], of_b[256][16];
static unsigned read_numbers(const Product& p) {
    acts_for = current / 32 * 32;  // all of the warp wait for it
    const int first_row = current / 32 % 4 * 16;
    unsigned hash = 0;
    for (int k = 0; k < 16; k++) {
        const auto read = [&](float& to, u64 matrix, bool turned, int row) {
            to = number(matrix, turned, row, k);
            hash = hash * 0x01000193 + (__float_as_uint(to) >> 16);
        };
        for (int i = 0; i < 16; i++) read(of_a[i][k], p.a, p.a_turned, first_row + i);
        for (int i = 0; i < p.columns; i++) read(of_b[i][k], p.b, p.b_turned, i);
    }
    acts_for = -1;
    return hash;
}
static void make_product(const Product& p) {
    if (read_numbers(p) != p.read) fail("what a product reads was written before it was made");
    for (int column = 0; column < p.columns; column++)
        for (int row = 0; row < 16; row++) {
            float* const of_thread = p.sums[row % 8 * 4 + column % 8 / 2];
            float& sum = of_thread[column / 8 * 4 + row / 8 * 2 + column % 2];
            float s = p.add ? sum : 0.f;
            for (int k = 0; k < 16; k++) s += of_a[row][k] * of_b[column][k];
            sum = s;
        }
}
static void check_described(u64 matrix) {
    if ((matrix & ~0x3fff3fff3fffull) != 1ull << 62) fail("a matrix is described by %#llx", matrix);
}
// `text` is the instruction, whose operands are the registers of d, then a, b and add.
static void multiply_by_warpgroup(
    const char* text, float* const* d, int registers, u64 a, u64 b, bool add) {
    static char expected[2048];
    int n = sprintf(expected, "{\n.reg .pred add;\nsetp.ne.b32 add, %%%d, 0;\n", registers + 2);
    n += sprintf(expected + n, "wgmma.mma_async.sync.aligned.m64n%dk16", registers * 2);
    n += sprintf(expected + n, ".f32.bf16.bf16 {");
    for (int i = 0; i < registers; i++) n += sprintf(expected + n, i ? ",%%%d" : "%%%d", i);
    n += sprintf(expected + n, "}, %%%d, %%%d, add, 1, 1, ", registers, registers + 1);
    int a_turned, b_turned;
    if (strncmp(text, expected, n) || sscanf(text + n, "%d, %d;", &a_turned, &b_turned) != 2)
        fail("not understood: %s", text);
    for (int i = 0; i < registers; i++)
        if (d[i] != d[0] + i) fail("register %d is another number of the array", i);
    check_described(a), check_described(b);
    sums_of[current] = d[0];
    if (wait(of_warp[current / 32], 32, "its warp's product")) {
        Queue& queue = queues[current / 32];
        if (!queue.fenced) fail("no wgmma.fence before a product");
        if (queue.n == 64) fail("64 products that none waits for");
        Product& p = queue.of[queue.n++];
        p = {{}, a, b, add, !!a_turned, !!b_turned, registers * 2, 0, false};
        memcpy(p.sums, &sums_of[current / 32 * 32], sizeof p.sums);
        p.read = read_numbers(p), queue.begun++;
    }
}
static void commit_products() {
    Queue& queue = queues[current / 32];
    if (current % 32 == 0 && queue.n) queue.of[queue.n - 1].last_of_group = true;
}
static void wait_for_products(int groups_left) {
    Queue& queue = queues[current / 32];
    if (wait(of_warp[current / 32], 32, "its warp's wait for products")) {
        int groups = 0, i = 0, n = 0;
        for (int j = 0; j < queue.n; j++) groups += queue.of[j].last_of_group;
        for (; groups > groups_left; groups -= queue.of[i++].last_of_group)
            make_product(queue.of[i]);
        for (; i < queue.n; i++) queue.of[n++] = queue.of[i];
        queue.n = n, queue.fenced = queue.fenced && groups_left;
    }
}
static const char* not_ended() {
    for (int& n : n_sent)
        if (n) return n = 0, "a box was sent that none waited for";
    for (int i = 0; i < 32; i++) {
        if (queues[i].n) return "a product was begun that none waited for";
        if (queues[i].begun != queues[i / 4 * 4].begun) return "a warp left out a product";
    }
    return nullptr;
}
"""

MEANINGS = (
    (r'asm volatile\("mbarrier\.init.*?: "memory"\);',
     "make_arrivals(address_of(&barrier), arrivals);"),
    (r'asm volatile\("mbarrier\.arrive\.expect_tx.*?: "memory"\);',
     "arrive_at(address_of(&barrier), bytes);"),
    (r'asm volatile\("(cp\.async\.)?mbarrier\.arrive(\.noinc)?\.shared.*?: "memory"\);',
     "arrive_at(barrier);"),
    (r'asm volatile\(\s*"\{\\n\.reg \.pred done;.*?mbarrier\.try_wait\.parity.*?: "memory"\);',
     "wait_for_phase(barrier, parity);"),
    (r'asm volatile\(\s*"cp\.async\.bulk\.tensor\.2d.*?: "memory"\);',
     "fetch_box(address_of(to), map.words, 2, at, row, 0, address_of(&barrier));"),
    (r'asm volatile\(\s*"cp\.async\.bulk\.tensor\.3d\.shared.*?: "memory"\);',
     "fetch_box(address_of(to), map.words, 3, at, row, of, address_of(&barrier));"),
    (r'asm volatile\("cp\.async\.bulk\.tensor\.3d\.global.*?: "memory"\);',
     "send_box(address_of(from), map.words, at, row, of);"),
    (r'asm volatile\("cp\.async\.bulk\.commit_group[^"]*" ::: "memory"\);', "wait_for_sent();"),
    (r'asm volatile\("atom\.shared\.inc\.u32[^;]*, 15;".*?: "memory"\);',
     "before = count(done, 15);"),
    (r'"\+f"\((d\[[^\]]*\])\)', r"&\1"),
    (r'asm volatile\(PRODUCT\(NUMBERS\) : REGISTERS : "l"\(a\), "l"\(b\), "r"\(add\)\);',
     "float* const registers[] = {REGISTERS};"
     "multiply_by_warpgroup(PRODUCT(NUMBERS), registers, WIDE / 2, a, b, add);"),
    (r'asm volatile\("wgmma\.fence.*?"memory"\);', "queues[current / 32].fenced = true;"),
    (r'asm volatile\("wgmma\.commit_group.*?"memory"\);', "commit_products();"),
    (r'asm volatile\("wgmma\.wait_group.*?"memory"\);', "wait_for_products(LEFT);"),
    (r'asm volatile\("bar\.sync %0, (128|256);" ::"r"\((.*?)\) : "memory"\);',
     r'order(of_block[\2], \1, "%d threads");'),
    (r'asm volatile\("(fence\.mbarrier_init|fence\.proxy)[^;]*;" ::: "memory"\);', ""),
    (r'asm volatile\("setmaxnreg[^;]*;"\);', ""),
)  # fmt: skip


class Driver:
    """Of the CUDA driver what makes a tensor map, one of our own that only `fetch_box` can read."""

    def cuTensorMapEncodeTiled(  # noqa: N802
        self, to: Any, dtype: int, rank: Any, matrix: Any, sizes: Any, strides: Any, box: Any,
        steps: Any, interleave: int, swizzle: int, _: int, fill: int,
    ) -> int:  # fmt: skip
        bfloat16, swizzle_128, zeros = 9, 3, 0
        kind = (dtype, interleave, swizzle, fill, *steps)
        if kind != (bfloat16, 0, swizzle_128, zeros, *[1] * rank.value):
            return 1
        if to.value % 64 or matrix.value % 16 or box[0] != 64 or box[1] > 256 or set(box[2:]) > {1}:
            return 1
        if any(stride % 16 for stride in strides) or len(sizes) != rank.value or len(sizes) > 3:
            return 1
        groups, apart = (sizes[2], strides[1]) if rank.value == 3 else (1, 0)
        words = (
            matrix.value,
            *sizes[:2],
            strides[0],
            *box[:2],
            0x50414D,
            apart,
            rank.value,
            groups,
        )
        ctypes.memmove(to, (ctypes.c_uint64 * 16)(*words), 128)
        return 0


def take_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the GPU and its driver, for launches; kernels have to be `cuda_on_cpu.Kernel` besides."""
    monkeypatch.setattr(hopper, "runs_on", lambda _: True)
    libraries = SimpleNamespace(**vars(ctypes) | {"CDLL": lambda _: Driver()})
    monkeypatch.setattr(hopper, "ctypes", libraries)
    maps = functools.lru_cache(64)(hopper.tensor_map.__wrapped__)
    monkeypatch.setattr(hopper, "tensor_map", maps)  # of memory that is here
