// What the backward pass does by matrix units, and how it gets at shared memory.

// Addresses in shared memory that stay in registers: what goes through a shuffle the compiler cannot compute again where
// it is used, which took it four instructions each time.
__device__ __forceinline__ u32 held(u32 value) { return __shfl_sync(FULL, value, threadIdx.x & 31); }
__device__ __forceinline__ u32 address_of(const void* p) { return held((u32)__cvta_generic_to_shared(p)); }
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
__device__ __forceinline__ void store1(u32 to, float a) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(a) : "memory");
}
__device__ __forceinline__ void store2(u32 to, float a, float b) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(a), "f"(b) : "memory");
}
__device__ __forceinline__ void store4(u32 to, float a, float b, float c, float d) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
}
// Without a branch.
__device__ __forceinline__ void store4_if(bool condition, u32 to, const float* v) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %0, 0; @p st.shared.v4.f32 [%1], {%2, %3, %4, %5};}"
        ::"r"((u32)condition), "r"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]) : "memory");
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
// Cut to 11 bits a number is less by 3.4e-4 of itself, in the mean; sums would keep that. Nearest numbers take 4 instructions.
__device__ __forceinline__ float before_cut(float v) { return v * 1.00034f; }

// The same with 4 columns of A and rows of B: of A (16 x 4) a thread has (g, k) and (g + 8, k), of B (4 x 8) (k, g).
__device__ __forceinline__ void multiply_add(float* d, float a0, float a1, float b) {
    asm("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(b)));
}

// Products of a number u of each of 8 channels and B, for two tokens of four. Thread 4 c + q gives u of channel c and token
// q, in two parts if EXACT, and of that token B's numbers 2 c and 2 c + 1. It gets, of channel c and the first token, states 4 q
// and 4 q + 2 in even[0..1], 4 q + 1 and 4 q + 3 in odd[0..1]; of the second in [2..3].
template <bool EXACT>
__device__ __forceinline__ void outer(
    float* even, float* odd, float rough, float rest, bool first, bool second, const float2& b) {
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

// Sums over states of h times C, for two tokens. Thread 4 c + q gives states 4 q to 4 q + 3 of channel c of both, and of C
// those of some token. It gets the first token's sums in sums[0] with what threads with c = 2 q gave of C, in sums[1] with
// that of c = 2 q + 1; the second's in sums[2] and sums[3]. For bfloat16, which keeps 8 bits of a sum, 11 of a state do.
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

// Sums over the four threads of a channel, of four tokens: thread 4 c + q gets the q-th token's. last_channels: all bits, if c
// is above 3.
__device__ __forceinline__ float over_threads(const float* v, int q, u32 last_channels) {
    const float first = __uint_as_float(0x3f800000u & ~last_channels), last = __uint_as_float(0x3f800000u & last_channels);
    float sums[4] = {};
    multiply_add(sums, v, first, last);
#if TYPE != 1
    float rest[4];
#pragma unroll
    for (int i = 0; i < 4; i++) rest[i] = v[i] - high_part(v[i]);
    multiply_add(sums, rest, first, last);
#endif
    return q & 1 ? sums[2] : sums[0];
}

// D = A B with float16 as `multiply_add_pairs` with bfloat16, D a pair to a register: of D (16 x 8) a thread has (g, 2 k) and
// (g + 8, 2 k), each with the next column.
__device__ __forceinline__ void multiply_halves(u32* d, const u32* a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%8, %8};"
        : "=r"(d[0]), "=r"(d[1]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(0));
}

// Sums over a warp's 8 channels, for each of 4 tokens and 16 states, of g times one number of the channel and of h times
// another: gradients of B and of C. Threads 4 c + q give states 4 q to 4 q + 3 of channel c. For the matrix units that is
// turned, so that states are rows of A and channels its columns. Columns of B are the four tokens with g's numbers, then with
// h's. Thread 4 r + k gets, of columns 2 k and 2 k + 1, those of state s = r / 2 * 4 + r % 2, then of s + 2. Bfloat16 numbers are
// summed as such, others are read in parts.
#if TYPE == 1
// They are turned by a product with ones: D is B, and has the form that A shall have. That the units take it for float16
// changes no bit of a number below 2^121; others become NaN. Columns of A are the channels of one token, then those of the
// next; columns of B have zeros where A has the other token. Those of the two tokens get what is wanted.
struct Turned {
    u32 ones[4], of[2][2], odd, last;  // odd, last: all bits, if r is odd or above 3
    __device__ __forceinline__ explicit Turned(int lane) {
        const int r = lane >> 2, k = lane & 3;
        odd = held(0u - (r & 1)), last = held(0u - (r >> 2));
        const u32 one = r == k * 2 ? 0x3c00u : r == k * 2 + 1 ? 0x3c000000u : 0u;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            // which the compiler does not know, so that all four stay in registers
            const u32 v = lane + i, zero = (v * v * v - v) % 3;
            ones[i] = __shfl_sync(FULL, (i % 3 ? 0 : one) | zero, lane);
        }
    }
    // v: the numbers of channels 2 k and 2 k + 1 and token r % 4, for h if r > 3
    __device__ __forceinline__ void begin(u32 v) {
        of[0][0] = v & ~last & ~odd, of[0][1] = v & ~last & odd;
        of[1][0] = v & last & ~odd, of[1][1] = v & last & odd;
    }
    // Two tokens of four: g and h of both. The sums are those of thread 4 r + k if k is even for the first two tokens, odd for
    // the last two.
    __device__ __forceinline__ void sum(float* sums, const uint2* g, const uint2* h) const {
        sums[0] = sums[1] = sums[2] = sums[3] = 0.f;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint2* const v = i ? h : g;
            u32 a[4];
            multiply_halves(a, ones, v[0].x, v[0].y);
            multiply_halves(a + 2, ones, v[1].x, v[1].y);
            multiply_add_pairs(sums, a, of[i][0], of[i][1]);
        }
    }
};
#else
// They are turned by way of shared memory.
struct Turned {
    u32 put_at, take_at, last;
    int r;
    typedef float Rows[2][8][20];  // of a token, g or h, a channel
    __device__ __forceinline__ Turned(Rows* rows, int lane)
        : put_at(address_of(&rows[0][0][lane >> 2][(lane & 3) * 4])),
          take_at(address_of(&rows[0][0][lane & 3][(lane >> 3) * 4 + (lane >> 2 & 1)])), last(0u - (lane >> 4)), r(lane >> 2) {}
    __device__ __forceinline__ void put(int token, const float* g, const float* h) const {
        const u32 to = put_at + token * sizeof(Rows);
        store4(to, g[0], g[1], g[2], g[3]);
        store4(to + sizeof(Rows) / 2, h[0], h[1], h[2], h[3]);
    }
    // low, high: the numbers of channels k and k + 4 and token r % 4, for h if r > 3
    __device__ __forceinline__ void sum(float* d, float low, float high) const {
        d[0] = d[1] = d[2] = d[3] = 0.f;
#pragma unroll
        for (int column = 0; column < 8; column++) {
            const float b0 = r == column ? low : 0.f, b1 = r == column ? high : 0.f;
            const u32 at = take_at + (column & 3) * sizeof(Rows) + (column >> 2) * (sizeof(Rows) / 2);
            constexpr u32 on = 4 * 20 * sizeof(float);
            const float a[4] = {load1(at), load1(at + 8), load1(at + on), load1(at + on + 8)};
#if TYPE == 0
            float rest[4];
#pragma unroll
            for (int i = 0; i < 4; i++) rest[i] = a[i] - high_part(a[i]);
            multiply_add(d, rest, b0, b1);
            multiply_add(d, a, b0 - high_part(b0), b1 - high_part(b1));
#endif
            multiply_add(d, a, b0, b1);
        }
    }
};
#endif
