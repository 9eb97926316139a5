// Decode attention on the GPU as a value: raw pointers, sizes, strides. No torch, no CUDA headers.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define HEADPRUNE_BOTH __host__ __device__
#else
#define HEADPRUNE_BOTH
#endif

struct CUstream_st;

namespace headprune::cuda {

enum class Type { float16, bfloat16 };

// A matrix [batch or page, head, token, dim] with last stride 1; strides in elements.
struct Operand {
  void* data;
  int64_t batch, head, token;
};

// As in headprune.ops.attention_decode, defaults resolved. Row head * tokens + i is new token i of a query head; a tile is up to
// kTileRows rows of one group (kernels/triton/decode_plan.py makes the table).
struct DecodeProblem {
  Type type;
  int batch, query_heads, tokens, head_dim, capacity;
  int window;     // 0: none
  int page_size;  // 0: a contiguous cache
  float scale, softcap;
  Operand query, key, value, output;
  const int* lengths;
  const int* page_table;
  int64_t page_table_batch;
  const int* tiles;  // [tile_count][3]: key/value head, first row, row behind the last one
  int tile_count, splits;
  const float* alibi_slopes;  // these may be null
  const float* sinks;
  const float* gate;
  int64_t gate_batch;
  const bool* key_mask;
  int64_t key_mask_batch;
  float* partial;      // [batch][rows][splits][head_dim], where splits > 1
  float* partial_lse;  // [batch][rows][splits], base 2
  int* arrived;        // [batch][tile_count], 0; left 0
};

constexpr int kTileRows = 16;
constexpr int kBlockKeys = 64;
constexpr int kLeastKeys = 256;

// The keys of one split: lo up to hi, none of them before `first`; `active` splits of the sample have anything to do.
struct SplitRange {
  int length, first, lo, hi, active;
};

HEADPRUNE_BOTH inline int smaller(int a, int b) { return a < b ? a : b; }
HEADPRUNE_BOTH inline int larger(int a, int b) { return a < b ? b : a; }
HEADPRUNE_BOTH inline int ceil_div(int a, int b) { return a / b + (a % b != 0); }

// Splits are even by the sample's real length, and whole blocks.
HEADPRUNE_BOTH inline SplitRange split_range(const DecodeProblem& p, int length, int split) {
  const int stop = larger(smaller(length, p.capacity), 0);
  const int first = p.window ? larger(length - p.tokens - p.window + 1, 0) : 0;
  const int first_block = first / kBlockKeys;
  const int blocks = larger(ceil_div(stop, kBlockKeys) - first_block, 0);
  const int each = larger(ceil_div(blocks, p.splits), kLeastKeys / kBlockKeys);
  const int lo = (first_block + split * each) * kBlockKeys;
  return {length, first, lo, smaller(lo + each * kBlockKeys, stop), larger(ceil_div(blocks, each), 1)};
}

// Launches on `stream`; null, or what went wrong. head_dim is 64, 96 or 128; keys and values are 16-byte aligned, row by row.
const char* attention_decode(const DecodeProblem& problem, CUstream_st* stream);

}  // namespace headprune::cuda
