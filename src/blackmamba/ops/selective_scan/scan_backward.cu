// Every gradient; those of B and C as sums over the channels of a block, in `partial` (b, l / 16, blocks, 4, 32, 4), see
// `add_up`. Keeps the states of 4 tokens and the gradients of state and A in registers, the states before each 4 tokens of a span
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
// Numbers on their way to shared memory, or zeros.
template <typename T>
__device__ __forceinline__ void fetch(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"((int)sizeof(T)) : "memory");
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

// What a warp has of four tokens of a span, which no other touches but `states`. Channel c is in place c ^ c / 4, so that threads
// meet in few banks; a group of four tokens begins 64 bytes behind a multiple of 128 or on one, in turn.
struct alignas(16) OfFour {
    float4 states[2][32];  // before them, in place `place_of_lane`; then their sums for B and C
    // of channel and token: delta x, the gradient of y before the gate; then sums over states, of g B and h C
    float2 numbers[8][4];
    struct {
        float delta[4];  // of a channel, by tokens
        u32 pairs[4];  // bfloat16 alone: of thread 4 r + k in place [r][k], for `Turned`
    } of[8];
    float2 of_decay[8][4];  // of channel and token, what has been summed over states, and nothing
    float unused[16];
};
// What it has of a span.
struct alignas(128) OfWarp {
    OfFour of[SPAN / 4];
    FourKept kept[32];  // the state before the span
    float4 wide[2][2];  // of four channels: `bias`, D
    uint4 where[3][32];  // addresses of a thread, for which it has no registers
    float4 sums[2][32];  // of a thread's tokens: the gradients of D and of `bias`
    // of a thread's numbers, for the end of a span: softplus' slope, the factor of z's gradient, that of y before the gate
    float4 later[3][32];
#if TYPE != 1
    Turned::Rows turned[4];
#endif
};
#define OFFSET(member) ((u32)(unsigned long long)&reinterpret_cast<OfWarp*>(0)->member)
#define OF_LANES (32 * (int)sizeof(float4))  // from one number of a thread to the next
#define BUFFER (u32)sizeof(OfFour::states[0])
#define OF_HALF (2 * (u32)sizeof(OfFour))  // of a span
#define BC_OF_HALF (u32)(10 * ROW_OF_STATES)
__device__ __forceinline__ int place_of_lane(int lane) { return lane ^ (lane & 16) >> 2; }

// x, dt, z and the gradient of y of a span, and then its results. A token's row has an odd number of 16 bytes, so that
// threads of 8 tokens meet in no bank.
#define ROW_OF_TILE ((WARPS * 8 * (int)sizeof(Number) / 16 | 1) * 16)
#define TILE (SPAN * ROW_OF_TILE)
#define NEVER (1 << 28)  // a token behind all others
enum { X, DT, Z, GRAD_Y };
// Of the i-th of four channels, where `odd` is between the first two.
__device__ __forceinline__ u32 of_channel(u32 first, u32 odd, int i) { return first + (i & 1 ? odd : 0) + (i >> 1) * 64; }
struct Shared {
    unsigned long long barriers[16];
    OfWarp of[WARPS];
    Staged BC[2];
    char tiles[2][4 * TILE];
};
#define OF_SHARED(member) ((u32)(unsigned long long)&reinterpret_cast<Shared*>(0)->member)

// B and C of a span are 2 KB, and so are sums for them: this is what a thread has of these, where there are as many threads.
#if WARPS >= 16
typedef float Part;
__device__ __forceinline__ float load_part(u32 from) { return load1(from); }
__device__ __forceinline__ void add(float& a, float b) { a += b; }
#elif WARPS >= 8
typedef float2 Part;
__device__ __forceinline__ float2 load_part(u32 from) { return load2(from); }
__device__ __forceinline__ void add(float2& a, const float2& b) { a.x += b.x, a.y += b.y; }
#else
typedef float4 Part;
__device__ __forceinline__ float4 load_part(u32 from) { return load4(from); }
__device__ __forceinline__ void add(float4& a, const float4& b) { a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w; }
#endif
#define OF_SPAN 2048
#define OF_THREADS (32 * WARPS * (int)sizeof(Part))
// They are on their way. of_thread: where its part begins.
__device__ __forceinline__ void stage(u32 to, const char* from, u32 of_thread) {
#pragma unroll
    for (u32 i = 0; i < OF_SPAN; i += OF_THREADS) {
        if (OF_SPAN % OF_THREADS && i + of_thread >= OF_SPAN) return;
        fetch<Part>(to + i / (OF_TOKEN * 4) / 4 * 5 * ROW_OF_STATES, from + (i + of_thread));
    }
}
// The sums of a span over the warps, always in the same order, to `to`. states: of the first warp and four tokens.
__device__ __forceinline__ void add_up(char* to, u32 states, u32 of_thread) {
#pragma unroll
    for (u32 i = 0; i < OF_SPAN; i += OF_THREADS) {
        if (OF_SPAN % OF_THREADS && i + of_thread >= OF_SPAN) return;
        const u32 from = states + i / OF_LANES * (u32)sizeof(OfFour);
        Part sum = load_part(from);
#pragma unroll
        for (int w = 1; w < WARPS; w++) add(sum, load_part(from + w * (u32)sizeof(OfWarp)));
        *reinterpret_cast<Part*>(to + (i + of_thread)) = sum;
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

// A token's number, that many bytes behind the token's first. Rows have less than 4 GB, as cuda.py sees to: 64 bits are one sum.
__device__ __forceinline__ Number* in_row(const Rows& tensor, i64 row, int t, u32 bytes) {
    const u32 offset = (u32)t * (u32)tensor.token + bytes;
    return reinterpret_cast<Number*>(reinterpret_cast<char*>(tensor.data + row * tensor.row) + offset);
}
__device__ __forceinline__ void store_scaled4(float* to, const float* v, float by) {
    *reinterpret_cast<float4*>(to) = make_float4(v[0] * by, v[1] * by, v[2] * by, v[3] * by);
}

// Rows of blocks of channels are laid end to end, each from its last token to its first, and that is cut into equal shares, one
// a block of threads: so all end at once. A share ends in a row whose later tokens are the next share's, which it begins
// with: their gradient of the state between is handed over. Shares are dealt from the last one on, so that the next has begun.
extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_backward(const Backward f) {
    Shared& shared = shared_as<Shared>();
    const int warp = threadIdx.x >> 5, lane = held(threadIdx.x & 31), q = lane & 3, c = lane >> 2;
    const u32 all_at = (u32)__cvta_generic_to_shared(&shared), own = address_of(&shared.of[warp]);
    // of a thread's states; of its token's numbers; of its channel; of its pairs
    const u32 by_lane = held(own + place_of_lane(lane) * 16), by_number = held(own + place_of_lane(lane) * 8);
    const u32 by_channel = held(own + (c ^ c >> 2) * 32);
#if TYPE == 1
    const u32 by_pair = held(own + c * 32 + q * 4);
    Turned turned(lane);
#else
    const u32 by_low = held(own + place_of_lane(q * 4 + (c & 3)) * 8 + (c >> 2) * 4);
    const u32 by_high = held(own + place_of_lane(16 + q * 4 + (c & 3)) * 8 + (c >> 2) * 4);
    Turned turned(shared.of[warp].turned, lane);
#endif
    // of B and C: four states of one of 8 tokens, the c / 2-th or fourth after; two of token q of 4, 2 c and the next
    const int four_t = (c >> 1) + (c & 1) * 4;
    const u32 four_at = address_of(&shared.BC[0].B[row_of_token(four_t)][place_of_state(four_t, q * 4)]);
    const u32 two_at = address_of(&shared.BC[0].B[q][place_of_state(q, c * 2)]);
    if (threadIdx.x == 0) {
        make_barrier<FULL_AT>(32 * WARPS);
        make_barrier<DONE_AT>(32 * WARPS);
    }
    int buffer = 0;  // of a span; also the parity of its barriers
    const int of_row = f.s.chunk / SPAN, number = gridDim.x - 1 - blockIdx.x, end = min((number + 1) * f.s.share, f.s.shares_end);
#pragma unroll 1
    for (int next = number * f.s.share; next < end;) {
        const int task = next / of_row, first_span = next - task * of_row;
        next = min(end, (task + 1) * of_row);
        const Place p = place_of(f.s, q, c, task);
        const int spans = (p.end - p.begin + SPAN - 1) / SPAN, last_span = min(next - task * of_row, spans);
        const u32 first_of_all = (u32)p.row * ((u32)f.s.l_padded / SPAN) + (u32)p.begin / SPAN;  // span
        const u32 of_kept = f.s.d * 16 * (u32)sizeof(Kept), of_sums = f.s.n_blocks * OF_SPAN;
        __syncthreads();  // all are done with the row before
        {
            OfWarp& mine = shared.of[warp];
            if (lane < 2) {
                if (HAS_BIAS) mine.wide[lane][0] = *reinterpret_cast<const float4*>(f.bias + p.c4);
                if (HAS_D) mine.wide[lane][1] = *reinterpret_cast<const float4*>(f.D + p.c4);
            }
            // what it copies and writes: four channels of one token, its neighbour the next four; and its part of B and C
            const int part = (int)threadIdx.x % (2 * WARPS), t = (int)threadIdx.x / (2 * WARPS);
            const int channel = (p.block * WARPS * 2 + part) * 4;
            const u32 of_thread = threadIdx.x * sizeof(Part), n = of_thread / 4 % OF_TOKEN, staged_t = of_thread / (4 * OF_TOKEN);
            const u32 staged =
                row_of_token(staged_t) * ROW_OF_STATES + place_of_state(staged_t, n % 16) * 4 + n / 16 * sizeof(Staged) / 2;
            const int place = place_of_lane(lane);
            mine.where[0][place] = make_uint4(
                all_at + OF_SHARED(tiles) + t * ROW_OF_TILE + part * (int)sizeof(Four),
                channel < f.s.d ? channel * sizeof(Number) : 0, channel < f.s.d ? t : NEVER, all_at + OF_SHARED(BC) + staged);
            // what it computes of x, dt, z and others: four channels of its warp, of one token
            const u32 half = lane & 1, four = own + (lane >> 3) * (u32)sizeof(OfFour), token = lane >> 1 & 3;
            mine.where[1][place] = make_uint4(
                all_at + OF_SHARED(tiles) + (lane >> 1) * ROW_OF_TILE + (warp * 8 + half * 4) * (int)sizeof(Number),
                four + OFFSET(of[0].numbers) + half * 160 + token * 8, four + OFFSET(of[0].of) + half * 160 + token * 4,
                four + OFFSET(of[0].of) + token * 32 + 16 + half * 8);
            mine.where[2][place] = make_uint4(
                of_thread, all_at + OF_SHARED(of) + of_thread / OF_LANES * (u32)sizeof(OfFour) + of_thread % OF_LANES,
                (p.channel * 16 + q * 4) * sizeof(Kept), own + OFFSET(wide) + half * 32);
            mine.sums[0][place] = mine.sums[1][place] = make_float4(0.f, 0.f, 0.f, 0.f);
        }
        float A2[4], g[4], sum_A[4] = {0.f, 0.f, 0.f, 0.f};
        scaled4(A2, *reinterpret_cast<const float4*>(f.A + p.channel * 16 + q * 4), LOG2E);
        const int handed = WARPS * 8 * 16, of_thread = (warp * 8 + c) * 16 + q * 4;
        const float* after = f.after + ((p.row * f.s.n_chunks + p.piece) * f.s.d + p.channel) * 16 + q * 4;
        const bool from_next = last_span < spans;
        if (from_next) {
            wait_for(f.there + number + 1);
            after = f.handed + (i64)(number + 1) * handed + of_thread;
        } else {
            __syncthreads();
        }
        if (p.active && (from_next || f.after)) scaled4(g, *reinterpret_cast<const float4*>(after), 1.f);
        else g[0] = g[1] = g[2] = g[3] = 0.f;  // nothing of what is not there goes into the block's sums

        const auto where_is = [&](int i) {
            const float4 v = load4(by_lane + OFFSET(where) + i * OF_LANES);
            return make_uint4(__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w));
        };
        // A span is on its way.
        const auto fetch_span = [&](int back, int buffer, const uint4& mine, const uint4& of_all) {
            const u32 to = mine.x + buffer * 4 * TILE;
            const int first_t = p.begin + back * SPAN, t = first_t + (int)mine.z;
            const int near = min(t, p.end - 1);  // behind the last token, where delta and grad_y are 0, its numbers
            const u64 span = first_of_all + back;
            fetch<Four>(to + X * TILE, in_row(f.x, p.row, near, mine.y));
            fetch<Four>(to + DT * TILE, in_row(f.dt, p.row, near, mine.y));
            if (HAS_Z) fetch<Four>(to + Z * TILE, in_row(f.z, p.row, near, mine.y));
            fetch_if<Four>(t < p.end, to + GRAD_Y * TILE, in_row(f.grad_y, p.row, near, mine.y));
            fetch<FourKept>(
                (TYPE == 1 ? by_number : by_lane) + OFFSET(kept),
                reinterpret_cast<const char*>(f.starts) + span * of_kept + of_all.z);
            stage(mine.w + buffer * (u32)sizeof(Staged), reinterpret_cast<const char*>(f.BC) + span * OF_SPAN, of_all.x);
            arrive_with_copies<FULL_AT>();
        };
        // What all warps have of a span goes to global memory.
        const auto finish_span = [&](int back, int buffer, const uint4& mine, const uint4& of_all) {
            const int first_t = p.begin + back * SPAN, t = first_t + (int)mine.z;
            const u32 from = mine.x + buffer * 4 * TILE;
            if (t < p.end) {
                *reinterpret_cast<Four*>(in_row(f.grad_x, p.row, t, mine.y)) = load_numbers(from + X * TILE);
                *reinterpret_cast<Four*>(in_row(f.grad_dt, p.row, t, mine.y)) = load_numbers(from + DT * TILE);
                if (HAS_Z) *reinterpret_cast<Four*>(in_row(f.grad_z, p.row, t, mine.y)) = load_numbers(from + Z * TILE);
            }
            char* const sums = reinterpret_cast<char*>(f.partial) + (u64)(first_of_all + back) * of_sums + p.block * OF_SPAN;
            add_up(sums, of_all.y + buffer * BUFFER, of_all.x);
        };
        fetch_span(last_span - 1, buffer, where_is(0), where_is(2));
        for (int back = last_span - 1; back >= first_span; back--) {
            const int span = p.begin + back * SPAN;
            wait<FULL_AT>(buffer);
            const float4 first = load_kept((TYPE == 1 ? by_number : by_lane) + OFFSET(kept));
            {
                const uint4 where = where_is(1);
                const u32 read = where.x + buffer * 4 * TILE;
                const int odd = 32 - (lane & 1) * 64;
                float delta[4], xv[4], gy[4], zv[4], slope[4], of_z[4], bias[4] = {};
                if (HAS_BIAS) scaled4(bias, load4(__float_as_uint(load1(by_lane + OFFSET(where[2]) + 12))), 1.f);
                widen(load_numbers(read + DT * TILE), delta);
                widen(load_numbers(read + X * TILE), xv);
                widen(load_numbers(read + GRAD_Y * TILE), gy);
                if (HAS_Z) widen(load_numbers(read + Z * TILE), zv);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float v = delta[i] + bias[i];
                    delta[i] = SOFTPLUS ? TYPE == 1 ? rough_softplus(v) : softplus(v) : v;
                    if (SOFTPLUS) slope[i] = exp2_fast((v - delta[i]) * LOG2E);  // sigmoid(v) = exp(v - softplus(v))
                    if (HAS_Z) {
                        const float s = sigmoid(zv[i]), gate = zv[i] * s;
                        of_z[i] = gy[i] * fmaf(gate, 1.f - s, s);
                        gy[i] *= gate;
                    }
                }
                if (span + SPAN > p.end && span + (lane >> 1) >= p.end) delta[0] = delta[1] = delta[2] = delta[3] = 0.f;
                if (SOFTPLUS) store4(by_lane + OFFSET(later[0]), slope[0], slope[1], slope[2], slope[3]);
                if (HAS_Z) {
                    store4(by_lane + OFFSET(later[1]), of_z[0], of_z[1], of_z[2], of_z[3]);
                    store4(by_lane + OFFSET(later[2]), gy[0], gy[1], gy[2], gy[3]);
                }
#pragma unroll
                for (int i = 0; i < 4; i++) store1(of_channel(where.z, odd, i), delta[i]), xv[i] *= delta[i];
#if TYPE == 1
                const uint2 of_g = narrow(xv), of_h = narrow(gy);
                store2(where.w, __uint_as_float(of_g.x), __uint_as_float(of_g.y));
                store2(where.w + 4 * 32, __uint_as_float(of_h.x), __uint_as_float(of_h.y));
#pragma unroll
                for (int i = 0; i < 4; i++) xv[i] = before_cut(xv[i]), gy[i] = before_cut(gy[i]);
#endif
#pragma unroll
                for (int i = 0; i < 4; i++) store2(of_channel(where.y, odd, i), xv[i], gy[i]);
            }
            __syncwarp();
#if HAS_SEQ
            const float* const resets = f.resets + p.row * f.s.l_padded + span;
#else
            const float* const resets = nullptr;
#endif
            const u32 of_states = buffer * BUFFER, of_B = buffer * (u32)sizeof(Staged);
            {
                float h[3][4], decays[2][4];
                scaled4(h[0], first, 1.f);
                store4(by_lane + of_states, first.x, first.y, first.z, first.w);
#pragma unroll
                for (int group = 0; group < SPAN / 4 - 1; group++) {
                    const u32 of_group = group * (u32)sizeof(OfFour);
                    float delta[4];
                    scaled4(delta, load4(by_channel + of_group + OFFSET(of[0].of)), 1.f);
                    const float drive = load1(by_number + of_group + OFFSET(of[0].numbers));
                    const float2 B = load2(two_at + of_B + group * 5 * ROW_OF_STATES);
#pragma unroll
                    for (int pair = 0; pair < 2; pair++) {
                        recompute(h, decays, A2, delta + pair * 2, drive, B, q, pair, resets + group * 4 + pair * 2);
                        if (pair == 1)
                            store4(by_lane + of_states + (group + 1) * (u32)sizeof(OfFour), h[2][0], h[2][1], h[2][2], h[2][3]);
#pragma unroll
                        for (int j = 0; j < 4; j++) h[0][j] = h[2][j];
                    }
                }
            }
            {
                const uint4 mine = where_is(0), of_all = where_is(2);
                if (back < last_span - 1) {  // the span behind: all warps are past it since long
                    wait<DONE_AT>(buffer ^ 1);
                    finish_span(back + 1, buffer ^ 1, mine, of_all);
                }
                if (back > first_span) fetch_span(back - 1, buffer ^ 1, mine, of_all);
            }
#pragma unroll 1
            for (u32 of_half = OF_HALF, BC_of_half = of_B + BC_OF_HALF, half_t = SPAN / 2; (int)of_half >= 0;
                 of_half -= OF_HALF, BC_of_half -= BC_OF_HALF, half_t -= SPAN / 2) {
#pragma unroll
                for (int part = 1; part >= 0; part--) {
                    const u32 of_group = of_half + part * (u32)sizeof(OfFour);
                    const u32 BC_of_group = BC_of_half + part * 5 * ROW_OF_STATES;
                    const float* const resets_of_group = resets + half_t + part * 4;
                    float delta[4];
                    scaled4(delta, load4(by_channel + of_group + OFFSET(of[0].of)), 1.f);
                    const float2 numbers = load2(by_number + of_group + OFFSET(of[0].numbers));
                    const float drive = numbers.x, to_y = numbers.y, rough = TYPE == 1 ? to_y : high_part(to_y);
                    const float2 B_pair = load2(two_at + BC_of_group);
                    const float2 C_pair = load2(two_at + BC_of_group + (u32)sizeof(Staged) / 2);
#if TYPE == 1
                    turned.begin(__float_as_uint(load1(by_pair + of_group + OFFSET(of[0].of[0].pairs))));
#endif
                    float all_states[5][4], all_decays[4][4];
                    scaled4(all_states[0], load4(by_lane + of_group + of_states), 1.f);
#pragma unroll
                    for (int pair = 0; pair < 2; pair++)
                        recompute(
                            all_states + pair * 2, all_decays + pair * 2, A2, delta + pair * 2, drive, B_pair, q,
                            pair, resets_of_group + pair * 2);
                    const float4 B = load4(four_at + BC_of_half), C = load4(four_at + BC_of_half + (u32)sizeof(Staged) / 2);
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
                        const uint2 of_g[2] = {narrow(after[0]), narrow(after[1])};
                        const uint2 of_h[2] = {narrow(states[1]), narrow(states[2])};
                        turned.sum(sums, of_g, of_h);
                        store4_if((q & 1) == pair, by_lane + of_group + of_states, sums);
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
                    turned.sum(
                        sums, load1(by_low + of_group + OFFSET(of[0].numbers)),
                        load1(by_high + of_group + OFFSET(of[0].numbers)));
                    __syncwarp();
                    store4(by_lane + of_group + of_states, sums[0], sums[1], sums[2], sums[3]);
#endif
                    store2(by_number + of_group + OFFSET(of[0].numbers), drives, HAS_Z ? y : 0.f);
                    store1(by_number + of_group + OFFSET(of[0].of_decay), over_threads(of_decay, q, turned.last));
                }
            }
            __syncwarp();
            {
                const uint4 where = where_is(1);
                const u32 read = where.x + buffer * 4 * TILE, wide_at = __float_as_uint(load1(by_lane + OFFSET(where[2]) + 12));
                const bool inside = span + (lane >> 1) < p.end;
                const int odd = 32 - (lane & 1) * 64;
                float xv[4], to_y[4], slope[4], of_z[4], g_x[4], g_dt[4], g_z[4], skip[4] = {}, sum_D[4], sum_bias[4];
                if (HAS_BIAS) scaled4(sum_bias, load4(by_lane + OFFSET(sums[1])), 1.f);
                if (HAS_D) scaled4(skip, load4(wide_at + 16), 1.f), scaled4(sum_D, load4(by_lane + OFFSET(sums[0])), 1.f);
                if (SOFTPLUS) scaled4(slope, load4(by_lane + OFFSET(later[0])), 1.f);
                if (HAS_Z) {
                    scaled4(of_z, load4(by_lane + OFFSET(later[1])), 1.f);
                    scaled4(to_y, load4(by_lane + OFFSET(later[2])), 1.f);
                } else widen(load_numbers(read + GRAD_Y * TILE), to_y);
                widen(load_numbers(read + X * TILE), xv);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const u32 at = of_channel(where.y, odd, i);
                    const float2 sums = load2(at);
                    const float of_decay = load1(at + OFFSET(of[0].of_decay) - OFFSET(of[0].numbers));
                    const float delta = load1(of_channel(where.z, odd, i));
                    if (HAS_Z) g_z[i] = of_z[i] * fmaf(skip[i], xv[i], sums.y);
                    g_x[i] = fmaf(sums.x, delta, skip[i] * to_y[i]);
                    g_dt[i] = fmaf(of_decay, LN2, sums.x * xv[i]);
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
        finish_span(first_span, buffer ^ 1, where_is(0), where_is(2));
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
        if (p.active && p.piece == 0 && first_span == 0)
            store_scaled4(f.grad_first + (p.row * f.s.d + p.channel) * 16 + q * 4, g, 1.f);
    }
}
