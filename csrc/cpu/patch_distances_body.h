// Squared distances between the patches of a query and those of a block of images, one image a lane; included by one file per SIMD
// level, with internal linkage throughout.
//
// For a row of the query and a row of the images: the squared differences of all their pixels [c][w], summed over channels; the box
// filter along the diagonals, as a row of the query and a row of the images advance together; then down the rows that belong
// together. A box of side b is made of log2(b) to 2 log2(b) sums, of boxes of half its side: non-negative terms only, never a running
// sum that subtracts, so that a distance has at most 2^-24 * (C + 2 + 4 log2(b)) of relative error beside that of its pixels.
//
// For each vector of distances (p = 7, 3 channels, 32 x 32, interior patches, margins included): 2.8 vectors of differences, of 3
// subtractions and 3 multiply-adds each, 8.1 additions along the rows, 4.8 down them; 30 operations, of which a Zen 3 core starts four a
// cycle: a floor of 7.5 cycles. About 18 are measured, with squares at 1.9 cycles each; the rest waits for the second- and third-level
// caches, through which every row of boxes and every distance goes once.
//
// The order of summation depends on the patch size alone, so that neither tiles nor lanes change a bit.
#include <utility>

#include "cpu/patch_lanes.h"

namespace pyattr::cpu {
namespace {

// Whether a plane's row or column lies beyond the border, in an image of this size.
inline bool beyond(const PatchPlan& plan, int64_t at, int64_t size) {
  return at + (plan.args->lowres ? 1 : 0) < plan.padding || at >= plan.padding + size;
}

// squares[i * stride + w] = sum over channels of (x[i] - y[w])^2, for X pixels of the query and y's entries from w to `end`; x [channels]
// and y [channels] lie a plane apart. The number of channels is a constant where it is 1 or 3, so that x stays in registers.
template <int X, int kChannels>
inline void difference_lines(int64_t channels, const float* x, int64_t x_plane, const float* y, int64_t y_plane, int64_t w, int64_t end,
                             reg* squares, int64_t stride) {
  const int64_t count = kChannels > 0 ? kChannels : channels;
  reg pixels[X][kChannels > 0 ? kChannels : 1];
  for (int i = 0; i < X; ++i)
    for (int c = 0; c < kChannels; ++c) pixels[i][c] = splat(x[i + c * x_plane]);
  const auto difference = [&](int i, int64_t c, reg value) {
    return (kChannels > 0 ? pixels[i][kChannels > 0 ? c : 0] : splat(x[i + c * x_plane])) - value;
  };
  for (; w < end; ++w) {
    reg sum[X];
    const reg first = *reinterpret_cast<const reg*>(y + w * kLanes);
    for (int i = 0; i < X; ++i) sum[i] = difference(i, 0, first) * difference(i, 0, first);
    for (int64_t c = 1; c < count; ++c) {
      const reg value = *reinterpret_cast<const reg*>(y + c * y_plane + w * kLanes);
      for (int i = 0; i < X; ++i) sum[i] = multiply_add(difference(i, c, value), difference(i, c, value), sum[i]);
    }
    for (int i = 0; i < X; ++i) squares[i * stride + w] = sum[i];
  }
}

template <int X>
inline void differences(int64_t channels, const float* x, int64_t x_plane, const float* y, int64_t y_plane, int64_t w, int64_t end,
                        reg* squares, int64_t stride) {
  if (channels == 3) {
    difference_lines<X, 3>(channels, x, x_plane, y, y_plane, w, end, squares, stride);
  } else if (channels == 1) {
    difference_lines<X, 1>(channels, x, x_plane, y, y_plane, w, end, squares, stride);
  } else {
    difference_lines<X, 0>(channels, x, x_plane, y, y_plane, w, end, squares, stride);
  }
}

// squares[i] = the same of x[i] and y[i].
template <int X>
inline void differences_in_step(int64_t channels, const float* x, int64_t x_plane, const float* y, int64_t y_plane, reg* squares) {
  reg sum[X];
  for (int i = 0; i < X; ++i) {
    const reg difference = splat(x[i]) - *reinterpret_cast<const reg*>(y + i * kLanes);
    sum[i] = difference * difference;
  }
  for (int64_t c = 1; c < channels; ++c) {
    x += x_plane, y += y_plane;
    for (int i = 0; i < X; ++i) {
      const reg difference = splat(x[i]) - *reinterpret_cast<const reg*>(y + i * kLanes);
      sum[i] = multiply_add(difference, difference, sum[i]);
    }
  }
  for (int i = 0; i < X; ++i) squares[i] = sum[i];
}

// The pixels of two rows of the planes: entry (c, w) lies at squares[c * wide + w], or at squares[c] where only c = w counts. Entries that
// no diagonal of the tile meets are left out; those beyond the border of one image are the other's squares.
inline void square_rows(const PatchPlan& plan, const PatchAxis& column, int64_t span, int64_t r, int64_t s, const PatchBuffers& buffers,
                        reg* squares) {
  const int64_t channels = plan.args->channels, high = column.count + span;
  const int64_t x_plane = plan.query_rows * plan.query_columns, y_plane = plan.bank_rows * plan.bank_columns * kLanes;
  const float* const x = plan.query + r * plan.query_columns + column.first;
  if (column.alike) {
    const float* const y = buffers.images + (s * plan.bank_columns + column.first) * kLanes;
    // Beyond the border of one is beyond that of the other.
    int64_t c = 0, end = high;
    for (; c < end && beyond(plan, column.first + c, plan.args->width); ++c) squares[c] = reg{};
    for (; end > c && beyond(plan, column.first + end - 1, plan.args->width); --end) squares[end - 1] = reg{};
    for (; c + 4 <= end; c += 4) differences_in_step<4>(channels, x + c, x_plane, y + c * kLanes, y_plane, squares + c);
    for (; c < end; ++c) differences_in_step<1>(channels, x + c, x_plane, y + c * kLanes, y_plane, squares + c);
    return;
  }
  const int64_t wide = column.bank_count + span;
  const float* const y = buffers.images + (s * plan.bank_columns + column.bank_first) * kLanes;
  const float* const x_norms = plan.query_norms + r * plan.query_columns + column.first;
  const reg* const y_norms = reinterpret_cast<const reg*>(buffers.norms) + s * plan.bank_columns + column.bank_first;
  const auto inside = [&](int64_t at, int64_t first, int64_t size) {  // the tile's entry `at` of an axis, up to `first` in the plane
    return !beyond(plan, first + at, size);
  };
  int64_t left = 0, right = wide, c = 0;  // where the bank's image begins and ends
  while (left < wide && !inside(left, column.bank_first, plan.args->width)) ++left;
  while (right > left && !inside(right - 1, column.bank_first, plan.args->width)) --right;
  while (c < high) {
    reg* const to = squares + c * wide;
    const bool here = inside(c, column.first, plan.args->query_width);
    const bool two = here && c + 1 < high && inside(c + 1, column.first, plan.args->query_width);
    const int64_t begin = std::max<int64_t>(0, c - column.count + 1), end = std::min(wide, c + (two ? 1 : 0) + column.bank_count);
    if (!here) {
      std::copy_n(y_norms + begin, end - begin, to + begin);
      ++c;
      continue;
    }
    const int64_t first = std::clamp(left, begin, end), last = std::clamp(right, first, end);
    for (int line = 0; line < (two ? 2 : 1); ++line) {
      std::fill(to + line * wide + begin, to + line * wide + first, splat(x_norms[c + line]));
      std::fill(to + line * wide + last, to + line * wide + end, splat(x_norms[c + line]));
    }
    if (two) {
      differences<2>(channels, x + c, x_plane, y, y_plane, first, last, to, wide);
    } else {
      differences<1>(channels, x + c, x_plane, y, y_plane, first, last, to, wide);
    }
    c += two ? 2 : 1;
  }
}

// to[i] = a[i] + b[i], and + more[i] where there is more.
inline void add_lines(const reg* a, const reg* b, const reg* more, int64_t count, reg* to) {
  if (more == nullptr) {
    for (int64_t i = 0; i < count; ++i) to[i] = a[i] + b[i];
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = a[i] + b[i] + more[i];
  }
}

inline int highest_bit(int64_t side) {
  int bit = 0;
  while (side >> (bit + 1) != 0) ++bit;
  return bit;
}

// Where the next entry of a box lies: so many lines on, so many entries on.
struct Step {
  int64_t lines, entries;
};

// a + b. A multiplication by one is exact, and takes the addition to the pipes that multiply, idle otherwise; `one` comes from where
// the compiler does not see it.
inline reg add_by_product(reg a, reg one, reg b) {
#if defined(__AVX2__)
  return multiply_add(a, one, b);
#else
  static_cast<void>(one);
  return a + b;
#endif
}

// Boxes of side S of a stream of entries, the first `N` of which are kept: box o needs the entries from o to o + S - 1.
template <int S, int N>
struct Boxes {
  Boxes<S / 2, N> halves;
  reg sums[N];

  template <int I>
  inline void push(reg entry, reg one) {
    halves.template push<I>(entry, one);
    if constexpr (I >= S - 1) {
      constexpr int o = I - S + 1;
      reg sum = add_by_product(halves.sums[o], one, halves.sums[o + S / 2]);
      if constexpr (S % 2 != 0) sum += entry;
      sums[o] = sum;
    }
  }
};
template <int N>
struct Boxes<1, N> {
  reg sums[N];

  template <int I>
  inline void push(reg entry, reg) {
    sums[I] = entry;
  }
};

// to[t * to_step] = box of side S from from[t * step] on, entries `step` apart, for t < T.
template <int S, typename To, int... I>
inline void push_all(const reg* from, int64_t step, reg one, const To& to, std::integer_sequence<int, I...>) {
  Boxes<S, sizeof...(I)> boxes;
  const auto one_more = [&](auto index) {
    constexpr int i = decltype(index)::value;
    boxes.template push<i>(from[i * step], one);
    if constexpr (i >= S - 1) to(i - S + 1, boxes.sums[i - S + 1]);
  };
  (one_more(std::integral_constant<int, I>{}), ...);
}

template <int S, int T, typename To>
inline void box_run(const reg* from, int64_t step, reg one, const To& to) {
  push_all<S>(from, step, one, to, std::make_integer_sequence<int, S + T - 1>{});
}

constexpr int64_t kMostSide = 24;  // of boxes made in registers, several at a time

// Calls take(T) for T = 16, 8, 4, 2, 1 while so many are left of `count`: the more boxes are made together, the more sums they share.
template <typename Take>
inline void in_runs(int64_t count, const Take& take) {
  const auto all = [&](auto together) {
    for (; count >= together; count -= together) take(together);
  };
  all(std::integral_constant<int, 16>{});
  all(std::integral_constant<int, 8>{});
  all(std::integral_constant<int, 4>{});
  all(std::integral_constant<int, 2>{});
  all(std::integral_constant<int, 1>{});
}

// to[t * to_step] = box from from[t * step] on, entries `step` apart, for t < count.
template <int S>
inline void box_line(const reg* from, int64_t step, int64_t count, reg one, reg* to, int64_t to_step) {
  in_runs(count, [&](auto together) {
    constexpr int T = decltype(together)::value;
    box_run<S, T>(from, step, one, [&](int t, reg sum) { to[t * to_step] = sum; });
    from += T * step, to += T * to_step;
  });
}

// Boxes of T lines of a pair of rows, dilation apart: to[c * matches + w] from squares[c * wide + w] on, along the diagonals. All of them
// at every entry, as a parallelogram; the corners that it leaves, along each diagonal.
template <int S, int T>
inline void box_diagonals(int64_t dilation, int64_t matches, const reg* squares, int64_t wide, reg one, reg* to) {
  const int64_t edge = (T - 1) * dilation, step = dilation * (wide + 1), to_step = dilation * (matches + 1);
  const auto corner = [&](int64_t c, int64_t w, int64_t count) {
    box_line<S>(squares + c * wide + w, step, count, one, to + c * matches + w, to_step);
  };
  for (int64_t w = 0; w < matches - edge; ++w)
    box_run<S, T>(squares + w, step, one, [&](int t, reg sum) { to[w + t * to_step] = sum; });
  for (int64_t w = std::max<int64_t>(0, matches - edge); w < matches; ++w)
    corner(0, w, std::min<int64_t>(T, (matches - w + dilation - 1) / dilation));
  for (int64_t t = 1; t < T; ++t) {
    for (int64_t w = 0; w < std::min(dilation, matches); ++w)
      corner(t * dilation, w, std::min<int64_t>(T - t, (matches - w + dilation - 1) / dilation));
  }
}

// Boxes of a pair of rows: to[c * column.bank_count + w]; or, where the tile's columns are alike, to[c] from squares[c] on.
template <int S>
void box_along(const PatchPlan& plan, const PatchAxis& column, const reg* squares, int64_t wide, reg one, reg* to) {
  const int64_t dilation = plan.dilation, matches = column.bank_count;
  for (int64_t phase = 0; phase < std::min(dilation, column.count); ++phase) {
    int64_t c = phase, lines = (column.count - phase + dilation - 1) / dilation;
    if (column.alike) {
      box_line<S>(squares + c, dilation, lines, one, to + c, dilation);
      continue;
    }
    const auto take = [&](auto together) {
      constexpr int T = decltype(together)::value;
      for (; lines >= T; lines -= T, c += T * dilation)
        box_diagonals<S, T>(dilation, matches, squares + c * wide, wide, one, to + c * matches);
    };
    if constexpr (S > 8) take(std::integral_constant<int, 8>{});  // large boxes share more
    take(std::integral_constant<int, 4>{});
    take(std::integral_constant<int, 2>{});
    take(std::integral_constant<int, 1>{});
  }
}

// to[r * to_stride + i] = box from rows[r * stride + i] on, down the rows, for r < lines and i < count.
template <int S>
void box_down(const PatchPlan& plan, const reg* rows, int64_t stride, int64_t lines, int64_t count, reg one, reg* to,
              int64_t to_stride) {
  const int64_t dilation = plan.dilation, step = dilation * stride;
  for (int64_t phase = 0; phase < std::min(dilation, lines); ++phase) {
    int64_t r = phase;
    in_runs((lines - phase + dilation - 1) / dilation, [&](auto together) {
      constexpr int T = decltype(together)::value;
      for (int64_t i = 0; i < count; ++i) {
        reg* const first = to + r * to_stride + i;
        box_run<S, T>(rows + r * stride + i, step, one, [&](int t, reg sum) { first[t * dilation * to_stride] = sum; });
      }
      r += T * dilation;
    });
  }
}

using Along = void (*)(const PatchPlan&, const PatchAxis&, const reg*, int64_t, reg, reg*);
using Down = void (*)(const PatchPlan&, const reg*, int64_t, int64_t, int64_t, reg, reg*, int64_t);
struct BoxFilters {
  Along along;
  Down down;
};

template <int... S>
inline BoxFilters box_filters(int64_t side, std::integer_sequence<int, S...>) {
  BoxFilters found{};
  ((side == S + 2 ? void(found = {box_along<S + 2>, box_down<S + 2>}) : void()), ...);
  return found;
}

// The same for any side: box (l, i) is the sum over s < side of from[l + s * step.lines][i + s * step.entries], for `lines` lines of
// `count`. A box of side 2 m (+ 1) is made of two of side m (and a single entry). target(l) is where the finished line goes; unfinished
// ones go to `work`.
template <typename Target>
inline void box_filter(int64_t side, Step step, const reg* from, int64_t from_stride, reg* work, int64_t work_stride, int64_t lines,
                       int64_t count, const Target& target) {
  if (side == 1) {
    for (int64_t l = 0; l < lines; ++l) std::copy_n(from + l * from_stride, count, target(l));
  }
  const reg* half = from;
  int64_t stride = from_stride, box = 1;
  for (int bit = highest_bit(side) - 1; bit >= 0; --bit) {
    const bool odd = (side >> bit & 1) != 0;
    const int64_t next = 2 * box + (odd ? 1 : 0), margin = side - next;  // boxes that the wider ones will take in
    const int64_t last = count + margin * step.entries;
    for (int64_t l = 0; l < lines + margin * step.lines; ++l) {
      const reg* const second = half + (l + box * step.lines) * stride + box * step.entries;
      const reg* const single = from + (l + 2 * box * step.lines) * from_stride + 2 * box * step.entries;
      add_lines(half + l * stride, second, odd ? single : nullptr, last, bit == 0 ? target(l) : work + l * work_stride);
    }
    half = work, stride = work_stride, box = next;
  }
}


// to[c * column.bank_count + w]: the boxes along a row r of the query's planes and a row s of the images'.
inline void pair_rows(const PatchPlan& plan, const PatchAxis& column, int64_t r, int64_t s, const BoxFilters& filters, reg one,
                      const PatchBuffers& buffers, reg* to) {
  const int64_t span = (plan.side - 1) * plan.dilation, pairs = column.count * column.bank_count;
  const bool no_query = beyond(plan, r, plan.args->query_height), no_image = beyond(plan, s, plan.args->height);
  if (no_query && no_image) {
    std::fill_n(to, pairs, reg{});
    return;
  }
  const auto filter = [&](const PatchAxis& axis, const reg* squares, int64_t wide, reg* boxes) {
    if (filters.along != nullptr) {
      filters.along(plan, axis, squares, wide, one, boxes);
    } else {
      const int64_t lines = axis.alike ? 1 : axis.count, count = axis.alike ? axis.count : axis.bank_count;
      box_filter(plan.side, {axis.alike ? 0 : plan.dilation, plan.dilation}, squares, wide, reinterpret_cast<reg*>(buffers.boxes),
                 wide, lines, count, [&](int64_t c) { return boxes + c * axis.bank_count; });
    }
  };
  reg* const squares = reinterpret_cast<reg*>(buffers.squares);
  if (column.alike || (!no_query && !no_image)) {
    square_rows(plan, column, span, r, s, buffers, squares);
    filter(column, squares, column.alike ? 0 : column.bank_count + span, to);
  } else if (no_query) {  // the same for every column of the query
    const reg* const norms = reinterpret_cast<const reg*>(buffers.norms) + s * plan.bank_columns + column.bank_first;
    filter({0, column.bank_count, 0, 1, true}, norms, 0, to);
    for (int64_t c = 1; c < column.count; ++c) std::copy_n(to, column.bank_count, to + c * column.bank_count);
  } else {
    const float* const norms = plan.query_norms + r * plan.query_columns + column.first;
    for (int64_t c = 0; c < column.count + span; ++c) squares[c] = splat(norms[c]);
    reg* const boxes = reinterpret_cast<reg*>(buffers.strip);
    filter({0, column.count, 0, 1, true}, squares, 0, boxes);
    for (int64_t c = 0; c < column.count; ++c) std::fill_n(to + c * column.bank_count, column.bank_count, boxes[c]);
  }
}

// distances [rows][columns][bank rows][bank columns] of a tile.
void tile_distances(const PatchPlan& plan, const PatchTile& tile, const PatchBuffers& buffers) {
  const PatchAxis &row = tile.row, &column = tile.column;
  const int64_t span = (plan.side - 1) * plan.dilation, stride = plan.row_stride;
  const int64_t matches = row.bank_count * column.bank_count;
  const BoxFilters filters = box_filters(plan.side, std::make_integer_sequence<int, kMostSide - 1>{});
  reg one = splat(1.0f);
  in_this_order(one);
  reg* const rows = reinterpret_cast<reg*>(buffers.rows);
  const int64_t last = row.first + row.count;
  const int64_t lowest = row.alike ? 0 : row.bank_first - (last - 1);
  const int64_t highest = row.alike ? 0 : row.bank_first + row.bank_count - 1 - row.first;
  for (int64_t shift = lowest; shift <= highest; ++shift) {  // of the bank's row against the query's
    const int64_t begin = row.alike ? row.first : std::max(row.first, row.bank_first - shift);
    const int64_t end = row.alike ? last : std::min(last, row.bank_first + row.bank_count - shift);
    for (int64_t r = begin; r < end + span; ++r) pair_rows(plan, column, r, r + shift, filters, one, buffers, rows + (r - begin) * stride);
    const int64_t next_row = column.count * matches + (row.alike ? 0 : column.bank_count);  // of query and bank
    reg* const distances = reinterpret_cast<reg*>(buffers.distances) + (begin - row.first) * column.count * matches +
                           (row.alike ? 0 : begin + shift - row.bank_first) * column.bank_count;
    for (int64_t c = 0; c < column.count; ++c) {
      reg* const to = distances + c * matches;
      const reg* const from = rows + c * column.bank_count;
      if (filters.down != nullptr) {
        filters.down(plan, from, stride, end - begin, column.bank_count, one, to, next_row);
        continue;
      }
      for (int64_t w = 0; w < column.bank_count; w += kPatchStrip) {
        box_filter(plan.side, {plan.dilation, 0}, from + w, stride, reinterpret_cast<reg*>(buffers.strip), kPatchStrip, end - begin,
                   std::min(kPatchStrip, column.bank_count - w), [&](int64_t r) { return to + w + r * next_row; });
      }
    }
  }
}

}  // namespace
}  // namespace pyattr::cpu
