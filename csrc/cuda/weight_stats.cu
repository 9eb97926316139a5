// Launches the weight statistics: one launch for all tensors.
#include "weight_kernel.cuh"
#include "weight_stats.h"

namespace headprune::cuda {

template <class T, bool kGrads>
__global__ void __launch_bounds__(kWeightThreads) weight_stats_kernel(const WeightProblem p) {
  weight_chunk<T, kGrads>(p);
}

namespace {

template <class T>
cudaError_t launch(const WeightProblem& problem, cudaStream_t stream) {
  constexpr int bytes = kWeightThreads / 32 * kMostStatistics * sizeof(float);
  if (!problem.chunk_count) return cudaSuccess;
  if (problem.grads) weight_stats_kernel<T, true><<<problem.chunk_count, kWeightThreads, bytes, stream>>>(problem);
  else weight_stats_kernel<T, false><<<problem.chunk_count, kWeightThreads, bytes, stream>>>(problem);
  return cudaGetLastError();
}

cudaError_t launch_element(const WeightProblem& problem, cudaStream_t stream) {
  switch (problem.element) {
    case Element::float32: return launch<Float>(problem, stream);
    case Element::float16: return launch<Half>(problem, stream);
    case Element::bfloat16: return launch<BFloat16>(problem, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

const char* weight_stats(const WeightProblem& problem, CUstream_st* stream) {
  const cudaError_t status = launch_element(problem, stream);
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

}  // namespace headprune::cuda
