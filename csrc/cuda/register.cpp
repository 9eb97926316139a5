// The CUDA operators as torch sees them: checks what the kernels assume and hands over raw pointers.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "decode.h"
#include "weight_stats.h"

namespace {

using at::Tensor;
using headprune::cuda::DecodeProblem;
using headprune::cuda::Element;
using headprune::cuda::Operand;
using headprune::cuda::Type;
using headprune::cuda::WeightProblem;
using OptionalTensor = std::optional<Tensor>;

Operand operand(const Tensor& tensor) { return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

Tensor rows_contiguous(const Tensor& tensor) { return tensor.stride(-1) == 1 ? tensor : tensor.contiguous(); }

void check_cache(const char* name, const Tensor& cache, const Tensor& query) {
  TORCH_CHECK(cache.dim() == 4 && cache.scalar_type() == query.scalar_type() && cache.device() == query.device(), name,
              " does not fit the query");
  TORCH_CHECK(cache.size(3) == query.size(3) && cache.stride(3) == 1, name, " must have the query's head_dim, with stride 1");
  bool aligned = reinterpret_cast<uintptr_t>(cache.data_ptr()) % 16 == 0;
  for (const int64_t axis : {0, 1, 2}) aligned = aligned && cache.stride(axis) % 8 == 0;
  TORCH_CHECK(aligned, name, " has rows that are not 16-byte aligned");
}

// A problem's optional tensors, kept alive until it is launched.
struct Held {
  std::vector<Tensor> tensors;

  Tensor keep(Tensor tensor) { return tensors.emplace_back(std::move(tensor)); }
  const float* floats(const OptionalTensor& tensor) {
    return tensor ? keep(tensor->to(at::kFloat).contiguous()).const_data_ptr<float>() : nullptr;
  }
};

// Zeros that every launch leaves as zeros. Launches of one stream follow each other and share them; a CUDA graph, which may run
// on any stream, has its own.
Tensor counters(const Tensor& like, int64_t count, const c10::cuda::CUDAStream& stream) {
  const auto options = like.options().dtype(at::kInt);
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) return at::zeros({count}, options);
  static std::mutex mutex;
  // Never destroyed: at exit the CUDA context may be gone before it.
  static auto* kept = new std::map<std::pair<int, c10::StreamId>, Tensor>();
  const std::lock_guard<std::mutex> lock(mutex);
  Tensor& found = (*kept)[{stream.device_index(), stream.id()}];
  if (!found.defined() || found.numel() < count) found = at::zeros({2 * count}, options);
  return found;
}

Tensor attention_decode(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache, const Tensor& lengths,
                        const OptionalTensor& page_table, const Tensor& tiles, int64_t splits, int64_t window, double scale,
                        double softcap, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
                        const OptionalTensor& key_mask, const OptionalTensor& gate) {
  TORCH_CHECK(query.dim() == 4, "expected a query [batch, query_heads, new, head_dim]");
  TORCH_CHECK(query.scalar_type() == at::kHalf || query.scalar_type() == at::kBFloat16, "runs fp16 and bf16, not ",
              query.scalar_type());
  check_cache("key_cache", key_cache, query);
  check_cache("value_cache", value_cache, query);
  TORCH_CHECK(lengths.scalar_type() == at::kInt && lengths.numel() == query.size(0), "lengths must be int32 [batch]");
  TORCH_CHECK(!page_table || page_table->scalar_type() == at::kInt, "page_table must be int32");
  TORCH_CHECK(tiles.scalar_type() == at::kInt && tiles.dim() == 2 && tiles.size(1) == 3 && tiles.is_contiguous(),
              "tiles must be int32 [tiles, 3]");
  TORCH_CHECK(splits >= 1 && splits <= 128, "splits must be 1 to 128, not ", splits);
  for (const Tensor& tensor : {lengths, tiles}) TORCH_CHECK(tensor.device() == query.device(), "lengths or tiles on another device");
  const c10::cuda::CUDAGuard guard(query.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();

  Held held;
  DecodeProblem problem{};
  problem.type = query.scalar_type() == at::kHalf ? Type::float16 : Type::bfloat16;
  problem.batch = query.size(0);
  problem.query_heads = query.size(1);
  problem.tokens = query.size(2);
  problem.head_dim = query.size(3);
  const int64_t pages = page_table ? page_table->size(1) : 1;
  problem.capacity = pages * key_cache.size(2);
  problem.page_size = page_table ? key_cache.size(2) : 0;
  problem.window = std::min<int64_t>(window, int64_t{1} << 30);  // positions are added to it in 32 bits
  problem.scale = scale;
  problem.softcap = softcap;
  problem.query = operand(held.keep(rows_contiguous(query)));
  problem.key = operand(key_cache);
  problem.value = operand(value_cache);
  const Tensor output =
      at::empty({query.size(0), query.size(2), query.size(1), query.size(3)}, query.options()).transpose(1, 2);
  problem.output = operand(output);
  problem.lengths = held.keep(lengths.contiguous()).const_data_ptr<int>();
  if (page_table) {
    const Tensor table = held.keep(rows_contiguous(*page_table));
    problem.page_table = table.const_data_ptr<int>();
    problem.page_table_batch = table.stride(0);
  }
  problem.tiles = tiles.const_data_ptr<int>();
  problem.tile_count = tiles.size(0);
  problem.splits = splits;
  problem.alibi_slopes = held.floats(alibi_slopes);
  problem.sinks = held.floats(sinks);
  problem.gate = held.floats(gate);
  problem.gate_batch = gate && gate->dim() == 2 ? problem.query_heads : 0;
  if (key_mask) {
    const Tensor mask = held.keep(rows_contiguous(*key_mask));
    problem.key_mask = mask.const_data_ptr<bool>();
    problem.key_mask_batch = mask.stride(0);
  }
  if (splits > 1) {
    const int64_t parts = query.size(0) * query.size(1) * query.size(2) * splits;
    problem.partial = held.keep(at::empty({parts * (query.size(3) + 1)}, query.options().dtype(at::kFloat))).data_ptr<float>();
    problem.partial_lse = problem.partial + parts * query.size(3);
    problem.arrived = held.keep(counters(query, query.size(0) * tiles.size(0), stream)).data_ptr<int>();
  }
  const char* error = headprune::cuda::attention_decode(problem, stream.stream());
  TORCH_CHECK(!error, "attention_decode on the GPU: ", error);
  return output;
}

Element element_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat: return Element::float32;
    case at::kHalf: return Element::float16;
    case at::kBFloat16: return Element::bfloat16;
    default: TORCH_CHECK(false, "runs fp32, bf16 and fp16, not ", type);
  }
}

// The tensors are given by their addresses; the caller keeps them alive.
Tensor head_weight_stats(const Tensor& weights, const OptionalTensor& grads, at::ScalarType dtype, const Tensor& chunks,
                         const Tensor& offsets, int64_t whole) {
  static_assert(sizeof(headprune::cuda::Chunk) == 7 * sizeof(int64_t));
  TORCH_CHECK(weights.scalar_type() == at::kLong && (!grads || grads->scalar_type() == at::kLong), "addresses must be int64");
  TORCH_CHECK(chunks.scalar_type() == at::kLong && chunks.dim() == 2 && chunks.size(1) == 7 && chunks.is_contiguous(),
              "chunks must be int64 [chunks, 7]");
  TORCH_CHECK(offsets.scalar_type() == at::kInt && offsets.dim() == 1 && offsets.numel() >= 1, "offsets must be int32 [heads + 1]");
  const c10::cuda::CUDAGuard guard(weights.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  WeightProblem problem{};
  problem.element = element_of(dtype);
  problem.whole = whole;
  problem.weights = weights.const_data_ptr<int64_t>();
  problem.grads = grads ? grads->const_data_ptr<int64_t>() : nullptr;
  problem.chunks = static_cast<const headprune::cuda::Chunk*>(chunks.const_data_ptr());
  problem.chunk_count = chunks.size(0);
  problem.offsets = offsets.const_data_ptr<int>();
  problem.heads = offsets.numel() - 1;
  const auto floats = weights.options().dtype(at::kFloat);
  const Tensor partial = at::empty({chunks.size(0), headprune::cuda::kMostStatistics}, floats);
  const Tensor arrived = counters(weights, problem.heads, stream), stats = at::zeros({grads ? 6 : 3, problem.heads}, floats);
  problem.partial = partial.data_ptr<float>();
  problem.arrived = arrived.data_ptr<int>();
  problem.stats = stats.data_ptr<float>();
  const char* error = headprune::cuda::weight_stats(problem, stream.stream());
  TORCH_CHECK(!error, "head_weight_stats on the GPU: ", error);
  return stats;
}

}  // namespace

TORCH_LIBRARY(headprune_cuda, library) {
  library.def(
      "attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths, Tensor? page_table, Tensor tiles, "
      "int splits, int window, float scale, float softcap, Tensor? alibi_slopes, Tensor? sinks, Tensor? key_mask, Tensor? gate) "
      "-> Tensor");
  library.def(
      "head_weight_stats(Tensor weights, Tensor? grads, ScalarType dtype, Tensor chunks, Tensor offsets, int whole) -> Tensor");
}

TORCH_LIBRARY_IMPL(headprune_cuda, CUDA, library) {
  library.impl("attention_decode", attention_decode);
  library.impl("head_weight_stats", head_weight_stats);
}
