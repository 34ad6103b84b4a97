// The extension module: what the processor has, and every operation's bindings.
#include <nanobind/nanobind.h>

#include <cstdlib>
#include <cstring>

#if defined(BM_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "native/bindings.hpp"
#include "native/targets.hpp"
#include "native/threads.hpp"

namespace bm {
namespace {

constexpr const char* names[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

Target best() {
#if defined(BM_X86)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
  const bool narrow = avx512 && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
  if (narrow) return Target::avx512_bf16;
  if (avx512) return Target::avx512;
  if (avx2) return Target::avx2;
#endif
  return Target::baseline;
}

Target chosen() {
  const Target limit = best();
  if (const char* wanted = std::getenv("BLACKMAMBA_CPU_TARGET"))
    for (int i = 0; i < static_cast<int>(limit); ++i)
      if (std::strcmp(wanted, names[i]) == 0) return static_cast<Target>(i);
  return limit;
}

}  // namespace

Target target() {
  static const Target t = chosen();
  return t;
}

bool reads_ahead_to_a_page_end() {
#if defined(BM_X86)
  static const bool is_intel = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("intel") != 0;
  }();
  return is_intel;
#else
  return false;
#endif
}

bool has_tiles() {
#if defined(BM_AMX)
  static const bool has = [] {
    unsigned a, b, c, d;
    if (target() != Target::avx512_bf16 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    constexpr unsigned bfloat16 = 1u << 22, tile = 1u << 24;
    if (!(d & bfloat16) || !(d & tile)) return false;
    constexpr long request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, request, tile_data) == 0;
  }();
  return has;
#else
  return false;
#endif
}

}  // namespace bm

NB_MODULE(_native, m) {
  m.attr("interface") = BM_INTERFACE;  // a digest of the sources of all bindings: CMakeLists.txt
  m.def("target", [] { return bm::names[static_cast<int>(bm::target())]; },
        "The instruction set that the kernels use.");
  m.def("has_tiles", &bm::has_tiles, "Whether the products by matrix units can run.");
  m.def("threading", &bm::threading, "Whose threads the kernels run on.");
  m.def("scratch_allocations", &bm::scratch_allocations,
        "How often the kernels' own memory had to grow so far.");
  bm::bind_all(m);
}
