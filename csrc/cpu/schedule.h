// Which work there is: the keys that each sample shows, the heads of each group that are computed, and blocks of rows.
#pragma once

#include <algorithm>
#include <tuple>
#include <vector>

#include "problem.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {

// The keys that key_mask lets through, in order; slot t is key index[t], or first + t where they are neighbours.
struct Keys {
  std::vector<int64_t> index;
  int64_t first = 0;
  int64_t count = 0;

  int64_t at(int64_t slot) const { return index.empty() ? first + slot : index[slot]; }
  // The first slot whose key is `key` or later.
  int64_t slot_from(int64_t key) const {
    if (index.empty()) return std::clamp<int64_t>(key - first, 0, count);
    return std::lower_bound(index.begin(), index.end(), key) - index.begin();
  }
};

inline Keys visible_keys(const Problem& problem, int64_t batch) {
  Keys keys;
  keys.count = problem.sequences[batch].kv_len;
  if (!problem.key_mask) return keys;
  const bool* mask = problem.key_mask + batch * problem.key_mask_batch;
  for (int64_t key = 0; key < problem.sequences[batch].kv_len; ++key) {
    if (mask[key]) keys.index.push_back(key);
  }
  keys.count = static_cast<int64_t>(keys.index.size());
  keys.first = keys.count ? keys.index.front() : 0;
  if (!keys.count || keys.index.back() - keys.first + 1 == keys.count) keys.index.clear();
  return keys;
}

// The computed query heads that read one key/value head in one sample. Its rows are ordered by query, then head, so that
// a block of rows sees nearly the same keys under a causal mask and reads each of them once for the whole group.
struct Group {
  int64_t batch, kv_head;
  std::vector<int64_t> heads;
  int64_t rows(const Problem& problem) const { return static_cast<int64_t>(heads.size()) * problem.sequences[batch].query_len; }
};

inline std::vector<Group> groups_of(const Problem& problem) {
  std::vector<Group> groups;
  for (int64_t batch = 0; batch < problem.batches; ++batch) {
    int64_t head = 0;
    for (int64_t kv_head = 0; kv_head < problem.kv_heads; ++kv_head) {
      Group group{batch, kv_head, {}};
      for (; head < problem.query_heads && problem.kv_of_query[head] == kv_head; ++head) {
        if (problem.gate_of(batch, head) != 0.f) group.heads.push_back(head);
      }
      if (!group.heads.empty() && problem.sequences[batch].query_len) groups.push_back(std::move(group));
    }
  }
  return groups;
}

// The slots [from, to) that queries `first` to `last` of the group may see.
inline std::tuple<int64_t, int64_t> slots_of(const Problem& problem, const Group& group, const Keys& keys, int64_t first, int64_t last) {
  const Sequence& sequence = problem.sequences[group.batch];
  const int64_t lowest = sequence.position(first), highest = sequence.position(last);
  int64_t from = 0, to = keys.count;
  if (problem.causal) to = keys.slot_from(highest + 1);
  if (problem.window) {
    from = keys.slot_from(lowest - problem.window + 1);
    to = std::min(to, keys.slot_from(highest + problem.window));
  }
  return {from, std::max(from, to)};
}

// Rows of a group against the slots [from, to). `part` numbers the blocks whose rows are split over the keys; -1: all keys.
struct Block {
  int64_t group, first_row, rows, from, to, part = -1;
};

// Blocks of at most `block_rows` rows, within a group the last ones first: under a causal mask these are the longest. Groups
// that are `split` are left out.
inline std::vector<Block> blocks_of(
    const Problem& problem, const std::vector<Group>& groups, const std::vector<Keys>& keys, const std::vector<bool>& split, int64_t block_rows) {
  std::vector<Block> blocks;
  for (size_t g = 0; g < groups.size(); ++g) {
    if (split[g]) continue;
    const int64_t rows = groups[g].rows(problem);
    for (int64_t block = (rows + block_rows - 1) / block_rows - 1; block >= 0; --block) {
      const int64_t first = block * block_rows;
      blocks.push_back({static_cast<int64_t>(g), first, std::min(block_rows, rows - first), 0, keys[groups[g].batch].count});
    }
  }
  return blocks;
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
