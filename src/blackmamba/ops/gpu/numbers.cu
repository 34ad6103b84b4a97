// Numbers, as kernels in CUDA C++ that are compiled at run time share them: their text follows this.

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Two bfloat16, the first in the low half.
__device__ __forceinline__ u32 narrow(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// d += a b by a warp's matrix units, with bfloat16: a thread 4 g + k has of a (16 x 16) (g, 2 k), (g + 8, 2 k), (g, 2 k + 8) and
// (g + 8, 2 k + 8), each with the next column; of b (16 x 8) (2 k, g) and (2 k + 8, g), each with the next row; of d (16 x 8)
// (g, 2 k), (g, 2 k + 1), (g + 8, 2 k), (g + 8, 2 k + 1).
__device__ __forceinline__ void multiply_add_pairs(float* d, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
