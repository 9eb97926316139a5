// The weight statistics kernel on the CPU, for tests: blocks one after another in an order that `seed` decides.
#include "emulated_warp.h"

#include "weight_kernel.cuh"

#include <algorithm>
#include <numeric>
#include <random>

namespace {

using namespace headprune::cuda;

template <class T, bool kGrads>
void run(const WeightProblem& problem, unsigned seed) {
  std::vector<int> order(problem.chunk_count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  for (const int index : order) {
    run_block(index, 0, kWeightThreads, 4096, seed, [&] { weight_chunk<T, kGrads>(problem); });
  }
}

template <class T>
void run_grads(const WeightProblem& problem, unsigned seed) {
  if (problem.grads) run<T, true>(problem, seed);
  else run<T, false>(problem, seed);
}

}  // namespace

extern "C" int problem_size() { return sizeof(WeightProblem); }

extern "C" void emulate_weights(const WeightProblem* problem, unsigned seed) {
  switch (problem->element) {
    case Element::float32: return run_grads<Float>(*problem, seed);
    case Element::float16: return run_grads<Half>(*problem, seed);
    case Element::bfloat16: return run_grads<BFloat16>(*problem, seed);
  }
}
