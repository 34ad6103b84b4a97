// The residual stream, its RMSNorm and by that the choice of an expert: total = x + update in x's own memory, y = total /
// sqrt(mean(total^2) + eps) * weight, and which of EXPERTS logits is largest, the first of equals, and its sigmoid.
//
// A warp owns ROWS rows at a time and keeps them in registers, four numbers of each 128 a thread. The router, times the
// norm's weight, lies in shared memory; each of its numbers is read once for ROWS rows. Its sums are of rows before they are
// scaled, as the scale is the same for all of them. A block walks over rows in steps of the grid. Moves rows once each way.
// Bound by bytes.
//
// PLACES: y lies by expert, each of which has places for t rows: the rows e t and on of y are those of expert e's tokens, and
// order says which they are, in no certain order. So do the gates. A count, which begins with 0, gives each its place.
//
// Compiled at run time, without headers, with: WIDTH (numbers of a row, a multiple of 4), EXPERTS, ROWS, WARPS (of a block),
// PLACES (0 or 1), SHARED (bytes).

#define CHUNKS ((WIDTH + 127) / 128)
#define PADDED (CHUNKS * 128)
#define LOG2E 1.4426950408889634f
#define FULL 0xffffffffu

struct Arguments {
    float* x;           // (t, WIDTH), the stream
    const u16* update;  // bfloat16
    const float* weight;
    const float* router;  // (EXPERTS, WIDTH)
    const float* bias;
    u16* y;
    i64* ids;  // not PLACES
    float* gate;
    int* counts;  // PLACES; (EXPERTS,)
    int* order;   // PLACES; (EXPERTS, t), as y and gate
    int t;
    float eps;
};

struct Shared {
    float router[EXPERTS][PADDED];
    float weight[PADDED];
};

extern __shared__ __align__(16) char memory[];

__device__ __forceinline__ float summed(float v) {  // over a warp
#pragma unroll
    for (int mask = 16; mask; mask >>= 1) v += __shfl_xor_sync(FULL, v, mask);
    return v;
}

struct Row {
    float v[CHUNKS][4];
};

__device__ __forceinline__ void load(const Arguments& a, Row (&rows)[ROWS], int first) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const i64 row = (i64)min(first + r, a.t - 1) * WIDTH;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int k = i * 128 + lane * 4;
            float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
            uint2 update = {0, 0};
            if (k < WIDTH) {
                x = *reinterpret_cast<const float4*>(a.x + row + k);
                update = *reinterpret_cast<const uint2*>(a.update + row + k);
            }
            float* const v = rows[r].v[i];
            v[0] = x.x + low(update.x), v[1] = x.y + high(update.x);
            v[2] = x.z + low(update.y), v[3] = x.w + high(update.y);
        }
    }
}

__device__ __forceinline__ void finish(const Arguments& a, const Shared& shared, const Row (&rows)[ROWS], int first) {
    const int lane = threadIdx.x & 31;
    float squares[ROWS], sums[ROWS][EXPERTS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        squares[r] = 0.f;
#pragma unroll
        for (int e = 0; e < EXPERTS; e++) sums[r][e] = 0.f;
        if (first + r >= a.t) continue;
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            const int k = i * 128 + lane * 4;
            const float* const v = rows[r].v[i];
            if (k < WIDTH) *reinterpret_cast<float4*>(a.x + (i64)(first + r) * WIDTH + k) = make_float4(v[0], v[1], v[2], v[3]);
        }
    }
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int j = 0; j < 4; j++) squares[r] += rows[r].v[i][j] * rows[r].v[i][j];
#pragma unroll
        for (int e = 0; e < EXPERTS; e++) {
            const float4 w = *reinterpret_cast<const float4*>(&shared.router[e][i * 128 + lane * 4]);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float* const v = rows[r].v[i];
                sums[r][e] += v[0] * w.x + v[1] * w.y + v[2] * w.z + v[3] * w.w;
            }
        }
    }
    float scale[ROWS];
    i64 to[ROWS];  // row of y
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        scale[r] = 1.f / sqrtf(summed(squares[r]) * (1.f / WIDTH) + a.eps);
        int chosen = 0;
        float best = 0.f;
#pragma unroll
        for (int e = 0; e < EXPERTS; e++) {
            const float logit = summed(sums[r][e]) * scale[r] + a.bias[e];
            if (e == 0 || logit > best) best = logit, chosen = e;
        }
        const bool writes = lane == 0 && first + r < a.t;
        const float gate = 1.f / (1.f + exp2_fast(best * -LOG2E));
#if PLACES
        int place = 0;
        if (writes) {
            place = chosen * a.t + atomicAdd(a.counts + chosen, 1);
            a.order[place] = first + r, a.gate[place] = gate;
        }
        to[r] = __shfl_sync(FULL, place, 0);
#else
        if (writes) a.ids[first + r] = chosen, a.gate[first + r] = gate;
        to[r] = first + r;
#endif
    }
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        const int k = i * 128 + lane * 4;
        const float4 w = *reinterpret_cast<const float4*>(&shared.weight[k]);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (k >= WIDTH || first + r >= a.t) continue;
            const float* const v = rows[r].v[i];
            uint2 y;
            y.x = narrow(v[0] * scale[r] * w.x, v[1] * scale[r] * w.y);
            y.y = narrow(v[2] * scale[r] * w.z, v[3] * scale[r] * w.w);
            *reinterpret_cast<uint2*>(a.y + to[r] * WIDTH + k) = y;
        }
    }
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) norm_and_choice(const Arguments a) {
    static_assert(sizeof(Shared) == SHARED, "gpu.py counts another size");
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    Row rows[ROWS];
    int first = (blockIdx.x + gridDim.x * (threadIdx.x >> 5)) * ROWS;
    const int step = gridDim.x * WARPS * ROWS;
    if (first < a.t) load(a, rows, first);  // on its way while the router comes
    for (int at = threadIdx.x * 4; at < (EXPERTS + 1) * PADDED; at += 32 * WARPS * 4) {
        const int row = at / PADDED, k = at % PADDED;
        float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
        if (k < WIDTH) v = *reinterpret_cast<const float4*>((row < EXPERTS ? a.router + row * WIDTH : a.weight) + k);
        *reinterpret_cast<float4*>(row < EXPERTS ? &shared.router[row][k] : &shared.weight[k]) = v;
    }
    __syncthreads();
    while (first < a.t) {
        finish(a, shared, rows, first);
        first += step;
        if (first < a.t) load(a, rows, first);
    }
}
