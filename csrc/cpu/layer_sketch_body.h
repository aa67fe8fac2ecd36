// Weight gradients of a layer, formed a tile at a time in registers and cache, then written out or added to the sums of a sparse
// projection; included by one file per SIMD level, with internal linkage throughout.
//
// G [O, C k k] = E^T A, with A [L, C k k] the patches of the L positions: patches are gathered straight from the images into panels
// of kStrip columns, errors into panels of kRows rows, and a panel pair is multiplied in kRows x kStrip registers. Floor: the
// multiply-adds, two vectors of them a cycle; the tile's way through the cache and the sketch add about 7 ns for 32 columns of a
// row, against 0.6 L ns for the multiply-adds themselves.
//
// Order of summation: an entry of G is one chain of fused multiply-adds over the positions; entries join the sums panel by panel of
// columns, row by row. The same for every level and batch.
#include <algorithm>

#include "cpu/buffer.h"
#include "cpu/layer_sketch.h"
#include "cpu/registers.h"
#include "cpu/sketch_runs.h"

namespace pyattr::cpu {
namespace {

using lanes_t = register_t<kRegisterLanes>;
constexpr int64_t kStrip = 2 * kRegisterLanes;  // columns of a panel: two registers
constexpr int64_t kRows = 6;                    // rows of a panel: 12 sums, 2 columns and a row in 16 registers

constexpr int64_t kBlockPositions = 256;   // positions of the patches gathered at a time
// 512 KB of patches, a second-level cache: longer rows of a tile were worth more than what falls out of it (66 to 82 G multiply-adds
// a second on two Zen 3 cores where 256 KB gave 59, 1280 to 1280 features and 256 positions).
constexpr int64_t kPatchFloats = 128 << 10;
constexpr int64_t kBlockColumns = 1024;    // of a row at most
constexpr int64_t kBlockRows = 24;         // whose gradients are formed before they are added to the sums
constexpr int64_t kMostRows = 2040;        // whose errors are gathered at a time: 2 MB
constexpr int64_t kSlabPositions = 32;     // of all samples that share the sketch's tables, where one has few

// tile[row * stride + column] (+)= sum over l of errs[l][row] * patches[l][column].
inline void multiply_panels(const float* errs, const float* patches, int64_t count, bool add, float* tile, int64_t stride) {
  lanes_t sum[kRows][2];
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      if (add) {
        __builtin_memcpy(&sum[i][v], tile + i * stride + v * kRegisterLanes, sizeof(lanes_t));
      } else {
        sum[i][v] = lanes_t{};
      }
    }
  }
  for (int64_t l = 0; l < count; ++l, errs += kRows, patches += kStrip) {
    const lanes_t column[2] = {*reinterpret_cast<const lanes_t*>(patches),
                               *reinterpret_cast<const lanes_t*>(patches + kRegisterLanes)};
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
      const lanes_t row = splat(errs[i]);
      sum[i][0] = multiply_add(row, column[0], sum[i][0]);
      sum[i][1] = multiply_add(row, column[1], sum[i][1]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) __builtin_memcpy(tile + i * stride + v * kRegisterLanes, &sum[i][v], sizeof(lanes_t));
  }
}

typedef float quad_t __attribute__((vector_size(16)));

// out[j][i] = in[i][j] for rows j < count of 4, kStrip apart.
inline void transpose_quads(const quad_t (&in)[4], int64_t count, float* out) {
  const quad_t a = __builtin_shufflevector(in[0], in[1], 0, 4, 1, 5), b = __builtin_shufflevector(in[2], in[3], 0, 4, 1, 5);
  const quad_t c = __builtin_shufflevector(in[0], in[1], 2, 6, 3, 7), d = __builtin_shufflevector(in[2], in[3], 2, 6, 3, 7);
  const quad_t rows[4] = {__builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
                          __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
  if (count >= 4) {
    for (int j = 0; j < 4; ++j) __builtin_memcpy(out + j * kStrip, &rows[j], sizeof(quad_t));
  } else {
    for (int64_t j = 0; j < count; ++j) __builtin_memcpy(out + j * kStrip, &rows[j], sizeof(quad_t));
  }
}

// What a few rows of a map read: the window of the images of some channels, with its padding written out.
struct Window {
  int64_t first_channel = 0, rows = 0, width = 0;
  Aligned<float> values;  // [channels][rows][width], and a vector more
  int64_t capacity = 0;
};

// The window of `channels` channels of one view for rows [y, y + count) and columns [x, x + length) of the map.
inline void open_window(const LayerArgs& layer, int64_t sample, int64_t view, int64_t channels, int64_t y, int64_t count, int64_t x,
                        int64_t length, Window& window) {
  window.rows = (count - 1) * layer.stride[0] + (layer.kernel[0] - 1) * layer.dilation[0] + 1;
  window.width = (length - 1) * layer.stride[1] + (layer.kernel[1] - 1) * layer.dilation[1] + 1;
  const int64_t size = channels * window.rows * window.width + 4;
  if (size > window.capacity) {
    window.values = aligned_array<float>(size);
    window.capacity = size;
  }
  std::fill_n(window.values.get(), size, 0.0f);
  const int64_t* const strides = layer.acts_strides;
  const int64_t top = y * layer.stride[0] - layer.padding[0], left = x * layer.stride[1] - layer.padding[1];
  const int64_t begin = std::max<int64_t>(0, left), end = std::min(layer.width, left + window.width);
  for (int64_t c = 0; c < channels; ++c) {
    const float* const plane = layer.acts + sample * strides[0] + view * strides[1] + (window.first_channel + c) * strides[2];
    for (int64_t row = std::max<int64_t>(0, top); row < std::min(layer.height, top + window.rows); ++row) {
      float* const out = window.values.get() + (c * window.rows + row - top) * window.width - left;
      const float* const in = plane + row * strides[3];
      for (int64_t at = begin; at < end; ++at) out[at] = in[at * strides[4]];
    }
  }
}

// panels[c / kStrip][l][c % kStrip] = entry of column first_column + c (channel of the group, kernel row, kernel column) of the
// patch at position first + l, for c in [0, columns) and l in [0, count); columns up to a whole panel are zero.
inline void gather_patches(const LayerArgs& layer, int64_t sample, int64_t group, int64_t first_column, int64_t columns,
                           int64_t first, int64_t count, Window& window, float* panels) {
  const int64_t taps = layer.kernel[0] * layer.kernel[1], map = layer.out_height * layer.out_width;
  const int64_t low = first_column / taps, channels = (first_column + columns - 1) / taps + 1 - low;
  window.first_channel = group * layer.group_channels() + low;
  const int64_t step = layer.stride[1];
  for (int64_t l = first, stop; l < first + count; l = stop) {  // positions of one view
    const int64_t view = l / map, top = l % map / layer.out_width;
    stop = std::min(first + count, (view + 1) * map);
    // Of a single row of the map, only the columns that are wanted.
    const int64_t map_rows = (stop - 1) % map / layer.out_width + 1 - top;
    const int64_t left = map_rows == 1 ? l % layer.out_width : 0, length = map_rows == 1 ? stop - l : layer.out_width;
    open_window(layer, sample, view, channels, top, map_rows, left, length, window);
    for (int64_t c = 0; c < columns; c += 4) {  // four columns at a time: their neighbours make whole stores
      const float* read[4];  // at the window's output row 0 and column 0
      for (int i = 0; i < 4; ++i) {
        const int64_t column = first_column + std::min(c + i, columns - 1), tap = column % taps;
        read[i] = window.values.get() + (column / taps - low) * window.rows * window.width +
                  tap / layer.kernel[1] * layer.dilation[0] * window.width + tap % layer.kernel[1] * layer.dilation[1];
      }
      float* const out = panels + c / kStrip * kStrip * count + c % kStrip;
      for (int64_t at = l; at < stop;) {  // rows of the map
        const int64_t y = at % map / layer.out_width - top, x = at % layer.out_width;
        const int64_t count_here = std::min(layer.out_width - x, stop - at);
        const int64_t offset = y * layer.stride[0] * window.width + (x - left) * step;
        for (int64_t j = 0; j < count_here; j += 4) {
          quad_t in[4];
          for (int i = 0; i < 4; ++i) {
            const float* const line = read[i] + offset + j * step;
            if (step == 1) {
              __builtin_memcpy(&in[i], line, sizeof(quad_t));
            } else {
              for (int64_t k = 0; k < 4; ++k) in[i][k] = line[std::min(k, count_here - j - 1) * step];
            }
          }
          transpose_quads(in, count_here - j, out + (at - first + j) * kStrip);
        }
        at += count_here;
      }
    }
  }
  // Columns up to a whole panel, some of which hold copies of the last one.
  for (int64_t c = columns; c % kStrip != 0; ++c)
    for (int64_t l = 0; l < count; ++l) panels[c / kStrip * kStrip * count + l * kStrip + c % kStrip] = 0.0f;
}

// The same for a layer whose patches are pixels with the channels side by side, as a linear layer's inputs are.
inline void gather_pixels(const LayerArgs& layer, int64_t sample, int64_t group, int64_t first_column, int64_t columns,
                          int64_t first, int64_t count, float* panels) {
  const int64_t* const strides = layer.acts_strides;
  const int64_t map = layer.out_height * layer.out_width, padded = (columns + kStrip - 1) / kStrip * kStrip;
  const float* const start = layer.acts + sample * strides[0] + group * layer.group_channels() + first_column;
  if (padded > columns) std::fill_n(panels + (padded - kStrip) * count, kStrip * count, 0.0f);
  for (int64_t l = first; l < first + count; ++l) {
    const float* const pixel =
        start + l / map * strides[1] + l % map / layer.out_width * strides[3] + l % layer.out_width * strides[4];
    float* const out = panels + (l - first) * kStrip;
    int64_t c = 0;
    for (; c + kStrip <= columns; c += kStrip) __builtin_memcpy(out + c * count, pixel + c, kStrip * sizeof(float));
    for (int64_t i = c; i < columns; ++i) out[c * count + i - c] = pixel[i];
  }
}

inline bool pixels_in_place(const LayerArgs& layer) {
  return layer.acts_strides[2] == 1 && layer.kernel[0] == 1 && layer.kernel[1] == 1 && layer.stride[0] == 1 &&
         layer.stride[1] == 1 && layer.padding[0] == 0 && layer.padding[1] == 0;
}

// panels[o / kRows][l][o % kRows] = errs[sample, :, first_row + o, :] at position first + l; rows up to a whole panel are zero.
inline void gather_errors(const LayerArgs& layer, int64_t sample, int64_t first_row, int64_t rows, int64_t first, int64_t count,
                          float* panels) {
  const int64_t* const strides = layer.errs_strides;
  const int64_t map = layer.out_height * layer.out_width, padded = (rows + kRows - 1) / kRows * kRows;
  if (padded > rows) std::fill_n(panels + (padded - kRows) * count, kRows * count, 0.0f);
  for (int64_t l = first, run; l < first + count; l += run) {  // along the rows of the map
    const int64_t x = l % layer.out_width;
    run = std::min(layer.out_width - x, first + count - l);
    const float* const at = layer.errs + sample * strides[0] + l / map * strides[1] + first_row * strides[2] +
                            l % map / layer.out_width * strides[3] + x * strides[4];
    float* const out = panels + (l - first) * kRows;
    if (strides[2] == 1) {  // channels side by side
      for (int64_t i = 0; i < run; ++i) {
        const float* const pixel = at + i * strides[4];
        for (int64_t o = 0; o < rows; o += kRows)
          for (int64_t k = 0; k < std::min(kRows, rows - o); ++k) out[o * count + i * kRows + k] = pixel[o + k];
      }
    } else {
      for (int64_t o = 0; o < rows; ++o) {
        const float* const line = at + o * strides[2];
        float* const column = out + o / kRows * kRows * count + o % kRows;
        for (int64_t i = 0; i < run; ++i) column[i * kRows] = line[i * strides[4]];
      }
    }
  }
}

// Buffers and block sizes of one task.
struct LayerBlocks {
  int64_t positions;  // gathered at a time
  int64_t columns;    // of a row, in a block
  int64_t rows;       // in a block
  int64_t slab;       // samples that share a run's tables
  int64_t stride;     // from row to row of a tile: columns, rounded up to panels
  int64_t sample_errors;  // floats of a sample's errors: rows of a group, rounded up to panels, times positions
  Aligned<float> patches;  // [slab][columns / kStrip][positions][kStrip]
  Aligned<float> errors;   // [slab][all rows / kRows][positions][kRows]
  Aligned<float> tile;     // [slab][rows][stride]
  Window window;

  // For `most_rows` rows of a group at a time, `all_columns` columns of a row and up to `samples` samples that share tables.
  LayerBlocks(const LayerArgs& layer, int64_t most_rows, int64_t all_columns, int64_t samples) {
    const int64_t L = layer.positions(), group_rows = std::min(most_rows, layer.out_channels / layer.groups);
    positions = std::min(L, kBlockPositions);
    // In multiples of 32, a whole number of panels at every SIMD level: the order of the sums must not depend on it.
    columns = std::min(std::clamp<int64_t>(kPatchFloats / positions / 32 * 32, 32, kBlockColumns), all_columns);
    stride = (columns + kStrip - 1) / kStrip * kStrip;
    slab = std::clamp<int64_t>(kSlabPositions / L, 1, samples);
    // The tile holds all rows where the positions come in several blocks, since only the last one completes them.
    rows = L > positions ? (group_rows + kRows - 1) / kRows * kRows : slab > 1 ? kRows : kBlockRows;
    patches = aligned_array<float>(slab * positions * stride);
    sample_errors = (group_rows + kRows - 1) / kRows * kRows * positions;
    errors = aligned_array<float>(slab * sample_errors);
    tile = aligned_array<float>(slab * rows * stride);
  }
};

// Which rows of a group are wanted, of which samples.
struct RowRange {
  int64_t sample, samples, group, begin, end;
};

// Forms rows [row, row + rows) of a range, columns [column, column + columns). What a former call has gathered is used again where
// all positions fit: patches for other rows, errors for other columns.
inline void form_tile(const LayerArgs& layer, const RowRange& range, int64_t row, int64_t rows, int64_t column, int64_t columns,
                      bool first_columns, LayerBlocks& blocks) {
  const int64_t L = layer.positions(), group_rows = layer.out_channels / layer.groups, sample = range.sample;
  const bool whole = L <= blocks.positions;
  for (int64_t s = 0; s < range.samples; ++s) {
    float* const patches = blocks.patches.get() + s * blocks.positions * blocks.stride;
    float* const errors = blocks.errors.get() + s * blocks.sample_errors;
    float* const tile = blocks.tile.get() + s * blocks.rows * blocks.stride;
    for (int64_t first = 0; first < L; first += blocks.positions) {
      const int64_t count = std::min(blocks.positions, L - first);
      if (!whole || row == range.begin) {
        if (pixels_in_place(layer)) {
          gather_pixels(layer, sample + s, range.group, column, columns, first, count, patches);
        } else {
          gather_patches(layer, sample + s, range.group, column, columns, first, count, blocks.window, patches);
        }
      }
      if (!whole || (row == range.begin && first_columns))
        gather_errors(layer, sample + s, range.group * group_rows + range.begin, range.end - range.begin, first, count, errors);
      for (int64_t c = 0; c < columns; c += kStrip)
        for (int64_t o = 0; o < rows; o += kRows)
          multiply_panels(errors + (row - range.begin + o) * count, patches + c * count, count, first > 0, tile + o * blocks.stride + c,
                          blocks.stride);
    }
  }
}

void layer_chunk(const LayerTask& task) {
  const LayerArgs& layer = *task.layer;
  const SketchArgs& sketch = *task.sketch;
  const int64_t D = sketch.proj_dim, group_rows = layer.out_channels / layer.groups;
  LayerBlocks blocks(layer, std::min(group_rows, kMostRows), task.column_end - task.column_begin, task.sample_end - task.sample_begin);
  const int lanes = sketch_lanes(D, sketch.nonzeros);
  const AddRun add = choose_add_run(lanes);
  const int64_t capacity = (blocks.columns + 3 * kSignsPerCall) / kSignsPerCall * kSignsPerCall;
  auto entries = aligned_array<float>(capacity);
  SketchRun run(capacity, lanes);
  for (int64_t sample = task.sample_begin; sample < task.sample_end; sample += blocks.slab) {
    const int64_t samples = std::min(blocks.slab, task.sample_end - sample);
    for (int64_t group = 0; group < layer.groups; ++group) {
      for (int64_t low = 0; low < group_rows; low += kMostRows) {
        const RowRange range{sample, samples, group, low, std::min(group_rows, low + kMostRows)};
        for (int64_t column = task.column_begin; column < task.column_end; column += blocks.columns) {
          const int64_t columns = std::min(blocks.columns, task.column_end - column);
          for (int64_t row = range.begin; row < range.end; row += blocks.rows) {
            const int64_t rows = std::min(blocks.rows, range.end - row);
            form_tile(layer, range, row, rows, column, columns, column == task.column_begin, blocks);
            for (int64_t o = 0; o < rows; ++o) {
              // The sketch's tables come in whole calls of the generator: zeros around the entries add nothing.
              const int64_t at = sketch.column_offset + (group * group_rows + row + o) * layer.row_columns() + column;
              const int64_t lead = at % kSignsPerCall;
              const int64_t whole = (lead + columns + kSignsPerCall - 1) / kSignsPerCall * kSignsPerCall;
              std::fill_n(entries.get(), lead, 0.0f);
              std::fill_n(entries.get() + lead + columns, whole - lead - columns, 0.0f);
              for (int r = 0; r < sketch.nonzeros; ++r) {
                make_run({lanes, r, sketch_group(D, sketch.nonzeros, r), sketch.seed, sketch.stream}, at - lead, whole, run);
                for (int64_t s = 0; s < samples; ++s) {
                  const float* const formed = blocks.tile.get() + (s * blocks.rows + o) * blocks.stride;
                  std::copy_n(formed, columns, entries.get() + lead);
                  add(run, entries.get(), task.sums + (sample + s - task.sample_begin) * D);
                }
              }
            }
          }
        }
      }
    }
  }
}

// Writes rows [begin, end) of a group, or adds them to what is there.
void layer_rows(const RowsTask& task) {
  const LayerArgs& layer = *task.layer;
  const int64_t columns = layer.row_columns();
  LayerBlocks blocks(layer, std::min(task.end - task.begin, kMostRows), columns, 1);
  for (int64_t low = task.begin; low < task.end; low += kMostRows) {
    const RowRange range{task.sample, 1, task.group, low, std::min(task.end, low + kMostRows)};
    for (int64_t column = 0; column < columns; column += blocks.columns) {
      const int64_t width = std::min(blocks.columns, columns - column);
      for (int64_t row = range.begin; row < range.end; row += blocks.rows) {
        const int64_t rows = std::min(blocks.rows, range.end - row);
        form_tile(layer, range, row, rows, column, width, column == 0, blocks);
        for (int64_t o = 0; o < rows; ++o) {
          const float* const formed = blocks.tile.get() + o * blocks.stride;
          float* const out = task.out + (row - task.begin + o) * columns + column;
          if (task.add) {
            for (int64_t c = 0; c < width; ++c) out[c] += formed[c];
          } else {
            std::copy_n(formed, width, out);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace pyattr::cpu
