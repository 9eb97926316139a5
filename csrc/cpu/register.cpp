// The operators of the CPU engine as torch sees them.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "forward.h"
#include "gradients.h"
#include "tensors.h"

namespace {

using namespace headprune::cpu;
using at::IntArrayRef;
using Found = std::tuple<Tensor, Tensor, Tensor>;
using Grads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// `output` as the kernel's [batch, heads, rows, dim].
Tensor run_forward(const Held& held, const Tensor& output, const Tensor& lse, bool stats) {
  Forward forward{held.problem};
  const Tensor packed = stats ? at::empty({6, forward.batches, forward.query_heads}, lse.options()) : at::empty({0}, lse.options());
  forward.output = operand(output);
  if (forward.numbers.batch == 0) forward.output.batch = 0;
  forward.lse = lse.data_ptr<float>();
  forward.stats = stats ? packed.data_ptr<float>() : nullptr;
  attention_forward(forward);
  return packed;
}

Found attention(
    const Tensor& query, const Tensor& key, const Tensor& value, IntArrayRef kv_of_query, bool causal, int64_t window, double scale,
    double softcap, const OptionalTensor& bias, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& key_mask, const OptionalTensor& query_mask, const OptionalTensor& gate, bool stats) {
  const Options options{kv_of_query, causal, window, scale, softcap, bias, alibi_slopes, sinks, key_mask, query_mask, gate};
  const Held held = hold(query, key, value, options);
  const Tensor output = at::empty({query.size(0), query.size(2), query.size(1), value.size(3)}, query.options()).transpose(1, 2);
  const Tensor lse = at::empty({query.size(0), query.size(1), query.size(2)}, query.options().dtype(at::kFloat));
  return {output, lse, run_forward(held, output, lse, stats)};
}

Grads attention_backward(
    const Tensor& grad_output, const Tensor& output, const Tensor& lse, std::array<bool, 6> needs, const Tensor& query,
    const Tensor& key, const Tensor& value, IntArrayRef kv_of_query, bool causal, int64_t window, double scale, double softcap,
    const OptionalTensor& bias, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const OptionalTensor& key_mask,
    const OptionalTensor& gate) {
  const Options options{kv_of_query, causal, window, scale, softcap, bias, alibi_slopes, sinks, key_mask, {}, gate};
  const Held held = hold(query, key, value, options);
  return std::tuple_cat(gradients(held, options, {grad_output, output, lse, needs, query, key, value}));
}

}  // namespace

TORCH_LIBRARY(headprune_cpu, library) {
  library.def(
      "attention(Tensor query, Tensor key, Tensor value, int[] kv_of_query, bool causal, int window, float scale, float softcap, "
      "Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? key_mask, Tensor? query_mask, Tensor? gate, bool stats) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "attention_backward(Tensor grad_output, Tensor output, Tensor lse, bool[6] needs, Tensor query, Tensor key, Tensor value, "
      "int[] kv_of_query, bool causal, int window, float scale, float softcap, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, "
      "Tensor? key_mask, Tensor? gate) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(headprune_cpu, CPU, library) {
  library.impl("attention", attention);
  library.impl("attention_backward", attention_backward);
}
