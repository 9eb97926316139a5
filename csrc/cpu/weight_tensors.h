// From torch tensors to the blocks of weights that the kernel sees.
#pragma once

#include <vector>

#include "tensors.h"
#include "weight_stats.h"

namespace headprune::cpu {

// `spans`: of six numbers each: weight, first head, heads, first feature, features from one head to the next, features of a head.
// `dims`: the dimension of each weight that holds its features.
inline std::vector<WeightBlock> weight_blocks(at::TensorList weights, at::TensorList grads, at::IntArrayRef dims, at::IntArrayRef spans) {
  std::vector<WeightBlock> blocks;
  for (size_t at = 0; at + 6 <= spans.size(); at += 6) {
    const int64_t index = spans[at], start = spans[at + 3], width = spans[at + 5];
    const Tensor& weight = weights[index];
    const int64_t dim = dims[index], others = weight.size(1 - dim), feature = weight.stride(dim), other = weight.stride(1 - dim);
    TORCH_CHECK(weight.dim() == 2 && type_of(weight) == type_of(weights[0]), "expected matrices of one dtype");
    TORCH_CHECK(grads.empty() || (grads[index].strides() == weight.strides() && type_of(grads[index]) == type_of(weight)),
                "a gradient must be laid out like its weight");
    TORCH_CHECK(feature == 1 || other == 1, "a weight must have a stride of 1");
    const int64_t offset = start * feature * weight.element_size();
    WeightBlock block{
        static_cast<const char*>(weight.const_data_ptr()) + offset,
        grads.empty() ? nullptr : static_cast<const char*>(grads[index].const_data_ptr()) + offset,
        spans[at + 1], spans[at + 2], spans[at + 4] * feature, 0, 0, 0};
    const bool along = feature == 1 && !(other == 1 && others > 1);
    block.rows = along ? others : width;
    block.columns = along ? width : others;
    block.row_stride = along ? other : feature;
    if (block.rows > 1 && block.row_stride == block.columns) {
      block.columns *= block.rows;
      block.rows = 1;
    }
    if (block.columns) blocks.push_back(block);
  }
  return blocks;
}

}  // namespace headprune::cpu
