// Squared distances between the patches of a query and those of a block of images, one image a lane; included by one file per SIMD
// level and op, with internal linkage throughout.
//
// For a row of the query and a row of the images: the squared differences of all their pixels [c][w], summed over channels; the box
// filter along the diagonals, as a row of the query and a row of the images advance together; then down the rows that belong
// together. A box of side b is made of log2(b) to 2 log2(b) sums, of boxes of half its side: non-negative terms only, never a running
// sum that subtracts, so that a distance has at most 2^-24 * (C + 1 + 4 log2(b)) of relative error, and the work hardly grows with b.
//
// For each vector of distances (p = 7, 3 channels, 32 x 32, interior patches): 2.5 vectors of differences, of 3 subtractions and 3
// multiply-adds, 1.5 times 4 additions along the rows, 4 down them; about 12 cycles of a Zen 3 core were its arithmetic alone.
//
// The order of summation depends on the patch size alone, so that neither tiles nor lanes change a bit.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/patch_args.h"
#include "cpu/buffer.h"
#include "cpu/patch_plan.h"
#include "cpu/registers.h"
#include "cpu/stage.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyattr::cpu {
namespace {

constexpr int64_t kLanes = kRegisterLanes;  // images of a block
constexpr int64_t kStrip = 32;  // vectors of a row that go down the rows together: with 32 rows, a first-level cache
using reg = register_t<kRegisterLanes>;
typedef int32_t ireg __attribute__((vector_size(4 * kRegisterLanes)));

inline reg multiply_add(reg a, reg b, reg c) {
#if defined(__AVX512F__)
  return (reg)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (reg)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int i = 0; i < kRegisterLanes; ++i) c[i] = std::fma(a[i], b[i], c[i]);  // the same bits, without the speed
  return c;
#endif
}

inline reg splat(float x) { return reg{} + x; }
inline ireg splat(int32_t x) { return ireg{} + x; }

// Scratch of one thread, for any tile of a plan.
struct PatchScratch {
  Aligned<float> images;     // [C][rows][columns][lanes]
  Aligned<float> pixels;     // one image, padded
  Aligned<reg> squares, boxes;  // of a pair of rows
  Aligned<reg> rows;         // [rows + span][columns][bank columns]
  Aligned<reg> strip;
  Aligned<reg> distances;    // [rows][columns][bank rows][bank columns]

  explicit PatchScratch(const PatchPlan& plan)
      : images(aligned_array<float>(plan.args->channels * plan.bank_rows * plan.bank_columns * kLanes)),
        pixels(aligned_array<float>((plan.args->height + 2 * plan.args->padding()) *
                                    (plan.args->width + 2 * plan.args->padding()))),
        squares(aligned_array<reg>(plan.products)),
        boxes(aligned_array<reg>(plan.products)),
        rows(aligned_array<reg>(plan.rows)),
        strip(aligned_array<reg>(plan.strips * kStrip)),
        distances(aligned_array<reg>(plan.distances)) {}
};

inline float pixel(const PatchArgs& args, int64_t at) {
  switch (args.pixel) {
    case Pixel::float16: return widen_float16(static_cast<const uint16_t*>(args.bank)[at]);
    case Pixel::bfloat16: return widen_bfloat16(static_cast<const uint16_t*>(args.bank)[at]);
    case Pixel::uint8: return static_cast<float>((2 * static_cast<const uint8_t*>(args.bank)[at] - 255) / 255.0);
    default: return static_cast<const float*>(args.bank)[at];
  }
}

// The planes of images [first, first + kLanes), the last of them again where there are no more.
void stage_images(const PatchPlan& plan, int64_t first, PatchScratch& scratch) {
  const PatchArgs& args = *plan.args;
  const int64_t pad = args.border == Border::inside ? 0 : (args.patch_size - 1) / 2;
  const int64_t wide = args.width + 2 * pad, high = args.height + 2 * pad, plane = plan.bank_rows * plan.bank_columns;
  std::fill_n(scratch.pixels.get(), high * wide, 0.0f);
  for (int64_t l = 0; l < kLanes; ++l) {
    const int64_t n = std::min(first + l, args.num_images - 1);
    for (int64_t c = 0; c < args.channels; ++c) {
      for (int64_t r = 0; r < args.height; ++r) {
        const int64_t at = n * args.bank_strides[0] + c * args.bank_strides[1] + r * args.bank_strides[2];
        float* const to = scratch.pixels.get() + (r + pad) * wide + pad;
        for (int64_t i = 0; i < args.width; ++i)
          to[i] = static_cast<float>(args.scale * pixel(args, at + i * args.bank_strides[3]));
      }
      float* const to = scratch.images.get() + c * plane * kLanes + l;
      for (int64_t r = 0; r < plan.bank_rows; ++r) {
        const float* const from = scratch.pixels.get() + r * wide;
        for (int64_t i = 0; i < plan.bank_columns; ++i) {
          float value = from[i];
          if (args.lowres) {
            const double sum = static_cast<double>(value) + from[i + 1] + from[i + wide] + from[i + wide + 1];
            value = static_cast<float>(0.5 * sum);
          }
          to[(r * plan.bank_columns + i) * kLanes] = value;
        }
      }
    }
  }
}

// squares[i * stride + j] = sum over channels of (x[i] - y[j])^2, for X pixels of the query and Y of the images.
template <int X, int Y>
inline void differences(int64_t channels, const float* x, int64_t x_plane, const float* y, int64_t y_plane, reg* squares,
                        int64_t stride) {
  reg sum[X][Y];
  for (int j = 0; j < Y; ++j) {
    const reg value = *reinterpret_cast<const reg*>(y + j * kLanes);
    for (int i = 0; i < X; ++i) {
      const reg difference = splat(x[i]) - value;
      sum[i][j] = difference * difference;
    }
  }
  for (int64_t c = 1; c < channels; ++c) {
    x += x_plane, y += y_plane;
    for (int j = 0; j < Y; ++j) {
      const reg value = *reinterpret_cast<const reg*>(y + j * kLanes);
      for (int i = 0; i < X; ++i) {
        const reg difference = splat(x[i]) - value;
        sum[i][j] = multiply_add(difference, difference, sum[i][j]);
      }
    }
  }
  for (int i = 0; i < X; ++i)
    for (int j = 0; j < Y; ++j) squares[i * stride + j] = sum[i][j];
}

// The pixels of two rows: entry (c, w) lies at squares[c * wide + w], or at squares[c] where only c = w counts. Entries that no
// diagonal of the tile meets are left out.
void square_rows(const PatchPlan& plan, const PatchAxis& column, int64_t span, const float* x, const float* y, reg* squares) {
  const int64_t channels = plan.args->channels;
  const int64_t x_plane = plan.query_rows * plan.query_columns, y_plane = plan.bank_rows * plan.bank_columns * kLanes;
  const int64_t high = column.count + span;
  x += column.first;
  if (column.alike) {
    y += column.first * kLanes;
    for (int64_t c = 0; c < high; ++c) differences<1, 1>(channels, x + c, x_plane, y + c * kLanes, y_plane, squares + c, 0);
    return;
  }
  const int64_t wide = column.bank_count + span;
  y += column.bank_first * kLanes;
  int64_t c = 0;
  for (; c < high; c += 2) {
    const bool two = c + 1 < high;
    int64_t w = std::max<int64_t>(0, c - column.count + 1);
    const int64_t end = std::min(wide, c + (two ? 1 : 0) + column.bank_count);
    reg* const to = squares + c * wide;
    if (two) {
      for (; w + 4 <= end; w += 4) differences<2, 4>(channels, x + c, x_plane, y + w * kLanes, y_plane, to + w, wide);
      for (; w < end; ++w) differences<2, 1>(channels, x + c, x_plane, y + w * kLanes, y_plane, to + w, wide);
    } else {
      for (; w < end; ++w) differences<1, 1>(channels, x + c, x_plane, y + w * kLanes, y_plane, to + w, wide);
    }
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

// The box filter: box (l, i) is the sum over s < side of from[l + s * step.lines][i + s * step.entries], for `lines` lines of `count`.
// A box of side 2 m (+ 1) is made of two of side m (and a single entry). target(l) is where the finished line goes; unfinished ones
// go to `work`.
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

// scratch.distances [rows][columns][bank rows][bank columns] of a tile.
void tile_distances(const PatchPlan& plan, const PatchTile& tile, PatchScratch& scratch) {
  const PatchAxis &row = tile.row, &column = tile.column;
  const int64_t span = (plan.side - 1) * plan.dilation, pairs = column.count * column.bank_count;
  const int64_t matches = row.bank_count * column.bank_count;
  const int64_t wide = column.alike ? 0 : column.bank_count + span;
  const Step along = {column.alike ? 0 : plan.dilation, plan.dilation}, down = {plan.dilation, 0};
  const int64_t last = row.first + row.count;
  const int64_t lowest = row.alike ? 0 : row.bank_first - (last - 1);
  const int64_t highest = row.alike ? 0 : row.bank_first + row.bank_count - 1 - row.first;
  for (int64_t shift = lowest; shift <= highest; ++shift) {  // of the bank's row against the query's
    const int64_t begin = row.alike ? row.first : std::max(row.first, row.bank_first - shift);
    const int64_t end = row.alike ? last : std::min(last, row.bank_first + row.bank_count - shift);
    for (int64_t r = begin; r < end + span; ++r) {
      const float* const x = plan.query + r * plan.query_columns;
      const float* const y = scratch.images.get() + (r + shift) * plan.bank_columns * kLanes;
      square_rows(plan, column, span, x, y, scratch.squares.get());
      reg* const to = scratch.rows.get() + (r - begin) * pairs;
      // Where the tile's columns are alike, they are one line.
      box_filter(plan.side, along, scratch.squares.get(), wide, scratch.boxes.get(), wide, column.alike ? 1 : column.count,
                 column.alike ? column.count : column.bank_count, [&](int64_t c) { return to + c * column.bank_count; });
    }
    const int64_t next_row = column.count * matches + (row.alike ? 0 : column.bank_count);  // of query and bank
    for (int64_t c = 0; c < column.count; ++c) {
      for (int64_t w = 0; w < column.bank_count; w += kStrip) {
        reg* const to = scratch.distances.get() + ((begin - row.first) * column.count + c) * matches + w +
                        (row.alike ? 0 : begin + shift - row.bank_first) * column.bank_count;
        box_filter(plan.side, down, scratch.rows.get() + c * column.bank_count + w, pairs, scratch.strip.get(), kStrip,
                   end - begin, std::min(kStrip, column.bank_count - w), [&](int64_t r) { return to + r * next_row; });
      }
    }
  }
}

}  // namespace
}  // namespace pyattr::cpu
