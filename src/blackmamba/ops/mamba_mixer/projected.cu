// A Mamba layer between in_proj and scan, in bfloat16: x behind the causal convolution of 4 numbers and SiLU; x_proj's columns
// [low | B | C] of that; dt = dt_proj low. Each is rounded to bfloat16 where it is written, and what follows reads it so.
//
// A block owns ROWS tokens of one row of the batch. Its 512 threads are two groups, each of 64 of these tokens, that do not wait
// for each other: so one has exponentials to compute while the other waits or multiplies. Of DEEP channels after the other:
//
//     x comes to shared memory (TMA, a barrier counts the bytes), asked for two steps ahead
//     a warp convolves 16 channels of its group's tokens by matrix units (mma): tokens, shifted, times diagonal matrices of
//         weights; so an infinite x makes NaN of its 8 neighbours, too, as x_proj does of all
//     what comes of it lies in shared memory as the left matrix, and goes to global memory from there
//     a warpgroup multiplies its group's tokens by one half of x_proj's rows (wgmma), while the next channels are convolved
//
// After the last channel a warpgroup has its columns of the group's tokens. The first of them are the left matrix of the second
// product, by 64 of DEEP rows of dt_proj at a time. Moves in_proj's x, x and dt once each. Bound by these bytes.
//
// Compiled at run time, without headers, with: WIDTH (d), RANK (r), COLUMNS (r + 2 n, at most 128), HAS_BEFORE, HAS_LENGTHS, SEQ
// (bytes of a document's number, 0: all of a row is one), LAST (0 or 1), SHARED (bytes).
//
// Letters: b batch, l sequence, d d_inner, n d_state, r dt_rank.

#define ROWS 128
#define OF_GROUP 64
#define TAPS 4
#define DEEP 128                     // channels at a time: two boxes
#define THREADS 512
#define STEPS ((WIDTH + DEEP - 1) / DEEP)
#define OF_X ((OF_GROUP + TAPS - 1 + 7) / 8 * 8)  // rows of a box of x, whole 1,024 bytes
#define AHEAD 4                      // steps, of dt_proj
#define RANKS ((RANK + 15) / 16)     // 16 of them a product
#define OF_LOW ((RANK + BOX - 1) / BOX)  // boxes
#define EIGHTHS ((COLUMNS + 7) / 8)
#define LOG2E 1.4426950408889634f
#define WIDE 64                      // columns of a warpgroup
#define NUMBERS "n64k16", N0, "%32, %33", "%34"
#define REGISTERS R32(0)
#define TURNED "0, 0"

struct Arguments {
    Map x, y, x_proj, dt_proj;  // (b, l, d), the same, (COLUMNS, d), (d, r)
    const u16* weight;       // (d, TAPS), of the convolution
    const u16* bias;         // (d,)
    const u16* before;       // HAS_BEFORE: (b, d, TAPS - 1), what came before x
    const i64* lengths;      // HAS_LENGTHS: (b,)
    const void* seq;         // SEQ: (b, l), strides seq_b and seq_l
    u16 *columns, *dt;       // (b, l, 8 EIGHTHS), (b, l, d)
    u16* last;               // LAST: (b, d, TAPS - 1), the last real numbers of each row
    i64 seq_b, seq_l;
    int l, tiles;            // tiles: of a row
};

// Boxes, in whose row t part c of 16 bytes is in place c ^ (t & 7).
struct Shared {
    union {
        struct {
            u16 x[2][2][2][OF_X * BOX];  // of a group, of a step: of both halves of its channels; first the three tokens before
            u16 x_proj[2][2][128 * BOX];
        };
        u16 dt_proj[AHEAD][2][DEEP * BOX];  // of a step: of both halves of r
    };
    union {
        u16 left[2][2][2][OF_GROUP * BOX];  // of a group, of a step: of both halves of its channels
        u16 low[2][2][OF_GROUP * BOX];       // of a group: of both halves of r
    };
    u64 has_x[2][2], has_x_proj[2], has_dt_proj[AHEAD];
    u32 done_x_proj[2], done_dt_proj[AHEAD];  // warps that have multiplied by what is in this place
};
extern __shared__ char memory[];

// Four 8 x 8 matrices, of which thread 8 i + j says where row j of the i-th is: v[i] are numbers 2 k and 2 k + 1 of row g for
// thread 4 g + k.
__device__ __forceinline__ void take_matrices(u32* v, u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
        : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]) : "r"(row) : "memory");
}
__device__ __forceinline__ void put_matrices(u32 row, const u32* v) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(v[0]), "r"(v[1]), "r"(v[2]),
        "r"(v[3]) : "memory");
}
__device__ __forceinline__ void sync(int group) { asm volatile("bar.sync %0, 256;" ::"r"(group + 1) : "memory"); }
__device__ __forceinline__ void written(int group) {  // all of it, for what matrix units and copies read
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    sync(group);
}
// Whether it is the last of the block's 16 warps.
__device__ __forceinline__ bool last_of_warps(u32& done) {
    if ((threadIdx.x & 31) != 0) return false;
    u32 before;
    asm volatile("atom.shared.inc.u32 %0, [%1], 15;" : "=r"(before) : "r"(address_of(&done)) : "memory");
    return before == 15;
}
// d = a b^T, or d += a b^T: 64 rows of each, 16 numbers, by a warpgroup. Thread 32 w + 4 g + k has of d, for each 8 columns j,
// those 2 k and 2 k + 1 of rows 16 w + g (d[4 j], d[4 j + 1]) and 16 w + g + 8 (d[4 j + 2], d[4 j + 3]).
__device__ __forceinline__ void multiply(float (&d)[WIDE / 2], u64 a, u64 b, int add) {
    asm volatile(PRODUCT(NUMBERS) : REGISTERS : "l"(a), "l"(b), "r"(add));
}
#define OF_16 (32 >> 4)  // 16 of the numbers that are summed over

__device__ __forceinline__ float silu(float v) { return v * reciprocal(1.f + exp2_fast(v * -LOG2E)); }

#if SEQ
__device__ __forceinline__ i64 document(const Arguments& a, int row, int t) {  // what came before is of the first one
    const i64 at = row * a.seq_b + min(max(t, 0), a.l - 1) * a.seq_l;
#if SEQ == 8
    return static_cast<const i64*>(a.seq)[at];
#else
    return static_cast<const int*>(a.seq)[at];
#endif
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) projected(const __grid_constant__ Arguments a) {
    static_assert(sizeof(Shared) + 1024 == SHARED, "hopper.py counts another size");
    Shared& shared = *reinterpret_cast<Shared*>(memory + (1024 - address_of(memory) % 1024) % 1024);
    // numbers that the compiler shall know to be one of a warp
    const int warpgroup = __shfl_sync(FULL, threadIdx.x / 128, 0), warp = __shfl_sync(FULL, threadIdx.x / 32 % 8, 0);
    const int group = warpgroup / 2, row = blockIdx.x / a.tiles, begin = blockIdx.x % a.tiles * ROWS + group * OF_GROUP;
    const int lane = threadIdx.x & 31, g = lane >> 2, k2 = lane & 3;
#if HAS_LENGTHS
    const int length = (int)a.lengths[row];
#elif LAST
    const int length = a.l;
#endif
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            make_barrier(shared.has_x[0][i], 1);
            make_barrier(shared.has_x[1][i], 1);
            make_barrier(shared.has_x_proj[i], 1);
            shared.done_x_proj[i] = 0;
        }
        for (int i = 0; i < AHEAD; i++) make_barrier(shared.has_dt_proj[i], 1), shared.done_dt_proj[i] = 0;
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const bool first = threadIdx.x % 256 == 0;  // of a group, which asks for x
    const auto fetch_x = [&](int step) {
        u64& has = shared.has_x[group][step & 1];
        expect(has, 2 * (OF_GROUP + TAPS - 1) * BOX * 2);
        for (int i = 0; i < 2; i++)
            fetch(shared.x[group][step & 1][i], a.x, step * DEEP + i * BOX, begin - (TAPS - 1), row, has);
    };
    const auto fetch_x_proj = [&](int step) {
        u64& has = shared.has_x_proj[step & 1];
        expect(has, 2 * 128 * BOX * 2);
        for (int i = 0; i < 2; i++) fetch(shared.x_proj[step & 1][i], a.x_proj, step * DEEP + i * BOX, 0, has);
    };
    const auto fetch_dt_proj = [&](int step) {
        u64& has = shared.has_dt_proj[step % AHEAD];
        expect(has, OF_LOW * DEEP * BOX * 2);
        for (int i = 0; i < OF_LOW; i++) fetch(shared.dt_proj[step % AHEAD][i], a.dt_proj, i * BOX, step * DEEP, has);
    };

    // ---- the convolution: 64 tokens and 16 channels a warp
    const int eighth = lane & 7, which = lane >> 3;  // of what take_matrices and put_matrices want
    // tokens and, in the right half, the next ones
    const int x_row = (which & 1) * 8 + (which >> 1) + eighth, x_part = warp * 2 & 7;
    const u32 x_at = address_of(shared.x[group][0][warp >> 2]);
    const u32 take_x = x_at + x_row * BOX * 2 + (x_part ^ x_row & 7) * 16;
    const u32 take_x2 = x_at + (x_row + 2) * BOX * 2 + (x_part ^ x_row + 2 & 7) * 16;
    // the first channels' matrices, then the others'
    const u32 put_left = address_of(shared.left[group][0][warp >> 2]) + ((which & 1) * 8 + eighth) * BOX * 2 +
        ((warp * 2 + (which >> 1) & 7) ^ eighth) * 16;
    const u32 diagonal_low = g == k2 * 2 ? 0xffffu : 0u, diagonal_high = g == k2 * 2 + 1 ? 0xffff0000u : 0u;
    uint2 weights[2];  // of channel g of each 8
    u32 biases[2];     // of channels 2 k and 2 k + 1
    const auto load_weights = [&](int step) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int channel = step * DEEP + warp * 16 + i * 8;
            weights[i] = {0, 0}, biases[i] = 0;
            if (WIDTH % DEEP && channel >= WIDTH) continue;
            weights[i] = reinterpret_cast<const uint2*>(a.weight)[channel + g];
            biases[i] = reinterpret_cast<const u32*>(a.bias)[channel / 2 + k2];
        }
    };
#if SEQ
    u32 apart = 0;  // of rows g and g + 8 of each 16, bits of tokens before that are of another document
#pragma unroll 1
    for (int i = 0; i < 8; i++)
#pragma unroll 1
        for (int j = 0; j < TAPS - 1; j++) {
            const int t = begin + i * 8 + g;
            apart |= (u32)(document(a, row, t) != document(a, row, t - (TAPS - 1) + j)) << i * TAPS + j;
        }
#endif
    const auto convolve = [&](int step) {
        const u32 from = take_x + (step & 1) * (u32)sizeof(shared.x[0][0]);
        const u32 from2 = take_x2 + (step & 1) * (u32)sizeof(shared.x[0][0]);
        const u32 to = put_left + (step & 1) * (u32)sizeof(shared.left[0][0]);
        u32 taps[2][TAPS];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 w[TAPS] = {weights[i].x, weights[i].x >> 16, weights[i].y, weights[i].y >> 16};
#pragma unroll
            for (int j = 0; j < TAPS; j++) taps[i][j] = w[j] & diagonal_low | w[j] << 16 & diagonal_high;
        }
#pragma unroll
        for (int tokens = 0; tokens < 4; tokens++) {
            u32 out[4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float v[4] = {low(biases[i]), high(biases[i]), low(biases[i]), high(biases[i])};
                u32 x01[4], x23[4];
                take_matrices(x01, (from ^ i * 16) + tokens * 16 * BOX * 2);
                take_matrices(x23, (from2 ^ i * 16) + tokens * 16 * BOX * 2);
#if SEQ
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const u32 bits = apart >> (tokens * 2 + half) * TAPS;
                    if (bits & 1) x01[half] = 0;
                    if (bits & 2) x01[half + 2] = 0;
                    if (bits & 4) x23[half] = 0;
                }
#endif
                multiply_add_pairs(v, x01, taps[i][0], taps[i][1]);
                multiply_add_pairs(v, x23, taps[i][2], taps[i][3]);
                out[i * 2] = narrow(silu(v[0]), silu(v[1])), out[i * 2 + 1] = narrow(silu(v[2]), silu(v[3]));
            }
            put_matrices(to + tokens * 16 * BOX * 2, out);
        }
    };
    const auto write_y = [&](int step) {
        for (int i = 0; i < 2; i++) send(shared.left[group][step & 1][i], a.y, step * DEEP + i * BOX, begin, row);
    };
#if HAS_BEFORE || LAST
    // Number `channel` of a token of the group's, or of the three before.
    const auto of_x = [&](int step, int channel, int t) -> u16& {
        const int at = t - begin + TAPS - 1, in_box = channel % BOX;
        return shared.x[group][step & 1][channel / BOX][at * BOX + (in_box / 8 ^ at & 7) * 8 + in_box % 8];
    };
#endif
#if HAS_BEFORE
    const auto put_before = [&](int step) {
        if (begin > 0) return;
        for (int i = threadIdx.x % 256; i < DEEP * (TAPS - 1); i += 256) {
            const int channel = i / (TAPS - 1), place = i % (TAPS - 1);
            if (step * DEEP + channel < WIDTH)
                of_x(step, channel, place - (TAPS - 1)) = a.before[((i64)row * WIDTH + step * DEEP) * (TAPS - 1) + i];
        }
        sync(group);
    };
#endif
#if LAST
    const bool has_last = length - (TAPS - 1) < begin + OF_GROUP && (length > begin || begin == 0);
    const auto keep_last = [&](int step) {
        for (int i = threadIdx.x % 256; i < DEEP * (TAPS - 1); i += 256) {
            const int channel = i / (TAPS - 1), t = length - (TAPS - 1) + i % (TAPS - 1);
            const bool mine = t < begin + OF_GROUP && (t >= begin || begin == 0);
            if (mine && step * DEEP + channel < WIDTH)
                a.last[((i64)row * WIDTH + step * DEEP) * (TAPS - 1) + i] = of_x(step, channel, t);
        }
    };
#endif

    // ---- x_proj: 64 tokens and 64 columns a warpgroup
    const int side = warpgroup % 2 * 64;
    float d[WIDE / 2];
    if (first) {
        fetch_x(0);
        if (group == 0) fetch_x_proj(0);
        if (STEPS > 1) fetch_x(1);
        if (STEPS > 1 && group == 0) fetch_x_proj(1);
    }
    load_weights(0);
    for (int step = 0; step < STEPS; step++) {
        const u32 parity = step >> 1 & 1;
        wait(shared.has_x[group][step & 1], parity);
#if HAS_BEFORE
        put_before(step);
#endif
#if LAST
        if (has_last) keep_last(step);
#endif
        convolve(step);
        if (step + 1 < STEPS) load_weights(step + 1);
        wait_products<0>();
        if (step > 0 && last_of_warps(shared.done_x_proj[step + 1 & 1]) && step + 1 < STEPS) fetch_x_proj(step + 1);
        if (first) wait_sent();
        written(group);
        if (first) {
            write_y(step);
            if (step + 2 < STEPS) fetch_x(step + 2);
        }
        wait(shared.has_x_proj[step & 1], parity);
        begin_products();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u64 left = described(shared.left[group][step & 1][i]);
            const u64 right = described(shared.x_proj[step & 1][i] + side * BOX);
#pragma unroll
            for (int k = 0; k < BOX / 16; k++) multiply(d, left + k * OF_16, right + k * OF_16, step > 0 || i > 0 || k > 0);
        }
        end_products();
    }
    wait_products<0>();
    if (first) wait_sent();
    __syncthreads();
    if (threadIdx.x == 0)
        for (int i = 0; i < AHEAD && i < STEPS; i++) fetch_dt_proj(i);

    // ---- dt_proj: 64 tokens and 64 of DEEP channels a warpgroup
    const int own_row = warp % 4 * 16 + g, token = begin + own_row, pair = k2 * 2;  // and the row 8 below
    u16* const columns = a.columns + ((i64)row * a.l + token) * EIGHTHS * 8;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int column = side + j * 8 + pair, at = own_row + half * 8;
            u32 v = narrow(d[j * 4 + half * 2], d[j * 4 + half * 2 + 1]);
            if (side + j * 8 < COLUMNS && token + half * 8 < a.l)
                *reinterpret_cast<u32*>(columns + half * 8 * EIGHTHS * 8 + column) = v;
            if (side + j * 8 >= RANKS * 16) continue;
            if (column >= RANK) v = 0;  // what is not low's
            else if (column + 1 >= RANK) v &= 0xffff;
            char* const box = reinterpret_cast<char*>(shared.low[group][side / 64] + at * BOX);
            *reinterpret_cast<u32*>(box + (j ^ (at & 7)) * 16 + pair * 2) = v;
        }
    written(group);
    const auto start = [&](int step) {
        wait(shared.has_dt_proj[step % AHEAD], step / AHEAD & 1);
        begin_products();
#pragma unroll
        for (int k = 0; k < RANKS; k++) {
            const int box = k / (BOX / 16), at = k % (BOX / 16) * OF_16;
            const u64 left = described(shared.low[group][box]);
            const u64 right = described(shared.dt_proj[step % AHEAD][box] + side * BOX);
            multiply(d, left + at, right + at, k > 0);
        }
        end_products();
    };
    u16* const dt = a.dt + ((i64)row * a.l + token) * WIDTH;
    u32 v[2][8];  // rows g and g + 8
    const auto take = [&] {
        wait_products<0>();
#pragma unroll
        for (int j = 0; j < 8; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                v[half][j] = narrow(d[j * 4 + half * 2], d[j * 4 + half * 2 + 1]);
#if HAS_LENGTHS
                if (token + half * 8 >= length) v[half][j] = 0xff80ff80u;  // minus infinity
#endif
            }
    };
    const auto write_dt = [&](int step) {
#pragma unroll
        for (int j = 0; j < 8; j += 4)
#pragma unroll
            for (int half = 0; half < 2; half++)
                write(dt + (i64)half * 8 * WIDTH, step * DEEP + side + j * 8, WIDTH, token + half * 8 < a.l, v[half] + j);
    };
    start(0);
    for (int step = 0; step < STEPS - 1; step++) {
        take();
        start(step + 1);
        if (last_of_warps(shared.done_dt_proj[step % AHEAD]) && step + AHEAD < STEPS) fetch_dt_proj(step + AHEAD);
        write_dt(step);
    }
    take();
    write_dt(STEPS - 1);
}
