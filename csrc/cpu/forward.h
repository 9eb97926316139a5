#pragma once

#include "problem.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

// Fills output, lse and stats; heads whose gate is 0 get output 0 and lse -inf without being computed.
void attention_forward(const Forward& problem);

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
