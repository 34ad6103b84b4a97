// The gradient of the state before each chunk, had nothing come from behind, and what is left of it after the chunk.
extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_backward_local(const Backward f) {
    struct Shared {
        float2 du[WARPS][SPAN][8];
        float BC[2][SPAN * OF_TOKEN];
    };
    Shared& shared = shared_as<Shared>();
    const Place p = place_of(f.s, threadIdx.x >> 3 & 3, threadIdx.x & 7, blockIdx.x);
    float2(*du)[8] = shared.du[p.warp];
    float A2[4], g[4] = {0.f, 0.f, 0.f, 0.f};
    scaled4(A2, *reinterpret_cast<const float4*>(f.A + p.channel * 16 + p.q * 4), LOG2E);
    float bias[4] = {};
#if HAS_BIAS
    scaled4(bias, *reinterpret_cast<const float4*>(f.bias + p.c4), 1.f);
#endif
    Number* const dt = pinned(row_of(f.dt, p));
    Number* const z = pinned(row_of(f.z, p));
    Number* const grad_y = pinned(row_of(f.grad_y, p));
    float total = 0.f, any_reset = 0.f;
    const int spans = (p.end - p.begin + SPAN - 1) / SPAN;
    int t = p.begin + (spans - 1) * SPAN + p.t;
    bool inside = t < p.end;
    Four next_dt = load4(at(dt, f.dt, t), inside), next_g = load4(at(grad_y, f.grad_y, t), inside), next_z = {};
    if (HAS_Z) next_z = load4(at(z, f.z, t), inside);
    const float* next_BC = f.BC + (p.row * f.s.l_padded + p.begin + (spans - 1) * SPAN) * OF_TOKEN;
    int buffer = 0;
    stage(shared.BC[0], next_BC);
    for (int back = spans - 1; back >= 0; back--) {
        staged();
        const float* C_at = shared.BC[buffer] + OF_C + p.q * 4;
        buffer ^= 1;
        next_BC -= SPAN * OF_TOKEN;
        if (back > 0) stage(shared.BC[buffer], next_BC);
        float raw[4], gy[4], zv[4];
        widen(next_dt, raw);
        widen(next_g, gy);
        widen(next_z, zv);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            raw[i] += bias[i];
            raw[i] = SOFTPLUS ? softplus(raw[i]) : raw[i];
            if (!inside) raw[i] = 0.f;
            if (HAS_Z) gy[i] *= zv[i] * sigmoid(zv[i]);
        }
        store_pairs(&du[p.t][(p.lane & 1) * 4], p.t, raw, gy);
        __syncwarp();
        t -= SPAN;
        inside = t >= p.begin;
        next_dt = load4(at(dt, f.dt, t), inside);
        next_g = load4(at(grad_y, f.grad_y, t), inside);
        if (HAS_Z) next_z = load4(at(z, f.z, t), inside);
#if HAS_SEQ
        const i64 token = p.row * f.s.l_padded + p.begin + back * SPAN;
#endif
#pragma unroll 4
        for (int i = SPAN - 1; i >= 0; i--) {
            const float2 step = du[i][p.c ^ (i & 2)];
            float c[4];
            take(c, C_at + i * OF_TOKEN);
            total += step.x;
            float reset = 0.f;
#if HAS_SEQ
            reset = f.resets[token + i];
            any_reset += reset;
#endif
#pragma unroll
            for (int j = 0; j < 4; j++) g[j] = exp2_fast(fmaf(step.x, A2[j], reset)) * fmaf(c[j], step.y, g[j]);
        }
        __syncwarp();
    }
    if (!p.active) return;
    const i64 state = ((p.row * f.s.n_chunks + p.piece) * f.s.d + p.channel) * 16 + p.q * 4;
    *reinterpret_cast<float4*>(f.ends + state) = make_float4(g[0], g[1], g[2], g[3]);
    float left[4];
#pragma unroll
    for (int j = 0; j < 4; j++) left[j] = exp2_fast(fmaf(total, A2[j], any_reset));
    *reinterpret_cast<float4*>(f.decays + state) = make_float4(left[0], left[1], left[2], left[3]);
}
