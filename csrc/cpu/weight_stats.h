#pragma once

#include <vector>

#include "problem.h"

namespace headprune::cpu {

// The weights of some heads in one matrix: for each head `rows` rows of `columns` neighbours, strides in elements. `grad` is laid
// out like `weight`, or null.
struct WeightBlock {
  const char* weight;
  const char* grad;
  int64_t first_head, heads, head_stride, rows, row_stride, columns;
};

// Writes stats [3 or 6, heads]: sum |w|, sum w^2, max |w| and, where `grads`, sum w g, sum |w g|, sum (w g)^2; the same bits with any
// number of threads.
void weight_stats(const std::vector<WeightBlock>& blocks, Type type, bool grads, int64_t heads, float* stats);

}  // namespace headprune::cpu
