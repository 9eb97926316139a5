// Decode attention: one block computes one tile of rows (all query heads of a group x new tokens) of one sample against one split
// of its keys. Every warp takes every fourth run of 16 keys through a pipeline of its own (nothing in the loop waits for another
// warp); the block merges its warps, and the last block of a tile to arrive merges the splits in their order.
//
// Names as in the papers: q, k, v, o; m and l are the running maximum and sum of the online softmax, base 2.
#pragma once

#include <math.h>

#include "decode.h"
#include "warp.cuh"

namespace headprune::cuda {

constexpr int kWarps = kBlockKeys / 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 3;
constexpr float kLog2e = 1.4426950408889634f;

// One row of a tile in shared memory is 16 bytes longer than its data: eight rows then lie in different banks.
template <int D>
struct Layout {
  static constexpr int pitch = D * 2 + 16;
  static constexpr int matrix = 16 * pitch;
  static constexpr int warp = kStages * 2 * matrix;  // keys and values of every stage
  static constexpr int keys = matrix;                // behind the queries
  static constexpr int visible = keys + kWarps * warp;
  static constexpr int bytes = visible + kWarps * kStages * 4;
  // After the loop, in place of the keys: o of every warp, then m and l.
  static constexpr int warp_m = keys + kWarps * 16 * D * 4;
  static_assert(warp_m + kWarps * 16 * 8 <= visible);
};

struct Row {
  int head, token, position;  // position among the keys
};

__device__ inline Row row_at(const DecodeProblem& p, int row, int length) {
  return {row / p.tokens, row % p.tokens, length - p.tokens + row % p.tokens};
}

__device__ inline float gate_of(const DecodeProblem& p, int sample, int head) {
  return p.gate ? p.gate[sample * p.gate_batch + head] : 1.f;
}

// Where a lane's key lies, and whether it is to be read.
struct KeyPlace {
  int64_t key, value;
  bool valid;
};

__device__ inline KeyPlace place_of(const DecodeProblem& p, const SplitRange& range, int sample, int key) {
  KeyPlace place{0, 0, key < range.hi && key >= range.first};
  if (place.valid && p.key_mask) place.valid = p.key_mask[sample * p.key_mask_batch + key];
  if (!place.valid) return place;
  int64_t page = sample;
  int inside = key;
  if (p.page_size) {
    page = p.page_table[sample * p.page_table_batch + key / p.page_size];
    inside = key % p.page_size;
  }
  place.key = page * p.key.batch + inside * p.key.token;
  place.value = page * p.value.batch + inside * p.value.token;
  return place;
}

// One warp's copy of 16 keys and values into a stage; lane l < 16 knows the place of key l.
template <int D>
__device__ void fetch(char* stage, unsigned* visible, const uint16_t* k, const uint16_t* v, const KeyPlace& place, int lane) {
  constexpr int kChunks = D / 8;
  const unsigned valid = ballot(place.valid);
  if (lane == 0) *visible = valid;
#pragma unroll
  for (int i = 0; i < kChunks / 2; ++i) {
    const int chunk = i * 32 + lane, row = chunk / kChunks, column = chunk % kChunks;
    char* target = stage + row * Layout<D>::pitch + column * 16;
    const bool read = valid >> row & 1;
    copy_async(target, k + shuffle(place.key, row) + column * 8, read);
    copy_async(target + Layout<D>::matrix, v + shuffle(place.value, row) + column * 8, read);
  }
}

// A lane's share of the online softmax: rows lane / 4 and lane / 4 + 8 of a tile.
template <int D>
struct Softmax {
  float m[2], l[2], o[D / 8][4];
};

template <class T, int D>
__device__ void attend(const DecodeProblem& p, Softmax<D>& state, const uint32_t (&q)[D / 16][4], const char* stage,
                       unsigned visible, int first_key, const int (&position)[2], const float (&slope)[2], int lane) {
  constexpr int pitch = Layout<D>::pitch;
  float s[2][4] = {};
  const char* k_row = stage + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t k[4];
    load_matrices(k, k_row + step * 32);
    multiply(T{}, s[0], q[step], k[0], k[1]);
    multiply(T{}, s[1], q[step], k[2], k[3]);
  }
  float m_new[2] = {state.m[0], state.m[1]};
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int part = i / 4, half = i / 2 % 2, column = part * 8 + lane % 4 * 2 + i % 2, key = first_key + column;
    float& score = s[part][i % 4];
    score *= p.scale;
    if (p.softcap != 0.f) score = p.softcap * tanhf(score / p.softcap);
    score = kLog2e * (score - slope[half] * static_cast<float>(position[half] - key));
    const bool seen = (visible >> column & 1) && key <= position[half] && (!p.window || key > position[half] - p.window);
    if (!seen) score = -INFINITY;
    m_new[half] = fmaxf(m_new[half], score);
  }
  float safe[2], alpha[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    m_new[half] = fmaxf(m_new[half], shuffle_xor(m_new[half], 1));
    m_new[half] = fmaxf(m_new[half], shuffle_xor(m_new[half], 2));
    // A row that has seen nothing yet keeps -inf; 0 stands in for it so that no -inf minus -inf arises.
    safe[half] = m_new[half] == -INFINITY ? 0.f : m_new[half];
    alpha[half] = exp2_fast(state.m[half] - safe[half]);
    state.l[half] *= alpha[half];
  }
  if (any_in_warp(m_new[0] != state.m[0] || m_new[1] != state.m[1])) {
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) state.o[i][j] *= alpha[j / 2];
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float& prob = s[i / 4][i % 4];
    prob = exp2_fast(prob - safe[i / 2 % 2]);
    state.l[i / 2 % 2] += prob;
  }
  state.m[0] = m_new[0];
  state.m[1] = m_new[1];
  // The product's result layout is its left operand's, two columns at a time.
  const uint32_t probs[4] = {pack(T{}, s[0][0], s[0][1]), pack(T{}, s[0][2], s[0][3]), pack(T{}, s[1][0], s[1][1]),
                             pack(T{}, s[1][2], s[1][3])};
  const char* v_row = stage + Layout<D>::matrix + lane % 16 * pitch + lane / 16 * 16;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    uint32_t v[4];
    load_matrices_transposed(v, v_row + step * 32);
    multiply(T{}, state.o[2 * step], probs, v[0], v[1]);
    multiply(T{}, state.o[2 * step + 1], probs, v[2], v[3]);
  }
}

// Factor that ends the softmax of a row: sum l, relative to the maximum m, of its keys, and its sink.
__device__ inline float row_factor(const DecodeProblem& p, float m, float l, int head, float gate) {
  if (l == 0.f || gate == 0.f) return 0.f;
  if (p.sinks) l += exp2f(p.sinks[head] * kLog2e - m);
  return gate / l;
}

template <class T, int D>
__device__ void store_output(const DecodeProblem& p, int sample, const Row& row, int column, float4 o) {
  uint16_t* target = static_cast<uint16_t*>(p.output.data) + sample * p.output.batch + row.head * p.output.head +
                     row.token * p.output.token + column;
  reinterpret_cast<uint32_t*>(target)[0] = pack(T{}, o.x, o.y);
  reinterpret_cast<uint32_t*>(target)[1] = pack(T{}, o.z, o.w);
}

__device__ inline void add_scaled(float4& sum, float weight, const float4& term) {
  sum.x += weight * term.x;
  sum.y += weight * term.y;
  sum.z += weight * term.z;
  sum.w += weight * term.w;
}

// The last block of a tile: every split's partial result, in the order of the splits.
template <class T, int D>
__device__ void merge_splits(const DecodeProblem& p, const SplitRange& range, int sample, int first_row, int rows, int thread) {
  float* weights = reinterpret_cast<float*>(shared_memory() + Layout<D>::keys);  // [rows][active]
  const int64_t base = static_cast<int64_t>(sample) * p.query_heads * p.tokens + first_row;
  for (int r = thread / 32; r < rows; r += kWarps) {
    const Row row = row_at(p, first_row + r, range.length);
    const float* lse = p.partial_lse + (base + r) * p.splits;
    float m = -INFINITY, l = 0.f;
    for (int s = thread % 32; s < range.active; s += 32) m = fmaxf(m, load_from_l2(lse + s));
    for (int mask = 16; mask; mask /= 2) m = fmaxf(m, shuffle_xor(m, mask));
    const float safe = m == -INFINITY ? 0.f : m;
    for (int s = thread % 32; s < range.active; s += 32) l += exp2f(load_from_l2(lse + s) - safe);
    for (int mask = 16; mask; mask /= 2) l += shuffle_xor(l, mask);
    const float factor = row_factor(p, safe, l, row.head, gate_of(p, sample, row.head));
    for (int s = thread % 32; s < range.active; s += 32) {
      weights[r * range.active + s] = factor * exp2f(load_from_l2(lse + s) - safe);
    }
  }
  sync_block();
  for (int item = thread; item < rows * (D / 4); item += kThreads) {
    const int r = item / (D / 4), column = item % (D / 4) * 4;
    const float4* partial = reinterpret_cast<const float4*>(p.partial + (base + r) * p.splits * D + column);
    float4 o{};
#pragma unroll 8
    for (int s = 0; s < range.active; ++s) {
      add_scaled(o, weights[r * range.active + s], load_from_l2(partial + s * (D / 4)));
    }
    const Row row = row_at(p, first_row + r, range.length);
    store_output<T, D>(p, sample, row, column, gate_of(p, sample, row.head) == 0.f ? float4{} : o);
  }
}

// The warps' shares, from shared memory: the output where there is one split, else this split's partial result.
template <class T, int D>
__device__ void merge_warps(const DecodeProblem& p, const SplitRange& range, int sample, int first_row, int rows, int split,
                            int thread) {
  const float* warp_o = reinterpret_cast<const float*>(shared_memory() + Layout<D>::keys);
  const float* warp_m = reinterpret_cast<const float*>(shared_memory() + Layout<D>::warp_m);
  const float* warp_l = warp_m + kWarps * 16;
  for (int item = thread; item < rows * (D / 4); item += kThreads) {
    const int r = item / (D / 4), column = item % (D / 4) * 4;
    float m = -INFINITY, l = 0.f;
    for (int w = 0; w < kWarps; ++w) m = fmaxf(m, warp_m[w * 16 + r]);
    const float safe = m == -INFINITY ? 0.f : m;
    float4 o{};
    for (int w = 0; w < kWarps; ++w) {
      const float weight = exp2f(warp_m[w * 16 + r] - safe);
      l += weight * warp_l[w * 16 + r];
      add_scaled(o, weight, *reinterpret_cast<const float4*>(warp_o + (w * 16 + r) * D + column));
    }
    const Row row = row_at(p, first_row + r, range.length);
    const bool whole = range.active == 1;
    const float factor = whole ? row_factor(p, safe, l, row.head, gate_of(p, sample, row.head)) : l == 0.f ? 0.f : 1.f / l;
    const float4 scaled{o.x * factor, o.y * factor, o.z * factor, o.w * factor};
    if (whole) {
      // A head gated to 0 gives 0 whatever its values are.
      store_output<T, D>(p, sample, row, column, factor == 0.f ? float4{} : scaled);
      continue;
    }
    const int64_t part = (static_cast<int64_t>(sample) * p.query_heads * p.tokens + first_row + r) * p.splits + split;
    *reinterpret_cast<float4*>(p.partial + part * D + column) = scaled;
    if (column == 0) p.partial_lse[part] = l == 0.f ? -INFINITY : safe + log2f(l);
  }
}

template <class T, int D>
__device__ void store_shares(const Softmax<D>& state, int warp, int lane) {
  float* warp_o = reinterpret_cast<float*>(shared_memory() + Layout<D>::keys) + warp * 16 * D;
  float* warp_m = reinterpret_cast<float*>(shared_memory() + Layout<D>::warp_m) + warp * 16;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + half * 8;
    float l = state.l[half];
    l += shuffle_xor(l, 1);
    l += shuffle_xor(l, 2);
    if (lane % 4 == 0) {
      warp_m[row] = state.m[half];
      warp_m[kWarps * 16 + row] = l;
    }
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      float* target = warp_o + row * D + i * 8 + lane % 4 * 2;
      target[0] = state.o[i][2 * half];
      target[1] = state.o[i][2 * half + 1];
    }
  }
}

// The queries of a tile, 0 behind its last row, through shared memory into the product's left operand.
template <int D>
__device__ void load_queries(const DecodeProblem& p, uint32_t (&q)[D / 16][4], int sample, int first_row, int rows, int thread) {
  char* memory = shared_memory();
  const uint16_t* query = static_cast<const uint16_t*>(p.query.data) + sample * p.query.batch;
  for (int item = thread; item < 16 * D; item += kThreads) {
    const int r = item / D, column = item % D;
    const Row row = row_at(p, first_row + r, 0);
    const uint16_t element = r < rows ? query[row.head * p.query.head + row.token * p.query.token + column] : 0;
    *reinterpret_cast<uint16_t*>(memory + r * Layout<D>::pitch + column * 2) = element;
  }
  sync_block();
  const int lane = thread % 32;
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
    load_matrices(q[step], memory + lane % 16 * Layout<D>::pitch + lane / 16 * 16 + step * 32);
  }
}

template <class T, int D>
__device__ void decode_tile(const DecodeProblem& p) {
  const int thread = thread_index(), lane = thread % 32, warp = thread / 32, split = block_y();
  const int sample = block_x() / p.tile_count;
  const int* tile = p.tiles + block_x() % p.tile_count * 3;
  const int kv_head = tile[0], first_row = tile[1], rows = tile[2] - tile[1];
  const SplitRange range = split_range(p, p.lengths[sample], split);
  if (split >= range.active) return;
  const bool gated_on = thread < rows && gate_of(p, sample, row_at(p, first_row + thread, 0).head) != 0.f;
  if (p.gate && !any_in_block(gated_on)) {
    for (int item = thread; split == 0 && item < rows * (D / 4); item += kThreads) {
      store_output<T, D>(p, sample, row_at(p, first_row + item / (D / 4), 0), item % (D / 4) * 4, float4{});
    }
    return;
  }

  char* stages = shared_memory() + Layout<D>::keys + warp * Layout<D>::warp;
  unsigned* visible = reinterpret_cast<unsigned*>(shared_memory() + Layout<D>::visible) + warp * kStages;
  const uint16_t* k = static_cast<const uint16_t*>(p.key.data) + kv_head * p.key.head;
  const uint16_t* v = static_cast<const uint16_t*>(p.value.data) + kv_head * p.value.head;
  const int runs = larger(ceil_div(larger(range.hi - range.lo, 0) - warp * 16, kWarps * 16), 0);
  const auto place = [&](int run) { return place_of(p, range, sample, range.lo + (run * kWarps + warp) * 16 + lane % 16); };
  const auto fetch_run = [&](int run, const KeyPlace& at) {
    if (run < runs) fetch<D>(stages + run % kStages * 2 * Layout<D>::matrix, visible + run % kStages, k, v, at, lane);
    commit_copies();
  };
  for (int run = 0; run < kStages - 1; ++run) fetch_run(run, place(run));
  KeyPlace next = place(kStages - 1);
  uint32_t q[D / 16][4];
  load_queries<D>(p, q, sample, first_row, rows, thread);
  int position[2];
  float slope[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Row row = row_at(p, first_row + lane / 4 + half * 8, range.length);
    position[half] = row.position;
    slope[half] = p.alibi_slopes && lane / 4 + half * 8 < rows ? p.alibi_slopes[row.head] : 0.f;
  }
  Softmax<D> state{{-INFINITY, -INFINITY}, {}, {}};
  for (int run = 0; run < runs; ++run) {
    wait_copies<kStages - 2>();
    // After this the run is there for every lane, and every lane is done with the stage that is filled next.
    sync_warp();
    fetch_run(run + kStages - 1, next);
    next = place(run + kStages);
    attend<T, D>(p, state, q, stages + run % kStages * 2 * Layout<D>::matrix, visible[run % kStages],
                 range.lo + (run * kWarps + warp) * 16, position, slope, lane);
  }
  wait_copies<0>();
  sync_block();
  store_shares<T, D>(state, warp, lane);
  sync_block();
  merge_warps<T, D>(p, range, sample, first_row, rows, split, thread);
  if (range.active == 1) return;

  // Release: each thread's part, then the block's arrival. Acquire: the last arrival, then everyone's parts.
  fence_device();
  sync_block();
  int* arrived = p.arrived + block_x();
  bool last = false;
  if (thread == 0) {
    last = fetch_add(arrived, 1) == range.active - 1;
    if (last) *arrived = 0;  // nobody else comes; the next launch finds it so
  }
  if (!any_in_block(last)) return;
  fence_device();
  merge_splits<T, D>(p, range, sample, first_row, rows, thread);
}

}  // namespace headprune::cuda
