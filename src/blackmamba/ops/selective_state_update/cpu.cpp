// The state (d, n) stays as it lies in memory: vectors run along n, and the sums over n of `lanes`
// channels are found together. Per state 22 operations and 12 bytes, so from the cache the arithmetic
// is the limit, and from main memory the bandwidth.
#include "selective_state_update/cpu.hpp"

#include <algorithm>

#include "native/simd.hpp"
#include "native/threads.hpp"
#include "selective_scan/lanes.hpp"

namespace bm {
namespace {

using std::int64_t;

constexpr int64_t task_channels = 256;

// What stays the same for all channels, with whole vectors of n where n has them.
template <bool whole>
void update_channels(const StateUpdateRow& k, const float* state, int64_t d0, int64_t d1) {
  alignas(64) float rates[lanes], drives[lanes], rows[lanes * lanes];
  for (int64_t d = d0; d < d1; d += lanes) {
    const int m = static_cast<int>(std::min<int64_t>(lanes, d1 - d));
    const vec x = load_some(k.x + d, m);
    vec delta = load_some(k.dt + d, m);
    if (k.dt_bias) delta += load_some(k.dt_bias + d, m);
    if (k.softplus) delta = softplus_rate<false>(delta).delta;
    store(rates, delta * log2_e);
    store(drives, delta * x);
    for (int c = 0; c < m; ++c) {
      const vec rate = splat(rates[c]), drive = splat(drives[c]);
      const float *A = k.A + (d + c) * k.n, *from = state + (d + c) * k.n;
      float* const to = k.state + (d + c) * k.n;
      vec total{};
      for (int64_t i = 0; i < k.n; i += lanes) {
        const int w = whole ? lanes : static_cast<int>(std::min<int64_t>(lanes, k.n - i));
        vec decay[1] = {rate * load_some(A + i, w)};
        to_decays(decay);
        const vec h = decay[0] * load_some(from + i, w) + drive * load_some(k.B + i, w);
        store_some(to + i, h, w);
        total += h * load_some(k.C + i, w);
      }
      store(rows + c * lanes, total);
    }
    for (int c = m; c < lanes; ++c) store(rows + c * lanes, vec{});
    vec y = row_sums(rows);
    if (k.D) y += load_some(k.D + d, m) * x;
    if (k.z) y *= silu(load_some(k.z + d, m));
    store_some(k.y + d, y, m);
  }
}

void update_from(const StateUpdateRow& k, const float* state, int64_t d0, int64_t d1) {
  return k.n % lanes ? update_channels<false>(k, state, d0, d1)
                     : update_channels<true>(k, state, d0, d1);
}

void state_update_rows(const StateUpdateRow& k, int64_t d0, int64_t d1) {
  update_from(k, k.state, d0, d1);
}

template <class T>
const float* as_floats(const T* from, int64_t count, float* to) {
  if (!from) return nullptr;
  for (int64_t i = 0; i < count; i += lanes) {
    const int m = static_cast<int>(std::min<int64_t>(lanes, count - i));
    store_some(to + i, load_some(from + i, m), m);
  }
  return to;
}

template <class T>
void update_of(const StateUpdate& s) {
  const int64_t pieces = (s.d + task_channels - 1) / task_channels;
  parallel_for(s.n_threads, s.b * pieces, [&](int64_t task) {
    const int64_t row = task / pieces, d0 = task % pieces * task_channels;
    const int64_t width = std::min(task_channels, s.d - d0);
    const auto at = [&](const TokenRows& rows, int64_t column) -> const T* {
      return rows.data ? static_cast<const T*>(rows.data) + row * rows.row + column : nullptr;
    };
    float* const memory = scratch<float>(Slot::a, 4 * task_channels + 2 * s.n);
    float *const x = memory, *const dt = x + task_channels, *const z = dt + task_channels;
    float *const y = z + task_channels, *const B = y + task_channels, *const C = B + s.n;
    const int64_t states = (row * s.d + d0) * s.n;
    const StateUpdateRow k{.n = s.n,
                           .softplus = s.softplus,
                           .x = as_floats(at(s.x, d0), width, x),
                           .dt = as_floats(at(s.dt, d0), width, dt),
                           .A = s.A + d0 * s.n,
                           .B = as_floats(at(s.B, 0), s.n, B),
                           .C = as_floats(at(s.C, 0), s.n, C),
                           .D = s.D ? s.D + d0 : nullptr,
                           .z = as_floats(at(s.z, d0), width, z),
                           .dt_bias = s.dt_bias ? s.dt_bias + d0 : nullptr,
                           .state = s.new_state + states,
                           .y = y};
    update_from(k, s.state + states, 0, width);
    T* const to = static_cast<T*>(s.y) + row * s.d + d0;
    for (int64_t i = 0; i < width; i += lanes) {
      const int m = static_cast<int>(std::min<int64_t>(lanes, width - i));
      store_some(to + i, load_some(y + i, m), m);
    }
  });
}

void update(const StateUpdate& s) { return s.bfloat16 ? update_of<bf16>(s) : update_of<float>(s); }

}  // namespace

BM_DEFINE(SelectiveStateUpdate, selective_state_update) = {update, state_update_rows};

}  // namespace bm
