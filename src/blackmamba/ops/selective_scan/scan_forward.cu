// y, the last state and, if KEEP, the state before every span. Keeps states and A in registers. Moves x, dt, z and y once.
// Bound by exponentials: 19 for each number of y. LOCAL: only what the chunk leaves (ends) and what is left of what it began
// with (decays).
//
// Of a span: B and C have come to shared memory while the span before was scanned, x, dt and z to registers; delta and
// delta x go to shared memory; the next span's numbers are asked for; token by token the states are advanced and each
// thread's part of y is laid down; at last y is summed up over them, gated and stored.

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_forward(const Forward f) {
    struct Shared {
        float2 du[WARPS][SPAN][8];
        float y[WARPS][SPAN][40];  // 4 parts of each sum; 40: so that they are read from all banks
        float BC[2][SPAN * OF_TOKEN];
    };
    Shared& shared = shared_as<Shared>();
    // Threads whose numbers differ in the lowest bit have one channel, in the second bit the same states of two: so delta,
    // and B and C, are read by pairs from one place, which shared memory serves with half as many turns.
    const int lane = threadIdx.x & 31;
    const Place p = place_of(f.s, (lane & 1) | (lane >> 3 & 2), lane >> 1 & 7);
    float2(*du)[8] = shared.du[p.warp];
    int place = p.q * 8 + p.c;
    pin(place);
    float* const own_y = &shared.y[p.warp][0][place];
    const float2* const own_du[2] = {&du[0][p.c], &du[0][p.c ^ 2]};  // of tokens 0, 1 and 2, 3 of each four
    float A2[4], h[4] = {0.f, 0.f, 0.f, 0.f};
    scaled4(A2, *reinterpret_cast<const float4*>(f.A + p.channel * 16 + p.q * 4), LOG2E);
    const i64 state = ((p.row * f.s.n_chunks + p.piece) * f.s.d + p.channel) * 16 + p.q * 4;
#if HAS_FIRST
    scaled4(h, *reinterpret_cast<const float4*>(f.first + state), 1.f);
#endif
    float bias[4] = {}, skip[4] = {};
#if HAS_BIAS
    scaled4(bias, *reinterpret_cast<const float4*>(f.bias + p.c4), 1.f);
#endif
#if HAS_D
    scaled4(skip, *reinterpret_cast<const float4*>(f.D + p.c4), 1.f);
#endif
    int t = p.begin + p.t;
    Number* const x = pinned(row_of(f.x, p));
    Number* const dt = pinned(row_of(f.dt, p));
    Number* const z = pinned(row_of(f.z, p));
    Number* const y = pinned(row_of(f.y, p));
    int end = p.end;
    pin(end);
    const float* next_BC = f.BC + (p.row * f.s.l_padded + p.begin) * OF_TOKEN;
    const float* resets = f.resets + p.row * f.s.l_padded + p.begin;
    int buffer = 0;
    stage(shared.BC[0], next_BC);
    Kept* starts = f.starts + ((p.row * (f.s.l_padded / SPAN) + p.begin / SPAN) * f.s.d + p.channel) * 16 + p.q * 4;
    float total = 0.f, any_reset = 0.f;

    bool inside = t < end;
    Four next_dt = load4(at(dt, f.dt, t), inside), next_x = load4(at(x, f.x, t), inside), next_z = {};
    if (HAS_Z && !LOCAL) next_z = load4(at(z, f.z, t), inside);
    for (int span = p.begin; span < end; span += SPAN) {
        staged();
        const float* BC = shared.BC[buffer] + p.q * 4;
        buffer ^= 1;
        next_BC += SPAN * OF_TOKEN;
        if (span + SPAN < end) stage(shared.BC[buffer], next_BC);
        const bool mine = inside;
        float xv[4], zv[4];
        {
            float raw[4], delta[4];
            widen(next_dt, raw);
            widen(next_x, xv);
            widen(next_z, zv);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                raw[i] += bias[i];
                delta[i] = SOFTPLUS ? softplus(raw[i]) : raw[i];
                if (!mine) delta[i] = 0.f;
            }
            float drive[4];
#pragma unroll
            for (int i = 0; i < 4; i++) drive[i] = delta[i] * xv[i];
            store_pairs(&du[p.t][(p.lane & 1) * 4], p.t, delta, drive);
        }
        __syncwarp();
        t += SPAN;
        inside = t < end;
        next_dt = load4(at(dt, f.dt, t), inside);
        next_x = load4(at(x, f.x, t), inside);
        if (HAS_Z && !LOCAL) next_z = load4(at(z, f.z, t), inside);
#if KEEP && !LOCAL
        if (p.active) keep(starts, h);
        starts += (i64)f.s.d * 16;
#endif
#pragma unroll 2  // not all four: slower
        for (int group = 0; group < SPAN; group += 4) {
            float parts[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 step = own_du[i >> 1][(group + i) * 8];
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
            for (int i = 0; i < 4; i++) own_y[(group + i) * 40] = parts[i];
#endif
            BC += 4 * OF_TOKEN;
            resets += 4;
        }
#if !LOCAL
        __syncwarp();
        float out[4] = {};
#pragma unroll
        for (int q = 0; q < 4; q++) {
            float part[4];
            scaled4(part, *reinterpret_cast<const float4*>(&shared.y[p.warp][p.t][q * 8 + (p.lane & 1) * 4]), 1.f);
#pragma unroll
            for (int i = 0; i < 4; i++) out[i] += part[i];
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            out[i] = fmaf(skip[i], xv[i], out[i]);
            if (HAS_Z) out[i] *= zv[i] * sigmoid(zv[i]);
        }
        store4(at(y, f.y, t - SPAN), out, mine && p.active);
#endif
        __syncwarp();
    }
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
