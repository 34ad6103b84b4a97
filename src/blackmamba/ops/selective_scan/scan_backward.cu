// Every gradient; those of B and C as sums over the channels of a block, in `partial` (b, l / 4, blocks, 32, 4): see `add_up`.
// Keeps the states of 4 tokens and the gradients of state and A in registers, the states before each 4 tokens of a span
// in shared memory. Moves x, dt, z, the gradients of y, x, dt and z once, and the states before every span once. Bound by
// instructions.
//
// Of a span, from its end, a warp computes delta, delta x and the gradient before the gate, then its states from the one that was
// kept, first those before each four tokens, then four tokens' at a time, and these are walked over backwards. There a
// thread has g, the gradient of its four states, and what is summed goes to matrix units (scan_units.cu). At last what is one
// number a token and channel is computed of those sums.
//
// Warps of a block share what comes from global memory and what goes there: of rows of channels, and B, C and their gradients.
// So that none waits for another, all of a span is finished while the next one's states are computed, and the one after
// that is fetched then.

// softplus to 9e-6 of itself, which does where states have 8 bits.
__device__ __forceinline__ float rough_softplus(float v) {
    float e = exp2_fast(-fabsf(v) * LOG2E);
    float p = fmaf(-0.02386913076043129f, e, 0.10122223198413849f);
    p = fmaf(p, e, -0.210048645734787f);
    p = fmaf(p, e, 0.3252066671848297f);
    p = fmaf(p, e, -0.4993613660335541f);
    p = fmaf(p, e, 0.9999915957450867f);
    return fmaf(e, p, fmaxf(v, 0.f));
}

// B and C of a span, apart. State n of token t is in place n ^ t / 2 % 2 * 8 of row t + t / 4: so threads of 4 tokens read all
// banks, and those of two tokens that are four apart.
#define ROW_OF_STATES (16 * sizeof(float))
struct Staged {
    float B[SPAN / 4 * 5][16];
    float C[SPAN / 4 * 5][16];
};
__device__ __forceinline__ int row_of_token(int t) { return t + (t >> 2); }
__device__ __forceinline__ int place_of_state(int t, int n) { return n ^ (t & 2) << 2; }
__device__ __forceinline__ void copy16_to(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// They are on their way, 16 bytes of each by the first 64 threads, or 32.
__device__ __forceinline__ void stage(u32 to, const float* from) {
    if (threadIdx.x >= SPAN * 4) return;
#pragma unroll
    for (int t = 0; t < SPAN; t += 8 * WARPS) {
        copy16_to(to + row_of_token(t) * ROW_OF_STATES, from + t * OF_TOKEN);
        copy16_to(to + row_of_token(t) * ROW_OF_STATES + (u32)sizeof(Staged) / 2, from + t * OF_TOKEN + OF_C);
    }
}
// Four numbers on their way to shared memory, or zeros.
template <typename T>
__device__ __forceinline__ void fetch(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"((int)sizeof(T)) : "memory");
}
template <typename T>
__device__ __forceinline__ void fetch_if(bool condition, u32 to, const void* from) {
    constexpr int bytes = sizeof(T);
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(bytes), "r"(condition ? bytes : 0) : "memory");
}
__device__ __forceinline__ Four load_numbers(u32 from) {
    Four v;
#if TYPE == 0
    v = load4(from);
#else
    const float2 two = load2(from);
    v.x = __float_as_uint(two.x), v.y = __float_as_uint(two.y);
#endif
    return v;
}
__device__ __forceinline__ float4 load_kept(u32 from) {
#if TYPE == 1
    float v[4];
    widen(load_numbers(from), v);
    return make_float4(v[0], v[1], v[2], v[3]);
#else
    return load4(from);
#endif
}
__device__ __forceinline__ void store_numbers(u32 to, const float* numbers) {
    const Four v = narrow(numbers);
#if TYPE == 0
    store4(to, v.x, v.y, v.z, v.w);
#else
    store2(to, __uint_as_float(v.x), __uint_as_float(v.y));
#endif
}

// Barriers, that many bytes from where shared memory begins: one that waits is for the end of a phase, whose parity it says.
enum { FULL_AT = 0, DONE_AT = 8 };  // a span has come; all warps are done with it
template <int barrier>
__device__ __forceinline__ void make_barrier(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [memory+%0], %1;" ::"n"(barrier), "r"(arrivals) : "memory");
}
template <int barrier>
__device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [memory+%0];" ::"n"(barrier) : "memory");
}
template <int barrier>
__device__ __forceinline__ void arrive_with_copies() {  // once all that this thread copies has come
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [memory+%0];" ::"n"(barrier) : "memory");
}
#if __CUDA_ARCH__ >= 900
#define LOOK_OR_SLEEP "try_wait"
#else
#define LOOK_OR_SLEEP "test_wait"
#endif
template <int barrier>
__device__ __forceinline__ void wait(u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n mbarrier." LOOK_OR_SLEEP ".parity.shared::cta.b64 done, [memory+%0], %1;\n"
        " @done bra.uni end;\n bra.uni again;\n"
        "end:\n}" ::"n"(barrier), "r"(parity) : "memory");
}

// What a warp has of a span, which no other touches but `states`. Its numbers of channel c and token q of four are thread
// 4 c + q's, in place `place_of_lane` of it.
struct Numbers {
    float drive, to_y;  // delta x; the gradient of y before the gate. Then what has been summed over states.
    float of_decay;
    u32 by;  // bfloat16 alone: drive or to_y of two channels, as matrix units take them
};
#define OF_FOUR (32 * (int)sizeof(float4))  // bytes of four tokens
struct alignas(128) OfWarp {
    Numbers numbers[SPAN / 4][32];
    float4 states[2][SPAN / 4][32];  // before each four tokens; then their sums for B and C
    FourKept kept[32][16 / sizeof(FourKept)];  // the state before the span
    float delta[SPAN / 4][36];  // by channels and tokens
    float4 wide[2][2];  // of four channels: `bias`, D
    uint4 where[2][32];  // addresses of a thread, for which it has no registers
    float4 sums[2][32];  // of a thread's tokens: the gradients of D and of `bias`
    float4 later[3][32];  // of a thread's numbers, for the end of a span: softplus' slope, the factor of z's gradient, `to_y`
#if TYPE != 1
    Turned::Rows turned[4];
#endif
};
__device__ __forceinline__ int place_of_lane(int lane) { return lane ^ (lane & 16) >> 2; }

// x, dt, z and the gradient of y of a span, and then its results. A token's row has an odd number of 16 bytes, so that
// threads of 8 tokens meet in no bank.
#define ROW_OF_TILE ((WARPS * 8 * (int)sizeof(Number) / 16 | 1) * 16)
#define TILE (SPAN * ROW_OF_TILE)
#define NEVER (1 << 28)  // a token behind all others
enum { X, DT, Z, GRAD_Y };
struct alignas(16) Two {
    Number *first, *second;
};
__device__ __forceinline__ Two load_two(u32 from) {
    const float4 v = load4(from);
    Two two;
    two.first = (Number*)(__float_as_uint(v.x) | (unsigned long long)__float_as_uint(v.y) << 32);
    two.second = (Number*)(__float_as_uint(v.z) | (unsigned long long)__float_as_uint(v.w) << 32);
    return two;
}
// Of the i-th of four channels, where `odd` is between the first two.
__device__ __forceinline__ u32 numbers_of(u32 first, u32 odd, int i) { return first + (i & 1 ? odd : 0) + (i >> 1) * 128; }
struct Shared {
    unsigned long long barriers[16];
    OfWarp of[WARPS];
    Staged BC[2];
    char tiles[2][4 * TILE];
    Two rows[4][2 * WARPS];  // where those are in global memory, by fours of channels
};
#define OFFSET(member) ((u32)(unsigned long long)&reinterpret_cast<OfWarp*>(0)->member)
#define OF_SHARED(member) ((u32)(unsigned long long)&reinterpret_cast<Shared*>(0)->member)
// The sums of a span over the warps, always in the same order, by 128 threads from the `first` on or by those before it.
__device__ __forceinline__ void add_up(const Backward& f, u32 states, const Place& p, int span, int first) {
    int task = (int)threadIdx.x - first;
    if (task < 0) task += 32 * WARPS;
#pragma unroll
    for (int i = 0; i < 128; i += 32 * WARPS, task += 32 * WARPS) {
        if (task >= 128) return;
        float4 sum = load4(states + task * 16);
#pragma unroll
        for (int w = 1; w < WARPS; w++) {
            const float4 v = load4(states + task * 16 + w * (u32)sizeof(OfWarp));
            sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        }
        const int tile = ((int)p.row * (f.s.l_padded / 4) + (span >> 2) + (task >> 5)) * f.s.n_blocks + p.block;
        shifted(reinterpret_cast<float4*>(f.partial), tile, 512)[place_of_lane(task & 31)] = sum;
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

// Rows of blocks of channels are laid end to end, each from its last token to its first, and that is cut into equal shares, one
// a block of threads: so all end at once. A share ends in a row whose later tokens are the next share's, which it begins
// with: their gradient of the state between is handed over. Shares are dealt from the last one on, so that the next has begun.
__device__ __forceinline__ void hand_over(int* there) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(there), "r"(1) : "memory");
}
__device__ __forceinline__ void wait_for(const int* there) {
    if (threadIdx.x == 0) {
        int v = 0;
        while (v == 0) asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(there) : "memory");
    }
    __syncthreads();
}

__device__ __forceinline__ void store_scaled4(float* to, const float* v, float by) {
    *reinterpret_cast<float4*>(to) = make_float4(v[0] * by, v[1] * by, v[2] * by, v[3] * by);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_backward(const Backward f) {
    Shared& shared = shared_as<Shared>();
    const int warp = threadIdx.x >> 5, lane = held(threadIdx.x & 31), q = lane & 3, c = lane >> 2;
    const u32 all_at = (u32)__cvta_generic_to_shared(&shared), tiles_at = all_at + OF_SHARED(tiles), of_rows = sizeof(shared.rows[0]);
    const u32 own = address_of(&shared.of[warp]);
    const u32 by_lane = held(own + place_of_lane(lane) * 16), by_channel = held(own + c * 16);
#if TYPE == 1
    Turned turned(lane);
#else
    Turned turned(shared.of[warp].turned, lane);
    const u32 by_low = held(own + place_of_lane(q * 4 + (c & 3)) * 16 + (c >> 2) * 4);
    const u32 by_high = held(own + place_of_lane(16 + q * 4 + (c & 3)) * 16 + (c >> 2) * 4);
#endif
    // of B and C: four states of one of 8 tokens, the c / 2-th or fourth after; two of token q of 4, 2 c and the next
    const int four_t = (c >> 1) + (c & 1) * 4;
    const u32 four_at = address_of(&shared.BC[0].B[row_of_token(four_t)][place_of_state(four_t, q * 4)]);
    const u32 two_at = address_of(&shared.BC[0].B[q][place_of_state(q, c * 2)]);
    const int staged_t = threadIdx.x >> 2 & SPAN - 1, staged_n = (threadIdx.x & 3) * 4;
    const int of_span = f.s.d * 16 * (int)sizeof(Kept);
    // What it copies and writes: four channels of one token, its neighbour the next four.
    const int copies_part = (int)threadIdx.x % (2 * WARPS), copies_t = (int)threadIdx.x / (2 * WARPS);
    if (threadIdx.x == 0) {
        make_barrier<FULL_AT>(32 * WARPS);
        make_barrier<DONE_AT>(32 * WARPS);
    }
    int buffer = 0;  // of a span; also the parity of its barriers
    int adders = 0;
    const int of_row = f.s.chunk / SPAN, number = gridDim.x - 1 - blockIdx.x, end = min((number + 1) * f.s.share, f.s.shares_end);
#pragma unroll 1
    for (int next = number * f.s.share; next < end;) {
        const int task = next / of_row, first_span = next - task * of_row;
        next = min(end, (task + 1) * of_row);
        const Place p = place_of(f.s, q, c, task);
        const int spans = (p.end - p.begin + SPAN - 1) / SPAN, last_span = min(next - task * of_row, spans);
        __syncthreads();  // all are done with the row before
        if (lane < 2) {
            const Rows* const all[8] = {&f.x, &f.dt, &f.z, &f.grad_y, &f.grad_x, &f.grad_dt, &f.grad_z, &f.grad_z};
#pragma unroll
            for (int k = 0; k < 4; k++) shared.rows[k][warp * 2 + lane] = {row_of(*all[k * 2], p), row_of(*all[k * 2 + 1], p)};
            if (HAS_BIAS) shared.of[warp].wide[lane][0] = *reinterpret_cast<const float4*>(f.bias + p.c4);
            if (HAS_D) shared.of[warp].wide[lane][1] = *reinterpret_cast<const float4*>(f.D + p.c4);
        }
        {
            OfWarp& mine = shared.of[warp];
            const int half = lane & 1, four = lane >> 3, t = lane >> 1 & 3, place = place_of_lane(lane);
            mine.where[0][place] = make_uint4(
                tiles_at + copies_t * ROW_OF_TILE + copies_part * (int)sizeof(Four), all_at + OF_SHARED(rows) + copies_part * 16,
                p.block * WARPS * 8 + copies_part * 4 < f.s.d ? copies_t : NEVER,
                all_at + OF_SHARED(BC) + row_of_token(staged_t) * (int)ROW_OF_STATES + place_of_state(staged_t, staged_n) * 4);
            // what it computes of x, dt, z and others: four channels of its warp, of one token
            mine.where[1][place] = make_uint4(
                tiles_at + (lane >> 1) * ROW_OF_TILE + (warp * 8 + half * 4) * (int)sizeof(Number), own + four * OF_FOUR + half * (256 + 64) + t * 16,
                own + OFFSET(delta) + four * 144 + half * 64 + t * 4, own + OFFSET(wide) + half * 32);
            mine.sums[0][place] = mine.sums[1][place] = make_float4(0.f, 0.f, 0.f, 0.f);
        }
        float A2[4], g[4], sum_A[4] = {0.f, 0.f, 0.f, 0.f};
        scaled4(A2, *reinterpret_cast<const float4*>(f.A + p.channel * 16 + q * 4), LOG2E);
        const int handed = WARPS * 8 * 16, of_thread = (warp * 8 + c) * 16 + q * 4;
        const float* after = f.after + ((p.row * f.s.n_chunks + p.piece) * f.s.d + p.channel) * 16 + q * 4;
        if (last_span < spans) {
            wait_for(f.there + number + 1);
            after = f.handed + (i64)(number + 1) * handed + of_thread;
        } else {
            __syncthreads();
        }
        scaled4(g, *reinterpret_cast<const float4*>(after), 1.f);
        if (!p.active) g[0] = g[1] = g[2] = g[3] = 0.f;  // nothing of it goes into the block's sums

        // A span is on its way.
        const auto fetch_span = [&](int back, int buffer, const uint4& where) {
            const u32 to = where.x + (buffer ? 4 * TILE : 0);
            const int first_t = p.begin + back * SPAN, t = first_t + (int)where.z, near = min(t, p.end - 1);  // behind the last token, where delta and grad_y are 0, its numbers
            const Two of_x = load_two(where.y), of_z = load_two(where.y + of_rows);  // before any copy, which would wait for them each time
            fetch<Four>(to + X * TILE, at(of_x.first, f.x, near));
            fetch<Four>(to + DT * TILE, at(of_x.second, f.dt, near));
            if (HAS_Z) fetch<Four>(to + Z * TILE, at(of_z.first, f.z, near));
            fetch_if<Four>(t < p.end, to + GRAD_Y * TILE, at(of_z.second, f.grad_y, near));
            fetch<FourKept>(
                by_lane + OFFSET(kept), shifted(f.starts, (int)p.row * (f.s.l_padded / SPAN) + first_t / SPAN, of_span) + p.channel * 16 + q * 4);
            stage(
                where.w + (buffer ? (u32)sizeof(Staged) : 0),
                shifted(f.BC, (int)p.row * f.s.l_padded + first_t + staged_t, OF_TOKEN * sizeof(float)) + staged_n);
            arrive_with_copies<FULL_AT>();
        };
        // What all warps have of a span goes to global memory.
        const auto finish_span = [&](int back, int buffer, const uint4& where) {
            add_up(f, all_at + OF_SHARED(of) + (buffer ? OFFSET(states[1]) : OFFSET(states[0])), p, p.begin + back * SPAN, adders);
            adders += 128 % (32 * WARPS);
            if (adders >= 32 * WARPS) adders -= 32 * WARPS;
            const u32 from = where.x + (buffer ? 4 * TILE : 0);
            const int t = p.begin + back * SPAN + (int)where.z;
            if (t < p.end) {
                const Two of_x = load_two(where.y + 2 * of_rows);
                *reinterpret_cast<Four*>(at(of_x.first, f.grad_x, t)) = load_numbers(from + X * TILE);
                *reinterpret_cast<Four*>(at(of_x.second, f.grad_dt, t)) = load_numbers(from + DT * TILE);
                if (HAS_Z) *reinterpret_cast<Four*>(at(load_two(where.y + 3 * of_rows).first, f.grad_z, t)) = load_numbers(from + Z * TILE);
            }
        };
        const auto where_is = [&](int i) {
            const float4 v = load4(by_lane + OFFSET(where) + i * OF_FOUR);
            return make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w));
        };
        fetch_span(last_span - 1, buffer, where_is(0));
        for (int back = last_span - 1; back >= first_span; back--) {
            const int span = p.begin + back * SPAN;
            wait<FULL_AT>(buffer);
            const float4 first = load_kept(by_lane + OFFSET(kept));
            {
                const uint4 where = where_is(1);
                const u32 read = where.x + (buffer ? 4 * TILE : 0);
                const bool inside = span + (lane >> 1) < p.end;
                const int odd = 64 - (lane & 1) * 128;
                float delta[4], xv[4], gy[4], zv[4], slope[4], of_z[4], bias[4] = {};
                if (HAS_BIAS) scaled4(bias, load4(where.w), 1.f);
                widen(load_numbers(read + DT * TILE), delta);
                widen(load_numbers(read + X * TILE), xv);
                widen(load_numbers(read + GRAD_Y * TILE), gy);
                if (HAS_Z) widen(load_numbers(read + Z * TILE), zv);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float v = delta[i] + bias[i];
                    delta[i] = SOFTPLUS ? TYPE == 1 ? rough_softplus(v) : softplus(v) : v;
                    if (SOFTPLUS) slope[i] = exp2_fast((v - delta[i]) * LOG2E);  // sigmoid(v) = exp(v - softplus(v))
                    if (!inside) delta[i] = 0.f;
                    xv[i] *= delta[i];
                    if (HAS_Z) {
                        const float s = sigmoid(zv[i]), gate = zv[i] * s;
                        of_z[i] = gy[i] * fmaf(gate, 1.f - s, s);
                        gy[i] *= gate;
                    }
                    store1(where.z + i * 16, delta[i]);
                }
                if (SOFTPLUS) store4(by_lane + OFFSET(later[0]), slope[0], slope[1], slope[2], slope[3]);
                if (HAS_Z) {
                    store4(by_lane + OFFSET(later[1]), of_z[0], of_z[1], of_z[2], of_z[3]);
                    store4(by_lane + OFFSET(later[2]), gy[0], gy[1], gy[2], gy[3]);
                }
#if TYPE == 1
                const uint2 of_g = narrow(xv), of_h = narrow(gy);
                const u32 by = where.y + (lane >> 1 & 3) * 48 - (lane & 1) * 288 + 12, by_h = by - (lane & 2) * 64;
                store1(by, __uint_as_float(of_g.x)), store1(by + 16, __uint_as_float(of_g.y));
                store1(by_h + 320, __uint_as_float(of_h.x)), store1(by_h + 320 + 16, __uint_as_float(of_h.y));
#pragma unroll
                for (int i = 0; i < 4; i++) xv[i] = before_cut(xv[i]), gy[i] = before_cut(gy[i]);
#endif
#pragma unroll
                for (int i = 0; i < 4; i++) store2(numbers_of(where.y, odd, i), xv[i], gy[i]);
            }
            __syncwarp();
#if HAS_SEQ
            const float* const resets = f.resets + p.row * f.s.l_padded + span;
#else
            const float* const resets = nullptr;
#endif
            const u32 of_B = buffer ? (u32)sizeof(Staged) : 0, of_C = of_B + (u32)sizeof(Staged) / 2;
            const u32 states_at = by_lane + (buffer ? OFFSET(states[1]) : OFFSET(states[0]));
            {
                float h[3][4], decays[2][4];
                scaled4(h[0], first, 1.f);
                store4(states_at, first.x, first.y, first.z, first.w);
#pragma unroll
                for (int group = 0; group < SPAN / 4 - 1; group++) {
                    float delta[4];
                    scaled4(delta, load4(by_channel + OFFSET(delta) + group * 144), 1.f);
                    const float drive = load1(by_lane + group * OF_FOUR);
                    const float2 B = load2(two_at + of_B + group * 5 * ROW_OF_STATES);
#pragma unroll
                    for (int pair = 0; pair < 2; pair++) {
                        recompute(h, decays, A2, delta + pair * 2, drive, B, q, pair, resets + group * 4 + pair * 2);
                        if (pair == 1) store4(states_at + (group + 1) * OF_FOUR, h[2][0], h[2][1], h[2][2], h[2][3]);
#pragma unroll
                        for (int j = 0; j < 4; j++) h[0][j] = h[2][j];
                    }
                }
            }
            if (back < last_span - 1) {  // the span behind: all warps are past it since long
                wait<DONE_AT>(buffer ^ 1);
                finish_span(back + 1, buffer ^ 1, where_is(0));
            }
            if (back > first_span) fetch_span(back - 1, buffer ^ 1, where_is(0));
#pragma unroll 1
            for (int half = 1; half >= 0; half--) {
#pragma unroll
                for (int part = 1; part >= 0; part--) {
                    const int group = half * 2 + part;
                    float delta[4];
                    scaled4(delta, load4(by_channel + OFFSET(delta) + group * 144), 1.f);
                    const float4 numbers = load4(by_lane + group * OF_FOUR);
                    const float drive = numbers.x, to_y = numbers.y, rough = TYPE == 1 ? to_y : high_part(to_y);
                    const float2 B_pair = load2(two_at + of_B + group * 5 * ROW_OF_STATES);
                    const float2 C_pair = load2(two_at + of_C + group * 5 * ROW_OF_STATES);
#if TYPE == 1
                    turned.begin(__float_as_uint(numbers.w));
#endif
                    float all_states[5][4], all_decays[4][4];
                    scaled4(all_states[0], load4(states_at + group * OF_FOUR), 1.f);
#pragma unroll
                    for (int pair = 0; pair < 2; pair++)
                        recompute(
                            all_states + pair * 2, all_decays + pair * 2, A2, delta + pair * 2, drive, B_pair, q,
                            pair, resets + group * 4 + pair * 2);
                    const float4 B = load4(four_at + of_B + half * 10 * ROW_OF_STATES), C = load4(four_at + of_C + half * 10 * ROW_OF_STATES);
                    float of_decay[4], y, drives;  // of token q, sums over states of h C and g B
#pragma unroll
                    for (int pair = 1; pair >= 0; pair--) {
                        float after[2][4], sums[4];
                        float even[4], odd[4];
                        outer<TYPE != 1>(even, odd, rough, to_y - rough, q == pair * 2, q == pair * 2 + 1, C_pair);
                        float(*const states)[4] = all_states + pair * 2, (*const decays)[4] = all_decays + pair * 2;
#pragma unroll
                        for (int e = 1; e >= 0; e--) {
                            const int i = pair * 2 + e;
                            const float by_y[4] = {even[e * 2], odd[e * 2], even[e * 2 + 1], odd[e * 2 + 1]};
#pragma unroll
                            for (int j = 0; j < 4; j++) after[e][j] = g[j] += by_y[j];
#if TYPE != 1
                            turned.put(i, after[e], states[e + 1]);
#endif
                            of_decay[i] = 0.f;
#pragma unroll
                            for (int j = 0; j < 4; j++) {
                                g[j] *= decays[e][j];
                                const float w = g[j] * states[e][j];  // the gradient of delta A
                                of_decay[i] = fmaf(w, A2[j], of_decay[i]);
                                sum_A[j] = fmaf(w, delta[i], sum_A[j]);
                            }
                        }
#if TYPE == 1
                        const uint2 of_g[2] = {narrow(after[0]), narrow(after[1])}, of_h[2] = {narrow(states[1]), narrow(states[2])};
                        turned.sum(sums, of_g, of_h);
                        store4_if((q & 1) == pair, states_at + group * OF_FOUR, sums);
#endif
                        const auto choose = [&](float& of_token) {
                            if (pair == 1) of_token = q == 3 ? sums[2 + part] : sums[part];
                            if (pair == 0 && q == 0) of_token = sums[part];
                            if (pair == 0 && q == 1) of_token = sums[2 + part];
                        };
                        if (HAS_Z) over_states(sums, states[1], states[2], C), choose(y);
                        over_states(sums, after[0], after[1], B), choose(drives);
                    }
#if TYPE != 1
                    __syncwarp();
                    float sums[4];
                    turned.sum(sums, load1(by_low + group * OF_FOUR), load1(by_high + group * OF_FOUR));
                    __syncwarp();
                    store4(states_at + group * OF_FOUR, sums[0], sums[1], sums[2], sums[3]);
#endif
                    store4(by_lane + group * OF_FOUR, drives, HAS_Z ? y : 0.f, over_threads(of_decay, q, turned.last), 0.f);
                }
            }
            __syncwarp();
            {
                const uint4 where = where_is(1);
                const u32 read = where.x + (buffer ? 4 * TILE : 0);
                const bool inside = span + (lane >> 1) < p.end;
                const int odd = 64 - (lane & 1) * 128;
                float xv[4], to_y[4], slope[4], of_z[4], g_x[4], g_dt[4], g_z[4], skip[4] = {}, sum_D[4], sum_bias[4];
                if (HAS_BIAS) scaled4(sum_bias, load4(by_lane + OFFSET(sums[1])), 1.f);
                if (HAS_D) scaled4(skip, load4(where.w + 16), 1.f), scaled4(sum_D, load4(by_lane + OFFSET(sums[0])), 1.f);
                if (SOFTPLUS) scaled4(slope, load4(by_lane + OFFSET(later[0])), 1.f);
                if (HAS_Z) scaled4(of_z, load4(by_lane + OFFSET(later[1])), 1.f), scaled4(to_y, load4(by_lane + OFFSET(later[2])), 1.f);
                else widen(load_numbers(read + GRAD_Y * TILE), to_y);
                widen(load_numbers(read + X * TILE), xv);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float4 sums = load4(numbers_of(where.y, odd, i));
                    const float delta = load1(where.z + i * 16);
                    if (HAS_Z) g_z[i] = of_z[i] * fmaf(skip[i], xv[i], sums.y);
                    g_x[i] = fmaf(sums.x, delta, skip[i] * to_y[i]);
                    g_dt[i] = fmaf(sums.z, LN2, sums.x * xv[i]);
                    if (SOFTPLUS) g_dt[i] *= slope[i];
                    if (HAS_D) sum_D[i] = fmaf(to_y[i], xv[i], sum_D[i]);
                    if (HAS_BIAS && inside) sum_bias[i] += g_dt[i];
                }
                if (HAS_D) store4(by_lane + OFFSET(sums[0]), sum_D[0], sum_D[1], sum_D[2], sum_D[3]);
                if (HAS_BIAS) store4(by_lane + OFFSET(sums[1]), sum_bias[0], sum_bias[1], sum_bias[2], sum_bias[3]);
                store_numbers(read + X * TILE, g_x);
                store_numbers(read + DT * TILE, g_dt);
                if (HAS_Z) store_numbers(read + Z * TILE, g_z);
            }
            __syncwarp();
            arrive<DONE_AT>();
            buffer ^= 1;
        }
        wait<DONE_AT>(buffer ^ 1);
        finish_span(first_span, buffer ^ 1, where_is(0));
        if (first_span > 0) {
            *reinterpret_cast<float4*>(f.handed + (i64)number * handed + of_thread) = make_float4(g[0], g[1], g[2], g[3]);
            hand_over(f.there + number);
        }
        float sum_D[4], sum_bias[4];  // over tokens
        scaled4(sum_D, load4(by_lane + OFFSET(sums[0])), 1.f);
        scaled4(sum_bias, load4(by_lane + OFFSET(sums[1])), 1.f);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int k = 2; k < 32; k *= 2) {
                sum_D[i] += __shfl_xor_sync(FULL, sum_D[i], k);
                sum_bias[i] += __shfl_xor_sync(FULL, sum_bias[i], k);
            }
        // As one of two parts of the row where rows are cut; of a whole one the other part is 0.
        const int parts = f.s.share > of_row ? 2 : 1, of_parts = first_span == 0 && last_span == spans ? parts : 1;
        for (int k = 0; k < of_parts && p.active; k++) {
            const i64 part = (p.row * f.s.n_chunks + p.piece) * parts + (first_span > 0) + k;
            const float by = k ? 0.f : 1.f;
            store_scaled4(f.grad_A + (part * f.s.d + p.channel) * 16 + q * 4, sum_A, by);
            if (HAS_D && lane < 2) store_scaled4(f.grad_D + part * f.s.d + p.c4, sum_D, by);
            if (HAS_BIAS && lane < 2) store_scaled4(f.grad_bias + part * f.s.d + p.c4, sum_bias, by);
        }
        if (p.active && p.piece == 0 && first_span == 0) store_scaled4(f.grad_first + (p.row * f.s.d + p.channel) * 16 + q * 4, g, 1.f);
    }
}
