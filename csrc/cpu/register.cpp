// The operators of the CPU engine as torch sees them.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <limits>
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
  const Tensor packed = at::empty(stats ? std::vector<int64_t>{6, forward.batches, forward.query_heads} : std::vector<int64_t>{0},
                                  lse.options().dtype(at::kFloat));
  forward.output = operand(output);
  if (forward.numbers.batch == 0) forward.output.batch = 0;
  forward.lse = lse.data_ptr<Real>();
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
  const Tensor lse = at::empty({query.size(0), query.size(1), query.size(2)}, query.options().dtype(kReal));
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

Found attention_varlen(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
    IntArrayRef kv_of_query, bool causal, int64_t window, double scale, double softcap, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& gate, bool stats) {
  const Options options{kv_of_query, causal, window, scale, softcap, {}, alibi_slopes, sinks, {}, {}, gate};
  const Held held = hold_packed(query, key, value, cu_seqlens_q, cu_seqlens_k, options);
  const Tensor output = at::empty({query.size(0), query.size(1), value.size(2)}, query.options());
  const Tensor lse = at::empty({query.size(1), query.size(0)}, query.options().dtype(kReal));
  // Tokens behind the last sequence.
  const int64_t end = held.sequences.empty() ? 0 : held.sequences.back().query_start + held.sequences.back().query_len;
  output.slice(0, end).zero_();
  lse.slice(1, end).fill_(-std::numeric_limits<Real>::infinity());
  return {output, lse, run_forward(held, as_one_batch(output), lse, stats)};
}

using VarlenGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

VarlenGrads attention_varlen_backward(
    const Tensor& grad_output, const Tensor& output, const Tensor& lse, std::array<bool, 5> needs, const Tensor& query,
    const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, IntArrayRef kv_of_query,
    bool causal, int64_t window, double scale, double softcap, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& gate) {
  const Options options{kv_of_query, causal, window, scale, softcap, {}, alibi_slopes, sinks, {}, {}, gate};
  const Held held = hold_packed(query, key, value, cu_seqlens_q, cu_seqlens_k, options);
  const auto packed = [](const Tensor& grad) { return grad.defined() ? grad.squeeze(0).transpose(0, 1) : grad; };
  const auto [dq, dk, dv, dbias, dsinks, dgate] = gradients(
      held, options,
      {as_one_batch(grad_output), as_one_batch(output), lse, {needs[0], needs[1], needs[2], false, needs[3], needs[4]},
       as_one_batch(query), as_one_batch(key), as_one_batch(value)});
  return {packed(dq), packed(dk), packed(dv), dsinks, dgate};
}

Tensor attention_decode(
    const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& lengths, const OptionalTensor& page_table,
    IntArrayRef kv_of_query, int64_t window, double scale, double softcap, const OptionalTensor& alibi_slopes,
    const OptionalTensor& sinks, const OptionalTensor& key_mask, const OptionalTensor& gate) {
  const Options options{kv_of_query, true, window, scale, softcap, {}, alibi_slopes, sinks, key_mask, {}, gate};
  const Held held = hold_cache(query, key_cache, value_cache, lengths, page_table, options);
  const Tensor output = at::empty({query.size(0), query.size(2), query.size(1), value_cache.size(3)}, query.options()).transpose(1, 2);
  run_forward(held, output, at::empty({held.problem.numbers.count}, query.options().dtype(kReal)), false);
  return output;
}

}  // namespace

#if defined(HEADPRUNE_FP64)
#define HEADPRUNE_LIBRARY headprune_cpu_fp64
#else
#define HEADPRUNE_LIBRARY headprune_cpu
#endif
// The name must be replaced before torch's macros paste it.
#define DEFINE(name, library) TORCH_LIBRARY(name, library)
#define IMPLEMENT(name, library) TORCH_LIBRARY_IMPL(name, CPU, library)

DEFINE(HEADPRUNE_LIBRARY, library) {
  library.def(
      "attention(Tensor query, Tensor key, Tensor value, int[] kv_of_query, bool causal, int window, float scale, float softcap, "
      "Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? key_mask, Tensor? query_mask, Tensor? gate, bool stats) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "attention_backward(Tensor grad_output, Tensor output, Tensor lse, bool[6] needs, Tensor query, Tensor key, Tensor value, "
      "int[] kv_of_query, bool causal, int window, float scale, float softcap, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, "
      "Tensor? key_mask, Tensor? gate) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "attention_varlen(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int[] kv_of_query, "
      "bool causal, int window, float scale, float softcap, Tensor? alibi_slopes, Tensor? sinks, Tensor? gate, bool stats) "
      "-> (Tensor, Tensor, Tensor)");
  library.def(
      "attention_varlen_backward(Tensor grad_output, Tensor output, Tensor lse, bool[5] needs, Tensor query, Tensor key, "
      "Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, int[] kv_of_query, bool causal, int window, float scale, "
      "float softcap, Tensor? alibi_slopes, Tensor? sinks, Tensor? gate) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths, Tensor? page_table, "
      "int[] kv_of_query, int window, float scale, float softcap, Tensor? alibi_slopes, Tensor? sinks, Tensor? key_mask, "
      "Tensor? gate) -> Tensor");
}

IMPLEMENT(HEADPRUNE_LIBRARY, library) {
  library.impl("attention", attention);
  library.impl("attention_backward", attention_backward);
  library.impl("attention_varlen", attention_varlen);
  library.impl("attention_varlen_backward", attention_varlen_backward);
  library.impl("attention_decode", attention_decode);
}
