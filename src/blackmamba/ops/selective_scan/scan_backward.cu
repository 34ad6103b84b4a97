// Every gradient; those of B and C as sums over the channels of a block, in `partial` (b, l / 4, blocks, 32, 4): see `add_up`.
// Keeps the states of 4 tokens and the gradients of state and A in registers, the states before each 4 tokens of a span
// in shared memory. Moves x, dt, z, the gradients of y, x, dt and z once, and the states before every span once. Bound by
// instructions.
//
// Of a span, from its end: a block copies what it reads while the span behind is computed; delta, delta x and the gradient
// before the gate go to shared memory; states are computed again from the one that was kept, first those before each four
// tokens, then four tokens' at a time, and these are walked over backwards. There a thread has g, the gradient of its four
// states, and what is summed goes to matrix units (scan_units.cu). At last what is one number a token and channel is
// computed of those sums, by the threads that read it.

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

struct OfWarp {
    float delta[SPAN / 4][8][4];  // by fours of tokens, channels and tokens
    // Then what has been summed over states.
    float drive[SPAN][8];  // delta x
    float to_y[SPAN][8];  // gradient of y before the gate
    float of_decay[SPAN][8];
#if TYPE == 1
    u32 by[SPAN / 4][4][2][4];  // drive and to_y of two channels, by fours of tokens, channels, and tokens
#else
    Turned::Rows turned[4];
#endif
    float4 first[SPAN / 4][32];  // states before tokens
    float4 of_BC[SPAN / 4][32];
    // What a thread reads of a span and the next, and the states before them.
    Four read[2][4][32];
    FourKept kept[2][32];
    float between[12];  // so that warps differ in banks
};
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
struct Shared {
    OfWarp of[WARPS];
    Staged BC[2];
    // What a thread would else have no registers for, of its four channels: `bias` and D, and where its rows are.
    float4 wide[2][2 * WARPS];
    Two rows[4][2 * WARPS];
};
enum { X, DT, Z, GRAD_Y };
constexpr u32 of_tensor = 32 * sizeof(Four);
#define OFFSET(member) ((u32)(unsigned long long)&reinterpret_cast<OfWarp*>(0)->member)
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
        const int tile = ((int)p.row * (f.s.l_padded / 4) + (span >> 2) + (task >> 5)) * f.s.n_blocks + p.block;
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
    const int staged_t = threadIdx.x >> 2 & SPAN - 1, staged_n = (threadIdx.x & 3) * 4;
    const float* next_BC = f.BC + (p.row * f.s.l_padded + p.begin + (spans - 1) * SPAN + staged_t) * OF_TOKEN + staged_n;
    const u32 put_BC = address_of(&shared.BC[0].B[row_of_token(staged_t)][place_of_state(staged_t, staged_n)]);
    stage(put_BC, next_BC);
    int buffer = 0;
    if (p.lane < 2) {
        const Rows* const all[8] = {&f.x, &f.dt, &f.z, &f.grad_y, &f.grad_x, &f.grad_dt, &f.grad_z, &f.grad_z};
#pragma unroll
        for (int k = 0; k < 4; k++) shared.rows[k][p.warp * 2 + p.lane] = {row_of(*all[k * 2], p), row_of(*all[k * 2 + 1], p)};
        if (HAS_BIAS) shared.wide[0][p.warp * 2 + p.lane] = *reinterpret_cast<const float4*>(f.bias + p.c4);
        if (HAS_D) shared.wide[1][p.warp * 2 + p.lane] = *reinterpret_cast<const float4*>(f.D + p.c4);
    }
    __syncthreads();
    const u32 wide_at = address_of(&shared.wide[0][r.warp * 2 + (r.c >> 2)]), rows_at = wide_at + (u32)sizeof(shared.wide), of_wide = 2 * WARPS * 16;
    const int own_t = held(r.t);
    // of its token: delta of the first channel; delta x and others of four
    const u32 delta_at = address_of(&other.delta[r.t >> 2][r.c][r.t & 3]);
    const u32 drive_at = address_of(reinterpret_cast<char*>(&other) + (r.t * 8 + r.c) * 4);
    const Kept* const starts =
        f.starts + ((p.row * (f.s.l_padded / SPAN) + p.begin / SPAN) * f.s.d + p.channel) * 16 + p.q * 4;
    const int of_span = f.s.d * 16 * (int)sizeof(Kept);
    const u32 by_channel = address_of(reinterpret_cast<char*>(&own) + p.c * 16), by_lane = address_of(reinterpret_cast<char*>(&own) + p.lane * 16);
    const u32 by_number = address_of(reinterpret_cast<char*>(&own) + (p.q * 8 + p.c) * 4);
#if TYPE == 1
    Turned turned(p.lane);
#else
    Turned turned(own.turned, p.lane);
    const u32 by_at = address_of(&(p.c & 4 ? own.to_y : own.drive)[p.c & 3][p.q]);
#endif
    // of B and C: four states of one of 8 tokens, the c / 2-th or fourth after; two of token q of 4, 2 c and the next
    const int four_t = (p.c >> 1) + (p.c & 1) * 4;
    u32 four_at = address_of(&shared.BC[0].B[row_of_token(four_t)][place_of_state(four_t, p.q * 4)]);
    u32 two_at = address_of(&shared.BC[0].B[p.q][place_of_state(p.q, p.c * 2)]);
    int other_BC = sizeof(Staged);
    const u32 by_four = address_of(reinterpret_cast<char*>(&own) + p.lane * (int)sizeof(Four));
    const auto fetch_span = [&](int back, int buffer) {
        const u32 to = by_four + OFFSET(read) + (buffer ? (u32)sizeof(own.read[0]) : 0);
        const int t = p.begin + back * SPAN + own_t, near = min(t, p.end - 1);  // behind the last token, where delta and grad_y are 0, its numbers
        const Two of_x = load_two(rows_at), of_z = load_two(rows_at + of_wide);  // before any copy, which would wait for them each time
        fetch<Four>(to + X * of_tensor, at(of_x.first, f.x, near));
        fetch<Four>(to + DT * of_tensor, at(of_x.second, f.dt, near));
        if (HAS_Z) fetch<Four>(to + Z * of_tensor, at(of_z.first, f.z, near));
        fetch_if<Four>(t < p.end && r.active, to + GRAD_Y * of_tensor, at(of_z.second, f.grad_y, near));
        const u32 kept_at = (sizeof(Four) == sizeof(FourKept) ? by_four : by_lane) + OFFSET(kept) + (buffer ? (u32)sizeof(own.kept[0]) : 0);
        fetch<FourKept>(kept_at, shifted(starts, back, of_span));
    };
    fetch_span(spans - 1, 0);
    for (int back = spans - 1; back >= 0; back--) {
        const int span = p.begin + back * SPAN;
        const int t = span + own_t;
        const bool inside = t < p.end;
        const u32 read = by_four + OFFSET(read) + (buffer ? (u32)sizeof(own.read[0]) : 0);
        copied();
        const float4 first = kept(reinterpret_cast<const Kept*>(&own.kept[buffer][p.lane]));
        {
            float delta[4], xv[4], gy[4], zv[4], bias[4] = {};
            if (HAS_BIAS) scaled4(bias, load4(wide_at), 1.f);
            widen(load_numbers(read + DT * of_tensor), delta);
            widen(load_numbers(read + X * of_tensor), xv);
            widen(load_numbers(read + GRAD_Y * of_tensor), gy);
            if (HAS_Z) widen(load_numbers(read + Z * of_tensor), zv);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                delta[i] += bias[i];
                if (SOFTPLUS) delta[i] = TYPE == 1 ? rough_softplus(delta[i]) : softplus(delta[i]);
                if (!inside) delta[i] = 0.f;
                xv[i] *= delta[i];
                if (HAS_Z) gy[i] *= zv[i] * sigmoid(zv[i]);
                store1(delta_at + i * 16, delta[i]);
            }
#if TYPE == 1
            const uint2 of_g = narrow(xv), of_h = narrow(gy);
            const u32 pairs[4] = {of_g.x, of_h.x, of_g.y, of_h.y};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                store1(delta_at + OFFSET(by) + i * 16, __uint_as_float(pairs[i]));
                xv[i] = before_cut(xv[i]), gy[i] = before_cut(gy[i]);
            }
#endif
            store4(drive_at + OFFSET(drive), xv[0], xv[1], xv[2], xv[3]);
            store4(drive_at + OFFSET(to_y), gy[0], gy[1], gy[2], gy[3]);
        }
        __syncthreads();
        buffer ^= 1;
        next_BC -= SPAN * OF_TOKEN;
        if (back > 0) {
            stage(put_BC + (buffer ? (u32)sizeof(Staged) : 0), next_BC);
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
                const float drive = load1(by_number + OFFSET(drive) + group * 128);
                const float2 B = load2(two_at + group * 5 * ROW_OF_STATES);
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    if (group == SPAN / 4 - 1) break;
                    recompute(h, decays, A2, delta + pair * 2, drive, B, p.q, pair, resets + group * 4 + pair * 2);
                    if (pair == 1)
                        store4(by_lane + OFFSET(first) + (group + 1) * 512, h[2][0], h[2][1], h[2][2], h[2][3]);
#pragma unroll
                    for (int j = 0; j < 4; j++) h[0][j] = h[2][j];
                }
            }
        }
#pragma unroll 1
        for (int half = 1; half >= 0; half--) {
#pragma unroll
            for (int part = 1; part >= 0; part--) {
                const int group = half * 2 + part;
                float delta[4];
                scaled4(delta, load4(by_channel + OFFSET(delta) + group * 128), 1.f);
                const float drive = load1(by_number + OFFSET(drive) + group * 128);
                const float2 B_pair = load2(two_at + group * 5 * ROW_OF_STATES);
                const float to_y = load1(by_number + OFFSET(to_y) + group * 128), rough = TYPE == 1 ? to_y : high_part(to_y);
                const float2 C_pair = load2(two_at + sizeof(shared.BC[0].B) + group * 5 * ROW_OF_STATES);
                const u32 of_BC = by_lane + OFFSET(of_BC) + group * 512;
#if TYPE == 1
                turned.begin(by_number + OFFSET(by) + group * 128);
#endif
                __syncwarp();
                float all_states[5][4], all_decays[4][4];
                scaled4(all_states[0], load4(by_lane + OFFSET(first) + group * 512), 1.f);
                __syncwarp();
#pragma unroll
                for (int pair = 0; pair < 2; pair++)
                    recompute(
                        all_states + pair * 2, all_decays + pair * 2, A2, delta + pair * 2, drive, B_pair, p.q,
                        pair, resets + group * 4 + pair * 2);
                const float4 B = load4(four_at + half * 10 * ROW_OF_STATES), C = load4(four_at + sizeof(shared.BC[0].B) + half * 10 * ROW_OF_STATES);
                float of_decay[4], y, drives;  // of token q, sums over states of h C and g B
#pragma unroll
                for (int pair = 1; pair >= 0; pair--) {
                    float after[2][4], sums[4];
                    float even[4], odd[4];
                    outer<TYPE != 1>(even, odd, rough, to_y - rough, p.q == pair * 2, p.q == pair * 2 + 1, C_pair);
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
                    store4_if((p.q & 1) == pair, of_BC, sums);
#endif
                    const auto choose = [&](float& of_token) {
                        if (pair == 1) of_token = p.q == 3 ? sums[2 + part] : sums[part];
                        if (pair == 0 && p.q == 0) of_token = sums[part];
                        if (pair == 0 && p.q == 1) of_token = sums[2 + part];
                    };
                    if (HAS_Z) over_states(sums, states[1], states[2], C), choose(y);
                    over_states(sums, after[0], after[1], B), choose(drives);
                }
#if TYPE != 1
                __syncwarp();
                float sums[4];
                turned.sum(sums, by_at + group * 128);
                __syncwarp();
                store4(of_BC, sums[0], sums[1], sums[2], sums[3]);
#endif
                if (HAS_Z) store1(by_number + OFFSET(to_y) + group * 128, y);
                store1(by_number + OFFSET(drive) + group * 128, drives);
                store1(by_number + OFFSET(of_decay) + group * 128, over_threads(of_decay, p.q, turned.last));
            }
        }
        __syncthreads();
        add_up(f, shared, p, span, adders);
        four_at += other_BC, two_at += other_BC;
        other_BC = -other_BC;
        adders = adders + 128 < 32 * WARPS ? adders + 128 : adders + 128 - 32 * WARPS;
        {
            float dtv[4], xv[4], gy[4], zv[4], g_x[4], g_dt[4], g_z[4], bias[4] = {}, skip[4] = {}, y[4], drives[4], decays[4];
            if (HAS_Z) scaled4(y, load4(drive_at + OFFSET(to_y)), 1.f);
            scaled4(drives, load4(drive_at + OFFSET(drive)), 1.f);
            scaled4(decays, load4(drive_at + OFFSET(of_decay)), 1.f);
            if (HAS_BIAS) scaled4(bias, load4(wide_at), 1.f);
            if (HAS_D) scaled4(skip, load4(wide_at + of_wide), 1.f);
            widen(load_numbers(read + DT * of_tensor), dtv);
            widen(load_numbers(read + X * of_tensor), xv);
            widen(load_numbers(read + GRAD_Y * of_tensor), gy);
            if (HAS_Z) widen(load_numbers(read + Z * of_tensor), zv);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float delta = load1(delta_at + i * 16);
                float to_y = gy[i];
                if (HAS_Z) {
                    const float s = sigmoid(zv[i]);
                    to_y *= zv[i] * s;
                    g_z[i] = gy[i] * fmaf(skip[i], xv[i], y[i]) * fmaf(zv[i] * s, 1.f - s, s);
                }
                g_x[i] = fmaf(drives[i], delta, skip[i] * to_y);
                g_dt[i] = fmaf(decays[i], LN2, drives[i] * xv[i]);
                if (SOFTPLUS) g_dt[i] *= exp2_fast(((dtv[i] + bias[i]) - delta) * LOG2E);  // sigmoid(v) = exp(v - softplus(v))
                if (HAS_D) sum_D[i] = fmaf(to_y, xv[i], sum_D[i]);
                if (HAS_BIAS && inside) sum_bias[i] += g_dt[i];
            }
            const bool write = inside && r.active;
            const Two of_x = load_two(rows_at + 2 * of_wide);
            store4(at(of_x.first, f.grad_x, t), g_x, write);
            store4(at(of_x.second, f.grad_dt, t), g_dt, write);
            if (HAS_Z) store4(at(load_two(rows_at + 3 * of_wide).first, f.grad_z, t), g_z, write);
        }
    }
    const i64 part = p.row * f.s.n_chunks + p.piece;
    // over tokens: a channel's sums are in 16 threads, then in 4
#pragma unroll
    for (int i = 0; i < 4; i++) other.delta[r.t >> 2][r.c + i][r.t & 3] = sum_D[i], other.drive[r.t][r.c + i] = sum_bias[i];
    __syncthreads();
    float all_D = 0.f, all_bias = 0.f;
#pragma unroll
    for (int i = 0; i < 4; i++) all_D += own.delta[p.q][p.c][i], all_bias += own.drive[p.q * 4 + i][p.c];
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
