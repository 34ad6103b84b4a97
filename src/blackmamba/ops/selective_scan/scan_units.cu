// What the backward pass does by matrix units, and how it gets at shared memory.

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
