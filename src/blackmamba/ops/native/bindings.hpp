// Every operation's bindings; each is defined in the bind.cpp of its folder.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

namespace bm {

void bind_activate(nanobind::module_& m);
void bind_adamw(nanobind::module_& m);
void bind_causal_conv1d(nanobind::module_& m);
void bind_decode(nanobind::module_& m);
void bind_elementwise(nanobind::module_& m);
void bind_expert_mlp(nanobind::module_& m);
void bind_grouped_product(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_linear_cross_entropy(nanobind::module_& m);
void bind_mamba_mixer(nanobind::module_& m);
void bind_quantized_expert_mlp(nanobind::module_& m);
void bind_rms_norm(nanobind::module_& m);
void bind_router_logits(nanobind::module_& m);
void bind_selective_scan(nanobind::module_& m);
void bind_selective_state_update(nanobind::module_& m);
void bind_sinkhorn(nanobind::module_& m);
void bind_weight_product(nanobind::module_& m);

inline void bind_all(nanobind::module_& m) {
  bind_activate(m);
  bind_adamw(m);
  bind_causal_conv1d(m);
  bind_decode(m);
  bind_elementwise(m);
  bind_expert_mlp(m);
  bind_grouped_product(m);
  bind_linear(m);
  bind_linear_cross_entropy(m);
  bind_mamba_mixer(m);
  bind_quantized_expert_mlp(m);
  bind_rms_norm(m);
  bind_router_logits(m);
  bind_selective_scan(m);
  bind_selective_state_update(m);
  bind_sinkhorn(m);
  bind_weight_product(m);
}

// Tensors come as addresses: the Python side has checked shapes, dtypes and strides.
template <class T>
inline T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace bm
