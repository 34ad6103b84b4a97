// The instruction sets that the kernels are compiled for, and how one is picked.
//
// An operation declares a struct of function pointers in its cpu.hpp, with BM_DECLARE; its cpu.cpp
// defines that struct with BM_DEFINE, once per instruction set; its bind.cpp calls through
// BM_PICK. The structs are constants: loading the module runs no code of a set that the processor
// lacks. For the same reason kernels stand in an unnamed namespace: a function shared between sets
// would be compiled for the largest and called by the smallest.
#pragma once

namespace bm {

enum class Target { baseline, avx2, avx512, avx512_bf16 };

// The set in use: the best that the processor has, unless BLACKMAMBA_CPU_TARGET names a lesser one.
Target target();

// Whether the processor reads ahead on its own, but no further than a page of 4 KiB reaches: then a
// kernel that reads on asks for the next one. Intel's do; a Zen 4 is faster left alone.
bool reads_ahead_to_a_page_end();

// Whether the set in use is the largest, the processor has matrix units (AMX) for bfloat16, and the
// system lets this process use them: the first call asks it.
bool has_tiles();

}  // namespace bm

#define BM_JOIN_(a, b) a##_##b
#define BM_JOIN(a, b) BM_JOIN_(a, b)

#define BM_DECLARE(type, name)   \
  extern const type name##_baseline, name##_avx2, name##_avx512, name##_avx512_bf16

#define BM_DEFINE(type, name) extern const type BM_JOIN(name, BM_TARGET)
// Another operation's struct, of the set that the kernel is compiled for.
#define BM_SAME(name) BM_JOIN(name, BM_TARGET)

#if defined(BM_X86)
#define BM_PICK(name)                                                      \
  (::bm::target() == ::bm::Target::avx512_bf16 ? name##_avx512_bf16       \
   : ::bm::target() == ::bm::Target::avx512    ? name##_avx512            \
   : ::bm::target() == ::bm::Target::avx2      ? name##_avx2              \
                                               : name##_baseline)
#else
#define BM_PICK(name) (name##_baseline)
#endif
