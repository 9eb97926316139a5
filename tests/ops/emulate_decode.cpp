// The decode kernel on the CPU, for tests: blocks one after another in an order that `seed` decides.
#include "emulated_warp.h"

#include "decode_kernel.cuh"

#include <algorithm>
#include <numeric>
#include <random>

namespace {

using namespace headprune::cuda;

template <class T, int D>
void run(const DecodeProblem& problem, unsigned seed) {
  std::vector<int> order(problem.batch * problem.tile_count * problem.splits);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  for (const int index : order) {
    run_block(index / problem.splits, index % problem.splits, kThreads, Layout<D>::bytes, seed, [&] { decode_tile<T, D>(problem); });
  }
}

template <class T>
void run_type(const DecodeProblem& problem, unsigned seed) {
  if (problem.head_dim == 64) run<T, 64>(problem, seed);
  if (problem.head_dim == 96) run<T, 96>(problem, seed);
  if (problem.head_dim == 128) run<T, 128>(problem, seed);
}

}  // namespace

extern "C" int problem_size() { return sizeof(DecodeProblem); }

extern "C" void emulate_decode(const DecodeProblem* problem, unsigned seed) {
  if (problem->type == Type::float16) run_type<Half>(*problem, seed);
  else run_type<BFloat16>(*problem, seed);
}
