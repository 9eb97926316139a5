#include "weight_stats.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "rows.h"
#include "scratch.h"

namespace headprune::cpu {
namespace {

constexpr int64_t kPieceElements = 1 << 17;
constexpr int64_t kBytesAhead = 4096;
constexpr int64_t kRunElements = 1024;  // summed in registers before they join the sums of the piece: keeps fp32 sums exact

// Some heads and rows of a block, or some columns of its only row; a thread reads it at one go. `slot` numbers its first head's
// partial sums.
struct Piece {
  const WeightBlock* block;
  int64_t head, heads, row, rows, column, columns, slot;
};

std::vector<Piece> pieces_of(const std::vector<WeightBlock>& blocks) {
  std::vector<Piece> pieces;
  int64_t slot = 0;
  const auto add = [&](const WeightBlock& block, int64_t head, int64_t heads, int64_t row, int64_t rows, int64_t column, int64_t columns) {
    pieces.push_back({&block, head, heads, row, rows, column, columns, slot});
    slot += heads;
  };
  for (const WeightBlock& block : blocks) {
    // Heads that lie side by side in a row are read row by row, as memory has them.
    const bool beside = block.rows > 1 && std::abs(block.head_stride) < block.row_stride;
    const int64_t together = beside ? block.heads : 1;
    const int64_t rows = std::max<int64_t>(kPieceElements / std::max<int64_t>(together * block.columns, 1), 1);
    const int64_t columns = block.rows == 1 ? kPieceElements : block.columns;
    for (int64_t head = 0; head < block.heads; head += together) {
      for (int64_t row = 0; row < block.rows; row += rows) {
        for (int64_t column = 0; column < block.columns; column += columns) {
          add(block, head, together, row, std::min(rows, block.rows - row), column, std::min(columns, block.columns - column));
        }
      }
    }
  }
  return pieces;
}

struct Two {
  Vec low, high;
};

inline Two load_two(const float* from) { return {load(from), load(from + kLanes)}; }
template <typename T>
inline Two load_two(const T* from) {
  const auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from));
  return {low, high};
}

// What will be read some steps later: the processor does not ask for it early enough by itself.
template <typename T>
[[gnu::always_inline]] inline void ask_ahead(const T* step) {
  const char* from = reinterpret_cast<const char*>(step) + kBytesAhead;
  for (size_t bytes = 0; bytes < 2 * kLanes * sizeof(T); bytes += 64) __builtin_prefetch(from + bytes, 0, 2);
}

// The sums of one run, by lane.
template <bool kGrads>
struct Sums {
  Vec l1{0.f}, square{0.f}, max{0.f}, dot{0.f}, dot_abs{0.f}, dot_square{0.f};

  void add(Vec w, Vec g) {
    const Vec size = w.abs();
    l1 = l1 + size;
    square = at::vec::fmadd(w, w, square);
    max = max_second(size, max);
    if constexpr (kGrads) {
      const Vec product = w * g;
      dot = dot + product;
      dot_abs = dot_abs + product.abs();
      dot_square = at::vec::fmadd(product, product, dot_square);
    }
  }
  // Joins `lanes` [statistics][kLanes].
  void join(const Sums& other, float* lanes) const {
    const auto sum = [&](int i, Vec a, Vec b) { store(lanes + i * kLanes, load(lanes + i * kLanes) + (a + b)); };
    sum(0, l1, other.l1);
    sum(1, square, other.square);
    store(lanes + 2 * kLanes, max_second(max_second(max, other.max), load(lanes + 2 * kLanes)));
    if constexpr (kGrads) {
      sum(3, dot, other.dot);
      sum(4, dot_abs, other.dot_abs);
      sum(5, dot_square, other.dot_square);
    }
  }
};

template <typename T, bool kGrads>
void add_run(const T* w, const T* g, int64_t count, float* lanes) {
  constexpr int64_t step = 2 * kLanes;
  Sums<kGrads> low, high;
  const auto add = [&](const T* w, const T* g) {
    const Two weight = load_two(w), grad = kGrads ? load_two(g) : weight;
    low.add(weight.low, grad.low);
    high.add(weight.high, grad.high);
  };
  int64_t i = 0;
  for (; i + step <= count; i += step) {
    ask_ahead(w + i);
    if (kGrads) ask_ahead(g + i);
    add(w + i, kGrads ? g + i : nullptr);
  }
  if (i < count) {
    T rest[2][step] = {};
    std::copy(w + i, w + count, rest[0]);
    if (kGrads) std::copy(g + i, g + count, rest[1]);
    add(rest[0], rest[1]);
  }
  low.join(high, lanes);
}

template <typename T, bool kGrads>
void add_piece(const Piece& piece, float* partial) {
  constexpr int statistics = kGrads ? 6 : 3;
  const WeightBlock& block = *piece.block;
  Scratch& scratch = thread_scratch();
  const int64_t size = piece.heads * statistics * kLanes;
  scratch.reset(size);
  float* lanes = scratch.take(size);
  std::fill_n(lanes, size, 0.f);
  const T *weight = reinterpret_cast<const T*>(block.weight), *grad = reinterpret_cast<const T*>(block.grad);
  for (int64_t row = piece.row; row < piece.row + piece.rows; ++row) {
    for (int64_t head = 0; head < piece.heads; ++head) {
      const int64_t at = (piece.head + head) * block.head_stride + row * block.row_stride + piece.column;
      for (int64_t i = 0; i < piece.columns; i += kRunElements) {
        const int64_t count = std::min(kRunElements, piece.columns - i);
        add_run<T, kGrads>(weight + at + i, kGrads ? grad + at + i : nullptr, count, lanes + head * statistics * kLanes);
      }
    }
  }
  for (int64_t i = 0; i < piece.heads * statistics; ++i) {
    const float* from = lanes + i * kLanes;
    partial[i] = i % statistics == 2 ? *std::max_element(from, from + kLanes) : sum_of_lanes(load(from));
  }
}

template <typename T>
void add_pieces(const std::vector<Piece>& pieces, bool grads, float* partial) {
  at::parallel_for(0, static_cast<int64_t>(pieces.size()), 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      if (grads) add_piece<T, true>(pieces[i], partial + pieces[i].slot * 6);
      else add_piece<T, false>(pieces[i], partial + pieces[i].slot * 3);
    }
  });
}

// Partial sums of the pieces, in their order.
void finish(const std::vector<Piece>& pieces, const float* partial, int statistics, int64_t heads, float* stats) {
  std::vector<double> sums(statistics * heads);
  for (const Piece& piece : pieces) {
    for (int64_t i = 0; i < piece.heads; ++i) {
      const float* from = partial + (piece.slot + i) * statistics;
      double* to = sums.data() + piece.block->first_head + piece.head + i;
      for (int s = 0; s < statistics; ++s) {
        to[s * heads] = s == 2 ? std::max<double>(to[s * heads], from[s]) : to[s * heads] + from[s];
      }
    }
  }
  std::copy(sums.begin(), sums.end(), stats);
  // Maxima pass over NaN; the sum of magnitudes is NaN where a weight is, and only there.
  for (int64_t head = 0; head < heads; ++head) {
    if (std::isnan(stats[head])) stats[2 * heads + head] = stats[head];
  }
}

}  // namespace

void weight_stats(const std::vector<WeightBlock>& blocks, Type type, bool grads, int64_t heads, float* stats) {
  const std::vector<Piece> pieces = pieces_of(blocks);
  const int statistics = grads ? 6 : 3;
  const int64_t slots = pieces.empty() ? 0 : pieces.back().slot + pieces.back().heads;
  std::vector<float> partial(slots * statistics);
  switch (type) {
    case Type::float32: add_pieces<float>(pieces, grads, partial.data()); break;
    case Type::bfloat16: add_pieces<at::BFloat16>(pieces, grads, partial.data()); break;
    case Type::float16: add_pieces<at::Half>(pieces, grads, partial.data()); break;
    case Type::float64: break;  // type_of has refused it
  }
  finish(pieces, partial.data(), statistics, heads, stats);
}

}  // namespace headprune::cpu
