#pragma once

#include <array>

#include "tensors.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

// What a backward operator is given besides its problem, and the tensors that want gradients; all [batch, heads, rows, dim]
// but for bias, sinks and gate. `output` is gated.
struct BackwardTensors {
  Tensor grad_output, output, lse;
  std::array<bool, 6> needs;  // query, key, value, bias, sinks, gate
  Tensor query, key, value;
};

// Gradients of query, key, value, bias, sinks and gate in the dtypes and shapes of these; those not needed are undefined.
std::array<Tensor, 6> gradients(const Held& held, const Options& options, const BackwardTensors& given);

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
