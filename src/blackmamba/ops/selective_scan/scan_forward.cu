// y, the last state and, if KEEP, the state before every span. Keeps states and A in registers. Moves x, dt, z and y once.
// Bound by exponentials: 19 for each number of y. LOCAL: only what the chunk leaves (ends) and what is left of what it began
// with (decays).
//
// Threads side by side read and write four channels each of a token, of all the block's channels, so that few lines of the
// cache are touched; what they compute of them goes through shared memory to the threads that scan. Of a span: B and C have
// come to shared memory while the span before was scanned, x, dt and z of the next to registers. Then y of the span before
// is summed up over the threads that had parts of it, gated and stored; delta and delta x of the next span are computed;
// and token by token the states are advanced and each thread's part of y is laid down.

struct Parts {  // of y; 48 and 8: so that they are read from all banks
    float y[SPAN][48];
    float between[8];
};
struct Steps {  // delta and delta x; channel c of token t in place c ^ ((t ^ warp) & 2), so that threads meet in no bank
    float2 du[SPAN][8];
    float2 between[8];
};

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_forward(const Forward f) {
    struct Shared {
        Steps steps[2][WARPS];
#if !LOCAL
        Parts parts[2][WARPS];
#endif
        float BC[2][SPAN * OF_TOKEN];
    };
    Shared& shared = shared_as<Shared>();
    // Threads whose numbers differ in the lowest bit have one channel, in the second bit the same states of two: so delta,
    // and B and C, are read by pairs from one place, which shared memory serves with half as many turns.
    const int lane = threadIdx.x & 31;
    const Place p = place_of(f.s, (lane & 1) | (lane >> 3 & 2), lane >> 1 & 7);
    // what it reads and writes: four channels of one token, scanned by that warp, as its c-th and the next
    const int reads_t = (int)threadIdx.x / (2 * WARPS), part = (int)threadIdx.x % (2 * WARPS), reads_warp = part >> 1, reads_c = (part & 1) * 4;
    int reads_c4 = p.block * WARPS * 8 + part * 4;
    const bool reads = reads_c4 < f.s.d;
    if (!reads) reads_c4 = 0;
    float4* const put_steps = reinterpret_cast<float4*>(&shared.steps[0][reads_warp].du[reads_t][reads_c]);
    const int low = (reads_t ^ reads_warp) >> 1 & 1;  // where the first two of four go
    const float2* const own_du[2] = {&shared.steps[0][p.warp].du[0][p.c ^ (p.warp & 2)], &shared.steps[0][p.warp].du[0][p.c ^ (p.warp & 2) ^ 2]};
    int place = p.q * 8 + p.c;
    pin(place);
#if !LOCAL
    float* const own_y = &shared.parts[0][p.warp].y[0][place];
    const float4* const parts_of = reinterpret_cast<const float4*>(&shared.parts[0][reads_warp].y[reads_t][reads_c]);
#endif
    float A2[4], h[4] = {0.f, 0.f, 0.f, 0.f};
    scaled4(A2, *reinterpret_cast<const float4*>(f.A + p.channel * 16 + p.q * 4), LOG2E);
    const i64 state = ((p.row * f.s.n_chunks + p.piece) * f.s.d + p.channel) * 16 + p.q * 4;
#if HAS_FIRST
    scaled4(h, *reinterpret_cast<const float4*>(f.first + state), 1.f);
#endif
    float bias[4] = {}, skip[4] = {};
#if HAS_BIAS
    scaled4(bias, *reinterpret_cast<const float4*>(f.bias + reads_c4), 1.f);
#endif
#if HAS_D
    scaled4(skip, *reinterpret_cast<const float4*>(f.D + reads_c4), 1.f);
#endif
    int t = p.begin + reads_t;  // of what is loaded next
    Number* const x = pinned(f.x.data + p.row * f.x.row + reads_c4);
    Number* const dt = pinned(f.dt.data + p.row * f.dt.row + reads_c4);
    Number* const z = pinned(f.z.data + p.row * f.z.row + reads_c4);
    Number* const y = pinned(f.y.data + p.row * f.y.row + reads_c4);
    int end = p.end;
    pin(end);
    const float* next_BC = f.BC + (p.row * f.s.l_padded + p.begin) * OF_TOKEN;
    const float* resets = f.resets + p.row * f.s.l_padded + p.begin;
    int buffer = 0;
    stage(shared.BC[0], next_BC);
    Kept* starts = f.starts + ((p.row * (f.s.l_padded / SPAN) + p.begin / SPAN) * f.s.d + p.channel) * 16 + p.q * 4;
    float total = 0.f, any_reset = 0.f;

    Four next_dt, next_x, next_z = {}, now_x, now_z, last_x = {}, last_z = {};
    const auto load = [&]() {
        const bool inside = t < end;
        next_dt = load4(at(dt, f.dt, t), inside);
        next_x = load4(at(x, f.x, t), inside);
        if (HAS_Z && !LOCAL) next_z = load4(at(z, f.z, t), inside);
        t += SPAN;
    };
    const auto prepare = [&](int into) {  // what was loaded, and load what comes after
        float raw[4], xv[4], delta[4], drive[4];
        widen(next_dt, raw);
        widen(next_x, xv);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            raw[i] += bias[i];
            delta[i] = SOFTPLUS ? softplus(raw[i]) : raw[i];
            if (t - SPAN >= end) delta[i] = 0.f;
            drive[i] = delta[i] * xv[i];
        }
        float4* const to = put_steps + into * (sizeof(shared.steps[0]) / 16);
        to[low] = make_float4(delta[0], drive[0], delta[1], drive[1]);
        to[low ^ 1] = make_float4(delta[2], drive[2], delta[3], drive[3]);
        now_x = next_x, now_z = next_z;
        load();
    };
#if !LOCAL
    const auto finish = [&](int from, int token) {
        float out[4], xv[4], zv[4];
        const float4* const of = parts_of + from * (sizeof(shared.parts[0]) / 16);
        widen(last_x, xv);
        widen(last_z, zv);
#pragma unroll
        for (int q = 0; q < 4; q++) {
            float one[4];
            scaled4(one, of[q * 2], 1.f);
#pragma unroll
            for (int i = 0; i < 4; i++) out[i] = q ? out[i] + one[i] : one[i];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            out[i] = fmaf(skip[i], xv[i], out[i]);
            if (HAS_Z) out[i] *= zv[i] * sigmoid(zv[i]);
        }
        store4(at(y, f.y, token), out, token >= p.begin && token < end && reads);
    };
#endif
    load();
    prepare(0);
    for (int span = p.begin; span < end; span += SPAN) {
        staged();
        const float* BC = shared.BC[buffer] + p.q * 4;
        next_BC += SPAN * OF_TOKEN;
        if (span + SPAN < end) stage(shared.BC[buffer ^ 1], next_BC);
#if !LOCAL
        finish(buffer ^ 1, span - SPAN + reads_t);
#endif
        last_x = now_x, last_z = now_z;
        prepare(buffer ^ 1);
        const float2* const du[2] = {own_du[0] + buffer * (sizeof(shared.steps[0]) / 8), own_du[1] + buffer * (sizeof(shared.steps[0]) / 8)};
#if !LOCAL
        float* const put_y = own_y + buffer * (sizeof(shared.parts[0]) / 4);
#endif
        buffer ^= 1;
#if KEEP && !LOCAL
        if (p.active) keep(starts, h);
        starts += (i64)f.s.d * 16;
#endif
#pragma unroll 2  // not all four: slower
        for (int group = 0; group < SPAN; group += 4) {
            float parts[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 step = du[i >> 1][(group + i) * 8];
                float b[4];
                take(b, BC + i * OF_TOKEN);
#if HAS_SEQ
                const float reset = resets[i];
#endif
#if LOCAL
                total += step.x;
#if HAS_SEQ
                any_reset += reset;
#endif
#else
                float c[4];
                take(c, BC + i * OF_TOKEN + OF_C);
                float part = 0.f;
#endif
#pragma unroll
                for (int j = 0; j < 4; j++) {
#if HAS_SEQ
                    const float a = exp2_fast(fmaf(step.x, A2[j], reset));
#else
                    const float a = exp2_fast(step.x * A2[j]);
#endif
                    h[j] = fmaf(a, h[j], step.y * b[j]);
#if !LOCAL
                    part = fmaf(h[j], c[j], part);
#endif
                }
#if !LOCAL
                parts[i] = part;
#endif
            }
#if !LOCAL  // only now: no load may come before a store that it could read
#pragma unroll
            for (int i = 0; i < 4; i++) put_y[(group + i) * 48] = parts[i];
#endif
            BC += 4 * OF_TOKEN;
            resets += 4;
        }
    }
#if !LOCAL
    __syncthreads();
    finish(buffer ^ 1, t - 3 * SPAN);
#endif
    if (!p.active) return;
#if LOCAL
    *reinterpret_cast<float4*>(f.ends + state) = make_float4(h[0], h[1], h[2], h[3]);
    float left[4];
#pragma unroll
    for (int j = 0; j < 4; j++) left[j] = exp2_fast(fmaf(total, A2[j], any_reset));
    *reinterpret_cast<float4*>(f.decays + state) = make_float4(left[0], left[1], left[2], left[3]);
#else
    if (p.piece == f.s.n_chunks - 1)
        *reinterpret_cast<float4*>(f.ends + (p.row * f.s.d + p.channel) * 16 + p.q * 4) = make_float4(h[0], h[1], h[2], h[3]);
#endif
}
