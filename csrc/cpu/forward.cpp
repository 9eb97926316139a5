#include "forward.h"

#include <ATen/Parallel.h>

#include <atomic>

#include "row_stats.h"
#include "scratch.h"
#include "split.h"
#include "thin_softmax.h"
#include "wide_pairs.h"

namespace headprune::cpu::inline HEADPRUNE_PRECISION {
namespace {

// Everything that a thread needs for one block of rows.
struct Workplace {
  SoftmaxPanel panels[kMostPanels];
  Real* states[kMostPanels];
  Real* rows;
  BiasBlock bias;
  WidePlace wide;
  ThinPlace thin;
  ThinKind thin_kind;
};

Workplace set_up(const Forward& problem) {
  const int64_t dim = std::max(problem.head_dim, problem.value_dim);
  const int64_t key_steps = whole_steps(problem.head_dim), value_steps = whole_steps(problem.value_dim);
  const int64_t most_floats = std::max(state_floats(kThinRows, problem.value_dim), state_floats(kPanelRows, problem.value_dim));
  const int64_t panel_floats = kPanelRows * (problem.head_dim + 2) + kThinRows * key_steps + most_floats;
  Scratch& scratch = thread_scratch();
  scratch.reset(kMostPanels * panel_floats + kKeyBlock * (2 * dim + kPanelRows) + 2 * kBlockFloats + kPanelRows * dim + kThinBlock + kLanes + value_steps +
                kProbPairs + problem.value_dim);
  Workplace place;
  place.thin_kind = thin_kind(problem.type, problem.stats);
  for (int64_t p = 0; p < kMostPanels; ++p) {
    SoftmaxPanel& panel = place.panels[p];
    panel.queries = scratch.take(problem.head_dim * kPanelRows);
    panel.thin_queries = scratch.take(kThinRows * key_steps);
    panel.position = scratch.take(kPanelRows);
    panel.slope = scratch.take(kPanelRows);
    place.states[p] = scratch.take(most_floats);
  }
  place.wide.keys = scratch.take(kKeyBlock * dim);
  place.wide.values = scratch.take(kKeyBlock * dim);
  place.wide.scores = scratch.take(kBlockFloats);
  place.wide.probs = reinterpret_cast<uint32_t*>(scratch.take(kProbPairs));
  place.wide.edge = reinterpret_cast<uint32_t*>(scratch.take(problem.value_dim));
  place.bias.rows = scratch.take(kBlockFloats);
  place.bias.transposed = scratch.take(kKeyBlock * kPanelRows);
  place.rows = scratch.take(kPanelRows * dim);
  place.thin.scores = place.wide.scores;
  place.thin.positions = scratch.take(kThinBlock + kLanes);
  place.thin.nothing = scratch.take(value_steps);
  std::fill_n(place.thin.nothing, value_steps, 0.f);
  return place;
}

template <typename Products>
void open_panel(
    const Problem& problem, const Group& group, const Keys& keys, int64_t first, int64_t rows, bool sinks, SoftmaxPanel& panel,
    const ThinKind& thin_kind, Real* buffer) {
  place_panel(problem, group, keys, first, rows, panel);
  const int64_t width = panel.width();
  std::fill_n(panel.sum, width, 0.f);
  std::fill_n(panel.high, width, -kInfinity);
  for (int64_t r = 0; problem.sinks && sinks && r < width; ++r) panel.high[r] = problem.sinks[panel.head[r]] * kLog2e;
  if (panel.thin()) {
    read_panel(problem, problem.query, group, panel, problem.head_dim, problem.head_dim, buffer);
    open_thin(thin_kind, problem, buffer, panel);
  } else {
    Products::open(problem, group, panel, buffer);
  }
  std::fill_n(panel.output, panel.thin() ? rows * whole_steps(problem.value_dim) : width * problem.value_dim, 0.f);
  std::fill_n(panel.stats.top, width, -kInfinity);
  for (Real* field : {panel.stats.weighted, panel.stats.distance, panel.stats.first}) std::fill_n(field, width, 0.f);
}

// The keys `slot` up to `slot + count` of a block, which the panel sees, taken into its softmax and its output.
template <typename Products, int Vecs, bool Stats>
void attend(const Problem& problem, const Group& group, const SoftmaxPanel& panel, const Keys& keys, int64_t slot, int64_t count,
            const WideBlock& block, Workplace& place) {
  const int64_t first = slot - block.slot;
  Real* bias = problem.bias.data ? place.bias.transposed : nullptr;
  if (bias && !read_bias(problem, group, panel, keys, slot, count, kKeyBlock, place.bias)) return;
  if (bias) turn_bias(panel, count, place.bias);
  const Edits edits = edits_of(problem, panel, keys, slot, count, bias);
  Products::template score<Vecs>(problem, panel, block, first, count, place.wide);
  if (edits.any()) edit_scores<Vecs>(edits, panel, keys, slot, count, place.wide.scores);
  softmax_step<Vecs, Stats>(panel, keys, slot, count, problem.value_dim, place.wide.scores);
  Products::template close<Vecs>(first, count, place.wide);
  // Keys that the bias hides from the whole panel are left out: their values may hold inf or NaN.
  for (int64_t from = 0, to; from < count; from = to) {
    const bool hidden = bias && place.bias.best[from] == -kInfinity;
    for (to = from + 1; to < count && (bias && place.bias.best[to] == -kInfinity) == hidden;) ++to;
    if (!hidden) Products::template add_values<Vecs>(problem, panel, block, first, from, to, place.wide);
  }
}

// To each row's sum. Out of line: within close_panel it made short sequences slower by 3 to 5 %.
[[gnu::noinline]] void add_sinks(const Problem& problem, const SoftmaxPanel& panel, Real* total) {
  for (int64_t r = 0; r < panel.width(); ++r) {
    const Real sink = problem.sinks[panel.head[r]] * kLog2e;
    if (sink != -kInfinity) total[r] += std::exp2(sink - panel.high[r]);
  }
}

template <int Vecs>
void close_panel(const Forward& problem, const Group& group, const SoftmaxPanel& panel, const ThinKind& thin_kind, Real* buffer,
                 RowStats* stats) {
  Real lse[kPanelRows], total[kPanelRows], gate[kPanelRows], factors[kPanelRows];
  for (int64_t r = 0; r < panel.width(); ++r) gate[r] = problem.gate_of(group.batch, panel.head[r]);
  std::copy_n(panel.sum, panel.width(), total);
  if (problem.sinks) add_sinks(problem, panel, total);
  Vec factor[Vecs];
  for (int v = 0; v < Vecs; ++v) {
    const Vec sum = load(total + v * kLanes);
    factor[v] = Vec::blendv(load(gate + v * kLanes) / sum, Vec(0.f), sum == Vec(0.f));
    store(factors + v * kLanes, factor[v]);
    store(lse + v * kLanes, sum.log());
  }
  // In fp64: the backward pass takes the exponential of what is lost here.
  constexpr double unit = 1 / static_cast<double>(kLog2e);
  for (int64_t r = 0; r < panel.rows; ++r) lse[r] = static_cast<Real>(panel.high[r] * unit + lse[r]);
  if (Real* in_place = panel.thin() ? nullptr : panel_in_place(problem, problem.output, group, panel)) {
    rescale<Vecs>(panel.output, problem.value_dim, factor);
    transpose(panel.output, panel.width(), problem.value_dim, panel.width(), in_place, problem.output.row);
    std::copy_n(lse, panel.rows, problem.lse + problem.number_of(group.batch, panel.head[0], panel.query[0]));
    if (stats) record_stats(problem, group, panel, total, in_place, problem.output.row, *stats);
    return;
  }
  if (panel.thin()) {
    read_thin_output(thin_kind, problem, panel, buffer);
  } else {
    transpose(panel.output, panel.width(), problem.value_dim, panel.width(), buffer, problem.value_dim);
  }
  for (int64_t r = 0; r < panel.rows; ++r) {
    problem.lse[problem.number_of(group.batch, panel.head[r], panel.query[r])] = lse[r];
    Real* row = buffer + r * problem.value_dim;
    scale_row(row, problem.value_dim, factors[r]);
    write_row(row, problem.value_dim, problem.type, query_row(problem, problem.output, group.batch, panel.head[r], panel.query[r]));
  }
  if (stats) record_stats(problem, group, panel, total, buffer, problem.value_dim, *stats);
}

void close(const Forward& problem, const Group& group, const SoftmaxPanel& panel, Workplace& place, RowStats* stats) {
  (panel.vecs == 1 ? close_panel<1> : close_panel<kPanelVecs>)(problem, group, panel, place.thin_kind, place.rows, stats);
}

// What a panel sees of the slots `from` to `to`, block by block; up to `ahead` they are asked for. Blocks start at multiples of their size,
// so that a panel's sums do not depend on the panels beside it.
void walk_thin(const Forward& problem, const Group& group, const Keys& keys, const SoftmaxPanel& panel, int64_t from, int64_t to, int64_t ahead,
               Workplace& place) {
  to = std::min(to, panel.slots_to);
  for (int64_t slot = std::max(from, panel.slots_from), end; slot < to; slot = end) {
    end = std::min(to, (slot / kThinBlock + 1) * kThinBlock);
    place.thin_kind.attend(problem, group, panel, keys, slot, end - slot, std::min(ahead, panel.slots_to), place.bias, place.thin);
  }
}

// The same for all panels but the thin ones: blocks are read once for all of them.
template <typename Products>
void walk_wide(const Forward& problem, const Group& group, const Keys& keys, int64_t panels, int64_t from, int64_t to, bool stats,
               Workplace& place) {
  for (int64_t slot = from, end; slot < to; slot = end) {
    end = std::min(to, (slot / kKeyBlock + 1) * kKeyBlock);
    WideBlock block = Products::read(problem, group, keys, slot, end - slot, place.wide);
    for (int64_t p = 0; p < panels; ++p) {
      const SoftmaxPanel& panel = place.panels[p];
      const int64_t first = std::max(slot, panel.slots_from), last = std::min(end, panel.slots_to);
      if (first >= last || panel.thin()) continue;
      const auto run = panel.vecs == 1 ? (stats ? attend<Products, 1, true> : attend<Products, 1, false>)
                                       : (stats ? attend<Products, kPanelVecs, true> : attend<Products, kPanelVecs, false>);
      run(problem, group, panel, keys, first, last - first, block, place);
      block.met = true;
    }
  }
}

// `states` is where the panels of a part are left, state_floats apart; null: the rows are closed here. `ahead`: up to which slot
// this thread goes on, in this block and those that follow.
template <typename Products>
void run_block(const Forward& problem, const Group& group, const Keys& keys, const Block& block, int64_t ahead, Real* states,
               Workplace& place, RowStats* stats) {
  const int64_t panels = panels_of(block.rows);
  int64_t from = keys.count, to = 0;
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t done = p * kPanelRows;
    SoftmaxPanel& panel = place.panels[p];
    const int64_t rows = std::min<int64_t>(kPanelRows, block.rows - done);
    panel.rows = rows;
    place_state(panel, states ? states : place.states[p], problem.value_dim);
    if (states) states += state_floats(rows, problem.value_dim);
    open_panel<Products>(problem, group, keys, block.first_row + done, rows, block.part <= 0, panel, place.thin_kind, place.rows);
    if (!states) ask_for_output(problem, group, panel);
    if (panel.thin()) {
      walk_thin(problem, group, keys, panel, block.from, block.to, ahead, place);
    } else {
      from = std::min(from, std::max(block.from, panel.slots_from));
      to = std::max(to, std::min(block.to, panel.slots_to));
    }
  }
  walk_wide<Products>(problem, group, keys, panels, from, to, stats, place);
  for (int64_t p = 0; !states && p < panels; ++p) close(problem, group, place.panels[p], place, stats);
}

void join_parts(const Forward& problem, const Group& group, const Keys& keys, Split& split, Workplace& place, RowStats* stats) {
  SoftmaxPanel& panel = place.panels[0];
  for (int64_t row = 0, at = 0; row < split.rows; row += kPanelRows, at += state_floats(panel.rows, problem.value_dim)) {
    place_panel(problem, group, keys, row, std::min<int64_t>(kPanelRows, split.rows - row), panel);
    place_state(panel, split.state(0) + at, problem.value_dim);
    for (int64_t part = 1; part < split.parts; ++part) {
      SoftmaxPanel other = panel;
      place_state(other, split.state(part) + at, problem.value_dim);
      merge(panel, other, problem.value_dim);
    }
    close(problem, group, panel, place, stats);
  }
}

// Heads that are gated off.
void clear_silent_heads(const Forward& problem) {
  for (int64_t batch = 0; batch < problem.batches; ++batch) {
    for (int64_t head = 0; head < problem.query_heads; ++head) {
      if (problem.gate_of(batch, head) != 0.f) continue;
      const int64_t queries = problem.sequences[batch].query_len;
      std::fill_n(problem.lse + problem.number_of(batch, head, 0), queries, -kInfinity);
      for (int64_t query = 0; query < queries; ++query) {
        std::fill_n(query_row(problem, problem.output, batch, head, query), problem.value_dim * element_size(problem.type), 0);
      }
    }
  }
}

// As many rows per block as leave every thread a few blocks: more rows read keys and values less often.
int64_t rows_per_block(const Problem& problem, const std::vector<Group>& groups, int64_t threads) {
  for (int64_t panels = kMostPanels; panels > 1; panels /= 2) {
    int64_t blocks = 0;
    for (const Group& group : groups) blocks += (group.rows(problem) + panels * kPanelRows - 1) / (panels * kPanelRows);
    if (blocks >= 4 * threads) return panels * kPanelRows;
  }
  return kPanelRows;
}

auto block_runner(Type type, bool stats) {
#if defined(HEADPRUNE_AVX512)
  if (PairedProducts::serve(type, stats)) return run_block<PairedProducts>;
#endif
  return run_block<WideProducts>;
}

}  // namespace

void attention_forward(const Forward& problem) {
  if (problem.gate) clear_silent_heads(problem);
  std::vector<Keys> keys;
  for (int64_t batch = 0; batch < problem.batches; ++batch) keys.push_back(visible_keys(problem, batch));
  const std::vector<Group> groups = groups_of(problem);
  const int64_t threads = at::get_num_threads();
  std::vector<Block> blocks;
  std::vector<Split> splits;
  std::vector<bool> is_split;
  for (size_t g = 0; g < groups.size(); ++g) {
    splits.push_back(split_of(problem, groups[g], keys[groups[g].batch], static_cast<int64_t>(g), blocks));
    is_split.push_back(splits[g].parts > 0);
  }
  const int64_t together = parts_together(static_cast<int64_t>(blocks.size()), threads);
  std::stable_sort(blocks.begin(), blocks.end(), [&](const Block& a, const Block& b) { return a.part / together < b.part / together; });
  const std::vector<Block> whole = blocks_of(problem, groups, keys, is_split, rows_per_block(problem, groups, threads));
  blocks.insert(blocks.end(), whole.begin(), whole.end());
  const std::vector<Run> runs = runs_of(blocks, together);
  RowStats stats;
  if (problem.stats) {
    stats.rows = problem.numbers.count;
    stats.values.assign(7 * stats.rows, 0.f);
  }
  const int64_t total = static_cast<int64_t>(runs.size());
  const auto run = block_runner(problem.type, problem.stats);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(threads, total), 1, [&](int64_t, int64_t) {
    Workplace place = set_up(problem);
    for (int64_t i; (i = next.fetch_add(1)) < total;) {
      const auto [first, last] = runs[i];
      for (int64_t b = first; b <= last; ++b) {
        const Block& block = blocks[b];
        const Group& group = groups[block.group];
        Real* states = block.part < 0 ? nullptr : splits[block.group].state(block.part);
        run(problem, group, keys[group.batch], block, blocks[last].to, states, place, problem.stats ? &stats : nullptr);
      }
    }
  });
  const bool any_split = std::find(is_split.begin(), is_split.end(), true) != is_split.end();
  at::parallel_for(0, any_split ? static_cast<int64_t>(splits.size()) : 0, 1, [&](int64_t from, int64_t to) {
    Workplace place = set_up(problem);
    for (int64_t i = from; i < to; ++i) {
      const Group& group = groups[i];
      if (is_split[i]) join_parts(problem, group, keys[group.batch], splits[i], place, problem.stats ? &stats : nullptr);
    }
  });
  if (problem.stats) average_stats(problem, stats);
}

}  // namespace headprune::cpu::HEADPRUNE_PRECISION
