// The engine is compiled twice: with fp32 arithmetic for fp32, bf16 and fp16, and for fp64 (the sources in fp64/).
#pragma once

#if defined(HEADPRUNE_FP64)
#define HEADPRUNE_PRECISION fp64
#else
#define HEADPRUNE_PRECISION fp32
// Where intrinsics stand in for at::vec, they are those of fp32.
#if defined(CPU_CAPABILITY_AVX512)
#define HEADPRUNE_AVX512
#elif defined(CPU_CAPABILITY_AVX2)
#define HEADPRUNE_AVX2
#endif
#endif

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

#if defined(HEADPRUNE_FP64)
using Real = double;
#else
using Real = float;
#endif

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
