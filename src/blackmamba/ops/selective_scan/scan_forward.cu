// y, the last state and, if KEEP, the state before every span. Keeps states and A in registers. Moves x, dt, z and y once.
// Bound by exponentials: 19 for each number of y. LOCAL: only what the chunk leaves (ends) and what is left of what it began
// with (decays).
//
// Threads side by side read and write four channels each of a token, of all the block's channels, so that few lines of the
// cache are touched; what they compute of them goes through shared memory to the threads that scan. Of a span: B and C have
// come to shared memory while the span before was scanned, x and dt of the next to registers. Then y of the span before
// is summed up over the threads that had parts of it, gated and stored; delta and delta x of the next span are computed;
// and token by token the states are advanced and each thread's part of y is laid down.

#define ROW_OF_PARTS (WARPS % 4 == 0 ? 32 : 48)  // so that they are read from all banks

struct Parts {  // of y, by thread q * 8 + c
    float y[SPAN][ROW_OF_PARTS];
    float between[8];
};
struct Steps {  // delta and delta x; channel c of token t in place c ^ ((t ^ warp) & 2), so that threads meet in no bank
    float2 du[SPAN][8];
    float2 between[8];
};
// The same of an address in shared memory.
__device__ __forceinline__ u32 kept_address(const void* p) { return pinned((u32)__cvta_generic_to_shared(p)); }
template <typename T>
__device__ __forceinline__ T& there(u32 address) { return *reinterpret_cast<T*>(__cvta_shared_to_generic(address)); }
__device__ __forceinline__ void take(float* out, u32 address) {
    const float4 v = there<float4>(address);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
}
// As copy16, without a branch.
__device__ __forceinline__ void copy16_if(bool condition, u32 to, const void* from) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %0, 0; @p cp.async.cg.shared.global [%1], [%2], 16;}"
        ::"r"((u32)condition), "r"(to), "l"(from) : "memory");
}
template <typename T>
__device__ __forceinline__ T* behind(T* from, i64 bytes) {
    return (T*)((const char*)from + bytes);
}

struct Slot {  // of a span
    Steps steps[WARPS];
#if !LOCAL
    Parts parts[WARPS];
#endif
    float BC[SPAN * OF_TOKEN];
};

// Rows of blocks of channels are laid end to end and cut into equal shares, one a block of threads: so all end at once. A share
// does its last row first and its first row last. Where that row's first tokens are the share's before, this began with them, and
// handed over the state that they leave. Shares are dealt from the first one on, so that the one before has begun.
extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) scan_forward(const Forward f) {
    struct Shared {
        Slot slots[2];
    };
    Slot& first = shared_as<Shared>().slots[0];
    // Threads whose numbers differ in the lowest bit have one channel, in the second bit the same states of two: so delta,
    // and B and C, are read by pairs from one place, which shared memory serves with half as many turns.
    const int lane = threadIdx.x & 31;
    const int q = (lane & 1) | (lane >> 3 & 2), c = lane >> 1 & 7, warp = threadIdx.x >> 5;
    // what it reads and writes: four channels of one token, scanned by that warp, as its c-th and the next
    const int reads_t = (int)threadIdx.x / (2 * WARPS), part = (int)threadIdx.x % (2 * WARPS);
    const int reads_warp = part >> 1, reads_c = (part & 1) * 4;
    const int turned = ((reads_t ^ reads_warp) & 2) * 8;  // where the first two of four go
    const u32 put_steps = kept_address(&first.steps[reads_warp].du[reads_t][reads_c]) + turned;
    const u32 put_steps2 = pinned(put_steps + 16 - 2 * turned);
    const u32 own_du = kept_address(&first.steps[warp].du[0][c ^ (warp & 2)]);
    const u32 own_du2 = kept_address(&first.steps[warp].du[0][c ^ (warp & 2) ^ 2]);
    const u32 own_BC = kept_address(&first.BC[q * 4]);
    const u32 put_BC = kept_address(&first.BC[reads_t * OF_TOKEN + part * 4]);
#if !LOCAL
    const u32 own_y = kept_address(&first.parts[warp].y[0][q * 8 + c]);
    const u32 parts_of = kept_address(&first.parts[reads_warp].y[reads_t][reads_c]);
    const int handed = WARPS * 8 * 16, of_thread = (warp * 8 + c) * 16 + q * 4;
#endif
    const int of_row = f.s.chunk / SPAN, begin = (int)blockIdx.x * f.s.share;
    int end = min(begin + f.s.share, f.s.shares_end);  // of what is left
#pragma unroll 1
    do {
        const int task = (end - 1) / of_row, last_span = end - task * of_row;
        end = task * of_row;
        Place p = place_of(f.s, q, c, task);
        const bool from_before = end < begin, for_next = p.begin + last_span * SPAN < p.end;
        if (for_next) p.end = p.begin + last_span * SPAN;
        if (from_before) p.begin += (begin - end) * SPAN;
        const int reads_c4 = p.block * WARPS * 8 + part * 4;
        const bool reads = reads_c4 < f.s.d, active = pinned(p.active);
        float A2[4], h[4] = {0.f, 0.f, 0.f, 0.f};
        scaled4(A2, *reinterpret_cast<const float4*>(f.A + p.channel * 16 + p.q * 4), LOG2E);
        const i64 state = ((p.row * f.s.n_chunks + p.piece) * f.s.d + p.channel) * 16 + p.q * 4;
#if HAS_FIRST
        scaled4(h, *reinterpret_cast<const float4*>(f.first + state), 1.f);
#endif
        float bias[4] = {}, skip[4] = {};
#if HAS_BIAS
        if (reads) scaled4(bias, *reinterpret_cast<const float4*>(f.bias + reads_c4), 1.f);
#endif
#if HAS_D
        if (reads) scaled4(skip, *reinterpret_cast<const float4*>(f.D + reads_c4), 1.f);
#endif
        // Where the next numbers are that it loads, and how many tokens are left from the one of this span on that it reads.
        const int first_t = p.begin + reads_t;
        const auto begins = [&](const Rows& tensor) {
            return at(tensor.data + p.row * tensor.row + reads_c4, tensor, first_t);
        };
        Number *x = begins(f.x), *dt = begins(f.dt), *z = begins(f.z), *y = begins(f.y);
        int left = reads ? p.end - first_t : 0;
        const int spans = (int)pinned((p.end - p.begin + SPAN - 1) / SPAN);
        const float* BC = shifted(f.BC + part * 4, (int)p.row * f.s.l_padded + first_t, OF_TOKEN * 4);
        const auto stage_BC = [&](u32 slot, bool inside) {
#pragma unroll
            for (int i = 0; i < OF_TOKEN / 4; i += 2 * WARPS)
                copy16_if(
                    (i + 2 * WARPS <= OF_TOKEN / 4 || part < OF_TOKEN / 4 - i) && inside, put_BC + slot + i * 16, BC + i * 4);
            BC += SPAN * OF_TOKEN;
        };
        const float* resets = f.resets + p.row * f.s.l_padded + p.begin;
        Kept* starts = f.starts + p.channel * 16 + p.q * 4;
        starts = shifted(starts, (int)p.row * (f.s.l_padded / SPAN) + p.begin / SPAN, f.s.d * 16 * (int)sizeof(Kept));
        float total = 0.f, any_reset = 0.f;

        Four next_dt, next_x, now_x = {}, last_x, last_z = {};
        const auto load = [&](int ahead) {
            const bool inside = left > ahead * SPAN;
            next_x = load4(x, inside);
            x = behind(x, (i64)f.x.token * SPAN);
            next_dt = load4(dt, inside);
            dt = behind(dt, (i64)f.dt.token * SPAN);
        };
        const auto prepare = [&](int ahead, u32 slot) {  // what was loaded
            float raw[4], xv[4], delta[4], drive[4];
            widen(next_dt, raw);
            widen(next_x, xv);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                raw[i] += bias[i];
                delta[i] = SOFTPLUS ? softplus(raw[i]) : raw[i];
                if (left <= ahead * SPAN) delta[i] = 0.f;
                drive[i] = delta[i] * xv[i];
            }
            there<float4>(put_steps + slot) = make_float4(delta[0], drive[0], delta[1], drive[1]);
            there<float4>(put_steps2 + slot) = make_float4(delta[2], drive[2], delta[3], drive[3]);
            last_x = now_x, now_x = next_x;
        };
#if !LOCAL
        const auto finish = [&](u32 slot, bool inside) {
            float out[4], xv[4], zv[4];
            widen(last_x, xv);
            widen(last_z, zv);
#pragma unroll
            for (int q = 0; q < 4; q++) {
                float one[4];
                take(one, parts_of + slot + q * 32);
#pragma unroll
                for (int i = 0; i < 4; i++) out[i] = q ? out[i] + one[i] : one[i];
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                out[i] = fmaf(skip[i], xv[i], out[i]);
                if (HAS_Z) out[i] *= zv[i] * sigmoid(zv[i]);
            }
            store4(y, out, inside);
            y = behind(y, (i64)f.y.token * SPAN);
        };
#endif
        u32 slot = 0;  // of this span, in bytes
        load(0);
        stage_BC(0, true);
        prepare(0, 0);
        load(1);
#if !LOCAL
        const float* const before = f.handed + ((i64)blockIdx.x - 1) * handed + of_thread;
        if (from_before) {
            wait_for(f.there + blockIdx.x - 1);
            scaled4(h, *reinterpret_cast<const float4*>(before), 1.f);
        }
#endif
        for (int span = 0; span < spans; span++) {
            staged();
            const u32 next = slot ^ (u32)sizeof(Slot);
            stage_BC(next, span + 1 < spans);
#if !LOCAL
            if (span > 0) finish(next, left > -SPAN);
#if HAS_Z
            last_z = load4(z, left > 0);
            z = behind(z, (i64)f.z.token * SPAN);
#endif
#endif
            prepare(1, next);
            load(2);
            left -= SPAN;
            u32 du = own_du + slot, du2 = own_du2 + slot, BC_at = own_BC + slot;
#if !LOCAL
            u32 put_y = own_y + slot;
#endif
            slot = next;
#if KEEP && !LOCAL
            if (active) keep(starts, h);
            starts += (i64)f.s.d * 16;
#endif
#pragma unroll 2  // not all four: slower
            for (int group = 0; group < SPAN; group += 4) {
                float parts[4];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const float2 step = there<float2>((i & 2 ? du2 : du) + i * 64);
                    float b[4];
                    take(b, BC_at + i * OF_TOKEN * 4);
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
                    take(c, BC_at + (i * OF_TOKEN + OF_C) * 4);
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
                for (int i = 0; i < 4; i++) there<float>(put_y + i * ROW_OF_PARTS * 4) = parts[i];
                put_y += 4 * ROW_OF_PARTS * 4;
#endif
                BC_at += 4 * OF_TOKEN * 4, du += 4 * 64, du2 += 4 * 64;
                resets += 4;
            }
        }
#if !LOCAL
        if (for_next) {
            *reinterpret_cast<float4*>(f.handed + (i64)blockIdx.x * handed + of_thread) = make_float4(h[0], h[1], h[2], h[3]);
            hand_over(f.there + blockIdx.x);
        } else {
            __syncthreads();
        }
        if (spans > 0) finish(slot ^ (u32)sizeof(Slot), left > -SPAN);
#endif
        if (!active) continue;
#if LOCAL
        *reinterpret_cast<float4*>(f.ends + state) = make_float4(h[0], h[1], h[2], h[3]);
        float kept[4];
#pragma unroll
        for (int j = 0; j < 4; j++) kept[j] = exp2_fast(fmaf(total, A2[j], any_reset));
        *reinterpret_cast<float4*>(f.decays + state) = make_float4(kept[0], kept[1], kept[2], kept[3]);
#else
        if (p.piece == f.s.n_chunks - 1 && !for_next)
            *reinterpret_cast<float4*>(f.ends + (p.row * f.s.d + p.channel) * 16 + p.q * 4) = make_float4(h[0], h[1], h[2], h[3]);
#endif
    } while (end > begin);
}
