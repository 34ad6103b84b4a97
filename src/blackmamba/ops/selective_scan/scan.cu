// The selective scan with 16 states, for NVIDIA GPUs: the same passes as in kernels.py, which explains them.
//
// A warp owns 8 channels of a row over a chunk of its tokens; a thread, 4 states of one channel. Warps walk over spans
// of 16 tokens. What is done once for a token and channel (softplus, delta x, gate) is done by the thread that loads it,
// four channels of one token, and is handed to the others through the warp's own shared memory. A sum over a channel's
// states adds up over 4 threads; a sum over channels is a product of matrices, see `Sums`. What limits all this is
// instructions, and next to them shared memory, 128 bytes a clock: what lies there is laid out for every bank to be used
// at once.
//
// Compiled at run time, without headers, with: TYPE (0 float32, 1 bfloat16, 2 float16), HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS,
// HAS_SEQ, HAS_FIRST, KEEP, LOCAL, NARROW_BC (each 0 or 1; NARROW_BC: B and C are bfloat16, and so is TYPE), WARPS (of a
// block), MIN_BLOCKS (that a multiprocessor shall hold at once), SHARED (bytes of a block's shared memory) and KERNEL
// (which one: 0, 1 or 2, as they follow).
//
// Letters: b batch, l sequence, d d_inner, n d_state = 16.

#define SPAN 16
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f
#define FULL 0xffffffffu

typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#if TYPE == 0
typedef float Number;
typedef float4 Four;
#else
typedef u16 Number;
typedef uint2 Four;
#endif

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
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.f + exp2_fast(x * -LOG2E)); }

// log(1 + exp(v)) to 2e-7 of itself: log1p of exp(-|v|) by a polynomial fitted at Chebyshev's points
__device__ __forceinline__ float softplus(float v) {
    float e = exp2_fast(-fabsf(v) * LOG2E);
    float p = fmaf(0.005253457929939032f, e, -0.02958850748836994f);
    p = fmaf(p, e, 0.07836166769266129f);
    p = fmaf(p, e, -0.13674770295619965f);
    p = fmaf(p, e, 0.19111430644989014f);
    p = fmaf(p, e, -0.24844369292259216f);
    p = fmaf(p, e, 0.33319270610809326f);
    p = fmaf(p, e, -0.49999502301216125f);
    p = fmaf(p, e, 1.f);
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

#if NARROW_BC
typedef u16 Part;
__device__ __forceinline__ void take(float* out, const Part* p) { widen(*reinterpret_cast<const Four*>(p), out); }
#else
typedef float Part;
__device__ __forceinline__ void take(float* out, const Part* p) {
    const float4 v = *reinterpret_cast<const float4*>(p);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}
#endif
#if TYPE == 1
typedef u16 Kept;  // states for the backward pass
__device__ __forceinline__ float4 kept(const Kept* p) {
    float v[4];
    widen(*reinterpret_cast<const Four*>(p), v);
    return make_float4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ void keep(Kept* p, const float* h) { *reinterpret_cast<Four*>(p) = narrow(h); }
#else
typedef float Kept;
__device__ __forceinline__ float4 kept(const Kept* p) { return *reinterpret_cast<const float4*>(p); }
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

// Keeps a value in its register: the compiler would rather compute it again in every turn of a loop.
__device__ __forceinline__ void pin(int& value) { asm volatile("" : "+r"(value)); }
template <typename T>
__device__ __forceinline__ T* pinned(T* address) {
    asm volatile("" : "+l"(address));
    __builtin_assume(__isGlobal(address));
    return address;
}

struct Rows {  // a tensor (b, l, d), channels contiguous
    Number* data;
    i64 row;    // stride, in numbers
    int token;  // stride, in bytes
};

struct Sizes {
    int l, d, l_padded, n_chunks, chunk, n_blocks;
};

// Sums over the 4 threads of a channel of 4 numbers each; thread q gets the sum of the q-th.
__device__ __forceinline__ float sum4(const float* v, bool odd, bool high) {
    float a = odd ? v[1] : v[0], b = odd ? v[0] : v[1];
    float c = odd ? v[3] : v[2], e = odd ? v[2] : v[3];
    a += __shfl_xor_sync(FULL, b, 8);
    c += __shfl_xor_sync(FULL, e, 8);
    float keep = high ? c : a, send = high ? a : c;
    return keep + __shfl_xor_sync(FULL, send, 16);
}

// D += A B by a warp's matrix units: a thread has of A (16 x 8) the numbers (g, k), (g + 8, k), (g, k + 4), (g + 8, k + 4),
// of B (8 x 8) (k, g) and (k + 4, g), of D (16 x 8) (g, 2 k), (g, 2 k + 1), (g + 8, 2 k), (g + 8, 2 k + 1), where g is
// lane / 4 and k lane % 4. They read 11 bits of a number of A or B.
__device__ __forceinline__ void multiply_add(float* d, const float* a, float b0, float b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
          "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
__device__ __forceinline__ float high_part(float v) { return __uint_as_float(__float_as_uint(v) & 0xffffe000u); }

// Sums over a warp's 8 channels of v times a number of the channel, for each of the 16 states and two tokens: the threads'
// v are A as they are, rows the four threads of a channel, their v[1] and v[3], and the channel's third bit; columns of
// B are two tokens, v[2] and v[3], and the channel's third bit again. Half of D is of no use.
struct Sums {
    float d[4];
    __device__ __forceinline__ void clear() { d[0] = d[1] = d[2] = d[3] = 0.f; }
    // For the thread whose columns are of this token and of v[0] and v[1] (low), of this token and of the others (high).
    __device__ __forceinline__ void add(const float* v, float by, bool low, bool high) {
        const float b0 = low ? by : 0.f, b1 = high ? by : 0.f;
#if TYPE == 0
        float rough[4], rest[4];
#pragma unroll
        for (int j = 0; j < 4; j++) rough[j] = high_part(v[j]), rest[j] = v[j] - rough[j];
        const float rough0 = high_part(b0), rough1 = high_part(b1);
        multiply_add(d, rest, rough0, rough1);
        multiply_add(d, rough, b0 - rough0, b1 - rough1);
        multiply_add(d, rough, rough0, rough1);
#else
        multiply_add(d, v, b0, b1);
#endif
    }
    // Of states 4 (lane / 8) + 2 (lane % 2) and the next, of token lane / 2 % 2, over half of the channels.
    __device__ __forceinline__ float first(bool upper) const { return upper ? d[1] : d[0]; }
    __device__ __forceinline__ float second(bool upper) const { return upper ? d[3] : d[2]; }
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

__device__ __forceinline__ Place place_of(const Sizes& s) {
    Place p;
    int pid = blockIdx.x;
    p.lane = threadIdx.x & 31;
    p.warp = threadIdx.x >> 5;
    p.q = p.lane >> 3;
    p.c = p.lane & 7;
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
__device__ __forceinline__ void first_of_pairs(const float2* from, int t, float* a) {
    const float4* at = reinterpret_cast<const float4*>(from);
    const float4 v = at[t >> 1 & 1], w = at[~t >> 1 & 1];
    a[0] = v.x, a[1] = v.z, a[2] = w.x, a[3] = w.z;
}

// B and C of a span, on their way to shared memory, 16 bytes a thread.
__device__ __forceinline__ void stage(Part* to, const Part* from) {
    constexpr int each = 16 / (int)sizeof(Part), threads = 32 * WARPS;
#pragma unroll
    for (int first = 0; first < SPAN * OF_TOKEN; first += each * threads) {
        const int at = first + threadIdx.x * each;
        if (at >= SPAN * OF_TOKEN) return;
        const u32 address = (u32)__cvta_generic_to_shared(to + at);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from + at) : "memory");
    }
}
__device__ __forceinline__ void staged() {  // what was staged is there, and the block is done with what was before
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
}
__device__ __forceinline__ void soon(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- forward ---------------------------------------------------------------------------------------------------
// Keeps states and A in registers. Moves x, dt, z and y once. Bound by exponentials: 18 for each number of y.
// LOCAL: only what the chunk leaves (ends) and what is left of what it began with (decays).

struct Forward {
    Rows x, dt, z, y;
    const float* A;
    const Part* BC;
    const float *D, *bias, *resets, *first;
    Kept* starts;
    float *ends, *decays;
    Sizes s;
};

#if KERNEL == 0
extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_forward(const Forward f) {
    struct Shared {
        float2 du[WARPS][SPAN][8];
        float y[WARPS][SPAN][40];  // 4 parts of each sum; 40: so that they are read from all banks
        Part BC[2][SPAN * OF_TOKEN];
    };
    Shared& shared = shared_as<Shared>();
    const Place p = place_of(f.s);
    float2(*du)[8] = shared.du[p.warp];
    float* const own_y = &shared.y[p.warp][0][p.lane];
    const float2* const own_du[2] = {&du[0][p.c], &du[0][p.c ^ 2]};  // of tokens 0, 1 and 2, 3 of each four
    float A2[4], h[4] = {0.f, 0.f, 0.f, 0.f};
    scaled4(A2, *reinterpret_cast<const float4*>(f.A + p.channel * 16 + p.q * 4), LOG2E);
    const i64 state = ((p.row * f.s.n_chunks + p.piece) * f.s.d + p.channel) * 16 + p.q * 4;
#if HAS_FIRST
    scaled4(h, *reinterpret_cast<const float4*>(f.first + state), 1.f);
#endif
    float bias[4] = {}, skip[4] = {};
#if HAS_BIAS
    scaled4(bias, *reinterpret_cast<const float4*>(f.bias + p.c4), 1.f);
#endif
#if HAS_D
    scaled4(skip, *reinterpret_cast<const float4*>(f.D + p.c4), 1.f);
#endif
    int t = p.begin + p.t;
    Number* const x = pinned(row_of(f.x, p));
    Number* const dt = pinned(row_of(f.dt, p));
    Number* const z = pinned(row_of(f.z, p));
    Number* const y = pinned(row_of(f.y, p));
    int end = p.end;
    pin(end);
    const Part* next_BC = f.BC + (p.row * f.s.l_padded + p.begin) * OF_TOKEN;
    const float* resets = f.resets + p.row * f.s.l_padded + p.begin;
    int buffer = 0;
    stage(shared.BC[0], next_BC);
    Kept* starts = f.starts + ((p.row * (f.s.l_padded / SPAN) + p.begin / SPAN) * f.s.d + p.channel) * 16 + p.q * 4;
    float total = 0.f, any_reset = 0.f;

    bool inside = t < end;
    Four next_dt = load4(at(dt, f.dt, t), inside), next_x = load4(at(x, f.x, t), inside), next_z = {};
    if (HAS_Z && !LOCAL) next_z = load4(at(z, f.z, t), inside);
    for (int span = p.begin; span < end; span += SPAN) {
        staged();
        const Part* BC = shared.BC[buffer] + p.q * 4;
        buffer ^= 1;
        next_BC += SPAN * OF_TOKEN;
        if (span + SPAN < end) stage(shared.BC[buffer], next_BC);
        const bool mine = inside;
        float xv[4], zv[4];
        {
            float raw[4], delta[4];
            widen(next_dt, raw);
            widen(next_x, xv);
            widen(next_z, zv);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                raw[i] += bias[i];
                delta[i] = SOFTPLUS ? softplus(raw[i]) : raw[i];
                if (!mine) delta[i] = 0.f;
            }
            float drive[4];
#pragma unroll
            for (int i = 0; i < 4; i++) drive[i] = delta[i] * xv[i];
            store_pairs(&du[p.t][(p.lane & 1) * 4], p.t, delta, drive);
        }
        __syncwarp();
        t += SPAN;
        inside = t < end;
        next_dt = load4(at(dt, f.dt, t), inside);
        next_x = load4(at(x, f.x, t), inside);
        if (HAS_Z && !LOCAL) next_z = load4(at(z, f.z, t), inside);
#if KEEP && !LOCAL
        if (p.active) keep(starts, h);
        starts += (i64)f.s.d * 16;
#endif
#pragma unroll 2
        for (int group = 0; group < SPAN; group += 4) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 step = own_du[i >> 1][(group + i) * 8];
                float b[4];
                take(b, BC + i * OF_TOKEN);
#if HAS_SEQ
                const float reset = resets[i];
#endif
#if LOCAL
                total += step.x;
#if HAS_SEQ
                any_reset += reset;
#endif
#else
                float c[4];
                take(c, BC + i * OF_TOKEN + OF_C);
                float part = 0.f;
#endif
#pragma unroll
                for (int j = 0; j < 4; j++) {
#if HAS_SEQ
                    const float a = exp2_fast(fmaf(step.x, A2[j], reset));
#else
                    const float a = exp2_fast(step.x * A2[j]);
#endif
                    h[j] = fmaf(a, h[j], step.y * b[j]);
#if !LOCAL
                    part = fmaf(h[j], c[j], part);
#endif
                }
#if !LOCAL
                own_y[(group + i) * 40] = part;
#endif
            }
            BC += 4 * OF_TOKEN;
            resets += 4;
        }
#if !LOCAL
        __syncwarp();
        float out[4] = {};
#pragma unroll
        for (int q = 0; q < 4; q++) {
            float part[4];
            scaled4(part, *reinterpret_cast<const float4*>(&shared.y[p.warp][p.t][q * 8 + (p.lane & 1) * 4]), 1.f);
#pragma unroll
            for (int i = 0; i < 4; i++) out[i] += part[i];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            out[i] = fmaf(skip[i], xv[i], out[i]);
            if (HAS_Z) out[i] *= zv[i] * sigmoid(zv[i]);
        }
        store4(at(y, f.y, t - SPAN), out, mine && p.active);
#endif
        __syncwarp();
    }
    if (!p.active) return;
#if LOCAL
    *reinterpret_cast<float4*>(f.ends + state) = make_float4(h[0], h[1], h[2], h[3]);
    float left[4];
#pragma unroll
    for (int j = 0; j < 4; j++) left[j] = exp2_fast(fmaf(total, A2[j], any_reset));
    *reinterpret_cast<float4*>(f.decays + state) = make_float4(left[0], left[1], left[2], left[3]);
#else
    if (p.piece == f.s.n_chunks - 1)
        *reinterpret_cast<float4*>(f.ends + (p.row * f.s.d + p.channel) * 16 + p.q * 4) = make_float4(h[0], h[1], h[2], h[3]);
#endif
}
#endif

// ---- backward ---------------------------------------------------------------------------------------------------

struct Backward {
    Rows x, dt, z, grad_y, grad_x, grad_dt, grad_z;
    const float* A;
    const Part* BC;
    const float *D, *bias, *resets;
    const Kept* starts;
    const float* after;
    float *partial, *grad_first, *grad_A, *grad_D, *grad_bias, *ends, *decays;
    Sizes s;
};

// The gradient of the state before each chunk, had nothing come from behind, and what is left of it after the chunk.
#if KERNEL == 1
extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_backward_local(const Backward f) {
    struct Shared {
        float2 du[WARPS][SPAN][8];
        Part BC[2][SPAN * OF_TOKEN];
    };
    Shared& shared = shared_as<Shared>();
    const Place p = place_of(f.s);
    float2(*du)[8] = shared.du[p.warp];
    float A2[4], g[4] = {0.f, 0.f, 0.f, 0.f};
    scaled4(A2, *reinterpret_cast<const float4*>(f.A + p.channel * 16 + p.q * 4), LOG2E);
    float bias[4] = {};
#if HAS_BIAS
    scaled4(bias, *reinterpret_cast<const float4*>(f.bias + p.c4), 1.f);
#endif
    Number* const dt = pinned(row_of(f.dt, p));
    Number* const z = pinned(row_of(f.z, p));
    Number* const grad_y = pinned(row_of(f.grad_y, p));
    float total = 0.f, any_reset = 0.f;
    const int spans = (p.end - p.begin + SPAN - 1) / SPAN;
    int t = p.begin + (spans - 1) * SPAN + p.t;
    bool inside = t < p.end;
    Four next_dt = load4(at(dt, f.dt, t), inside), next_g = load4(at(grad_y, f.grad_y, t), inside), next_z = {};
    if (HAS_Z) next_z = load4(at(z, f.z, t), inside);
    const Part* next_BC = f.BC + (p.row * f.s.l_padded + p.begin + (spans - 1) * SPAN) * OF_TOKEN;
    int buffer = 0;
    stage(shared.BC[0], next_BC);
    for (int back = spans - 1; back >= 0; back--) {
        staged();
        const Part* C_at = shared.BC[buffer] + OF_C + p.q * 4;
        buffer ^= 1;
        next_BC -= SPAN * OF_TOKEN;
        if (back > 0) stage(shared.BC[buffer], next_BC);
        float raw[4], gy[4], zv[4];
        widen(next_dt, raw);
        widen(next_g, gy);
        widen(next_z, zv);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            raw[i] += bias[i];
            raw[i] = SOFTPLUS ? softplus(raw[i]) : raw[i];
            if (!inside) raw[i] = 0.f;
            if (HAS_Z) gy[i] *= zv[i] * sigmoid(zv[i]);
        }
        store_pairs(&du[p.t][(p.lane & 1) * 4], p.t, raw, gy);
        __syncwarp();
        t -= SPAN;
        inside = t >= p.begin;
        next_dt = load4(at(dt, f.dt, t), inside);
        next_g = load4(at(grad_y, f.grad_y, t), inside);
        if (HAS_Z) next_z = load4(at(z, f.z, t), inside);
#if HAS_SEQ
        const i64 token = p.row * f.s.l_padded + p.begin + back * SPAN;
#endif
#pragma unroll 4
        for (int i = SPAN - 1; i >= 0; i--) {
            const float2 step = du[i][p.c ^ (i & 2)];
            float c[4];
            take(c, C_at + i * OF_TOKEN);
            total += step.x;
            float reset = 0.f;
#if HAS_SEQ
            reset = f.resets[token + i];
            any_reset += reset;
#endif
#pragma unroll
            for (int j = 0; j < 4; j++) g[j] = exp2_fast(fmaf(step.x, A2[j], reset)) * fmaf(c[j], step.y, g[j]);
        }
        __syncwarp();
    }
    if (!p.active) return;
    const i64 state = ((p.row * f.s.n_chunks + p.piece) * f.s.d + p.channel) * 16 + p.q * 4;
    *reinterpret_cast<float4*>(f.ends + state) = make_float4(g[0], g[1], g[2], g[3]);
    float left[4];
#pragma unroll
    for (int j = 0; j < 4; j++) left[j] = exp2_fast(fmaf(total, A2[j], any_reset));
    *reinterpret_cast<float4*>(f.decays + state) = make_float4(left[0], left[1], left[2], left[3]);
}
#endif

// Every gradient; those of B and C as sums over the channels of a block, in `partial` (b, l / 4, blocks, 32, 4): see `add_up`.
// Keeps the states of 4 tokens and the gradients of state and A in registers, the states before each 4 tokens of a span
// in shared memory. Moves x, dt, z, the gradients of y, x, dt and z once, and the states before every span once. Bound by
// instructions.
#if KERNEL == 2
struct OfWarp {
    float2 du[SPAN][8];
    float go[SPAN][8];  // gradient of y before the gate
    float sums[3][SPAN][8];
    float4 first[SPAN / 4][32];
    float4 of_BC[2][4][32];  // of the halves of a span, by pairs of tokens: two numbers for B and two for C
    // What a thread would else have no registers for, of its own four channels: `bias` and D, where its row is.
    float4 wide[2][2];
    Number* rows[7][2];
};
struct Shared {
    OfWarp of[WARPS];
    Part BC[2][SPAN * OF_TOKEN];
};
enum { X, DT, Z, GRAD_Y, GRAD_X, GRAD_DT, GRAD_Z };

// The sums of half a span over the warps and the halves of their channels, always in the same order, by 64 threads.
__device__ __forceinline__ void add_up(const Backward& f, const Shared& shared, const Place& p, int half, int span, int first) {
    static_assert(WARPS % 2 == 0, "64 threads in a row");
    const int task = (int)threadIdx.x - first;
    if (task < 0 || task >= 64) return;
    const int pair = task >> 4, at = task & 15, lane = (at >> 2) * 8 + (at & 3);
    const int turn = at & 4;  // so that neighbours read other banks
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
    for (int w = 0; w < WARPS; w++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const float4 v = shared.of[w].of_BC[half][pair][lane + (turn ^ k * 4)];
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
    const int tile = ((int)p.row * (f.s.l_padded / 4) + span / 4 + half * 2 + (pair >> 1)) * f.s.n_blocks + p.block;
    shifted(reinterpret_cast<float4*>(f.partial), tile, 512)[(pair & 1) * 16 + at] = sum;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_backward(const Backward f) {
    Shared& shared = shared_as<Shared>();
    const Place p = place_of(f.s);
    OfWarp& own = shared.of[p.warp];
    const float2* const own_du[2] = {&own.du[0][p.c], &own.du[0][p.c ^ 2]};  // of tokens 0, 1 and 2, 3 of each four
    const float* const own_go = &own.go[0][p.c];
    float* const own_sums = &own.sums[0][p.q][p.c];
    float4* const firsts = &own.first[0][p.lane];
    float4* const own_BC = &own.of_BC[0][0][p.lane];
    float A2[4], g[4], h[4], sum_A[4] = {0.f, 0.f, 0.f, 0.f};
    scaled4(A2, *reinterpret_cast<const float4*>(f.A + p.channel * 16 + p.q * 4), LOG2E);
    const i64 state = ((p.row * f.s.n_chunks + p.piece) * f.s.d + p.channel) * 16 + p.q * 4;
    scaled4(g, *reinterpret_cast<const float4*>(f.after + state), 1.f);
    if (!p.active) g[0] = g[1] = g[2] = g[3] = 0.f;  // nothing of it goes into the block's sums
    float sum_D[4] = {}, sum_bias[4] = {};
    const bool odd = p.q & 1, high = p.q & 2;
    const bool upper = p.lane & 4, of_low = !(p.lane & 8), of_second = p.lane & 16;  // see `Sums`
    const bool low[2] = {of_low && !of_second, of_low && of_second};
    const bool rest[2] = {!of_low && !of_second, !of_low && of_second};
    const int spans = (p.end - p.begin + SPAN - 1) / SPAN;
    int buffer = 0, adders = 0;
    const Part* next_BC = f.BC + (p.row * f.s.l_padded + p.begin + (spans - 1) * SPAN) * OF_TOKEN;
    stage(shared.BC[0], next_BC);
    if (p.lane < 2) {
        const Rows* const all[7] = {&f.x, &f.dt, &f.z, &f.grad_y, &f.grad_x, &f.grad_dt, &f.grad_z};
#pragma unroll
        for (int k = 0; k < 7; k++) own.rows[k][p.lane] = row_of(*all[k], p);
        if (HAS_BIAS) own.wide[0][p.lane] = *reinterpret_cast<const float4*>(f.bias + p.c4);
        if (HAS_D) own.wide[1][p.lane] = *reinterpret_cast<const float4*>(f.D + p.c4);
    }
    __syncwarp();
    const int four = p.lane & 1;  // which of the warp's
    const Kept* const starts =
        f.starts + ((p.row * (f.s.l_padded / SPAN) + p.begin / SPAN) * f.s.d + p.channel) * 16 + p.q * 4;
    const int of_span = f.s.d * 16 * (int)sizeof(Kept);
    for (int back = spans - 1; back >= 0; back--) {
        const int span = p.begin + back * SPAN;
        const int t = span + p.t;
        const bool inside = t < p.end;
        const Number* const dt_at = at(own.rows[DT][four], f.dt, t);
        const Number* const x_at = at(own.rows[X][four], f.x, t);
        const Number* const gy_at = at(own.rows[GRAD_Y][four], f.grad_y, t);
        const Number* const z_at = at(own.rows[Z][four], f.z, t);
        const Kept* const first_at = shifted(starts, back, of_span);
        const Four raw_dt = load4(dt_at, inside), raw_x = load4(x_at, inside);
        const Four raw_g = load4(gy_at, inside && p.active);
        Four raw_z = {};
        if (HAS_Z) raw_z = load4(z_at, inside);
        const float4 first = kept(first_at);
        if (back > 0) {
            soon(shifted(dt_at, -SPAN, f.dt.token));
            soon(shifted(x_at, -SPAN, f.x.token));
            soon(shifted(gy_at, -SPAN, f.grad_y.token));
            if (HAS_Z) soon(shifted(z_at, -SPAN, f.z.token));
            soon(shifted(first_at, -1, of_span));
        }
        {
            float delta[4], xv[4], gy[4], zv[4], bias[4] = {};
            if (HAS_BIAS) scaled4(bias, own.wide[0][four], 1.f);
            widen(raw_dt, delta);
            widen(raw_x, xv);
            widen(raw_g, gy);
            widen(raw_z, zv);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                delta[i] += bias[i];
                if (SOFTPLUS) delta[i] = softplus(delta[i]);
                if (!inside) delta[i] = 0.f;
                xv[i] *= delta[i];
                if (HAS_Z) gy[i] *= zv[i] * sigmoid(zv[i]);
            }
            store_pairs(&own.du[p.t][four * 4], p.t, delta, xv);
            *reinterpret_cast<float4*>(&own.go[p.t][four * 4]) = make_float4(gy[0], gy[1], gy[2], gy[3]);
        }
        staged();
        if (back < spans - 1) {
            add_up(f, shared, p, 0, span + SPAN, adders);
            adders = adders + 64 < 32 * WARPS ? adders + 64 : 0;
        }
        const Part* BC = shared.BC[buffer] + p.q * 4;
        buffer ^= 1;
        next_BC -= SPAN * OF_TOKEN;
        if (back > 0) stage(shared.BC[buffer], next_BC);
#if HAS_SEQ
        const float* resets = f.resets + p.row * f.s.l_padded + span;
#endif
        scaled4(h, first, 1.f);
        firsts[0] = first;
#pragma unroll 1
        for (int group = 1; group < SPAN / 4; group++) {
            const Part* const BC_at = BC + (group - 1) * 4 * OF_TOKEN;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 step = own_du[i >> 1][((group - 1) * 4 + i) * 8];
                float b[4];
                take(b, BC_at + i * OF_TOKEN);
#pragma unroll
                for (int j = 0; j < 4; j++) {
#if HAS_SEQ
                    const float a = exp2_fast(fmaf(step.x, A2[j], resets[(group - 1) * 4 + i]));
#else
                    const float a = exp2_fast(step.x * A2[j]);
#endif
                    h[j] = fmaf(a, h[j], step.y * b[j]);
                }
            }
            firsts[group * 32] = make_float4(h[0], h[1], h[2], h[3]);
        }
#pragma unroll 1
        for (int group = SPAN / 4 - 1; group >= 0; group--) {
            const float* const go_at = own_go + group * 4 * 8;
            const Part* const BC_at = BC + group * 4 * OF_TOKEN;
            float states[5][4], decays[4][4];
            scaled4(states[0], firsts[group * 32], 1.f);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 step = own_du[i >> 1][(group * 4 + i) * 8];
                float b[4];
                take(b, BC_at + i * OF_TOKEN);
#pragma unroll
                for (int j = 0; j < 4; j++) {
#if HAS_SEQ
                    decays[i][j] = exp2_fast(fmaf(step.x, A2[j], resets[group * 4 + i]));
#else
                    decays[i][j] = exp2_fast(step.x * A2[j]);
#endif
                    states[i + 1][j] = fmaf(decays[i][j], states[i][j], step.y * b[j]);
                }
            }
            float part_y[4], part_drive[4], part_decay[4];
            Sums of_B, of_C;
#pragma unroll
            for (int i = 3; i >= 0; i--) {
                const float2 step = own_du[i >> 1][(group * 4 + i) * 8];
                const float to_y = go_at[i * 8];
                float b[4], c[4];
                take(b, BC_at + i * OF_TOKEN);
                take(c, BC_at + i * OF_TOKEN + OF_C);
                part_y[i] = part_drive[i] = part_decay[i] = 0.f;
                if (i & 1) of_B.clear(), of_C.clear();
#pragma unroll
                for (int j = 0; j < 4; j++) g[j] = fmaf(c[j], to_y, g[j]);
                of_B.add(g, step.y, low[i & 1], rest[i & 1]);
                of_C.add(states[i + 1], to_y, low[i & 1], rest[i & 1]);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    if (HAS_Z) part_y[i] = fmaf(c[j], states[i + 1][j], part_y[i]);
                    part_drive[i] = fmaf(g[j], b[j], part_drive[i]);
                    g[j] *= decays[i][j];
                    const float w = g[j] * states[i][j];  // the gradient of delta A
                    part_decay[i] = fmaf(w, A2[j], part_decay[i]);
                    sum_A[j] = fmaf(w, step.x, sum_A[j]);
                }
                if (!(i & 1))
                    own_BC[(group * 2 + (i >> 1)) * 32] =
                        make_float4(of_B.first(upper), of_B.second(upper), of_C.first(upper), of_C.second(upper));
            }
            const float y = HAS_Z ? sum4(part_y, odd, high) : 0.f;
            const float drive = sum4(part_drive, odd, high), decay = sum4(part_decay, odd, high);
            float* const sums = own_sums + group * 4 * 8;
            if (HAS_Z) sums[0] = y;
            sums[SPAN * 8] = drive, sums[2 * SPAN * 8] = decay;
            if (group != SPAN / 8) continue;
            __syncthreads();
            add_up(f, shared, p, 1, span, adders);
            adders = adders + 64 < 32 * WARPS ? adders + 64 : 0;
        }
        __syncwarp();
        {
            float dtv[4], xv[4], gy[4], zv[4], g_x[4], g_dt[4], g_z[4], bias[4] = {}, skip[4] = {};
            if (HAS_BIAS) scaled4(bias, own.wide[0][four], 1.f);
            if (HAS_D) scaled4(skip, own.wide[1][four], 1.f);
            widen(raw_dt, dtv);
            widen(raw_x, xv);
            widen(raw_g, gy);
            widen(raw_z, zv);
            const int c = four * 4;
            float delta[4], to_y[4], y[4] = {}, drive[4], decay[4];
            first_of_pairs(&own.du[p.t][c], p.t, delta);
            scaled4(to_y, *reinterpret_cast<const float4*>(&own.go[p.t][c]), 1.f);
            if (HAS_Z) scaled4(y, *reinterpret_cast<const float4*>(&own.sums[0][p.t][c]), 1.f);
            scaled4(drive, *reinterpret_cast<const float4*>(&own.sums[1][p.t][c]), 1.f);
            scaled4(decay, *reinterpret_cast<const float4*>(&own.sums[2][p.t][c]), 1.f);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                g_x[i] = fmaf(drive[i], delta[i], skip[i] * to_y[i]);
                g_dt[i] = fmaf(decay[i], LN2, drive[i] * xv[i]);
                if (SOFTPLUS) g_dt[i] *= sigmoid(dtv[i] + bias[i]);
                if (HAS_Z) {
                    y[i] = fmaf(skip[i], xv[i], y[i]);
                    const float s = sigmoid(zv[i]);
                    g_z[i] = gy[i] * y[i] * fmaf(zv[i] * s, 1.f - s, s);
                }
                if (HAS_D) sum_D[i] = fmaf(to_y[i], xv[i], sum_D[i]);
                if (HAS_BIAS && inside) sum_bias[i] += g_dt[i];
            }
            const bool write = inside && p.active;
            store4(at(own.rows[GRAD_X][four], f.grad_x, t), g_x, write);
            store4(at(own.rows[GRAD_DT][four], f.grad_dt, t), g_dt, write);
            if (HAS_Z) store4(at(own.rows[GRAD_Z][four], f.grad_z, t), g_z, write);
        }
        __syncwarp();
    }
    __syncthreads();
    add_up(f, shared, p, 0, p.begin, adders);
    const i64 part = p.row * f.s.n_chunks + p.piece;
    // over tokens: lanes of the same parity hold the same channels
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int k = 2; k < 32; k *= 2) {
            sum_D[i] += __shfl_xor_sync(FULL, sum_D[i], k);
            sum_bias[i] += __shfl_xor_sync(FULL, sum_bias[i], k);
        }
    if (!p.active) return;
    *reinterpret_cast<float4*>(f.grad_A + (part * f.s.d + p.channel) * 16 + p.q * 4) = make_float4(sum_A[0], sum_A[1], sum_A[2], sum_A[3]);
    if (p.piece == 0)
        *reinterpret_cast<float4*>(f.grad_first + (p.row * f.s.d + p.channel) * 16 + p.q * 4) = make_float4(g[0], g[1], g[2], g[3]);
    if (p.lane < 2) {
#if HAS_D
        *reinterpret_cast<float4*>(f.grad_D + part * f.s.d + p.c4) = make_float4(sum_D[0], sum_D[1], sum_D[2], sum_D[3]);
#endif
#if HAS_BIAS
        *reinterpret_cast<float4*>(f.grad_bias + part * f.s.d + p.c4) = make_float4(sum_bias[0], sum_bias[1], sum_bias[2], sum_bias[3]);
#endif
    }
}
#endif
