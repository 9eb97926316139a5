// The operator of the weight statistics as torch sees it.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "weight_tensors.h"

namespace {

using namespace headprune::cpu;
using at::IntArrayRef;

Tensor head_weight_stats(at::TensorList weights, at::TensorList grads, IntArrayRef dims, IntArrayRef spans, int64_t heads) {
  TORCH_CHECK(!weights.empty() && dims.size() == weights.size(), "expected a weight, and a dim for each");
  TORCH_CHECK(grads.empty() || grads.size() == weights.size(), "expected a gradient for each weight");
  const Tensor stats = at::empty({grads.empty() ? 3 : 6, heads}, weights[0].options().dtype(at::kFloat));
  weight_stats(weight_blocks(weights, grads, dims, spans), type_of(weights[0]), !grads.empty(), heads, stats.data_ptr<float>());
  return stats;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(headprune_cpu, library) {
  library.def("head_weight_stats(Tensor[] weights, Tensor[] grads, int[] dims, int[] spans, int heads) -> Tensor");
}

TORCH_LIBRARY_IMPL(headprune_cpu, CPU, library) { library.impl("head_weight_stats", head_weight_stats); }
