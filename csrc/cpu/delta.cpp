#include "delta.h"

#include <ATen/Parallel.h>

#include "rows.h"
#include "scratch.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {
namespace {

Real dot(const Real* a, const Real* b, int64_t count) {
  Vec sums[4] = {Vec(0.f), Vec(0.f), Vec(0.f), Vec(0.f)};
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    for (int v = 0; v < 4; ++v) sums[v] = at::vec::fmadd(load(a + i + v * kLanes), load(b + i + v * kLanes), sums[v]);
  }
  for (; i + kLanes <= count; i += kLanes) sums[0] = at::vec::fmadd(load(a + i), load(b + i), sums[0]);
  Real sum = sum_of_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// The row itself where it is fp32, else a widened copy.
const Real* as_floats(const char* row, Type type, int64_t count, Real* copy) {
  if (type == kRealType) return reinterpret_cast<const Real*>(row);
  read_row(row, type, count, copy);
  return copy;
}

}  // namespace

void row_dots(const Problem& problem, const Operand& a, const Operand& b, Real* dots) {
  const int64_t dim = problem.value_dim;
  at::parallel_for(0, problem.batches * problem.query_heads, 1, [&](int64_t from, int64_t to) {
    Scratch& scratch = thread_scratch();
    scratch.reset(2 * dim);
    Real *left = scratch.take(dim), *right = scratch.take(dim);
    for (int64_t i = from; i < to; ++i) {
      const int64_t batch = i / problem.query_heads, head = i % problem.query_heads;
      Real* row = dots + problem.number_of(batch, head, 0);
      for (int64_t query = 0; query < problem.sequences[batch].query_len; ++query) {
        const Real* x = as_floats(query_row(problem, a, batch, head, query), problem.type, dim, left);
        row[query] = dot(x, as_floats(query_row(problem, b, batch, head, query), problem.type, dim, right), dim);
      }
    }
  });
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
