
#include "decode/cpu.hpp"
#include "native/bindings.hpp"

namespace nb = nanobind;

namespace bm {
namespace {

// of (kind, data, scales, rows, cols, group, narrow)

Weights weights(nb::handle from) {
  const nb::tuple t = nb::cast<nb::tuple>(from);
  Weights w;
  w.kind = static_cast<WeightKind>(nb::cast<int>(t[0]));
  w.data = pointer<const void>(nb::cast<std::uintptr_t>(t[1]));
  w.scales = pointer<const void>(nb::cast<std::uintptr_t>(t[2]));
  w.rows = nb::cast<std::int64_t>(t[3]);
  w.cols = nb::cast<std::int64_t>(t[4]);
  w.group = nb::cast<std::int64_t>(t[5]);
  w.narrow = nb::cast<bool>(t[6]);
  return w;
}

const float* floats(nb::handle address) {
  return pointer<const float>(nb::cast<std::uintptr_t>(address));
}

Linear linear(nb::dict d, const char* name) {
  const nb::tuple t = nb::cast<nb::tuple>(d[name]);
  return {weights(t[0]), floats(t[1])};
}

Norm norm(nb::dict d, const char* name) {
  const nb::tuple t = nb::cast<nb::tuple>(d[name]);
  return {floats(t[0]), floats(t[1]), nb::cast<float>(t[2]), nb::cast<bool>(t[3])};
}

DecodeLayer layer(nb::dict d) {
  DecodeLayer out;
  out.norm = norm(d, "norm");
  if (d.contains("in_proj")) {
    out.has_mamba = true;
    Mamba& l = out.mamba;
    l.in_proj = linear(d, "in_proj");
    l.x_proj = linear(d, "x_proj");
    l.dt_proj = linear(d, "dt_proj");
    l.out_proj = linear(d, "out_proj");
    l.conv_weight = floats(d["conv_weight"]);
    l.conv_bias = floats(d["conv_bias"]);
    l.dt_bias = floats(d["dt_bias"]);
    l.A = floats(d["A"]);
    l.D = floats(d["D"]);
    l.conv_state = const_cast<float*>(floats(d["conv_state"]));
    l.ssm_state = const_cast<float*>(floats(d["ssm_state"]));
  }
  if (d.contains("fc1")) {
    out.has_feed_forward = true;
    FeedForward& l = out.feed_forward;
    if (out.has_mamba) out.feed_forward_norm = norm(d, "feed_forward_norm");
    l.n_experts = nb::cast<int>(d["n_experts"]);
    l.router_weight = floats(d["router_weight"]);
    l.router_bias = floats(d["router_bias"]);
    l.fc1 = linear(d, "fc1");
    l.fc2 = linear(d, "fc2");
    l.gated = nb::cast<bool>(d["gated"]);
    l.gelu = nb::cast<bool>(d["gelu"]);
  }
  return out;
}

}  // namespace

void bind_decode(nb::module_& m) {
  nb::class_<DecodePlan>(m, "DecodePlan",
                         "A model, its states and the memory of a step; addresses must stay valid.")
      .def("__init__",
           [](DecodePlan* plan, int batch, nb::dict sizes, nb::list layers, nb::handle embedding,
              nb::dict head) {
             new (plan) DecodePlan();
             const auto size = [&](const char* name) { return nb::cast<int>(sizes[name]); };
             plan->batch = batch;
             plan->m = size("m");
             plan->d = size("d");
             plan->r = size("r");
             plan->n = size("n");
             plan->k = size("k");
             plan->v = size("v");
             plan->widest_expert = plan->most_experts = 1;
             for (nb::handle l : layers) {
               plan->layers.push_back(layer(nb::cast<nb::dict>(l)));
               const DecodeLayer& added = plan->layers.back();
               if (!added.has_feed_forward) continue;
               const int f = static_cast<int>(added.feed_forward.fc2.weights.cols);
               if (f > plan->widest_expert) plan->widest_expert = f;
               if (added.feed_forward.n_experts > plan->most_experts)
                 plan->most_experts = added.feed_forward.n_experts;
             }
             plan->embedding = weights(embedding);
             plan->head = linear(head, "head");
             plan->final_norm = norm(head, "norm");
             plan->memory.resize(BM_PICK(decode).workspace(*plan));
           })
      .def(
          "step",
          [](DecodePlan& plan, std::uintptr_t ids, std::uintptr_t logits, int n_threads) {
            BM_PICK(decode).step(plan, pointer<const std::int64_t>(ids), pointer<float>(logits),
                                 n_threads);
          },
          nb::call_guard<nb::gil_scoped_release>(),
          "Read ids (b) int64, advance the states, write logits (b, v) float32.");
}

}  // namespace bm
