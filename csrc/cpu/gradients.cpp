// Gradients of all that an attention takes: of sinks, gates and what follows from the row sums delta here, the rest by
// attention_backward.
#include "gradients.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <cmath>
#include <limits>

#include "backward.h"
#include "delta.h"
#include "forward.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {
namespace {

// Gates below this are not divided out of the output: it may have lost its precision.
double smallest_divisor(Type type) { return type == Type::float16 ? 0x1p-6 : 0x1p-60; }

// The output without the gate, of those heads alone whose gate is too small to be divided out; the others give 0.
Tensor output_of_faint_heads(Held held, const Tensor& faint, const Tensor& like) {
  Problem& problem = held.problem;
  problem.gate = held.floats(faint);
  Forward forward{problem};
  const Tensor output = at::empty_like(like), lse = at::empty({problem.numbers.count}, like.options().dtype(kReal));
  forward.output = operand(output);
  if (problem.numbers.batch == 0) forward.output.batch = 0;
  forward.lse = lse.data_ptr<Real>();
  forward.stats = nullptr;
  attention_forward(forward);
  return output;
}

Tensor dots(const Problem& problem, const Tensor& a, const Tensor& b) {
  const Tensor found = at::zeros({problem.numbers.count}, a.options().dtype(kReal));
  Operand left = operand(a), right = operand(b);
  if (problem.numbers.batch == 0) left.batch = right.batch = 0;
  row_dots(problem, left, right, found.data_ptr<Real>());
  return found;
}

// Sums over the queries of each sample and head of rows[number] * factor(head, number), fp64 [batches, query_heads].
template <typename Factor>
Tensor head_sums(const Problem& problem, const Tensor& rows, Factor factor) {
  const Tensor sums = at::empty({problem.batches, problem.query_heads}, rows.options().dtype(at::kDouble));
  const Real* from = rows.const_data_ptr<Real>();
  double* to = sums.data_ptr<double>();
  for (int64_t batch = 0; batch < problem.batches; ++batch) {
    for (int64_t head = 0; head < problem.query_heads; ++head) {
      const int64_t first = problem.number_of(batch, head, 0);
      double sum = 0;
      for (int64_t i = first; i < first + problem.sequences[batch].query_len; ++i) sum += from[i] * factor(head, i);
      *to++ = sum;
    }
  }
  return sums;
}

Tensor reduced(const Tensor& sums, const Tensor& like) { return (like.dim() == 2 ? sums : sums.sum(0)).to(like.scalar_type()); }

// The probability of each row's sink.
struct SinkProbability {
  const Real *sinks, *lse;
  double operator()(int64_t head, int64_t number) const {
    return sinks && lse[number] != -std::numeric_limits<Real>::infinity() ? std::exp(sinks[head] - lse[number]) : 0.0;
  }
};

// Of a bias that is the same for all keys: the softmax forgets it but for what the sink takes.
Tensor gradient_of_row_bias(const Problem& problem, const Tensor& bias, const Tensor& delta, const SinkProbability& sink) {
  const Tensor rows = at::empty_like(delta);
  const Real* from = delta.const_data_ptr<Real>();
  Real* to = rows.data_ptr<Real>();
  const int64_t queries = problem.numbers.head;
  for (int64_t i = 0; i < delta.numel(); ++i) to[i] = from[i] * static_cast<Real>(sink(i / queries % problem.query_heads, i));
  return rows.view({problem.batches, problem.query_heads, queries, 1}).sum_to_size(bias.sizes());
}

// Memory for a gradient, laid out like its tensor where the kernels can write so.
Tensor gradient_like(const Tensor& tensor, bool zeroed) {
  const Tensor grad = at::empty_like(tensor);
  const Tensor found = rows_contiguous(grad).is_same(grad) ? grad : at::empty(tensor.sizes(), tensor.options());
  return zeroed ? found.zero_() : found;
}

// Whether the backward pass leaves out no row of the keys' and values' gradients.
bool writes_all_keys(const Problem& problem) {
  if (problem.key_mask || problem.gate || problem.numbers.batch == 0 || !problem.numbers.head) return false;
  int64_t read = 0;
  for (int64_t head = 0; head < problem.query_heads; ++head) read += !head || problem.kv_of_query[head] != problem.kv_of_query[head - 1];
  return read == problem.kv_heads;
}

Tensor zeroed_bias_gradient(Backward& backward, const Tensor& bias) {
  std::vector<int64_t> shape(4 - bias.dim(), 1);
  shape.insert(shape.end(), bias.sizes().begin(), bias.sizes().end());
  const Tensor grad = at::zeros(shape, bias.options().dtype(kReal));
  const auto stride = [&](int64_t dim) { return shape[dim] == 1 ? 0 : grad.stride(dim); };
  backward.grad_bias = {grad.data_ptr<Real>(), stride(0), stride(1), stride(2)};
  return grad;
}

}  // namespace

std::array<Tensor, 6> gradients(const Held& held, const Options& options, const BackwardTensors& given) {
  const auto [need_query, need_key, need_value, need_bias, need_sinks, need_gate] = given.needs;
  std::array<Tensor, 6> grads;
  Backward backward{held.problem};
  const bool packed = held.problem.numbers.batch == 0;
  const Tensor grad_output = rows_contiguous(given.grad_output), output = rows_contiguous(given.output), lse = given.lse.contiguous();
  const SinkProbability sink{held.problem.sinks, lse.const_data_ptr<Real>()};
  const Tensor delta = dots(held.problem, output, grad_output);
  if (need_gate) {
    const Tensor gate = options.gate->to(at::kDouble), faint = gate.abs().lt(smallest_divisor(held.problem.type));
    const auto one = [](int64_t, int64_t) { return 1.0; };
    Tensor sums = head_sums(held.problem, delta, one).div(gate);
    if (faint.any().item<bool>()) {
      const Tensor open = output_of_faint_heads(held, faint, given.output);
      sums = at::where(faint, head_sums(held.problem, dots(held.problem, open, grad_output), one), sums);
    }
    grads[5] = reduced(sums, *options.gate);
  }
  if (need_sinks) grads[4] = head_sums(held.problem, delta, sink).sum(0).neg().to(options.sinks->scalar_type());
  const bool row_bias = need_bias && (!options.bias->dim() || options.bias->size(-1) != given.key.size(2)), key_bias = need_bias && !row_bias;
  if (row_bias) grads[3] = gradient_of_row_bias(held.problem, *options.bias, delta, sink).to(options.bias->scalar_type());
  if (key_bias) grads[3] = zeroed_bias_gradient(backward, *options.bias);
  if (!(need_query || need_key || need_value || key_bias)) return grads;

  backward.grad_output = operand(grad_output);
  backward.lse = lse.const_data_ptr<Real>();
  backward.delta = delta.const_data_ptr<Real>();
  Tensor query_sums;
  if (need_query) {
    const bool in_place = held.problem.type == kRealType;
    grads[0] = gradient_like(given.query, in_place);
    query_sums = in_place ? grads[0] : at::zeros(given.query.sizes(), given.query.options().dtype(kReal));
    backward.grad_query = operand(query_sums);
  }
  const bool zeroed = !writes_all_keys(held.problem);
  if (need_key) backward.grad_key = operand(grads[1] = gradient_like(given.key, zeroed));
  if (need_value) backward.grad_value = operand(grads[2] = gradient_like(given.value, zeroed));
  if (packed) {
    for (Operand* one : {&backward.grad_output, &backward.grad_query, &backward.grad_key, &backward.grad_value}) one->batch = 0;
  }
  attention_backward(backward);
  if (need_query && !query_sums.is_same(grads[0])) grads[0].copy_(query_sums);
  if (key_bias) grads[3] = grads[3].view(options.bias->sizes()).to(options.bias->scalar_type());
  return grads;
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
