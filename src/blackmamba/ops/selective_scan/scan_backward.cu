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

// B and C of a span, apart: so threads of 8 tokens read all banks. State n of token t is in place n ^ t / 2 % 2 * 8: so do
// threads of 4 tokens.
struct Staged {
    float B[SPAN][16];
    float C[SPAN][16];
};
__device__ __forceinline__ int place_of_state(int t, int n) { return n ^ (t & 2) << 2; }
__device__ __forceinline__ void stage(Staged& to, const float* from) {
#pragma unroll
    for (int first = 0; first < SPAN * 8; first += 32 * WARPS) {
        const int i = first + threadIdx.x, token = i >> 2 & SPAN - 1, four = (i & 3) * 4;
        if (i >= SPAN * 8) return;
        copy16(&(i < SPAN * 4 ? to.B : to.C)[token][place_of_state(token, four)], from + token * OF_TOKEN + (i < SPAN * 4 ? 0 : OF_C) + four);
    }
}
// Four numbers on their way to shared memory, or zeros.
template <typename T>
__device__ __forceinline__ void fetch(T* to, const void* from, bool inside) {
    const u32 address = (u32)__cvta_generic_to_shared(to);
    constexpr int bytes = sizeof(T);
    static_assert(bytes == 8 || bytes == 16, "what can be copied at once, and here is");
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(bytes), "r"(inside ? bytes : 0) : "memory");
}

struct OfWarp {
    float delta[SPAN / 4][8][4];  // by fours of tokens, channels and tokens
    float drive[SPAN / 4][8][4];  // delta x
    float to_y[SPAN / 4][8][4];  // gradient of y before the gate
#if TYPE == 1
    uint2 by[SPAN][4];  // drive and to_y, of a token, of two channels
#else
    float by[SPAN][2][8];  // the same, of all
#endif
#if TYPE != 1
    Turned::Rows turned[4];
#endif
    float4 first[SPAN / 4][32];  // states before tokens; then, by channels, what has been summed over those tokens' states
    float4 of_BC[SPAN / 4][32];
    // What a thread reads of a span and the next, and the states before them.
    Four read[2][4][32];
    FourKept kept[2][32];
    float between[12];  // so that warps differ in banks
};
struct Shared {
    OfWarp of[WARPS];
    Staged BC[2];
    // What a thread would else have no registers for, of its four channels: `bias` and D, where its row is.
    float4 wide[2][2 * WARPS];
    Number* rows[7][2 * WARPS];
};
enum { X, DT, Z, GRAD_Y, GRAD_X, GRAD_DT, GRAD_Z };
enum { OF_Y, OF_DRIVE, OF_DECAY };
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
        for (int k = 0; k < 7; k++) shared.rows[k][p.warp * 2 + p.lane] = row_of(*all[k], p);
        if (HAS_BIAS) shared.wide[0][p.warp * 2 + p.lane] = *reinterpret_cast<const float4*>(f.bias + p.c4);
        if (HAS_D) shared.wide[1][p.warp * 2 + p.lane] = *reinterpret_cast<const float4*>(f.D + p.c4);
    }
    __syncthreads();
    const int four = r.warp * 2 + (r.c >> 2);  // which of the block's
    // of its token and first channel: delta, and what has been summed
    const u32 number_at = address_of(&other.delta[r.t >> 2][r.c][r.t & 3]);
    const u32 sum_at = address_of(reinterpret_cast<float*>(other.first[r.t >> 2]) + r.c * 4 + (r.t & 3));
    const Kept* const starts =
        f.starts + ((p.row * (f.s.l_padded / SPAN) + p.begin / SPAN) * f.s.d + p.channel) * 16 + p.q * 4;
    const int of_span = f.s.d * 16 * (int)sizeof(Kept);
    const u32 by_channel = address_of(reinterpret_cast<char*>(&own) + p.c * 16), by_lane = address_of(reinterpret_cast<char*>(&own) + p.lane * 16);
    const u32 by_number = address_of(reinterpret_cast<char*>(&own) + p.lane * 4);
#if TYPE == 1
    Turned turned(p.lane);
    const u32 by_at = address_of(&own.by[p.c >> 1][p.q]);
#else
    Turned turned(own.turned, p.lane);
    const u32 by_at = address_of(&own.by[p.c >> 1][p.c & 1][p.q]);
#endif
    // of B and C: four states of token c; two of token q, 2 c and the next
    u32 four_at = address_of(&shared.BC[0].B[p.c][place_of_state(p.c, p.q * 4)]);
    u32 two_at = address_of(&shared.BC[0].B[p.q][place_of_state(p.q, p.c * 2)]);
    int other_BC = sizeof(Staged);
    const auto fetch_span = [&](int back, int buffer) {
        const int t = p.begin + back * SPAN + r.t;
        const bool inside = t < p.end;
        fetch(&own.read[buffer][X][p.lane], at(shared.rows[X][four], f.x, t), inside);
        fetch(&own.read[buffer][DT][p.lane], at(shared.rows[DT][four], f.dt, t), inside);
        if (HAS_Z) fetch(&own.read[buffer][Z][p.lane], at(shared.rows[Z][four], f.z, t), inside);
        fetch(&own.read[buffer][GRAD_Y][p.lane], at(shared.rows[GRAD_Y][four], f.grad_y, t), inside && r.active);
        fetch(&own.kept[buffer][p.lane], shifted(starts, back, of_span), true);
    };
    fetch_span(spans - 1, 0);
    for (int back = spans - 1; back >= 0; back--) {
        const int span = p.begin + back * SPAN;
        const int t = span + r.t;
        const bool inside = t < p.end;
        const Four(*const read)[32] = own.read[buffer];
        copied();
        const float4 first = kept(reinterpret_cast<const Kept*>(&own.kept[buffer][p.lane]));
        {
            float delta[4], xv[4], gy[4], zv[4], bias[4] = {};
            if (HAS_BIAS) scaled4(bias, shared.wide[0][four], 1.f);
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
                store1(number_at + i * 16, delta[i]);
                store1(number_at + i * 16 + OFFSET(drive), TYPE == 1 ? before_cut(xv[i]) : xv[i]);
                store1(number_at + i * 16 + OFFSET(to_y), TYPE == 1 ? before_cut(gy[i]) : gy[i]);
            }
#if TYPE == 1
            const uint2 of_g = narrow(xv), of_h = narrow(gy);
            *reinterpret_cast<uint4*>(&other.by[r.t][r.c >> 1]) = make_uint4(of_g.x, of_h.x, of_g.y, of_h.y);
#else
            *reinterpret_cast<float4*>(&other.by[r.t][0][r.c]) = make_float4(xv[0], xv[1], xv[2], xv[3]);
            *reinterpret_cast<float4*>(&other.by[r.t][1][r.c]) = make_float4(gy[0], gy[1], gy[2], gy[3]);
#endif
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
                const float drive = load1(by_number + OFFSET(drive) + group * 128);
                const float2 B = load2(two_at + group * 256);
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
                const float2 B_pair = load2(two_at + group * 256);
                const float to_y = load1(by_number + OFFSET(to_y) + group * 128), rough = TYPE == 1 ? to_y : high_part(to_y);
                const float2 C_pair = load2(two_at + sizeof(float) * 16 * SPAN + group * 256);
                const u32 by = by_at + group * (u32)sizeof(own.by[0]) * 4;
#if TYPE == 1
                turned.begin(by);
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
                const float4 B = load4(four_at + half * 512), C = load4(four_at + sizeof(float) * 16 * SPAN + half * 512);
#pragma unroll
                for (int pair = 1; pair >= 0; pair--) {
                    float after[2][4], of_decay[2], sums[3][4];
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
                        of_decay[e] = 0.f;
#pragma unroll
                        for (int j = 0; j < 4; j++) {
                            g[j] *= decays[e][j];
                            const float w = g[j] * states[e][j];  // the gradient of delta A
                            of_decay[e] = fmaf(w, A2[j], of_decay[e]);
                            sum_A[j] = fmaf(w, delta[i], sum_A[j]);
                        }
                    }
#if TYPE == 1
                    const uint2 of_g[2] = {narrow(after[0]), narrow(after[1])}, of_h[2] = {narrow(states[1]), narrow(states[2])};
                    turned.add(pair, of_g, of_h);
#endif
                    if (HAS_Z) over_states(sums[OF_Y], states[1], states[2], C);
                    over_states(sums[OF_DRIVE], after[0], after[1], B);
                    over_threads(sums[OF_DECAY], of_decay[0], of_decay[1]);
                    const u32 summed = by_channel + OFFSET(first) + group * 512 + pair * 8;
#pragma unroll
                    for (int k = HAS_Z ? OF_Y : OF_DRIVE; k <= OF_DECAY; k++)
                        store2_if(p.q == part * 2 + pair, summed + k * 128, sums[k][0], sums[k][3]);
                }
#if TYPE != 1
                __syncwarp();
                turned.add_all(by);
                __syncwarp();
#endif
                store4(by_lane + OFFSET(of_BC) + group * 512, turned.sums[0], turned.sums[1], turned.sums[2], turned.sums[3]);
            }
        }
        __syncthreads();
        add_up(f, shared, p, span, adders);
        four_at += other_BC, two_at += other_BC;
        other_BC = -other_BC;
        adders = adders + 128 < 32 * WARPS ? adders + 128 : adders + 128 - 32 * WARPS;
        {
            float dtv[4], xv[4], gy[4], zv[4], g_x[4], g_dt[4], g_z[4], bias[4] = {}, skip[4] = {};
            if (HAS_BIAS) scaled4(bias, shared.wide[0][four], 1.f);
            if (HAS_D) scaled4(skip, shared.wide[1][four], 1.f);
            widen(read[DT][p.lane], dtv);
            widen(read[X][p.lane], xv);
            widen(read[GRAD_Y][p.lane], gy);
            if (HAS_Z) widen(read[Z][p.lane], zv);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float delta = load1(number_at + i * 16);
                const float drive = load1(sum_at + i * 16 + OF_DRIVE * 128), decay = load1(sum_at + i * 16 + OF_DECAY * 128);
                float to_y = gy[i];
                if (HAS_Z) {
                    const float s = sigmoid(zv[i]), y = fmaf(skip[i], xv[i], load1(sum_at + i * 16 + OF_Y * 128));
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
            store4(at(shared.rows[GRAD_X][four], f.grad_x, t), g_x, write);
            store4(at(shared.rows[GRAD_DT][four], f.grad_dt, t), g_dt, write);
            if (HAS_Z) store4(at(shared.rows[GRAD_Z][four], f.grad_z, t), g_z, write);
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
