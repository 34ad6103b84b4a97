// A task is one block of time of one row of the batch, and one block of channels: it reads the
// k - 1 inputs before its block, and in the backward pass recomputes the k - 1 gradients behind it,
// so that it alone writes its outputs. It keeps a block of gradients on chip (L2). Bytes moved: x
// once forward; x and y's gradient once and x's gradient once backward. Bound: memory, then exp.
#include "causal_conv1d/cpu.hpp"

#include <algorithm>
#include <cstring>

#include "native/simd.hpp"
#include "native/threads.hpp"

namespace bm {
namespace {

constexpr std::int64_t time_block = 64, channel_block = 512;
constexpr std::int64_t small = 1 << 14;  // numbers below which waking threads costs more

struct Task {
  std::int64_t row, block, start, stop;  // of the batch; of time, and its tokens
  std::int64_t channel, width;           // first channel, how many
};

struct Plan {
  std::int64_t n_times, n_channels, n_tasks;
  int n_threads;

  explicit Plan(const ConvInputs& in)
      : n_times((in.l + time_block - 1) / time_block),
        n_channels((in.d + channel_block - 1) / channel_block),
        n_tasks(in.b * n_times * n_channels),
        n_threads(in.b * in.l * in.d < small ? 1 : in.n_threads) {}

  Task task(const ConvInputs& in, std::int64_t i) const {
    const std::int64_t c = i % n_channels * channel_block, rest = i / n_channels;
    const std::int64_t block = rest % n_times, start = block * time_block;
    return {rest / n_times, block, start, std::min(start + time_block, in.l),
            c, std::min(channel_block, in.d - c)};
  }
};

// The inputs of one task, by time: also those before the first, and zeros of other documents.
template <class T>
class Inputs {
 public:
  Inputs(const ConvInputs& in, const Task& task)
      : x_(static_cast<const T*>(in.x) + task.row * in.x_batch + task.channel),
        stride_(in.x_row),
        seq_idx_(in.seq_idx ? in.seq_idx + task.row * in.l : nullptr),
        memory_(in.k - 1),
        width_(task.width) {
    T* rows = scratch<T>(Slot::b, (memory_ + 1) * width_);
    zeros_ = rows + memory_ * width_;
    std::memset(rows + memory_ * width_, 0, width_ * sizeof(T));
    if (in.before != nullptr && task.start < memory_) {
      const T* before =
          static_cast<const T*>(in.before) + (task.row * in.d + task.channel) * memory_;
      for (std::int64_t j = 0; j < memory_; ++j)
        for (std::int64_t c = 0; c < width_; ++c) rows[j * width_ + c] = before[c * memory_ + j];
      before_ = rows;
    }
  }

  // input s, as the output of time t sees it; s > t - k
  const T* seen(std::int64_t s, std::int64_t t) const {
    if (!together(s, t)) return zeros_;
    if (s >= 0) return x_ + s * stride_;
    return before_ ? before_ + (s + memory_) * width_ : zeros_;
  }

  // whether they are of one document; what is before the first input is of its document
  bool together(std::int64_t s, std::int64_t t) const {
    return seq_idx_ == nullptr || seq_idx_[s > 0 ? s : 0] == seq_idx_[t];
  }

 private:
  const T* x_;
  std::int64_t stride_;
  const std::int64_t* seq_idx_;
  std::int64_t memory_, width_;
  const T *before_ = nullptr, *zeros_;
};

// before the activation: bias + sum over j of weight[j] x_j. K is k, or 0 for any.
template <class T, int K>
BM_INLINE vec linear_part(const ConvInputs& in, const Task& task, const T* const* rows,
                          std::int64_t c, int n) {
  const std::int64_t k = K ? K : in.k;
  const float* weight = in.weight + task.channel + c;
  vec sum = in.bias ? load_some(in.bias + task.channel + c, n) : vec{};
  for (std::int64_t j = 0; j < k; ++j)
    sum += load_some(weight + j * in.d, n) * load_some(rows[j] + c, n);
  return sum;
}

template <class T, int K>
void forward_task(const ConvInputs& in, const Task& task, T* y) {
  const std::int64_t k = K ? K : in.k;
  const Inputs<T> inputs(in, task);
  const T** rows = scratch<const T*>(Slot::c, k);
  for (std::int64_t t = task.start; t < task.stop; ++t) {
    for (std::int64_t j = 0; j < k; ++j) rows[j] = inputs.seen(t - (k - 1) + j, t);
    T* out = y + (task.row * in.l + t) * in.d + task.channel;
    const T* fixed[K ? K : 1];
    if (K) std::copy(rows, rows + K, fixed);
    over(task.width, [&](std::int64_t c, int n) {
      const vec sum = linear_part<T, K>(in, task, K ? fixed : rows, c, n);
      store_some(out + c, in.silu ? silu(sum) : sum, n);
    });
  }
}

// The gradients before the activation of times t .. t + R - 1, into g; and, if they are the task's
// own, their part in the gradients of the weights, sums (k + 1, d), the last for the bias.
template <class T, int K, int R, bool own>
BM_INLINE void pre_activation(const ConvInputs& in, const ConvGradients& grad, const Task& task,
                              const Inputs<T>& inputs, std::int64_t t, float* g, float* sums) {
  const std::int64_t k = K ? K : in.k;
  const T** rows = scratch<const T*>(Slot::c, R * k);
  for (int r = 0; r < R; ++r)
    for (std::int64_t j = 0; j < k; ++j)
      rows[r * k + j] = inputs.seen(t + r - (k - 1) + j, t + r);
  const T* grad_y =
      static_cast<const T*>(grad.y) + task.row * grad.y_batch + t * grad.y_row + task.channel;
  over(task.width, [&](std::int64_t c, int n) {
    vec here[R];
    for (int r = 0; r < R; ++r) {
      here[r] = load_some(grad_y + r * grad.y_row + c, n);
      if (in.silu) {
        const vec sum = linear_part<T, K>(in, task, rows + r * k, c, n), s = sigmoid(sum);
        here[r] *= s * (1.0f + sum * (1.0f - s));
      }
      store_some(g + r * task.width + c, here[r], n);
    }
    if (!own) return;
    for (std::int64_t j = 0; j < k; ++j) {
      vec total = load_some(sums + j * in.d + c, n);
      for (int r = 0; r < R; ++r) total += here[r] * load_some(rows[r * k + j] + c, n);
      store_some(sums + j * in.d + c, total, n);
    }
    vec total = load_some(sums + k * in.d + c, n);
    for (int r = 0; r < R; ++r) total += here[r];
    store_some(sums + k * in.d + c, total, n);
  });
}

template <class T, int K>
void backward_task(const ConvInputs& in, const ConvGradients& grad, const Task& task, float* sums) {
  const std::int64_t k = K ? K : in.k, width = task.width;
  const Inputs<T> inputs(in, task);
  const std::int64_t end = std::min(task.stop + k - 1, in.l);
  float* g = scratch<float>(Slot::a, (time_block + k) * width);  // of times start .. end - 1
  const auto g_of = [&](std::int64_t t) { return g + (t - task.start) * width; };
  float* zeros = g + (time_block + k - 1) * width;
  std::memset(zeros, 0, width * sizeof(float));

  sums += task.channel;
  for (std::int64_t j = 0; j <= k; ++j) std::memset(sums + j * in.d, 0, width * sizeof(float));
  std::int64_t t = task.start;
  for (; t + 4 <= task.stop; t += 4)
    pre_activation<T, K, 4, true>(in, grad, task, inputs, t, g_of(t), sums);
  for (; t < task.stop; ++t)
    pre_activation<T, K, 1, true>(in, grad, task, inputs, t, g_of(t), sums);
  for (; t < end; ++t) pre_activation<T, K, 1, false>(in, grad, task, inputs, t, g_of(t), sums);

  // input s met weight[j] at time s + (k - 1) - j
  const float** rows = scratch<const float*>(Slot::c, k);
  const auto find_rows = [&](std::int64_t s) {
    for (std::int64_t j = 0; j < k; ++j) {
      const std::int64_t later = s + (k - 1) - j;
      rows[j] = later >= 0 && later < end && inputs.together(s, later) ? g_of(later) : zeros;
    }
  };
  const float* weight = in.weight + task.channel;
  const auto grad_of_input = [&](std::int64_t c, int n) {
    vec sum{};
    for (std::int64_t j = 0; j < k; ++j)
      sum += load_some(weight + j * in.d + c, n) * load_some(rows[j] + c, n);
    return sum;
  };
  for (std::int64_t s = task.start; s < task.stop; ++s) {
    find_rows(s);
    T* out = static_cast<T*>(grad.x) + task.row * grad.x_batch + s * grad.x_row + task.channel;
    over(width, [&](std::int64_t c, int n) {
      store_some(out + c, grad_of_input(c, n), n);
    });
  }
  if (grad.before == nullptr || task.start > 0) return;
  T* before = static_cast<T*>(grad.before) + (task.row * in.d + task.channel) * (k - 1);
  for (std::int64_t i = 0; i < k - 1; ++i) {
    find_rows(i - (k - 1));
    over(width, [&](std::int64_t c, int n) {
      const vec sum = grad_of_input(c, n);
      for (int lane = 0; lane < n; ++lane)
        before[(c + lane) * (k - 1) + i] = from_float<T>(sum[lane]);
    });
  }
}

template <class T, int K>
void forward(const ConvInputs& in, void* y) {
  const Plan plan(in);
  parallel_for(plan.n_threads, plan.n_tasks, [&](std::int64_t i) {
    forward_task<T, K>(in, plan.task(in, i), static_cast<T*>(y));
  });
}

template <class T, int K>
void backward(const ConvInputs& in, const ConvGradients& grad) {
  const Plan plan(in);
  const std::int64_t n_parts = in.b * plan.n_times, size = (in.k + 1) * in.d;
  float* parts = scratch<float>(Slot::d, n_parts * size);
  parallel_for(plan.n_threads, plan.n_tasks, [&](std::int64_t i) {
    const Task task = plan.task(in, i);
    backward_task<T, K>(in, grad, task, parts + (task.row * plan.n_times + task.block) * size);
  });
  for (std::int64_t j = 0; j <= in.k; ++j) {
    float* total = j < in.k ? grad.weight + j * in.d : grad.bias;
    over(in.d, [&](std::int64_t c, int n) {
      vec sum{};
      for (std::int64_t p = 0; p < n_parts; ++p) sum += load_some(parts + p * size + j * in.d + c, n);
      store_some(total + c, sum, n);
    });
  }
}

// The dtype and k at hand; 4 is the usual k.
void run_forward(const ConvInputs& in, void* y) {
  if (in.is_bf16) return in.k == 4 ? forward<bf16, 4>(in, y) : forward<bf16, 0>(in, y);
  return in.k == 4 ? forward<float, 4>(in, y) : forward<float, 0>(in, y);
}

void run_backward(const ConvInputs& in, const ConvGradients& grad) {
  if (in.is_bf16) return in.k == 4 ? backward<bf16, 4>(in, grad) : backward<bf16, 0>(in, grad);
  return in.k == 4 ? backward<float, 4>(in, grad) : backward<float, 0>(in, grad);
}

}  // namespace

BM_DEFINE(CausalConv1d, causal_conv1d) = {run_forward, run_backward};

}  // namespace bm
