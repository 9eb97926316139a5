#pragma once

#include "problem.h"

namespace headprune::cpu {

// Fills output, lse and stats; heads whose gate is 0 get output 0 and lse -inf without being computed.
void attention_forward(const Forward& problem);

}  // namespace headprune::cpu
