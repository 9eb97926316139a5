// The operators of the CPU engine as torch sees them: checks what the kernels assume and hands over raw pointers.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "forward.h"

namespace {

using at::Tensor;
using headprune::cpu::Bias;
using headprune::cpu::Operand;
using headprune::cpu::Problem;
using headprune::cpu::Type;
using OptionalTensor = std::optional<Tensor>;

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Type::float32;
    case at::kBFloat16: return Type::bfloat16;
    case at::kHalf: return Type::float16;
    default: TORCH_CHECK(false, "headprune_cpu runs fp32, bf16 and fp16, not ", tensor.scalar_type());
  }
}

Tensor rows_contiguous(const Tensor& tensor) { return tensor.stride(3) == 1 || tensor.size(3) <= 1 ? tensor : tensor.contiguous(); }

Operand operand(const Tensor& tensor) { return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

// A problem and the tensors that keep its memory alive.
struct Held {
  Problem problem{};
  std::vector<Tensor> tensors;

  Tensor keep(Tensor tensor) { return tensors.emplace_back(std::move(tensor)); }
  const float* floats(const OptionalTensor& tensor) {
    return tensor ? keep(tensor->to(at::kFloat).contiguous()).const_data_ptr<float>() : nullptr;
  }
  const bool* bools(const OptionalTensor& tensor) { return tensor ? keep(tensor->contiguous()).const_data_ptr<bool>() : nullptr; }
};

Bias bias_of(Held& held, const OptionalTensor& given) {
  if (!given) return {};
  const Problem& problem = held.problem;
  const bool is_bool = given->scalar_type() == at::kBool;
  const Tensor bias = held.keep(is_bool ? *given : given->to(at::kFloat))
                          .expand({problem.batches, problem.query_heads, problem.query_len, problem.kv_len});
  return {bias.const_data_ptr(), is_bool, bias.stride(0), bias.stride(1), bias.stride(2), bias.stride(3)};
}

Held hold(const Tensor& query, const Tensor& key, const Tensor& value, at::IntArrayRef kv_of_query, bool causal, int64_t window,
          double scale, double softcap, const OptionalTensor& bias, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
          const OptionalTensor& key_mask, const OptionalTensor& query_mask, const OptionalTensor& gate) {
  Held held;
  Problem& problem = held.problem;
  problem.type = type_of(query);
  TORCH_CHECK(key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(), "dtypes differ");
  TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4, "expected [batch, heads, length, dim]");
  TORCH_CHECK(static_cast<int64_t>(kv_of_query.size()) == query.size(1), "kv_of_query does not fit the query heads");
  problem.batches = query.size(0);
  problem.query_heads = query.size(1);
  problem.query_len = query.size(2);
  problem.head_dim = query.size(3);
  problem.kv_heads = key.size(1);
  problem.kv_len = key.size(2);
  problem.value_dim = value.size(3);
  problem.query = operand(held.keep(rows_contiguous(query)));
  problem.key = operand(held.keep(rows_contiguous(key)));
  problem.value = operand(held.keep(rows_contiguous(value)));
  problem.kv_of_query = kv_of_query.data();
  problem.causal = causal;
  problem.window = window;
  problem.scale = static_cast<float>(scale);
  problem.softcap = static_cast<float>(softcap);
  problem.bias = bias_of(held, bias);
  problem.alibi_slopes = held.floats(alibi_slopes);
  problem.sinks = held.floats(sinks);
  problem.gate = held.floats(gate);
  problem.gate_batch = gate && gate->dim() == 2 ? problem.query_heads : 0;
  problem.key_mask = held.bools(key_mask);
  problem.query_mask = held.bools(query_mask);
  return held;
}

std::tuple<Tensor, Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, at::IntArrayRef kv_of_query, bool causal, int64_t window,
    double scale, double softcap, const OptionalTensor& bias, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& key_mask, const OptionalTensor& query_mask, const OptionalTensor& gate, bool stats) {
  const Held held = hold(query, key, value, kv_of_query, causal, window, scale, softcap, bias, alibi_slopes, sinks, key_mask,
                         query_mask, gate);
  headprune::cpu::Forward forward{held.problem};
  const Problem& p = held.problem;
  const auto fp32 = query.options().dtype(at::kFloat);
  const Tensor output = at::empty({p.batches, p.query_len, p.query_heads, p.value_dim}, query.options()).transpose(1, 2);
  const Tensor lse = at::empty({p.batches, p.query_heads, p.query_len}, fp32);
  const Tensor packed = stats ? at::empty({6, p.batches, p.query_heads}, fp32) : at::empty({0}, fp32);
  forward.output = operand(output);
  forward.lse = lse.data_ptr<float>();
  forward.stats = stats ? packed.data_ptr<float>() : nullptr;
  headprune::cpu::attention_forward(forward);
  return {output, lse, packed};
}

}  // namespace

TORCH_LIBRARY(headprune_cpu, library) {
  library.def(
      "attention(Tensor query, Tensor key, Tensor value, int[] kv_of_query, bool causal, int window, float scale, float softcap, "
      "Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? key_mask, Tensor? query_mask, Tensor? gate, bool stats) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(headprune_cpu, CPU, library) { library.impl("attention", attention); }
