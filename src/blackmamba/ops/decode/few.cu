// A matrix times the vectors of up to 16 sequences, in bfloat16 with float32 sums: out = W v, and what a one-token step does
// before and after it.
//
// Matrix units multiply 16 vectors with 8 rows of W at a time. Which columns they take for the same is of no matter to a sum,
// so a thread (4 g + k) has 8 columns that lie side by side, from 8 k on, of row g and of vectors g and g + 8: 16 bytes at
// once. An item is 8 TILES rows, of which each warp has every WARPS-th 32 columns; the warps' sums are added up in shared
// memory, always in the same order. A block does as many items as others do, one after the other. Each thread copies what it
// will need of W to shared memory itself, STAGES items ahead and before the kernel ahead of this one has ended (OVERLAP), so
// that it waits for no other. Vectors stay in registers from item to item. Moves W once, and the vectors, out of the L2
// cache, for each block. Bound by the bytes of W.
//
// NORM: v = x / sqrt(mean(x^2) + eps) * norm_weight of the float32 stream x. The sums are of x norm_weight, in bfloat16, and
// scaled at last.
// ROUTED: of EXPERTS matrices, at most 32, each with the sequences that chose it.
// FORM: what is done with sums,
//   KEEP    out = sum, of OUT's type
//   CONV    the first half of the rows go through the causal convolution, whose memory moves on, and SiLU
//   ADD     out += sum, times the gate if ROUTED: the stream
//   GATED   out = act(g) u, of rows g, and u ROWS further
//
// Compiled at run time, without headers, with: WIDTH (columns of W, a multiple of 8), ROWS (of out), TOKENS (vectors, up to
// 16), TILES, WARPS, STAGES, NORM, ROUTED, FORM, WIDE (out is float32), GELU, TAPS (of the convolution), OVERLAP, SHARED
// (bytes).

#define KEEP 0
#define CONV 1
#define ADD 2
#define GATED 3
#define LOG2E 1.4426950408889634f
#define FULL 0xffffffffu
#define MATRICES (FORM == GATED ? 2 : 1)
#define STEPS ((WIDTH + 32 * WARPS - 1) / (32 * WARPS))
#define COLUMNS (8 * TILES)  // of out, of an item
#define ROW_ITEMS ((ROWS + COLUMNS - 1) / COLUMNS)
#define PIECES (STEPS * MATRICES * TILES)  // of 16 bytes of an item, a thread
#if WIDE
typedef float Out;
#else
typedef u16 Out;
#endif

struct Arguments {
    const void* v;  // (TOKENS, WIDTH), rows v_stride apart: bfloat16; float32 if NORM
    const u16* weight;  // (EXPERTS, MATRICES ROWS, WIDTH)
    const float* norm_weight;
    Out* out;  // (TOKENS, ROWS), rows out_stride apart
    const i64* ids;  // (TOKENS,), the experts
    const float* gate;
    const float* conv_weight;  // (ROWS / 2, TAPS)
    const float* conv_bias;
    float* conv_state;  // (TOKENS, ROWS / 2, TAPS - 1)
    int v_stride, out_stride;
    float eps;
};

struct Shared {
    uint4 ring[STAGES][PIECES][32 * WARPS];
    float sums[2][WARPS][16][MATRICES * COLUMNS];  // items take turns
    float squares[2][WARPS][16];
    int tokens[WARPS][TOKENS];  // of the expert
};

extern __shared__ __align__(16) char memory[];

__device__ __forceinline__ void let_next_begin() {
#if OVERLAP
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_last() {
#if OVERLAP
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void fetch_or_clear(uint4& into, const u16* from, bool inside) {
    const u32 to = (u32)__cvta_generic_to_shared(&into);
    const int bytes = inside ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ float silu(float x) { return x * reciprocal(1.f + exp2_fast(-LOG2E * x)); }
__device__ __forceinline__ float activated(float x) {
#if GELU
    return 0.5f * x * (1.f + erff(x * 0.7071067811865476f));
#else
    return silu(x);
#endif
}
__device__ __forceinline__ void store(float* to, float v) { *to = v; }
__device__ __forceinline__ void store(u16* to, float v) { *to = (u16)narrow(v, 0.f); }

// 8 numbers of a vector from column k on; `squares` is added to.
__device__ __forceinline__ uint4 operand(const Arguments& a, int token, int k, float& squares) {
    if (token < 0 || k >= WIDTH) return make_uint4(0, 0, 0, 0);
    const i64 at = (i64)token * a.v_stride + k;
#if NORM
    const float4* const x = reinterpret_cast<const float4*>(reinterpret_cast<const float*>(a.v) + at);
    const float4* const w = reinterpret_cast<const float4*>(a.norm_weight + k);
    const float4 p = x[0], q = x[1], u = w[0], v = w[1];
    squares += p.x * p.x + p.y * p.y + p.z * p.z + p.w * p.w;
    squares += q.x * q.x + q.y * q.y + q.z * q.z + q.w * q.w;
    return make_uint4(narrow(p.x * u.x, p.y * u.y), narrow(p.z * u.z, p.w * u.w), narrow(q.x * v.x, q.y * v.y),
                      narrow(q.z * v.z, q.w * v.w));
#else
    return *reinterpret_cast<const uint4*>(reinterpret_cast<const u16*>(a.v) + at);
#endif
}

// Which experts are chosen.
__device__ __forceinline__ u32 chosen(const Arguments& a) {
    const int lane = threadIdx.x & 31;
    u32 experts = lane < TOKENS ? 1u << (int)a.ids[lane] : 0;
#pragma unroll
    for (int mask = 16; mask; mask >>= 1) experts |= __shfl_xor_sync(FULL, experts, mask);
    return experts;
}
// How many sequences chose the expert; which, for this warp.
__device__ __forceinline__ int choose(const Arguments& a, int (&tokens)[TOKENS], int expert) {
    const int lane = threadIdx.x & 31;
    const bool mine = lane < TOKENS && a.ids[lane] == expert;
    const u32 those = __ballot_sync(FULL, mine);
    __syncwarp();  // all have done with what it was
    if (mine) tokens[__popc(those & ((1u << lane) - 1))] = lane;
    __syncwarp();
    return __popc(those);
}

struct Items {
    u32 experts;  // that are chosen
    int first, end;  // of this block

    __device__ __forceinline__ int expert(int item) const {
#if ROUTED
        u32 left = experts;
        for (int i = item / ROW_ITEMS; i; i--) left &= left - 1;
        return __popc((left & -left) - 1);
#else
        return 0;
#endif
    }
    // What this thread needs of W for an item, if there is one so far on; a group of copies of its own.
    __device__ __forceinline__ void fetch(const Arguments& a, Shared& shared, int item) const {
        if (item < end) {
            const int lane = threadIdx.x & 31, k = (threadIdx.x >> 5) * 32 + (lane & 3) * 8;
            const int row = item % ROW_ITEMS * COLUMNS + (lane >> 2);
            const u16* const from = a.weight + ((i64)expert(item) * MATRICES * ROWS + row) * WIDTH + k;
            uint4(&to)[PIECES][32 * WARPS] = shared.ring[(item - first) % STAGES];
#pragma unroll
            for (int s = 0; s < STEPS; s++)
#pragma unroll
                for (int j = 0; j < MATRICES * TILES; j++) {
                    const bool inside = row + j % TILES * 8 < ROWS && k + s * 32 * WARPS < WIDTH;
                    const u16* const piece = from + (j % TILES * 8 + j / TILES * ROWS) * WIDTH + s * 32 * WARPS;
                    fetch_or_clear(to[s * MATRICES * TILES + j][threadIdx.x], inside ? piece : a.weight, inside);
                }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
};

struct Vectors {
    uint4 p[STEPS], q[STEPS];  // of vectors g and g + 8
    float squares[2];

    __device__ __forceinline__ void load(const Arguments& a, const int (&tokens)[TOKENS], int n) {
        const int lane = threadIdx.x & 31, g = lane >> 2, k = (threadIdx.x >> 5) * 32 + (lane & 3) * 8;
        int token[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int place = g + 8 * i;
            token[i] = place >= n ? -1 : ROUTED ? tokens[place] : place, squares[i] = 0.f;
        }
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            p[s] = operand(a, token[0], k + s * 32 * WARPS, squares[0]);
            q[s] = TOKENS > 8 ? operand(a, token[1], k + s * 32 * WARPS, squares[1]) : make_uint4(0, 0, 0, 0);
        }
#if NORM
#pragma unroll
        for (int i = 0; i < 2; i++) {
            squares[i] += __shfl_xor_sync(FULL, squares[i], 1);
            squares[i] += __shfl_xor_sync(FULL, squares[i], 2);
        }
#endif
    }
};

// Column `column` of the block's part of out, of one sequence; `v` is its sum, `u` that of its other matrix.
__device__ __forceinline__ void finish(const Arguments& a, int token, int row, float v, float u) {
    Out* const to = a.out + (i64)token * a.out_stride + row;
#if FORM == GATED
    store(to, activated(v) * u);
#elif FORM == ADD
    *to += ROUTED ? v * a.gate[token] : v;
#elif FORM == CONV
    if (row < ROWS / 2) {
        const float* const tap = a.conv_weight + row * TAPS;
        float* const state = a.conv_state + ((i64)token * (ROWS / 2) + row) * (TAPS - 1);
        float sum = a.conv_bias[row] + tap[TAPS - 1] * v;
#pragma unroll
        for (int i = 0; i < TAPS - 1; i++) {
            const float old = state[i];
            sum += tap[i] * old;
            if (i) state[i - 1] = old;
        }
        state[TAPS - 2] = v;
        v = silu(sum);
    }
    store(to, v);
#else
    store(to, v);
#endif
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) few_product(const Arguments a) {
    static_assert(sizeof(Shared) == SHARED, "few.py counts another size");
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2;
#if ROUTED && FORM == GATED
    wait_for_last();  // for the choice; and the kernel after this one reads it without waiting, so it may not begin before
#endif
    let_next_begin();
    Items items;
    items.experts = ROUTED ? chosen(a) : 1;
    const int n_items = __popc(items.experts) * ROW_ITEMS;
    items.first = blockIdx.x * n_items / gridDim.x, items.end = (blockIdx.x + 1) * n_items / gridDim.x;
#pragma unroll
    for (int i = 0; i < STAGES; i++) items.fetch(a, shared, items.first + i);
#if !(ROUTED && FORM == GATED)
    wait_for_last();
#endif

    Vectors vectors;
    int n = TOKENS, known = -1;  // the expert whose vectors are at hand
    for (int item = items.first; item < items.end; item++) {
        const int first_row = item % ROW_ITEMS * COLUMNS, expert = items.expert(item), turn = item & 1;
        if (expert != known) {
            if (ROUTED) n = choose(a, shared.tokens[warp], expert);
            vectors.load(a, shared.tokens[warp], n);
            known = expert;
        }
        float sums[MATRICES * TILES][4];
#pragma unroll
        for (int j = 0; j < MATRICES * TILES; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums[j][i] = 0.f;
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
        uint4(&w)[PIECES][32 * WARPS] = shared.ring[(item - items.first) % STAGES];
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            const uint4 p = vectors.p[s], q = vectors.q[s];
            const u32 one[4] = {p.x, q.x, p.y, q.y}, two[4] = {p.z, q.z, p.w, q.w};
#pragma unroll
            for (int j = 0; j < MATRICES * TILES; j++) {
                const uint4 piece = w[s * MATRICES * TILES + j][threadIdx.x];
                multiply_add_pairs(sums[j], one, piece.x, piece.y);
                multiply_add_pairs(sums[j], two, piece.z, piece.w);
            }
        }
        items.fetch(a, shared, item + STAGES);  // to the place of what was just read
#pragma unroll
        for (int j = 0; j < MATRICES * TILES; j++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                *reinterpret_cast<float2*>(&shared.sums[turn][warp][g + 8 * i][j * 8 + (lane & 3) * 2]) =
                    make_float2(sums[j][2 * i], sums[j][2 * i + 1]);
#if NORM
        if ((lane & 3) == 0)
#pragma unroll
            for (int i = 0; i < 2; i++) shared.squares[turn][warp][g + 8 * i] = vectors.squares[i];
#endif
        __syncthreads();
        for (int i = threadIdx.x; i < n * COLUMNS; i += 32 * WARPS) {
            const int place = i / COLUMNS, column = i % COLUMNS;
            if (first_row + column >= ROWS) continue;
            float v = 0.f, u = 0.f, scale = 1.f;
#if NORM
            float square = 0.f;
#pragma unroll
            for (int j = 0; j < WARPS; j++) square += shared.squares[turn][j][place];
            scale = 1.f / sqrtf(square * (1.f / WIDTH) + a.eps);
#endif
#pragma unroll
            for (int j = 0; j < WARPS; j++) {
                v += shared.sums[turn][j][place][column];
                if (MATRICES == 2) u += shared.sums[turn][j][place][column + (MATRICES - 1) * COLUMNS];
            }
            finish(a, ROUTED ? shared.tokens[warp][place] : place, first_row + column, v * scale, u * scale);
        }
    }
}
