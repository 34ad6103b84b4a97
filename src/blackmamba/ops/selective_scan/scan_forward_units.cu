// As scan_forward.cu, of bfloat16 rows on NVIDIA's Hopper, so that few rows fill it: a block has 16 channels, and yet twenty
// warps. Twelve of them scan. What is one number a token and channel, others compute: four delta and delta x, before, and four
// the gate, after. They hand each other 16 tokens at a time, by way of TURNS places in shared memory.
//
// A thread that scans has two states of a channel, a warp eight of eight channels, as a 16 x 8 matrix lies in threads. So
// delta x B and sums of h C over states are products of matrices. Those read 11 bits of a number: delta x is cut in two; of h
// 11 bits do for y, which keeps 8. Three warps have the same states, and take turns of 16 tokens: while one advances them, the
// others compute decays and drives of their next tokens.
//
// Bound by exponentials: 19 for each number of y.

#define TURN 16      // tokens
#define TURNS 8
#define STAGE 32     // tokens of two turns, one by each half of the threads that prepare or finish
#define OF_ROLE 128  // threads
#define SCANS 3      // roles that scan
#define CHANNELS 16
#define AHEAD 3      // stages whose numbers are on their way from global memory
#define MOST 3e38f   // what is above counts as infinite

// Channel c of a block has place c % 4 * 4 + c / 4: so threads that have four of a token meet in no bank.
struct alignas(16) Turn {
    struct {  // of four tokens; of place p and token t in [p * 4 + t]
        float delta[80], rough[80], rest[80];  // the last two are delta x
    } of[TURN / 4];
    float BC[TURN][40];
    float sums[2][TURN / 2][40];  // of h C over half of the states; of place p and token t in [t / 2][p * 2 + t % 2]
    float resets[TURN];
    u64 full, done;  // what is above has come, and sums of before have been read; it has been scanned, sums are there
};
#define OFFSET(member) ((u32)(unsigned long long)&reinterpret_cast<Turn*>(0)->member)
#define ROW (u32)(40 * sizeof(float))  // of BC and sums

__device__ __forceinline__ void take4(float* out, u32 from) {
    take(out, reinterpret_cast<const float*>(__cvta_shared_to_generic(from)));
}
__device__ __forceinline__ float2& two(u32 at) { return *reinterpret_cast<float2*>(__cvta_shared_to_generic(at)); }
__device__ __forceinline__ float& one(u32 at) { return *reinterpret_cast<float*>(__cvta_shared_to_generic(at)); }

// D = A B, see `multiply_add` in scan_units.cu.
__device__ __forceinline__ void multiply(float* d, const float* a, float b0, float b1) {
    d[0] = d[1] = d[2] = d[3] = 0.f;
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%5, %6, %7, %8}, {%9, %10}, {%4, %4, %4, %4};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
        : "f"(0.f), "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
          "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// What a thread that scans knows of the tokens of a turn before their states.
struct Known {
    float decay[TURN][2], drive[TURN][2];
    float2 c[TURN / 8];  // of token g of each eight and the thread's states
};

struct Shared {
    Turn turns[TURNS];
    float2 passed[OF_ROLE / 32][SCANS][32];  // states, by each of the warps that take turns to the next
    u64 has_passed[OF_ROLE / 32][SCANS];
    Four read[2][AHEAD + 1][2][OF_ROLE];  // by those that prepare and those that finish, of stages, of two tensors
};

// One turn after the other: its address, and the parity of its barriers.
struct Ring {
    u32 at, parity = 0, end;
    __device__ __forceinline__ Ring(Shared& shared, int first) {
        at = pinned(address_of(&shared.turns[0]));
        end = at + sizeof(shared.turns);
        at += first * (u32)sizeof(Turn);
    }
    __device__ __forceinline__ void next(int n) {
        at += n * (u32)sizeof(Turn);
        if (at >= end) at -= sizeof(Shared::turns), parity ^= 1;
    }
};

// Parts of rows, one after the other, that are a block's share, see scan_forward.cu.
struct Share {
    int begin, end;  // of what is left
    int row, first_channel, from, to, stages;
    bool from_before, for_next;
    int* there;
    __device__ __forceinline__ explicit Share(const Forward& f) : there(f.there + (int)blockIdx.x) {
        begin = (int)blockIdx.x * f.s.share, end = min(begin + f.s.share, f.s.shares_end), for_next = false;
    }
    // By all threads of the block: once states that the part begins with are there, if any.
    __device__ __forceinline__ bool next(const Forward& f) {
        if (for_next) hand_over(there);
        if (end <= begin) return false;
        const int of_row = f.s.chunk / SPAN, task = (end - 1) / of_row, last_span = end - task * of_row;
        end = task * of_row;
        row = task / f.s.n_blocks, first_channel = task % f.s.n_blocks * CHANNELS;
        from_before = end < begin, for_next = last_span * SPAN < f.s.l;
        from = from_before ? (begin - end) * SPAN : 0, to = for_next ? last_span * SPAN : f.s.l;
        stages = (to - from + STAGE - 1) / STAGE;
        if (from_before) wait_for(there - 1);
        return true;
    }
};

// Advances the states, in every turn of its own: those with numbers `mine`, `mine` + SCANS, ...
__device__ __forceinline__ void scan(const Forward& f, Shared& shared, int thread, int mine) {
    const int warp = thread >> 5, g = thread >> 2 & 7, k = thread & 3, half = warp & 1, place = (warp >> 1) * 8 + g;
    const int state = half * 8 + k * 2;
    const u32 own_delta = pinned(OFFSET(of[0].delta[place * 4]));
    const u32 own_drive = pinned(OFFSET(of[0].rough[place * 4 + k]));
    const u32 own_b = pinned(OFFSET(BC[k][half * 8 + g])), own_c = pinned(OFFSET(BC[g][OF_C + state]));
    const u32 own_sums = pinned(OFFSET(sums[half][k][place * 2]));
    const u32 rest_behind = OFFSET(of[0].rest) - OFFSET(of[0].rough), of_four = OFFSET(of[1]) - OFFSET(of[0]);
    const int before_me = (mine + SCANS - 1) % SCANS;
    const u32 takes = pinned(address_of(&shared.passed[warp][before_me][thread & 31]));
    const u32 puts = pinned(address_of(&shared.passed[warp][mine][thread & 31]));
    const u32 may_take = pinned(address_of(&shared.has_passed[warp][before_me]));
    const u32 has_put = pinned(address_of(&shared.has_passed[warp][mine]));
    Ring ring(shared, mine);
    u32 passes = 0;   // parity
    u32 turn = mine;  // of all
    u32 first = 0;    // of this part's
#pragma unroll 1
    for (Share share(f); share.next(f);) {
        int channel = share.first_channel + (place & 3) * 4 + (place >> 2);
        const bool active = channel < f.s.d;
        if (!active) channel = 0;  // computes, but writes nothing
        const float2 A = *reinterpret_cast<const float2*>(f.A + channel * 16 + state);
        const float A2[2] = {A.x * LOG2E, A.y * LOG2E};
        const i64 in_row = ((i64)share.row * f.s.d + channel) * 16 + state;
        float* const handed = f.handed + (i64)blockIdx.x * CHANNELS * 16 + place * 16 + state;
        float h[2] = {0.f, 0.f};
        const float* before = HAS_FIRST ? f.first + in_row : nullptr;
        if (share.from_before) before = handed - CHANNELS * 16;
        if (before) h[0] = before[0], h[1] = before[1];
#if KEEP
        const int first_span = share.from / SPAN + (int)(turn - first);
        Kept* starts = f.starts + (((i64)share.row * (f.s.l_padded / SPAN) + first_span) * f.s.d + channel) * 16 + state;
        int left = active ? share.to - share.from - (int)(turn - first) * TURN : 0;
#endif
        Known known;
        const auto compute = [&](u32 at) {
#pragma unroll
            for (int i = 0; i < TURN / 4; i++) {
                float delta[4], u[4];  // u: of token k; rows behind the eighth may be anything
                take4(delta, at + own_delta + i * of_four);
                u[0] = one(at + own_drive + i * of_four), u[2] = one(at + own_drive + i * of_four + rest_behind);
                const float b_of_k = one(at + own_b + i * 4 * ROW);
#if HAS_SEQ
                float reset[4];
                take4(reset, at + OFFSET(resets[i * 4]));
#endif
                if (i % 2 == 0) known.c[i / 2] = two(at + own_c + i * 4 * ROW);
#pragma unroll
                for (int t = 0; t < 4; t++) {
                    const float b = k == t ? b_of_k : 0.f;
                    float drive[4];
                    multiply(drive, u, b, b);
#pragma unroll
                    for (int j = 0; j < 2; j++) {
#if HAS_SEQ
                        known.decay[i * 4 + t][j] = exp2_fast(fmaf(delta[t], A2[j], reset[t]));
#else
                        known.decay[i * 4 + t][j] = exp2_fast(delta[t] * A2[j]);
#endif
                        known.drive[i * 4 + t][j] = drive[j];
                    }
                }
            }
        };
#pragma unroll 1
        for (const u32 last = first + share.stages * (STAGE / TURN) - 1; turn <= last; turn += SCANS) {
            const u32 at = ring.at;
            wait(at + OFFSET(full), ring.parity);
            compute(at);
            ring.next(SCANS);
            if (turn > 0) {  // at the begin of a part, too: none may be two turns ahead of another
                wait(may_take, passes);
                passes ^= 1;
            }
            if (turn > first) {
                const float2 v = two(takes);
                h[0] = v.x, h[1] = v.y;
            }
#if KEEP
            if (left > 0) *reinterpret_cast<u32*>(starts) = narrow(h[0], h[1]);
            starts += (i64)f.s.d * 16 * SCANS;
            left -= TURN * SCANS;
#endif
            float by_two[TURN / 2][4];  // states of two tokens
#pragma unroll
            for (int t = 0; t < TURN; t++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    h[j] = fmaf(known.decay[t][j], h[j], known.drive[t][j]);
                    by_two[t / 2][j * 2 + t % 2] = h[j];
                }
            if (turn < last) {
                two(puts) = make_float2(h[0], h[1]);
            } else if (share.for_next) {
                *reinterpret_cast<float2*>(handed) = make_float2(h[0], h[1]);
            } else if (active) {
                *reinterpret_cast<float2*>(f.ends + in_row) = make_float2(h[0], h[1]);
            }
            arrive(has_put);
#pragma unroll
            for (int eight = 0; eight < TURN / 8; eight++) {
                float2 y;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float sums[4];
                    multiply(sums, by_two[eight * 4 + i], known.c[eight].x, known.c[eight].y);
                    if (i == 0 || k == i) y = make_float2(sums[0], sums[3]);
                }
                two(at + own_sums + eight * 4 * ROW) = y;
            }
            arrive(at + OFFSET(done));
        }
        first += share.stages * (STAGE / TURN);
    }
}

// Four channels of a token of each stage, for those that prepare and those that finish: the numbers of two tensors come by way of
// shared memory, where no thread sees another's.
struct Reader {
    int t, part, c4, left;  // left: tokens
    bool inside;
    Number *first, *second;
    int of_first, of_second;  // bytes of a token
    u32 first_at, end_at, now_at, before_at;  // where this stage's numbers are, and those of the one before, AHEAD behind it
    __device__ __forceinline__ Reader(Shared& shared, int which, int thread) : t(thread >> 2), part(thread & 3) {
        first_at = pinned(address_of(&shared.read[which][0][0][thread])), end_at = first_at + sizeof(shared.read[0]);
    }
    __device__ __forceinline__ Number* in(const Rows& tensor, const Share& share) const {
        return at(tensor.data + share.row * tensor.row + c4, tensor, share.from + t);
    }
    // Of the stage that is `ahead` of this one.
    __device__ __forceinline__ void ask(u32 to, int ahead, bool has_first, bool has_second) {
        const bool here = left > ahead * STAGE;
        if (has_first) fetch_if<Four>(here, to, first);
        if (has_second) fetch_if<Four>(here, to + OF_ROLE * (u32)sizeof(Four), second);
        first = shifted(first, STAGE, of_first), second = shifted(second, STAGE, of_second);
        asm volatile("cp.async.commit_group;" ::: "memory");
    }
    __device__ __forceinline__ void begin(
        const Share& share, int channels, const Rows& one, const Rows& other, bool has_first, bool has_second) {
        copied();  // what was asked for behind the part before
        c4 = share.first_channel + part * 4, inside = c4 < channels, left = inside ? share.to - share.from - t : 0;
        first = in(one, share), second = in(other, share), of_first = one.token, of_second = other.token;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) ask(first_at + i * BYTES, i, has_first, has_second);
        now_at = first_at, before_at = end_at - BYTES;
    }
    // This stage's; asks for those that are AHEAD.
    __device__ __forceinline__ void take(float* one, float* other, bool has_first, bool has_second) {
        asm volatile("cp.async.wait_group %0;" ::"n"(AHEAD - 1) : "memory");
        const auto read = [&](float* out, u32 from) {
            widen(*reinterpret_cast<const Four*>(__cvta_shared_to_generic(from)), out);
        };
        if (has_first) read(one, now_at);
        if (has_second) read(other, now_at + OF_ROLE * (u32)sizeof(Four));
        ask(before_at, AHEAD, has_first, has_second);
        before_at = now_at, now_at += BYTES;
        if (now_at == end_at) now_at = first_at;
    }
    static constexpr u32 BYTES = 2 * OF_ROLE * sizeof(Four);
};

// Computes delta and delta x, and copies B and C.
__device__ __forceinline__ void prepare(const Forward& f, Shared& shared, int thread) {
    Reader reader(shared, 0, thread);
    const int half = thread / (OF_ROLE / 2), of_half = thread % (OF_ROLE / 2);
    const int copies_t = of_half >> 3, piece = (of_half & 7) * 4;  // B and C: 16 bytes of two tokens
    const u32 put_BC = pinned(OFFSET(BC[copies_t][piece]));
    const u32 put = pinned(OFFSET(of[reader.t >> 2 & 3].delta[reader.part * 4 + (reader.t & 3)]));
    const u32 rough_behind = OFFSET(of[0].rough) - OFFSET(of[0].delta), rest_behind = 2 * rough_behind;
    Ring ring(shared, half);
#pragma unroll 1
    for (Share share(f); share.next(f);) {
        reader.begin(share, f.s.d, f.x, f.dt, true, true);
        float bias[4] = {};
#if HAS_BIAS
        if (reader.inside) scaled4(bias, *reinterpret_cast<const float4*>(f.bias + reader.c4), 1.f);
#endif
        const int first_t = share.from + half * TURN;
        int left_to_copy = share.to - first_t - copies_t;
        const float* BC = f.BC + ((i64)share.row * f.s.l_padded + first_t + copies_t) * OF_TOKEN + piece;
#if HAS_SEQ
        const float* resets = f.resets + (i64)share.row * f.s.l_padded + first_t + of_half * 4;
        int resets_left = share.to - first_t - of_half * 4;
#endif
#pragma unroll 1
        for (int stage = 0; stage < share.stages; stage++) {
            const u32 at = ring.at;
            wait(at + OFFSET(done), ring.parity ^ 1);
            fetch_if<float4>(left_to_copy > 0, at + put_BC, BC);
            fetch_if<float4>(left_to_copy > 8, at + put_BC + 8 * ROW, BC + 8 * OF_TOKEN);
            BC += STAGE * OF_TOKEN, left_to_copy -= STAGE;
#if HAS_SEQ
            if (of_half < TURN / 4) fetch_if<float4>(resets_left > 0, at + OFFSET(resets[0]) + of_half * 16, resets);
            resets += STAGE, resets_left -= STAGE;
#endif
            arrive_with_copies(at + OFFSET(full));
            float raw[4], x[4], delta[4], drive[4];
            reader.take(x, raw, true, true);
#pragma unroll
            for (int c = 0; c < 4; c++) {
                raw[c] += bias[c];
                delta[c] = SOFTPLUS ? softplus(raw[c]) : raw[c];
                drive[c] = delta[c] * x[c];
            }
            const bool finite = fabsf(drive[0] + drive[1] + drive[2] + drive[3]) < MOST;
            if (reader.left <= 0 || !finite) {
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    if (reader.left <= 0) delta[c] = drive[c] = 0.f;
                    // Not to be multiplied with the zeros of tokens before: the decay makes NaN of the state in its place.
                    if (!(fabsf(drive[c]) < MOST)) drive[c] = 0.f, delta[c] = __uint_as_float(0x7fffffffu);
                }
            }
#pragma unroll
            for (int c = 0; c < 4; c++) {
                const u32 to_place = at + put + c * 64;
                const float rough = high_part(drive[c]);
                one(to_place) = delta[c];
                one(to_place + rough_behind) = rough;
                one(to_place + rest_behind) = drive[c] - rough;
            }
            reader.left -= STAGE;
            arrive(at + OFFSET(full));
            ring.next(2);
        }
    }
}

// Sums up y, and multiplies it with the gate.
__device__ __forceinline__ void finish(const Forward& f, Shared& shared, int thread) {
    Reader reader(shared, 1, thread);
    const u32 take = pinned(OFFSET(sums[0][reader.t >> 1 & 7][reader.part * 2 + (reader.t & 1)]));
    const u32 other_half = OFFSET(sums[1]) - OFFSET(sums[0]);
    Ring ring(shared, thread / (OF_ROLE / 2));
    for (int i = 0; i < TURNS; i += 2) arrive(ring.at + i * (u32)sizeof(Turn) + OFFSET(full));  // no sums are there to be read
#pragma unroll 1
    for (Share share(f); share.next(f);) {
        reader.begin(share, f.s.d, f.x, f.z, HAS_D, HAS_Z);
        float skip[4] = {};
#if HAS_D
        if (reader.inside) scaled4(skip, *reinterpret_cast<const float4*>(f.D + reader.c4), 1.f);
#endif
        Number* y = reader.in(f.y, share);
#pragma unroll 1
        for (int stage = 0; stage < share.stages; stage++) {
            const u32 at = ring.at;
            float out[4], x[4] = {}, z[4] = {};
            wait(at + OFFSET(done), ring.parity);
#pragma unroll
            for (int c = 0; c < 4; c++) out[c] = one(at + take + c * 32) + one(at + take + c * 32 + other_half);
            arrive(at + OFFSET(full));
            ring.next(2);
            reader.take(x, z, HAS_D, HAS_Z);
#pragma unroll
            for (int c = 0; c < 4; c++) {
                out[c] = fmaf(out[c], 1.00034f, skip[c] * x[c]);  // what matrix units cut off h is given back, in the mean
                if (HAS_Z) out[c] *= z[c] * sigmoid(z[c]);
            }
            store4(y, out, reader.left > 0);
            y = shifted(y, STAGE, f.y.token);
            reader.left -= STAGE;
        }
    }
}

extern "C" __global__ void __launch_bounds__((SCANS + 2) * OF_ROLE, MIN_BLOCKS) scan_forward_units(const Forward f) {
    Shared& shared = shared_as<Shared>();
    if (threadIdx.x == 0) {
        for (Turn& turn : shared.turns) {
            make_barrier(turn.full, 3 * OF_ROLE / 2);  // half of those that prepare, their copies, half of those that finish
            make_barrier(turn.done, OF_ROLE);
        }
        for (auto& of_warp : shared.has_passed)
            for (u64& barrier : of_warp) make_barrier(barrier, 32);
    }
    __syncthreads();
    const int role = threadIdx.x / OF_ROLE, thread = threadIdx.x % OF_ROLE;
    if (role < SCANS) {  // registers: 96 a thread, dealt out anew
        asm volatile("setmaxnreg.inc.sync.aligned.u32 120;");
        scan(f, shared, thread, role);
    } else {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
        if (role == SCANS) prepare(f, shared, thread);
        else finish(f, shared, thread);
    }
}
