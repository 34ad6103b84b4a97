// The selective scan with 16 states, for NVIDIA GPUs: the same passes as in kernels.py, which explains them.
//
// A warp owns 8 channels of a row over a chunk of its tokens; a thread, 4 states of one channel. Warps walk over spans
// of 16 tokens. What is done once for a token and channel (softplus, delta x, gate) is done by the thread that loads it,
// four channels of one token, and is handed to the others through shared memory. A sum over a channel's states adds up over
// 4 threads, in the backward pass as a product of matrices, see `over_states`; a sum over channels is one too, see `Turned`.
// What limits all this is instructions, and next to them shared memory, 128 bytes a clock: what lies there is laid out for
// every bank to be used at once.
//
// Compiled at run time, without headers, with: TYPE (0 float32, 1 bfloat16, 2 float16), HAS_D, HAS_Z, HAS_BIAS, SOFTPLUS,
// HAS_SEQ, HAS_FIRST, KEEP, LOCAL (each 0 or 1), SHORT_BC (1: no number of B and C has more than 11 bits), WARPS (of a
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
__device__ __forceinline__ void keep4(float* p, const float* v) { *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]); }
#if TYPE == 1
__device__ __forceinline__ void keep4(u16* p, const float* v) { *reinterpret_cast<Four*>(p) = narrow(v); }
#endif
__device__ __forceinline__ Four load4(const Number* p, bool inside) {
    Four v = {};
    if (inside) v = *reinterpret_cast<const Four*>(p);
    return v;
}
__device__ __forceinline__ void store4(Number* p, const float* in, bool inside) {
    if (inside) *reinterpret_cast<Four*>(p) = narrow(in);
}

#define OF_TOKEN 32  // numbers of B and C

__device__ __forceinline__ void take(float* out, const float* p) {
    const float4 v = *reinterpret_cast<const float4*>(p);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}
#if TYPE == 1
typedef u16 Kept;  // states for the backward pass
typedef Four FourKept;
__device__ __forceinline__ float4 kept(const Kept* p) {
    float v[4];
    widen(*reinterpret_cast<const Four*>(p), v);
    return make_float4(v[0], v[1], v[2], v[3]);
}
__device__ __forceinline__ void keep(Kept* p, const float* h) { *reinterpret_cast<Four*>(p) = narrow(h); }
#else
typedef float Kept;
typedef float4 FourKept;
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

// The same with 4 columns of A and rows of B: of A (16 x 4) a thread has (g, k) and (g + 8, k), of B (4 x 8) (k, g).
__device__ __forceinline__ void multiply_add(float* d, float a0, float a1, float b) {
    asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(b)));
}

// Products of a number u of each of 8 channels and B, for two tokens of four. Thread 4 c + q gives u of channel c and token
// q, in two parts if EXACT, and of that token B's numbers 2 c and 2 c + 1. It gets, of channel c and the first token, states 4 q and
// 4 q + 2 in even[0..1], 4 q + 1 and 4 q + 3 in odd[0..1]; of the second in [2..3].
template <bool EXACT>
__device__ __forceinline__ void outer(float* even, float* odd, float rough, float rest, bool first, bool second, const float2& b) {
    const float u0 = first ? rough : 0.f, u1 = second ? rough : 0.f, rest0 = first ? rest : 0.f, rest1 = second ? rest : 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) even[i] = odd[i] = 0.f;
#if !SHORT_BC
    multiply_add(even, u0, u1, b.x - high_part(b.x));
    multiply_add(odd, u0, u1, b.y - high_part(b.y));
#endif
    if (EXACT) multiply_add(even, rest0, rest1, b.x), multiply_add(odd, rest0, rest1, b.y);
    multiply_add(even, u0, u1, b.x);
    multiply_add(odd, u0, u1, b.y);
}

// Sums over states of h times C, for two tokens of eight. Thread 4 c + q gives states 4 q to 4 q + 3 of channel c of both,
// and of C those of the c-th token. It gets in sums[0] the first token's, if that is the 2 q-th, and in sums[3] the
// second's, if that is the next. For bfloat16, which keeps 8 bits of a sum, 11 of a state do.
__device__ __forceinline__ void over_states(float* sums, const float* first, const float* second, const float4& c) {
    const float v[2][4] = {{first[0], second[0], first[1], second[1]}, {first[2], second[2], first[3], second[3]}};
    sums[0] = sums[1] = sums[2] = sums[3] = 0.f;
    multiply_add(sums, v[0], c.x, c.y);
    multiply_add(sums, v[1], c.z, c.w);
#if TYPE != 1
    float rest[2][4];
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int j = 0; j < 4; j++) rest[k][j] = v[k][j] - high_part(v[k][j]);
    multiply_add(sums, rest[0], c.x, c.y);
    multiply_add(sums, rest[1], c.z, c.w);
#if !SHORT_BC
    multiply_add(sums, v[0], c.x - high_part(c.x), c.y - high_part(c.y));
    multiply_add(sums, v[1], c.z - high_part(c.z), c.w - high_part(c.w));
#endif
#endif
}

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

__device__ __forceinline__ Place place_of(const Sizes& s, int q, int c) {
    Place p;
    int pid = blockIdx.x;
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

struct Reader {  // what a thread reads and writes of x, dt, z and others: four channels of one token, its neighbour the next four
    int t, warp, c, c4;  // who scans the channels, as that warp's c-th to c + 3-rd
    bool active;
};
__device__ __forceinline__ Reader reader_of(const Sizes& s, const Place& p) {
    Reader r;
    r.t = (int)threadIdx.x / (2 * WARPS);
    const int part = (int)threadIdx.x % (2 * WARPS);
    r.warp = part >> 1;
    r.c = (part & 1) * 4;
    r.c4 = p.block * WARPS * 8 + part * 4;
    r.active = r.c4 < s.d;
    if (!r.active) r.c4 = 0;
    return r;
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

struct Staged {  // B and C of a span
    float B[SPAN][16];
    float C[SPAN][16];
};
// They are on their way to shared memory, 16 bytes a thread.
__device__ __forceinline__ void stage(Staged& to, const float* from) {
#pragma unroll
    for (int first = 0; first < SPAN * 8; first += 32 * WARPS) {
        const int i = first + threadIdx.x, token = i >> 3, four = (i & 7) * 4;
        if (i >= SPAN * 8) return;
        const float* const source = from + i * 4;
        float* const target = four < 16 ? &to.B[token][four] : &to.C[token][four - 16];
        const u32 address = (u32)__cvta_generic_to_shared(target);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(source) : "memory");
    }
}
__device__ __forceinline__ void staged() {  // what was staged is there, and the block is done with what was before
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
}
// Addresses in shared memory that stay in registers: what goes through a shuffle the compiler cannot compute again where
// it is used, which took it four instructions each time.
__device__ __forceinline__ u32 address_of(const void* p) {
    return __shfl_sync(FULL, (u32)__cvta_generic_to_shared(p), threadIdx.x & 31);
}
__device__ __forceinline__ float load1(u32 from) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(from) : "memory");
    return v;
}
__device__ __forceinline__ float2 load2(u32 from) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from) : "memory");
    return v;
}
__device__ __forceinline__ float4 load4(u32 from) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(from) : "memory");
    return v;
}
__device__ __forceinline__ void store4(u32 to, float a, float b, float c, float d) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
// Without a branch.
__device__ __forceinline__ void store2_if(bool condition, u32 to, float a, float b) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %0, 0; @p st.shared.v2.f32 [%1], {%2, %3};}"
        ::"r"((u32)condition), "r"(to), "f"(a), "f"(b) : "memory");
}
// Four numbers on their way to shared memory, or zeros.
template <typename T>
__device__ __forceinline__ void fetch(T* to, const void* from, bool inside) {
    const u32 address = (u32)__cvta_generic_to_shared(to);
    constexpr int bytes = sizeof(T);
    static_assert(bytes == 8 || bytes == 16, "what can be copied at once, and here is");
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(bytes), "r"(inside ? bytes : 0) : "memory");
}
__device__ __forceinline__ void fetched() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// ---- forward ---------------------------------------------------------------------------------------------------
// Keeps states and A in registers. Moves x, dt, z and y once. Bound by exponentials: 18 for each number of y.
// LOCAL: only what the chunk leaves (ends) and what is left of what it began with (decays).

struct Forward {
    Rows x, dt, z, y;
    const float* A;
    const float* BC;
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
        Staged BC[2];
    };
    Shared& shared = shared_as<Shared>();
    const Place p = place_of(f.s, threadIdx.x >> 3 & 3, threadIdx.x & 7);
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
    const float* next_BC = f.BC + (p.row * f.s.l_padded + p.begin) * OF_TOKEN;
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
        const Staged& BC = shared.BC[buffer];
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
#pragma unroll
        for (int group = 0; group < SPAN; group += 4) {
            float parts[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 step = own_du[i >> 1][(group + i) * 8];
                float b[4];
                take(b, &BC.B[group + i][p.q * 4]);
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
                take(c, &BC.C[group + i][p.q * 4]);
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
                parts[i] = part;
#endif
            }
#if !LOCAL
#pragma unroll
            for (int i = 0; i < 4; i++) own_y[(group + i) * 40] = parts[i];
#endif
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
    const float* BC;
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
        Staged BC[2];
    };
    Shared& shared = shared_as<Shared>();
    const Place p = place_of(f.s, threadIdx.x >> 3 & 3, threadIdx.x & 7);
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
    const float* next_BC = f.BC + (p.row * f.s.l_padded + p.begin + (spans - 1) * SPAN) * OF_TOKEN;
    int buffer = 0;
    stage(shared.BC[0], next_BC);
    for (int back = spans - 1; back >= 0; back--) {
        staged();
        const float* C_at = &shared.BC[buffer].C[0][p.q * 4];
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
            take(c, C_at + i * 16);
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
#if TYPE == 1
typedef u16 Short;
#else
typedef float Short;
#endif

// D += A B with bfloat16, a pair to a register: of A (16 x 16) a thread has (g, 2 k), (g + 8, 2 k), (g, 2 k + 8),
// (g + 8, 2 k + 8), each with the next column, of B (16 x 8) (2 k, g) and (2 k + 8, g), each with the next row.
__device__ __forceinline__ void multiply_add_pairs(float* d, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Four matrices of 8 x 8 bfloat16 numbers, transposed: of the i-th, whose rows of 16 bytes are named by lanes 8 i to
// 8 i + 7, a thread gets column g, rows 2 k and 2 k + 1.
__device__ __forceinline__ void load_transposed(u32* r, u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}

// Sums over a warp's 8 channels, for each of 4 tokens and 16 states, of g times one number of the channel and of h times
// another: gradients of B and of C. What threads 4 c + q give is turned by way of shared memory, so that states are rows of
// A and channels its columns; columns of B are the tokens, for g and for h. Thread 4 r + k gets those of token k: of g if
// r < 4, else of h; states r % 4, and 4, 8 and 12 behind. Bfloat16 numbers are summed as such, others are read in parts.
struct Turned {
#if TYPE == 1
    uint4 rows[4][8][4];  // of a token, a channel: states 4 q to 4 q + 3 of g and of h, in place q ^ c / 2 % 4 for all banks
#else
    float rows[4][2][8][20];  // of a token, g or h, a channel
#endif
    // Where a thread puts what it gives, and takes what it sums.
    __device__ __forceinline__ u32 to_put(int c, int q) const {
#if TYPE == 1
        return address_of(&rows[0][c][q ^ (c >> 1 & 3)]);
#else
        return address_of(&rows[0][0][c][q * 4]);
#endif
    }
    __device__ __forceinline__ u32 to_take(int lane) const {
#if TYPE == 1
        const int row = lane & 7, matrix = lane >> 3;
        return address_of(&rows[matrix >> 1][row][(matrix & 1) ^ (row >> 1 & 3)]);
#else
        return address_of(&rows[0][lane >> 4][lane & 3][lane >> 2 & 3]);
#endif
    }
    __device__ __forceinline__ static void put(u32 to, int token, const float* g, const float* h) {
        to += token * sizeof(rows[0]);
#if TYPE == 1
        const uint2 low = narrow(g), high = narrow(h);
        store4(to, __uint_as_float(low.x), __uint_as_float(low.y), __uint_as_float(high.x), __uint_as_float(high.y));
#else
        store4(to, g[0], g[1], g[2], g[3]);
        store4(to + sizeof(rows[0][0]), h[0], h[1], h[2], h[3]);
#endif
    }
    __device__ __forceinline__ static float4 sums(u32 from, u32 by, int lane) {
        // by: of token r / 2, of g or h as r is even or not, channel 2 k, or k if they are not in pairs
        const int r = lane >> 2;
        float d[2][4] = {};
#if TYPE == 1
        const u32 pair = __float_as_uint(load1(by));
        const int step = lane & 4 ? -32 : 32;  // to the other half of a row's places
#pragma unroll
        for (int token = 0; token < 4; token += 2) {
            const u32 b0 = r >> 1 == token ? pair : 0, b1 = r >> 1 == token + 1 ? pair : 0;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 a[4];
                load_transposed(a, (half ? from + step : from) + token * sizeof(rows[0]));
                multiply_add_pairs(d[half], a, b0, b1);
            }
        }
#else
        const float low = load1(by), high = load1(by + 4 * sizeof(float));
#pragma unroll
        for (int token = 0; token < 4; token++) {
            const float b0 = r >> 1 == token ? low : 0.f, b1 = r >> 1 == token ? high : 0.f;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const u32 at = from + token * sizeof(rows[0]) + half * 8 * sizeof(float), on = 4 * sizeof(rows[0][0][0]);
                const float a[4] = {load1(at), load1(at + 16), load1(at + on), load1(at + on + 16)};
#if TYPE == 0
                float rest[4];
#pragma unroll
                for (int i = 0; i < 4; i++) rest[i] = a[i] - high_part(a[i]);
                multiply_add(d[half], rest, b0, b1);
                multiply_add(d[half], a, b0 - high_part(b0), b1 - high_part(b1));
#endif
                multiply_add(d[half], a, b0, b1);
            }
        }
#endif
        const bool first = r < 4;
        return make_float4(first ? d[0][0] : d[0][1], first ? d[0][2] : d[0][3], first ? d[1][0] : d[1][1], first ? d[1][2] : d[1][3]);
    }
};

struct OfWarp {
    float delta[SPAN / 4][8][4];  // by fours of tokens, channels and tokens
    float drive[SPAN / 4][8][4];  // delta x
    float to_y[SPAN / 4][8][4];  // gradient of y before the gate
    Short by[SPAN][2][8];  // drive and to_y, of a token
    Turned turned;
    float4 first[SPAN / 4][32];  // states before tokens; then, by channels, what has been summed over those tokens' states
    float4 of_BC[SPAN / 4][32];
    // What a thread would else have no registers for, of its own four channels: `bias` and D, where its row is.
    float4 wide[2][2];
    Number* rows[7][2];
    // What a thread reads of a span and the next, and the states before them.
    Four read[2][4][32];
    FourKept kept[2][32];
};
struct Shared {
    OfWarp of[WARPS];
    Staged BC[2];
};
enum { X, DT, Z, GRAD_Y, GRAD_X, GRAD_DT, GRAD_Z };
enum { OF_Y, OF_DRIVE, OF_DECAY };
#define OFFSET(member) ((u32)(unsigned long long)&reinterpret_cast<OfWarp*>(0)->member)
__device__ __forceinline__ float* sum_at(OfWarp& of, int which, int c, int token) {
    return reinterpret_cast<float*>(of.first[token / 4]) + (which * 8 + c) * 4 + token % 4;
}

// The sums of a span over the warps, always in the same order, by 128 threads from the `first` on or by those before it.
__device__ __forceinline__ void add_up(const Backward& f, const Shared& shared, const Place& p, int span, int first) {
    int task = (int)threadIdx.x - first;
    if (task < 0) task += 32 * WARPS;
    for (; task < 128; task += 32 * WARPS) {
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float4 v = shared.of[w].of_BC[task >> 5][task & 31];
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        const int tile = ((int)p.row * (f.s.l_padded / 4) + span / 4 + (task >> 5)) * f.s.n_blocks + p.block;
        shifted(reinterpret_cast<float4*>(f.partial), tile, 512)[task & 31] = sum;
    }
}

// The decays and states of two tokens, the first two or last two of four: states[0] is given.
__device__ __forceinline__ void recompute(
    float (*states)[4], float (*decays)[4], const float* A2, const float* delta, float drive, const float2& B, int q, int pair,
    const float* resets) {
    constexpr bool exact = TYPE != 1;  // 11 bits do where the states that begin a span have 8
    const float rough = exact ? high_part(drive) : drive, rest = drive - rough;
    float even[4], odd[4];
    outer<exact>(even, odd, rough, rest, q == pair * 2, q == pair * 2 + 1, B);
#pragma unroll
    for (int e = 0; e < 2; e++) {
        const float drives[4] = {even[e * 2], odd[e * 2], even[e * 2 + 1], odd[e * 2 + 1]};
#pragma unroll
        for (int j = 0; j < 4; j++) {
#if HAS_SEQ
            decays[e][j] = exp2_fast(fmaf(delta[e], A2[j], resets[e]));
#else
            decays[e][j] = exp2_fast(delta[e] * A2[j]);
#endif
            states[e + 1][j] = fmaf(decays[e][j], states[e][j], drives[j]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_backward(const Backward f) {
    Shared& shared = shared_as<Shared>();
    const Place p = place_of(f.s, threadIdx.x & 3, threadIdx.x >> 2 & 7);
    OfWarp& own = shared.of[p.warp];
    float A2[4], g[4], sum_A[4] = {0.f, 0.f, 0.f, 0.f};
    scaled4(A2, *reinterpret_cast<const float4*>(f.A + p.channel * 16 + p.q * 4), LOG2E);
    const i64 state = ((p.row * f.s.n_chunks + p.piece) * f.s.d + p.channel) * 16 + p.q * 4;
    scaled4(g, *reinterpret_cast<const float4*>(f.after + state), 1.f);
    if (!p.active) g[0] = g[1] = g[2] = g[3] = 0.f;  // nothing of it goes into the block's sums
    const Reader r = reader_of(f.s, p);
    OfWarp& other = shared.of[r.warp];
    float sum_D[4] = {}, sum_bias[4] = {};
    const int spans = (p.end - p.begin + SPAN - 1) / SPAN;
    int adders = 0;
    const float* next_BC = f.BC + (p.row * f.s.l_padded + p.begin + (spans - 1) * SPAN) * OF_TOKEN;
    stage(shared.BC[0], next_BC);
    int buffer = 0;
    if (p.lane < 2) {
        const Rows* const all[7] = {&f.x, &f.dt, &f.z, &f.grad_y, &f.grad_x, &f.grad_dt, &f.grad_z};
#pragma unroll
        for (int k = 0; k < 7; k++) own.rows[k][p.lane] = row_of(*all[k], p);
        if (HAS_BIAS) own.wide[0][p.lane] = *reinterpret_cast<const float4*>(f.bias + p.c4);
        if (HAS_D) own.wide[1][p.lane] = *reinterpret_cast<const float4*>(f.D + p.c4);
    }
    __syncthreads();
    const int four = r.c >> 2;  // which of the warp's
    const Kept* const starts =
        f.starts + ((p.row * (f.s.l_padded / SPAN) + p.begin / SPAN) * f.s.d + p.channel) * 16 + p.q * 4;
    const int of_span = f.s.d * 16 * (int)sizeof(Kept);
    const u32 by_channel = address_of(reinterpret_cast<char*>(&own) + p.c * 16), by_lane = address_of(reinterpret_cast<char*>(&own) + p.lane * 16);
    const u32 drive_at = address_of(&own.drive[0][p.c][p.q]);
    const u32 by_at = address_of(TYPE == 1 ? &own.by[p.c >> 1][p.c & 1][p.q * 2] : &own.by[p.c >> 1][p.c & 1][p.q]);
    const u32 put_at = own.turned.to_put(p.c, p.q), take_at = own.turned.to_take(p.lane);
    // of B and C: four states of token c; two of token q, of channel c; four of a token
    u32 four_at = address_of(&shared.BC[0].B[p.c][p.q * 4]), two_at = address_of(&shared.BC[0].B[p.q][p.c * 2]);
    u32 C_at = address_of(&shared.BC[0].C[0][p.q * 4]);
    int other_BC = sizeof(Staged);
    const auto fetch_span = [&](int back, int buffer) {
        const int t = p.begin + back * SPAN + r.t;
        const bool inside = t < p.end;
        fetch(&own.read[buffer][X][p.lane], at(other.rows[X][four], f.x, t), inside);
        fetch(&own.read[buffer][DT][p.lane], at(other.rows[DT][four], f.dt, t), inside);
        if (HAS_Z) fetch(&own.read[buffer][Z][p.lane], at(other.rows[Z][four], f.z, t), inside);
        fetch(&own.read[buffer][GRAD_Y][p.lane], at(other.rows[GRAD_Y][four], f.grad_y, t), inside && r.active);
        fetch(&own.kept[buffer][p.lane], shifted(starts, back, of_span), true);
    };
    fetch_span(spans - 1, 0);
    for (int back = spans - 1; back >= 0; back--) {
        const int span = p.begin + back * SPAN;
        const int t = span + r.t;
        const bool inside = t < p.end;
        const Four(*const read)[32] = own.read[buffer];
        fetched();
        const float4 first = kept(reinterpret_cast<const Kept*>(&own.kept[buffer][p.lane]));
        {
            float delta[4], xv[4], gy[4], zv[4], bias[4] = {};
            if (HAS_BIAS) scaled4(bias, other.wide[0][four], 1.f);
            widen(read[DT][p.lane], delta);
            widen(read[X][p.lane], xv);
            widen(read[GRAD_Y][p.lane], gy);
            if (HAS_Z) widen(read[Z][p.lane], zv);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                delta[i] += bias[i];
                if (SOFTPLUS) delta[i] = softplus(delta[i]);
                if (!inside) delta[i] = 0.f;
                xv[i] *= delta[i];
                if (HAS_Z) gy[i] *= zv[i] * sigmoid(zv[i]);
                other.delta[r.t >> 2][r.c + i][r.t & 3] = delta[i];
                other.drive[r.t >> 2][r.c + i][r.t & 3] = xv[i];
                other.to_y[r.t >> 2][r.c + i][r.t & 3] = gy[i];
            }
            keep4(&other.by[r.t][0][r.c], xv);
            keep4(&other.by[r.t][1][r.c], gy);
        }
        __syncthreads();
        buffer ^= 1;
        next_BC -= SPAN * OF_TOKEN;
        if (back > 0) {
            stage(shared.BC[buffer], next_BC);
            fetch_span(back - 1, buffer);
        }
#if HAS_SEQ
        const float* const resets = f.resets + p.row * f.s.l_padded + span;
#else
        const float* const resets = nullptr;
#endif
        {
            float h[3][4], decays[2][4];
            scaled4(h[0], first, 1.f);
            store4(by_lane + OFFSET(first), first.x, first.y, first.z, first.w);
#pragma unroll
            for (int group = 0; group < SPAN / 4; group++) {
                float delta[4];
                scaled4(delta, load4(by_channel + OFFSET(delta) + group * 128), 1.f);
                const float2 B = load2(two_at + group * 256);
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    if (group == SPAN / 4 - 1) break;
                    recompute(h, decays, A2, delta + pair * 2, load1(drive_at + group * 128), B, p.q, pair, resets + group * 4 + pair * 2);
                    if (pair == 1)
                        store4(by_lane + OFFSET(first) + (group + 1) * 512, h[2][0], h[2][1], h[2][2], h[2][3]);
#pragma unroll
                    for (int j = 0; j < 4; j++) h[0][j] = h[2][j];
                }
            }
        }
#pragma unroll 1
        for (int half = 1; half >= 0; half--) {
            const float4 B = load4(four_at + half * 512);
            const float4 C = load4(four_at + sizeof(float) * 16 * SPAN + half * 512);
#pragma unroll
            for (int part = 1; part >= 0; part--) {
                const int group = half * 2 + part;
                float delta[4], to_y[4];
                scaled4(delta, load4(by_channel + OFFSET(delta) + group * 128), 1.f);
                scaled4(to_y, load4(by_channel + OFFSET(to_y) + group * 128), 1.f);
                const float2 B_pair = load2(two_at + group * 256);
                __syncwarp();
                float all_states[5][4], all_decays[4][4];
                scaled4(all_states[0], load4(by_lane + OFFSET(first) + group * 512), 1.f);
                __syncwarp();
#pragma unroll
                for (int pair = 0; pair < 2; pair++)
                    recompute(
                        all_states + pair * 2, all_decays + pair * 2, A2, delta + pair * 2, load1(drive_at + group * 128), B_pair, p.q,
                        pair, resets + group * 4 + pair * 2);
#pragma unroll
                for (int pair = 1; pair >= 0; pair--) {
                    float after[2][4], of_decay[2][4], sums[3][4];
                    float(*const states)[4] = all_states + pair * 2, (*const decays)[4] = all_decays + pair * 2;
#pragma unroll
                    for (int e = 1; e >= 0; e--) {
                        const int i = pair * 2 + e;
                        float c[4];
                        scaled4(c, load4(C_at + (group * 4 + i) * 64), 1.f);
#pragma unroll
                        for (int j = 0; j < 4; j++) after[e][j] = g[j] = fmaf(c[j], to_y[i], g[j]);
                        Turned::put(put_at, i, after[e], states[e + 1]);
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            g[j] *= decays[e][j];
                            const float w = g[j] * states[e][j];  // the gradient of delta A
                            of_decay[e][j] = w * A2[j];
                            sum_A[j] = fmaf(w, delta[i], sum_A[j]);
                        }
                    }
                    if (HAS_Z) over_states(sums[OF_Y], states[1], states[2], C);
                    over_states(sums[OF_DRIVE], after[0], after[1], B);
                    over_states(sums[OF_DECAY], of_decay[0], of_decay[1], make_float4(1.f, 1.f, 1.f, 1.f));
                    const u32 summed = by_channel + OFFSET(first) + group * 512 + pair * 8;
#pragma unroll
                    for (int k = HAS_Z ? OF_Y : OF_DRIVE; k <= OF_DECAY; k++)
                        store2_if(p.q == part * 2 + pair, summed + k * 128, sums[k][0], sums[k][3]);
                }
                __syncwarp();
                const float4 total = Turned::sums(take_at, by_at + group * (u32)sizeof(own.by[0]) * 4, p.lane);
                store4(by_lane + OFFSET(of_BC) + group * 512, total.x, total.y, total.z, total.w);
            }
        }
        __syncthreads();
        add_up(f, shared, p, span, adders);
        four_at += other_BC, two_at += other_BC, C_at += other_BC;
        other_BC = -other_BC;
        adders = adders + 128 < 32 * WARPS ? adders + 128 : adders + 128 - 32 * WARPS;
        {
            float dtv[4], xv[4], gy[4], zv[4], g_x[4], g_dt[4], g_z[4], bias[4] = {}, skip[4] = {};
            if (HAS_BIAS) scaled4(bias, other.wide[0][four], 1.f);
            if (HAS_D) scaled4(skip, other.wide[1][four], 1.f);
            widen(read[DT][p.lane], dtv);
            widen(read[X][p.lane], xv);
            widen(read[GRAD_Y][p.lane], gy);
            if (HAS_Z) widen(read[Z][p.lane], zv);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int c = r.c + i;
                const float delta = other.delta[r.t >> 2][c][r.t & 3], drive = *sum_at(other, OF_DRIVE, c, r.t), decay = *sum_at(other, OF_DECAY, c, r.t);
                float to_y = gy[i];
                if (HAS_Z) {
                    const float s = sigmoid(zv[i]), y = fmaf(skip[i], xv[i], *sum_at(other, OF_Y, c, r.t));
                    to_y *= zv[i] * s;
                    g_z[i] = gy[i] * y * fmaf(zv[i] * s, 1.f - s, s);
                }
                g_x[i] = fmaf(drive, delta, skip[i] * to_y);
                g_dt[i] = fmaf(decay, LN2, drive * xv[i]);
                if (SOFTPLUS) g_dt[i] *= sigmoid(dtv[i] + bias[i]);
                if (HAS_D) sum_D[i] = fmaf(to_y, xv[i], sum_D[i]);
                if (HAS_BIAS && inside) sum_bias[i] += g_dt[i];
            }
            const bool write = inside && r.active;
            store4(at(other.rows[GRAD_X][four], f.grad_x, t), g_x, write);
            store4(at(other.rows[GRAD_DT][four], f.grad_dt, t), g_dt, write);
            if (HAS_Z) store4(at(other.rows[GRAD_Z][four], f.grad_z, t), g_z, write);
        }
    }
    const i64 part = p.row * f.s.n_chunks + p.piece;
    // over tokens: a channel's sums are in 16 threads, then in 4
#pragma unroll
    for (int i = 0; i < 4; i++) other.delta[r.t >> 2][r.c + i][r.t & 3] = sum_D[i], other.drive[r.t >> 2][r.c + i][r.t & 3] = sum_bias[i];
    __syncthreads();
    float all_D = 0.f, all_bias = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) all_D += own.delta[p.q][p.c][i], all_bias += own.drive[p.q][p.c][i];
#pragma unroll
    for (int k = 1; k < 4; k *= 2) {
        all_D += __shfl_xor_sync(FULL, all_D, k);
        all_bias += __shfl_xor_sync(FULL, all_bias, k);
    }
    if (!p.active) return;
    *reinterpret_cast<float4*>(f.grad_A + (part * f.s.d + p.channel) * 16 + p.q * 4) = make_float4(sum_A[0], sum_A[1], sum_A[2], sum_A[3]);
    if (p.piece == 0)
        *reinterpret_cast<float4*>(f.grad_first + (p.row * f.s.d + p.channel) * 16 + p.q * 4) = make_float4(g[0], g[1], g[2], g[3]);
    if (HAS_D && p.q == 0) f.grad_D[part * f.s.d + p.channel] = all_D;
    if (HAS_BIAS && p.q == 0) f.grad_bias[part * f.s.d + p.channel] = all_bias;
}
#endif
