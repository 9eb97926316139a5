#pragma once

#include "problem.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

// dots[row] = <a, b> over the value_dim columns of each query row, for two operands in the problem's type: with the output
// and its gradient these are the row sums delta of FlashAttention's backward pass.
void row_dots(const Problem& problem, const Operand& a, const Operand& b, Real* dots);

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
