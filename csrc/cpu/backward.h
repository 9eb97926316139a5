#pragma once

#include "problem.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

// Gradient of a floating bias, fp32, in the bias's own shape: strides are 0 where it broadcasts, but not along the keys.
struct BiasGradient {
  Real* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

// What is not asked for is null.
struct Backward : Problem {
  Operand grad_output;  // of the gated output, in the type of the query
  const Real* lse;     // as the forward left it
  const Real* delta;   // <output, grad_output> of each row
  Operand grad_query;   // fp32, zeroed by the caller, like all that follow
  Operand grad_key, grad_value;  // in the type of key and value
  BiasGradient grad_bias;
};

// Adds to the gradients what the heads with a gate other than 0 contribute. The result does not depend on the number of
// threads, and no two runs differ.
void attention_backward(const Backward& problem);

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
