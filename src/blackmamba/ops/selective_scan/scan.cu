// The selective scan with 16 states, for NVIDIA GPUs: the same passes as in kernels.py, which explains them.
//
// This is what the kernels share; each is in a file of its name, of which cuda.py makes one text with gpu/numbers.cu and this
// before it. A warp owns 8 channels of a row over a chunk of its tokens; a thread, 4 states of one channel. Warps walk over
// spans of 16 tokens. What is done once for a token and channel (softplus, delta x, gate) is done by the thread that loads it,
// four channels of one token, and is handed to the others through shared memory. What limits all this is instructions, and next
// to them shared memory, 128 bytes a clock: what lies there is laid out for every bank to be used at once.
//
// Compiled at run time, without headers, with: TYPE (0 float32, 1 bfloat16, 2 float16), HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS,
// HAS_SEQ, HAS_FIRST, KEEP, LOCAL (each 0 or 1), SHORT_BC (1: no number of B and C has more than 11 bits), WARPS (of a
// block), MIN_BLOCKS (that a multiprocessor shall hold at once) and SHARED (bytes of a block's shared memory).
//
// Letters: b batch, l sequence, d d_inner, n d_state = 16.

#define SPAN 16
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define FULL 0xffffffffu

typedef unsigned long long u64;

#if TYPE == 0
typedef float Number;
typedef float4 Four;
#else
typedef u16 Number;
typedef uint2 Four;
#endif

__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + exp2_fast(x * -LOG2E)); }

// log(1 + exp(v)) to 2e-7 of itself: log1p of exp(-|v|) by a polynomial whose largest relative error is least
__device__ __forceinline__ float softplus(float v) {
    float e = exp2_fast(-fabsf(v) * LOG2E);
    float p = fmaf(-0.008539200760424137f, e, 0.044089604169130325f);
    p = fmaf(p, e, -0.10768166929483414f);
    p = fmaf(p, e, 0.17745238542556763f);
    p = fmaf(p, e, -0.24495461583137512f);
    p = fmaf(p, e, 0.33275479078292847f);
    p = fmaf(p, e, -0.4999740421772003f);
    p = fmaf(p, e, 0.9999998211860657f);
    return fmaf(e, p, fmaxf(v, 0.f));
}

__device__ __forceinline__ void widen(const Four& v, float* out) {
#if TYPE == 0
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
#elif TYPE == 1
    out[0] = __uint_as_float(v.x << 16), out[1] = __uint_as_float(v.x & 0xffff0000u);
    out[2] = __uint_as_float(v.y << 16), out[3] = __uint_as_float(v.y & 0xffff0000u);
#else
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(out[0]), "=f"(out[1]) : "r"(v.x));
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(out[2]), "=f"(out[3]) : "r"(v.y));
#endif
}
__device__ __forceinline__ Four narrow(const float* in) {
    Four v;
#if TYPE == 0
    v.x = in[0], v.y = in[1], v.z = in[2], v.w = in[3];
#elif TYPE == 1
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v.x) : "f"(in[1]), "f"(in[0]));
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v.y) : "f"(in[3]), "f"(in[2]));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v.x) : "f"(in[1]), "f"(in[0]));
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v.y) : "f"(in[3]), "f"(in[2]));
#endif
    return v;
}
__device__ __forceinline__ Four load4(const Number* p, bool inside) {
    Four v = {};
    if (inside) v = *reinterpret_cast<const Four*>(p);
    return v;
}
__device__ __forceinline__ void store4(Number* p, const float* in, bool inside) {
    if (inside) *reinterpret_cast<Four*>(p) = narrow(in);
}

#define OF_TOKEN 32  // numbers of B and C
#define OF_C 16      // where C begins

__device__ __forceinline__ void take(float* out, const float* p) {
    const float4 v = *reinterpret_cast<const float4*>(p);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}
#if TYPE == 1
typedef u16 Kept;  // states for the backward pass
typedef Four FourKept;
__device__ __forceinline__ void keep(Kept* p, const float* h) { *reinterpret_cast<Four*>(p) = narrow(h); }
#else
typedef float Kept;
typedef float4 FourKept;
__device__ __forceinline__ void keep(Kept* p, const float* h) {
    *reinterpret_cast<float4*>(p) = make_float4(h[0], h[1], h[2], h[3]);
}
#endif

// The address `count` times `bytes` behind, in one instruction.
template <typename T>
__device__ __forceinline__ T* shifted(T* from, int count, int bytes) {
    T* to;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(to) : "r"(count), "r"(bytes), "l"(from));
    __builtin_assume(__isGlobal(to));
    return to;
}

// Keeps an address in its registers: the compiler would rather compute it again in every turn of a loop.
template <typename T>
__device__ __forceinline__ T* pinned(T* address) {
    asm volatile("" : "+l"(address));
    __builtin_assume(__isGlobal(address));
    return address;
}
// The same of a number.
__device__ __forceinline__ u32 pinned(u32 number) {
    asm volatile("" : "+r"(number));
    return number;
}
// The 11 bits of a number that matrix units read.
__device__ __forceinline__ float high_part(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); }

struct Rows {  // a tensor (b, l, d), channels contiguous
    Number* data;
    i64 row;    // stride, in numbers
    int token;  // stride, in bytes
};

struct Sizes {
    int l, d, l_padded, n_chunks, chunk, n_blocks;
    int share, shares_end;  // of a block of threads, in spans, and of all
};

// What the kernels are given, in cuda.py's order.
struct Forward {  // starts: states before every span; ends, decays: see LOCAL; handed, there: see `hand_over`
    Rows x, dt, z, y;
    const float* A;
    const float* BC;
    const float *D, *bias, *resets, *first;
    Kept* starts;
    float *ends, *decays, *handed;
    int* there;
    Sizes s;
};

struct Backward {  // after: the gradient of the state that each chunk leaves
    Rows x, dt, z, grad_y, grad_x, grad_dt, grad_z;
    const float* A;
    const float* BC;
    const float *D, *bias, *resets;
    const Kept* starts;
    const float* after;
    float *partial, *grad_first, *grad_A, *grad_D, *grad_bias, *ends, *decays, *handed;
    int* there;
    Sizes s;
};

extern __shared__ __align__(16) char memory[];
template <typename Shared>
__device__ __forceinline__ Shared& shared_as() {
    static_assert(sizeof(Shared) == SHARED, "cuda.py counts another size");
    return *reinterpret_cast<Shared*>(memory);
}

struct Place {  // of a warp and a thread; states 4 q to 4 q + 3 of channel `channel`, its c-th of 8
    int lane, warp, q, c, channel, piece, block, begin, end;
    i64 row;
    bool active;
    int t, c4;  // of the four channels of one token that it loads
};

__device__ __forceinline__ Place place_of(const Sizes& s, int q, int c, int pid) {
    Place p;
    p.lane = threadIdx.x & 31;
    p.warp = threadIdx.x >> 5;
    p.q = q;
    p.c = c;
    p.block = pid % s.n_blocks;
    p.piece = pid / s.n_blocks % s.n_chunks;
    p.row = pid / s.n_blocks / s.n_chunks;
    int first = (p.block * WARPS + p.warp) * 8;
    p.active = first < s.d;
    if (!p.active) first = 0;  // computes, but writes nothing
    p.channel = first + p.c;
    p.begin = p.piece * s.chunk;
    p.end = min(s.l, p.begin + s.chunk);
    p.t = p.lane >> 1;
    p.c4 = first + (p.lane & 1) * 4;
    return p;
}

// Where the four numbers are that a thread loads of the row: of its first token, and of token t.
__device__ __forceinline__ Number* row_of(const Rows& tensor, const Place& p) {
    return tensor.data + p.row * tensor.row + p.c4;
}
__device__ __forceinline__ Number* at(Number* row, const Rows& tensor, int t) {
    return shifted(row, t, tensor.token);
}

__device__ __forceinline__ void scaled4(float* out, const float4& v, float by) {
    out[0] = v.x * by, out[1] = v.y * by, out[2] = v.z * by, out[3] = v.w * by;
}

// Pairs of four channels of one token, 32 bytes a thread. Channel c of token t is in place c ^ (t & 2), so that threads
// meet in no bank.
__device__ __forceinline__ void store_pairs(float2* to, int t, const float* a, const float* b) {
    float4* at = reinterpret_cast<float4*>(to);
    at[t >> 1 & 1] = make_float4(a[0], b[0], a[1], b[1]);
    at[~t >> 1 & 1] = make_float4(a[2], b[2], a[3], b[3]);
}

// What a block has written for another, which waits for it: there is 0 until then, and once it was taken.
__device__ __forceinline__ void hand_over(int* there) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(there), "r"(1) : "memory");
}
__device__ __forceinline__ void wait_for(int* there) {
    if (threadIdx.x == 0) {
        int v = 0;
        while (v == 0) asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(there) : "memory");
        *there = 0;  // for the next launch
    }
    __syncthreads();
}

// 16 bytes on their way to shared memory, and all of a thread's copies there.
__device__ __forceinline__ void copy16(void* to, const void* from) {
    const u32 address = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}
__device__ __forceinline__ void copied() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// Numbers on their way, or zeros.
template <typename T>
__device__ __forceinline__ void fetch_if(bool condition, u32 to, const void* from) {
    constexpr int bytes = sizeof(T);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
        ::"r"(to), "l"(from), "n"(bytes), "r"(condition ? bytes : 0) : "memory");
}

// B and C of a span are on their way, 16 bytes a thread.
__device__ __forceinline__ void stage(float* to, const float* from) {
#pragma unroll
    for (int first = 0; first < SPAN * OF_TOKEN; first += 4 * 32 * WARPS) {
        const int at = first + threadIdx.x * 4;
        if (at >= SPAN * OF_TOKEN) return;
        copy16(to + at, from + at);
    }
}
__device__ __forceinline__ void staged() {  // what was staged is there, and the block is done with what was before
    copied();
    __syncthreads();
}
