// One pass over (block of keys) x (panel of query rows), five products each:
//   S = K Q^T, dP = V dO^T, dV += P^T dO, dK += dS^T Q, dQ += dS K, with P = exp(S - lse) and dS = P (dP - delta).
// A thread owns a block of keys with its dK and dV and walks the panels that see it. dQ of a panel is added up in the order
// of the key blocks: a block waits until the blocks before it have passed the panel. Panels are walked from the last to the
// first, so that under a causal mask a block follows its predecessor at once; and blocks are handed out key block by key
// block over all groups, so that with as many groups as threads nobody waits at all.
#include "backward.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <map>
#include <memory>
#include <thread>

#include "bias.h"
#include "keys.h"
#include "panel.h"
#include "scratch.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {
namespace {

int64_t padded(int64_t dim) { return (dim + kLanes - 1) / kLanes * kLanes; }

struct Workplace {
  Panel panel;
  Real *keys, *values, *grad_keys, *grad_values;  // [kKeyBlock][padded dim]
  Real *scores, *grad_scores;                     // [kKeyBlock][row]; scores become probabilities
  Real *query_rows, *grad_rows, *grad_queries;    // [row][padded dim]
  Real* grads;                                    // [value_dim][row]
  Real *lse, *delta;                              // [row], lse in log2 units
  BiasBlock bias;
};

Workplace set_up(const Problem& problem) {
  const int64_t key_width = padded(problem.head_dim), value_width = padded(problem.value_dim);
  Scratch& scratch = thread_scratch();
  scratch.reset((2 * kKeyBlock + 4 * kPanelRows) * (key_width + value_width) + 4 * kKeyBlock * kPanelRows + 8 * kPanelRows);
  Workplace place;
  place.keys = scratch.take(kKeyBlock * key_width);
  place.values = scratch.take(kKeyBlock * value_width);
  place.grad_keys = scratch.take(kKeyBlock * key_width);
  place.grad_values = scratch.take(kKeyBlock * value_width);
  for (Real** block : {&place.scores, &place.grad_scores, &place.bias.rows, &place.bias.transposed}) {
    *block = scratch.take(kKeyBlock * kPanelRows);
  }
  place.query_rows = scratch.take(kPanelRows * key_width);
  place.grad_rows = scratch.take(kPanelRows * value_width);
  place.grad_queries = scratch.take(kPanelRows * key_width);
  place.panel.queries = scratch.take(kPanelRows * key_width);
  place.grads = scratch.take(kPanelRows * value_width);
  for (Real** field : {&place.panel.position, &place.panel.slope, &place.lse, &place.delta}) *field = scratch.take(kPanelRows);
  return place;
}

// A panel of a group: its rows, the slots that it sees, and before which slot all keys have added to its dQ.
struct Step {
  int64_t first_row, rows, from, to;
};
struct Walk {
  std::vector<Step> steps;
  std::unique_ptr<std::atomic<int64_t>[]> added;
};

Walk walk_of(const Problem& problem, const Group& group, const Keys& keys) {
  Walk walk;
  const int64_t rows = group.rows(problem), heads = static_cast<int64_t>(group.heads.size());
  for (int64_t first = 0; first < rows; first += kPanelRows) {
    const int64_t count = std::min<int64_t>(kPanelRows, rows - first);
    const auto [from, to] = slots_of(problem, group, keys, first / heads, (first + count - 1) / heads);
    walk.steps.push_back({first, count, from, to});
  }
  walk.added = std::make_unique<std::atomic<int64_t>[]>(walk.steps.size());
  for (size_t i = 0; i < walk.steps.size(); ++i) walk.added[i].store(walk.steps[i].from, std::memory_order_relaxed);
  return walk;
}

void open_panel(const Backward& problem, const Group& group, const Keys& keys, const Step& step, Workplace& place) {
  Panel& panel = place.panel;
  place_panel(problem, group, keys, step.first_row, step.rows, panel);
  const int64_t width = panel.width(), key_width = padded(problem.head_dim), value_width = padded(problem.value_dim);
  read_panel(problem, problem.query, group, panel, problem.head_dim, key_width, place.query_rows);
  transpose(place.query_rows, key_width, width, problem.head_dim, panel.queries, width);
  scale_row(panel.queries, width * problem.head_dim, query_factor(problem));
  scale_row(place.query_rows, width * key_width, problem.scale);
  read_panel(problem, problem.grad_output, group, panel, problem.value_dim, value_width, place.grad_rows);
  for (int64_t r = 0; r < width; ++r) {
    const int64_t number = problem.number_of(group.batch, panel.head[r], panel.query[r]);
    // Rows that attend to nothing, and the padding, get probability 0.
    const bool attends = r < panel.rows && problem.lse[number] != -kInfinity;
    place.lse[r] = attends ? static_cast<Real>(static_cast<double>(problem.lse[number]) * kLog2e) : kInfinity;
    place.delta[r] = problem.delta[number];
    if (problem.gate) scale_row(place.grad_rows + r * value_width, problem.value_dim, problem.gate_of(group.batch, panel.head[r]));
  }
  transpose(place.grad_rows, value_width, width, problem.value_dim, place.grads, width);
}

// Scores become probabilities; grad_scores, on entry dP, become dS as the query and key products want it. `bias_grad`, where
// asked for, gets dS before the softcap.
template <int Vecs, bool Edited>
void softmax_backward(const Edits& edits, const Keys& keys, int64_t slot, int64_t count, Workplace& place, Real* bias_grad) {
  constexpr int rows = Vecs * kLanes;
  for (int64_t key = 0; key < count; ++key) {
    const Vec key_position(static_cast<Real>(keys.at(slot + key)));
    for (int v = 0; v < Vecs; ++v) {
      const int64_t at = key * rows + v * kLanes;
      Vec score = load(place.scores + at), tanh_of_score;
      if constexpr (Edited) score = edited(edits, score, place.panel, key, v * kLanes, rows, key_position, tanh_of_score);
      // Of large scores the lse has lost digits: no probability exceeds 1 for that.
      const Vec prob = exp2(min_second(Vec(0.f), score - load(place.lse + v * kLanes)));
      const Vec hidden = prob == Vec(0.f);
      Vec grad = prob * (load(place.grad_scores + at) - load(place.delta + v * kLanes));
      store(place.scores + at, prob);
      if constexpr (Edited) {
        if (bias_grad) store(bias_grad + at, Vec::blendv(grad, Vec(0.f), hidden));
        if (edits.softcap != 0.f) grad = grad * (Vec(1.f) - tanh_of_score * tanh_of_score);
      }
      // A hidden key may hold inf or NaN.
      store(place.grad_scores + at, Vec::blendv(grad, Vec(0.f), hidden));
    }
  }
}

void add_bias_gradient(
    const BiasGradient& gradient, int64_t batch, const Panel& panel, const Keys& keys, int64_t slot, int64_t count, BiasBlock& block) {
  transpose(block.transposed, panel.width(), count, panel.width(), block.rows, kKeyBlock);
  for (int64_t r = 0; r < panel.rows; ++r) {
    Real* to = gradient.data + batch * gradient.batch + panel.head[r] * gradient.head + panel.query[r] * gradient.row;
    const Real* from = block.rows + r * kKeyBlock;
    for (int64_t key = 0; key < count; ++key) to[keys.at(slot + key)] += from[key];
  }
}

// What keys `slot` up to `slot + count`, number `offset` and on of the block, and the panel give each other.
template <int Vecs>
void exchange(const Backward& problem, const Group& group, const Keys& keys, int64_t slot, int64_t count, RowBlock key, RowBlock value,
              int64_t offset, Workplace& place) {
  constexpr int rows = Vecs * kLanes;
  const int64_t key_width = padded(problem.head_dim), value_width = padded(problem.value_dim);
  Real* bias = problem.bias.data ? place.bias.transposed : nullptr;
  if (bias && !read_bias(problem, group, place.panel, keys, slot, count, kKeyBlock, place.bias)) return;
  if (bias) turn_bias(place.panel, count, place.bias);
  const Edits edits = edits_of(problem, place.panel, keys, slot, count, bias);
  score_block<Vecs>(key.data, key.stride, count, place.panel.queries, problem.head_dim, place.scores);
  score_block<Vecs>(value.data, value.stride, count, place.grads, problem.value_dim, place.grad_scores);
  Real* bias_grad = problem.grad_bias.data ? place.bias.transposed : nullptr;
  const auto run = edits.any() ? softmax_backward<Vecs, true> : softmax_backward<Vecs, false>;
  run(edits, keys, slot, count, place, bias_grad);
  if (bias_grad) add_bias_gradient(problem.grad_bias, group.batch, place.panel, keys, slot, count, place.bias);
  if (problem.grad_value.data) {
    columns_block<false>(count, place.scores, rows, place.grad_rows, value_width, rows, value_width,
                         place.grad_values + offset * value_width, value_width);
  }
  if (problem.grad_key.data) {
    columns_block<false>(count, place.grad_scores, rows, place.query_rows, key_width, rows, key_width,
                         place.grad_keys + offset * key_width, key_width);
  }
  if (!problem.grad_query.data) return;
  // Keys that the bias hides from the whole panel are left out: they may hold inf or NaN.
  for (int64_t from = 0, to; from < count; from = to) {
    const bool hidden = bias && place.bias.best[from] == -kInfinity;
    for (to = from + 1; to < count && (bias && place.bias.best[to] == -kInfinity) == hidden;) ++to;
    if (hidden) continue;
    columns_block<true>(rows, place.grad_scores + from * rows, rows, key.data + from * key.stride, key.stride, to - from, key_width,
                        place.grad_queries, key_width);
  }
}

void add_grad_queries(const Backward& problem, const Group& group, const Workplace& place) {
  const int64_t key_width = padded(problem.head_dim);
  for (int64_t r = 0; r < place.panel.rows; ++r) {
    const int64_t row = problem.sequences[group.batch].query_start + place.panel.query[r];
    char* at = row_of(problem.grad_query, kRealType, group.batch, place.panel.head[r], row);
    Real* to = reinterpret_cast<Real*>(at);
    for (int64_t x = 0; x < problem.head_dim; ++x) to[x] += problem.scale * place.grad_queries[r * key_width + x];
  }
}

void wait_for(const std::atomic<int64_t>& added, int64_t slot) {
  for (int tries = 0; added.load(std::memory_order_acquire) != slot; ++tries) {
    if (tries > 100) std::this_thread::yield();
  }
}

void write_rows(const Problem& problem, const Operand& to, const Group& group, const Keys& keys, int64_t slot, int64_t count,
                const Real* rows, int64_t dim) {
  for (int64_t i = 0; to.data && i < count; ++i) {
    write_row(rows + i * padded(dim), dim, problem.type, key_row(problem, to, group.batch, group.kv_head, keys.at(slot + i)));
  }
}

void run_block(const Backward& problem, const Group& group, const Keys& keys, Walk& walk, int64_t block, Workplace& place) {
  const int64_t slot = keys.slot_from(block * kKeyBlock), end = keys.slot_from((block + 1) * kKeyBlock), count = end - slot;
  if (!count) return;
  const int64_t head_dim = problem.head_dim, value_dim = problem.value_dim;
  const RowBlock key = row_block(problem, problem.key, group, keys, slot, count, head_dim, padded(head_dim), place.keys);
  const RowBlock value = row_block(problem, problem.value, group, keys, slot, count, value_dim, value_dim, place.values);
  std::fill_n(place.grad_keys, count * padded(head_dim), 0.f);
  std::fill_n(place.grad_values, count * padded(value_dim), 0.f);
  for (int64_t i = static_cast<int64_t>(walk.steps.size()) - 1; i >= 0; --i) {
    const Step& step = walk.steps[i];
    const int64_t from = std::max(slot, step.from), to = std::min(end, step.to);
    if (from >= to) continue;
    open_panel(problem, group, keys, step, place);
    if (problem.grad_query.data) std::fill_n(place.grad_queries, place.panel.width() * padded(head_dim), 0.f);
    const RowBlock seen_key{key.data + (from - slot) * key.stride, key.stride};
    const RowBlock seen_value{value.data + (from - slot) * value.stride, value.stride};
    const auto run = place.panel.vecs == 1 ? exchange<1> : exchange<kPanelVecs>;
    run(problem, group, keys, from, to - from, seen_key, seen_value, from - slot, place);
    if (!problem.grad_query.data) continue;
    wait_for(walk.added[i], from);
    add_grad_queries(problem, group, place);
    walk.added[i].store(to, std::memory_order_release);
  }
  write_rows(problem, problem.grad_key, group, keys, slot, count, place.grad_keys, head_dim);
  write_rows(problem, problem.grad_value, group, keys, slot, count, place.grad_values, value_dim);
}

// Groups whose bias gradients lie in the same memory: one thread takes them one after the other.
std::vector<std::vector<int64_t>> teams_of(const Backward& problem, const std::vector<Group>& groups) {
  const bool apart = !problem.grad_bias.data;
  std::map<std::tuple<int64_t, int64_t>, std::vector<int64_t>> teams;
  for (size_t i = 0; i < groups.size(); ++i) {
    const Group& group = groups[i];
    const int64_t batch = apart || problem.grad_bias.batch ? group.batch : 0;
    teams[{batch, apart || problem.grad_bias.head ? group.kv_head : 0}].push_back(static_cast<int64_t>(i));
  }
  std::vector<std::vector<int64_t>> found;
  for (auto& team : teams) found.push_back(std::move(team.second));
  return found;
}

}  // namespace

void attention_backward(const Backward& problem) {
  std::vector<Keys> keys;
  int64_t blocks = 0;
  for (int64_t batch = 0; batch < problem.batches; ++batch) {
    keys.push_back(visible_keys(problem, batch));
    blocks = std::max(blocks, (problem.sequences[batch].kv_len + kKeyBlock - 1) / kKeyBlock);
  }
  const std::vector<Group> groups = groups_of(problem);
  std::vector<Walk> walks;
  for (const Group& group : groups) walks.push_back(walk_of(problem, group, keys[group.batch]));
  const std::vector<std::vector<int64_t>> teams = teams_of(problem, groups);
  const int64_t count = static_cast<int64_t>(teams.size()), total = blocks * count;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), total), 1, [&](int64_t, int64_t) {
    Workplace place = set_up(problem);
    for (int64_t i; (i = next.fetch_add(1)) < total;) {
      for (int64_t g : teams[i % count]) run_block(problem, groups[g], keys[groups[g].batch], walks[g], i / count, place);
    }
  });
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
