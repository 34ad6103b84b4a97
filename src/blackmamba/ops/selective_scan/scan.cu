// The selective scan with 16 states, for NVIDIA GPUs: the same passes as in kernels.py, which explains them.
//
// A warp owns 8 channels of a row over a chunk of its tokens; a thread, 4 states of one channel. Warps walk over spans
// of 16 tokens without waiting for each other. What is done once for a token and channel (softplus, delta x, gate) is
// done by the thread that loads it, four channels of one token, and is handed to the others through the warp's own
// shared memory. A sum over a channel's states adds up over 4 threads, for 4 tokens at once, so that each thread ends
// with one of them; a sum over the channels likewise. What limits all this is shared memory, 128 bytes a clock: so what
// lies there is laid out for every bank to be used at once, and B and C stay as narrow as they came.
//
// Compiled at run time, without headers, with: TYPE (0 float32, 1 bfloat16, 2 float16), HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS,
// HAS_SEQ, HAS_FIRST, KEEP, LOCAL, NARROW_BC (each 0 or 1; NARROW_BC: B and C are bfloat16, and so is TYPE), COPIES
// (1 or 4: how often a token's B and C are there, see `order_of`), WARPS (of a block), MIN_BLOCKS (that a multiprocessor
// shall hold at once), SHARED (bytes of a block's shared memory) and KERNEL (which one: 0, 1 or 2, as they follow).
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

#define OF_TOKEN (32 * COPIES)  // numbers of B and C
#define OF_C (16 * COPIES)      // where C begins

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

// In the backward pass a thread's j-th number is of state j ^ order, so that in the sums over channels all threads hand
// on the same ones of their registers and need not select them.
__device__ __forceinline__ int order_of(int lane) { return lane >> 2 & 3; }
__device__ __forceinline__ void swap_if(bool wanted, float& a, float& b) {
    const float c = wanted ? b : a, d = wanted ? a : b;
    a = c, b = d;
}
__device__ __forceinline__ void reorder(float* v, int order) {
    swap_if(order & 1, v[0], v[1]), swap_if(order & 1, v[2], v[3]);
    swap_if(order & 2, v[0], v[2]), swap_if(order & 2, v[1], v[3]);
}
// Where a thread's four of B of a span are; with COPIES they lie there in all four orders.
__device__ __forceinline__ const Part* ordered(const Part* p, int q, int order) {
    return p + q * 4 + (COPIES == 4 ? order * 16 : 0);
}
__device__ __forceinline__ void take_ordered(float* out, const Part* p, int order) {
#if COPIES == 4
    take(out, p);
#else
#pragma unroll
    for (int j = 0; j < 4; j++) out[j] = p[j ^ order];
#endif
}

struct Rows {  // a tensor (b, l, d), channels contiguous
    Number* data;
    i64 row, token;  // strides
};

struct Sizes {
    int l, d, l_padded, n_chunks, chunk, n_blocks;
};

// Sums over the 4 threads of a channel of 4 numbers each; thread q gets the sum of the q-th.
__device__ __forceinline__ float sum4(const float* v, bool odd, bool high) {
    float a = odd ? v[1] : v[0], b = odd ? v[0] : v[1];
    float c = odd ? v[3] : v[2], e = odd ? v[2] : v[3];
    a += __shfl_xor_sync(FULL, b, 1);
    c += __shfl_xor_sync(FULL, e, 1);
    float keep = high ? c : a, send = high ? a : c;
    return keep + __shfl_xor_sync(FULL, send, 2);
}

extern __shared__ __align__(16) char memory[];
template <typename Shared>
__device__ __forceinline__ Shared& shared_as() {
    static_assert(sizeof(Shared) == SHARED, "cuda.py counts another size");
    return *reinterpret_cast<Shared*>(memory);
}

struct Place {  // of a warp and a thread
    int lane, warp, q, channel, piece, block, begin, end;
    i64 row;
    bool active;
    int t, c4;  // of the four channels of one token that it loads
};

__device__ __forceinline__ Place place_of(const Sizes& s) {
    Place p;
    int pid = blockIdx.x;
    p.lane = threadIdx.x & 31;
    p.warp = threadIdx.x >> 5;
    p.q = p.lane & 3;
    p.block = pid % s.n_blocks;
    p.piece = pid / s.n_blocks % s.n_chunks;
    p.row = pid / s.n_blocks / s.n_chunks;
    int first = (p.block * WARPS + p.warp) * 8;
    p.active = first < s.d;
    if (!p.active) first = 0;  // computes, but writes nothing
    p.channel = first + (p.lane >> 2);
    p.begin = p.piece * s.chunk;
    p.end = min(s.l, p.begin + s.chunk);
    p.t = p.lane >> 1;
    p.c4 = first + (p.lane & 1) * 4;
    return p;
}

// Where the four numbers are that a thread loads of the span in which it has token t.
__device__ __forceinline__ Number* at(const Rows& tensor, const Place& p, int t) {
    return tensor.data + p.row * tensor.row + t * tensor.token + p.c4;
}

__device__ __forceinline__ void scaled4(float* out, const float4& v, float by) {
    out[0] = v.x * by, out[1] = v.y * by, out[2] = v.z * by, out[3] = v.w * by;
}

// Pairs of four channels of one token, 32 bytes a thread; threads take turns so that no two meet in a bank.
__device__ __forceinline__ void store_pairs(float2* to, int lane, const float* a, const float* b) {
    const bool later = lane & 4;
    const float4 low = make_float4(a[0], b[0], a[1], b[1]), high = make_float4(a[2], b[2], a[3], b[3]);
    float4* at = reinterpret_cast<float4*>(to);
    at[later] = later ? high : low;
    at[!later] = later ? low : high;
}
__device__ __forceinline__ void first_of_pairs(const float2* from, int lane, float* a) {
    const bool later = lane & 4;
    const float4* at = reinterpret_cast<const float4*>(from);
    const float4 v = at[later], w = at[!later];
    a[0] = later ? w.x : v.x, a[1] = later ? w.z : v.z, a[2] = later ? v.x : w.x, a[3] = later ? v.z : w.z;
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
        float y[WARPS][SPAN][8];
        Part BC[2][SPAN * OF_TOKEN];
    };
    Shared& shared = shared_as<Shared>();
    const Place p = place_of(f.s);
    float2(*du)[8] = shared.du[p.warp];
    float(*ys)[8] = shared.y[p.warp];
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
    const Number* x = at(f.x, p, t);
    const Number* dt = at(f.dt, p, t);
    const Number* z = at(f.z, p, t);
    Number* y = at(f.y, p, t);
    const Part* next_BC = f.BC + (p.row * f.s.l_padded + p.begin) * OF_TOKEN;
    const float* resets = f.resets + p.row * f.s.l_padded + p.begin;
    int buffer = 0;
    stage(shared.BC[0], next_BC);
    Kept* starts = f.starts + ((p.row * (f.s.l_padded / SPAN) + p.begin / SPAN) * f.s.d + p.channel) * 16 + p.q * 4;
    const bool odd = p.q & 1, high = p.q & 2;
    float total = 0.f, any_reset = 0.f;

    bool inside = t < p.end;
    Four next_dt = load4(dt, inside), next_x = load4(x, inside), next_z = {};
    if (HAS_Z && !LOCAL) next_z = load4(z, inside);
    for (int span = p.begin; span < p.end; span += SPAN) {
        staged();
        const Part* BC = shared.BC[buffer] + p.q * 4;
        buffer ^= 1;
        next_BC += SPAN * OF_TOKEN;
        if (span + SPAN < p.end) stage(shared.BC[buffer], next_BC);
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
            store_pairs(&du[p.t][(p.lane & 1) * 4], p.lane, delta, drive);
        }
        __syncwarp();
        t += SPAN;
        inside = t < p.end;
        next_dt = load4(dt += SPAN * f.dt.token, inside);
        next_x = load4(x += SPAN * f.x.token, inside);
        if (HAS_Z && !LOCAL) next_z = load4(z += SPAN * f.z.token, inside);
#if KEEP && !LOCAL
        if (p.active) keep(starts, h);
        starts += (i64)f.s.d * 16;
#endif
#pragma unroll 2
        for (int group = 0; group < SPAN; group += 4) {
            float part[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 step = du[group + i][p.lane >> 2];
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
                part[i] = 0.f;
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
                    part[i] = fmaf(h[j], c[j], part[i]);
#endif
                }
            }
            BC += 4 * OF_TOKEN;
            resets += 4;
#if !LOCAL
            ys[group + p.q][p.lane >> 2] = sum4(part, odd, high);
#endif
        }
#if !LOCAL
        __syncwarp();
        const float4 sums = *reinterpret_cast<const float4*>(&ys[p.t][(p.lane & 1) * 4]);
        float out[4] = {sums.x, sums.y, sums.z, sums.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            out[i] = fmaf(skip[i], xv[i], out[i]);
            if (HAS_Z) out[i] *= zv[i] * sigmoid(zv[i]);
        }
        store4(y, out, mine && p.active);
        y += SPAN * f.y.token;
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
    const Number* dt = f.dt.data + p.row * f.dt.row + p.c4;
    const Number* z = f.z.data + p.row * f.z.row + p.c4;
    const Number* grad_y = f.grad_y.data + p.row * f.grad_y.row + p.c4;
    float total = 0.f, any_reset = 0.f;
    const int spans = (p.end - p.begin + SPAN - 1) / SPAN;
    int t = p.begin + (spans - 1) * SPAN + p.t;
    bool inside = t < p.end;
    Four next_dt = load4(dt + t * f.dt.token, inside), next_g = load4(grad_y + t * f.grad_y.token, inside), next_z = {};
    if (HAS_Z) next_z = load4(z + t * f.z.token, inside);
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
        store_pairs(&du[p.t][(p.lane & 1) * 4], p.lane, raw, gy);
        __syncwarp();
        t -= SPAN;
        inside = t >= p.begin;
        next_dt = load4(dt + t * f.dt.token, inside);
        next_g = load4(grad_y + t * f.grad_y.token, inside);
        if (HAS_Z) next_z = load4(z + t * f.z.token, inside);
#if HAS_SEQ
        const i64 token = p.row * f.s.l_padded + p.begin + back * SPAN;
#endif
#pragma unroll 4
        for (int i = SPAN - 1; i >= 0; i--) {
            const float2 step = du[i][p.lane >> 2];
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

// Every gradient; those of B and C as sums over the channels of a block, in `partial` (b, l / 4, blocks, 2, 16, 4).
// Keeps the states of 4 tokens and the gradients of state and A in registers, the states before each 4 tokens of a span
// in shared memory. Moves x, dt, z, the gradients of y, x, dt and z once, and the states before every span once. Bound by
// instructions.
#if KERNEL == 2
extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_backward(const Backward f) {
    struct Shared {
        float2 du[WARPS][SPAN][8];
        float go[WARPS][SPAN][8];  // gradient of y before the gate
        float sums[3][WARPS][SPAN][8];
        float4 first[WARPS][SPAN / 4][32];
        float of_BC[2][2][WARPS][4][40];  // of two groups, by warp; 40: so that the sums read all banks
        Part BC[2][SPAN * OF_TOKEN];
    };
    Shared& shared = shared_as<Shared>();
    const Place p = place_of(f.s);
    float2(*du)[8] = shared.du[p.warp];
    float(*go)[8] = shared.go[p.warp];
    const float2* const own_du = &du[0][p.lane >> 2];
    const float* const own_go = &go[0][p.lane >> 2];
    float* const own_sums = &shared.sums[0][p.warp][p.q][p.lane >> 2];
    constexpr int all_sums = WARPS * SPAN * 8;  // of one kind
    float4(*firsts)[32] = shared.first[p.warp];
    float A2[4], g[4], h[4], sum_A[4] = {0.f, 0.f, 0.f, 0.f};
    const int order = order_of(p.lane);
    scaled4(A2, *reinterpret_cast<const float4*>(f.A + p.channel * 16 + p.q * 4), LOG2E);
    reorder(A2, order);
    const i64 state = ((p.row * f.s.n_chunks + p.piece) * f.s.d + p.channel) * 16 + p.q * 4;
    scaled4(g, *reinterpret_cast<const float4*>(f.after + state), 1.f);
    reorder(g, order);
    if (!p.active) g[0] = g[1] = g[2] = g[3] = 0.f;  // nothing of it goes into the block's sums
    float sum_D[4] = {}, sum_bias[4] = {};
    const bool odd = p.q & 1, high = p.q & 2;
    const bool c_high = p.lane & 16;
    const int own = (c_high ? 16 : 0) + p.q * 4 + order;  // what it ends with, of a token's 16 sums for B and 16 for C
    const int spans = (p.end - p.begin + SPAN - 1) / SPAN;
    int turn = 0, buffer = 0;
    const Part* next_BC = f.BC + (p.row * f.s.l_padded + p.begin + (spans - 1) * SPAN) * OF_TOKEN;
    stage(shared.BC[0], next_BC);
    const Number* dt_at = f.dt.data + p.row * f.dt.row + p.c4;
    const Number* x_at = f.x.data + p.row * f.x.row + p.c4;
    const Number* gy_at = f.grad_y.data + p.row * f.grad_y.row + p.c4;
    const Number* z_at = f.z.data + p.row * f.z.row + p.c4;
    const Kept* starts =
        f.starts + ((p.row * (f.s.l_padded / SPAN) + p.begin / SPAN + spans - 1) * f.s.d + p.channel) * 16 + p.q * 4;
    for (int back = spans - 1; back >= 0; back--) {
        const int span = p.begin + back * SPAN;
        const int t = span + p.t;
        const bool inside = t < p.end;
        const Four raw_dt = load4(dt_at + t * f.dt.token, inside);
        const Four raw_x = load4(x_at + t * f.x.token, inside);
        const Four raw_g = load4(gy_at + t * f.grad_y.token, inside && p.active);
        Four raw_z = {};
        if (HAS_Z) raw_z = load4(z_at + t * f.z.token, inside);
        const float4 first = kept(starts);
        starts -= (i64)f.s.d * 16;
        if (back > 0) {
            soon(dt_at + (t - SPAN) * f.dt.token);
            soon(x_at + (t - SPAN) * f.x.token);
            soon(gy_at + (t - SPAN) * f.grad_y.token);
            if (HAS_Z) soon(z_at + (t - SPAN) * f.z.token);
            soon(starts);
        }
        {
            float delta[4], xv[4], gy[4], zv[4], bias[4] = {};
#if HAS_BIAS
            scaled4(bias, *reinterpret_cast<const float4*>(f.bias + p.c4), 1.f);
#endif
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
            store_pairs(&du[p.t][(p.lane & 1) * 4], p.lane, delta, xv);
            *reinterpret_cast<float4*>(&go[p.t][(p.lane & 1) * 4]) = make_float4(gy[0], gy[1], gy[2], gy[3]);
        }
        staged();
        const Part* BC = ordered(shared.BC[buffer], p.q, order);
        buffer ^= 1;
        next_BC -= SPAN * OF_TOKEN;
        if (back > 0) stage(shared.BC[buffer], next_BC);
#if HAS_SEQ
        const float* resets = f.resets + p.row * f.s.l_padded + span;
#endif
        scaled4(h, first, 1.f);
        reorder(h, order);
        firsts[0][p.lane] = make_float4(h[0], h[1], h[2], h[3]);
#pragma unroll 1
        for (int group = 1; group < SPAN / 4; group++) {
            const float2* const du_at = own_du + (group - 1) * 4 * 8;
            const Part* const BC_at = BC + (group - 1) * 4 * OF_TOKEN;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 step = du_at[i * 8];
                float b[4];
                take_ordered(b, BC_at + i * OF_TOKEN, order);
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
            firsts[group][p.lane] = make_float4(h[0], h[1], h[2], h[3]);
        }
#pragma unroll 1
        for (int group = SPAN / 4 - 1; group >= 0; group--) {
            const float2* const du_at = own_du + group * 4 * 8;
            const float* const go_at = own_go + group * 4 * 8;
            const Part* const BC_at = BC + group * 4 * OF_TOKEN;
            float states[5][4], decays[4][4];
            scaled4(states[0], firsts[group][p.lane], 1.f);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 step = du_at[i * 8];
                float b[4];
                take_ordered(b, BC_at + i * OF_TOKEN, order);
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
#pragma unroll
            for (int i = 3; i >= 0; i--) {
                const float2 step = du_at[i * 8];
                const float to_y = go_at[i * 8];
                float b[4], c[4], of_B[4], of_C[4];
                take_ordered(b, BC_at + i * OF_TOKEN, order);
                take_ordered(c, BC_at + i * OF_TOKEN + OF_C, order);
                part_y[i] = part_drive[i] = part_decay[i] = 0.f;
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    g[j] = fmaf(c[j], to_y, g[j]);
                    if (HAS_Z) part_y[i] = fmaf(c[j], states[i + 1][j], part_y[i]);
                    of_C[j] = states[i + 1][j] * to_y;
                    of_B[j] = g[j] * step.y;
                    part_drive[i] = fmaf(g[j], b[j], part_drive[i]);
                    g[j] *= decays[i][j];
                    const float w = g[j] * states[i][j];  // the gradient of delta A
                    part_decay[i] = fmaf(w, A2[j], part_decay[i]);
                    sum_A[j] = fmaf(w, step.x, sum_A[j]);
                }
                // over the 8 channels of the warp: each thread ends with one sum
                float v[4], u[2];
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    v[j] = of_B[2 * j] + __shfl_xor_sync(FULL, of_B[2 * j + 1], 4);
                    v[2 + j] = of_C[2 * j] + __shfl_xor_sync(FULL, of_C[2 * j + 1], 4);
                }
#pragma unroll
                for (int j = 0; j < 2; j++) u[j] = v[2 * j] + __shfl_xor_sync(FULL, v[2 * j + 1], 8);
                shared.of_BC[turn][group & 1][p.warp][i][own] = (c_high ? u[1] : u[0]) + __shfl_xor_sync(FULL, c_high ? u[0] : u[1], 16);
            }
            const float y = HAS_Z ? sum4(part_y, odd, high) : 0.f;
            const float drive = sum4(part_drive, odd, high), decay = sum4(part_decay, odd, high);
            float* const sums = own_sums + group * 4 * 8;
            if (HAS_Z) sums[0] = y;
            sums[all_sums] = drive, sums[2 * all_sums] = decay;
            if (group & 1) continue;
            __syncthreads();
#pragma unroll
            for (int first = 0; first < 2 * 128; first += 32 * WARPS) {  // the other half is written meanwhile
                const int k = first + threadIdx.x, i = k >> 7;
                if (256 % (32 * WARPS) != 0 && k >= 256) break;
                float sum = 0.f;  // over the warps, always in the same order
#pragma unroll
                for (int w = 0; w < WARPS; w++) sum += shared.of_BC[turn][i][w][k & 3][k >> 2 & 31];
                const i64 tile = (p.row * (f.s.l_padded / 4) + span / 4 + group + i) * f.s.n_blocks + p.block;
                f.partial[tile * 128 + (k & 127)] = sum;
            }
            turn ^= 1;
        }
        __syncwarp();
        {
            float dtv[4], xv[4], gy[4], zv[4], g_x[4], g_dt[4], g_z[4], bias[4] = {}, skip[4] = {};
#if HAS_BIAS
            scaled4(bias, *reinterpret_cast<const float4*>(f.bias + p.c4), 1.f);
#endif
#if HAS_D
            scaled4(skip, *reinterpret_cast<const float4*>(f.D + p.c4), 1.f);
#endif
            widen(raw_dt, dtv);
            widen(raw_x, xv);
            widen(raw_g, gy);
            widen(raw_z, zv);
            const int c = (p.lane & 1) * 4;
            float delta[4], to_y[4], y[4] = {}, drive[4], decay[4];
            first_of_pairs(&du[p.t][c], p.lane, delta);
            scaled4(to_y, *reinterpret_cast<const float4*>(&go[p.t][c]), 1.f);
            if (HAS_Z) scaled4(y, *reinterpret_cast<const float4*>(&shared.sums[0][p.warp][p.t][c]), 1.f);
            scaled4(drive, *reinterpret_cast<const float4*>(&shared.sums[1][p.warp][p.t][c]), 1.f);
            scaled4(decay, *reinterpret_cast<const float4*>(&shared.sums[2][p.warp][p.t][c]), 1.f);
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
            store4(at(f.grad_x, p, t), g_x, write);
            store4(at(f.grad_dt, p, t), g_dt, write);
            if (HAS_Z) store4(at(f.grad_z, p, t), g_z, write);
        }
        __syncwarp();
    }
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
    reorder(sum_A, order), reorder(g, order);
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
