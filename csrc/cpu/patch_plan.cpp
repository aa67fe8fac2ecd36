#include "cpu/patch_plan.h"

#include <algorithm>
#include <cmath>

namespace pyattr::cpu {
namespace {

// Distances of a tile, kept until its positions are reduced one by one: a share of a third-level cache.
constexpr int64_t kTileBytes = 6 << 20;

struct Group {
  int64_t first, last, bank_first, bank_last;
  bool alike;
};

// Positions [begin, end) of an axis by what they may match.
std::vector<Group> groups(const PatchArgs& args, int64_t begin, int64_t end, int64_t query_size, int64_t size) {
  if (args.border != Border::cut_alike) return {{begin, end, 0, args.grid(size), false}};
  const Interior whole = interior(query_size, args.patch_size);
  const int64_t first = std::clamp(whole.first, begin, end), last = std::clamp(whole.last, first, end);
  std::vector<Group> found;
  if (begin < first) found.push_back({begin, first, 0, 0, true});
  if (first < last) found.push_back({first, last, whole.first, whole.last, false});
  if (last < end) found.push_back({last, end, 0, 0, true});
  return found;
}

int64_t matched(const Group& group) { return group.alike ? 1 : group.bank_last - group.bank_first; }

// Lines of differences for each line of distances, along one axis, for tiles of `count` positions: a margin of `span` on every diagonal,
// but none beyond the images, where differences are known.
double margin(int64_t count, const Group& group, int64_t span, int64_t query_size, int64_t size) {
  if (group.alike) return static_cast<double>(count + span) / static_cast<double>(count);
  const int64_t bank_count = matched(group);
  const int64_t all = count * bank_count + (count + bank_count - 1) * span;
  const int64_t inside = std::min(count + span, query_size) * std::min(bank_count + span, size);
  return static_cast<double>(std::min(all, inside)) / static_cast<double>(count * bank_count);
}

int64_t divided(int64_t size, int64_t most) {  // the same number of pieces, as even as can be
  const int64_t pieces = (size + most - 1) / most;
  return (size + pieces - 1) / pieces;
}

struct Size {
  int64_t rows, columns;
};

// The tile with the least work for each pair that keeps its distances within bounds. The box filter runs along rows first, so that
// only rows have a margin for the second pass.
Size tile_size(const PatchArgs& args, const Group& row, const Group& column, int64_t span, int64_t lanes) {
  const int64_t rows = row.last - row.first, columns = column.last - column.first;
  const int64_t pair_bytes = 4 * lanes * matched(row) * matched(column);
  const int64_t most = std::max<int64_t>(1, kTileBytes / pair_bytes);
  Size best{1, 1};
  double least = 1e300;
  for (int64_t c = 1; c <= std::min(columns, most); ++c) {
    const Size size{divided(rows, std::min(rows, most / c)), divided(columns, c)};
    const double down = margin(size.rows, row, span, args.query_height, args.height);
    const double along = margin(size.columns, column, span, args.query_width, args.width);
    const double cost = down * along + 1.5 * down;
    if (cost < least) least = cost, best = size;
  }
  return best;
}

void add_tiles(const PatchArgs& args, const Group& row, const Group& column, int64_t span, int64_t lanes, std::vector<PatchTile>* tiles) {
  const Size size = tile_size(args, row, column, span, lanes);
  for (int64_t r = row.first; r < row.last; r += size.rows) {
    for (int64_t c = column.first; c < column.last; c += size.columns) {
      tiles->push_back({{r, std::min(size.rows, row.last - r), row.bank_first, matched(row), row.alike},
                        {c, std::min(size.columns, column.last - c), column.bank_first, matched(column), column.alike}});
    }
  }
}

}  // namespace

int64_t patch_lanes(SimdLevel level) {
  return level == SimdLevel::avx512 ? 16 : level == SimdLevel::avx2 ? 8 : 4;
}

PatchSchedule::PatchSchedule(const PatchArgs& args, int64_t lanes) {
  const int64_t pad = args.padding(), less = args.lowres ? 1 : 0, C = args.channels;
  const int64_t H = args.query_height, W = args.query_width, wide = W + 2 * pad;
  const int64_t rows = H + 2 * pad - less, columns = wide - less;
  std::vector<float> padded(static_cast<size_t>(C * (H + 2 * pad) * wide), 0.0f);
  for (int64_t c = 0; c < C; ++c) {
    for (int64_t r = 0; r < H; ++r)
      std::transform(args.query + (c * H + r) * W, args.query + (c * H + r + 1) * W,
                     padded.data() + (c * (H + 2 * pad) + r + pad) * wide + pad, plain_nan);
  }
  if (args.lowres) {
    query_.resize(static_cast<size_t>(C * rows * columns));
    for (int64_t c = 0; c < C; ++c) {
      for (int64_t r = 0; r < rows; ++r) {
        const float* const from = padded.data() + (c * (rows + 1) + r) * wide;
        for (int64_t i = 0; i < columns; ++i) {
          const double sum = static_cast<double>(from[i]) + from[i + 1] + from[i + wide] + from[i + wide + 1];
          query_[(c * rows + r) * columns + i] = static_cast<float>(0.5 * sum);
        }
      }
    }
  } else {
    query_.swap(padded);
  }
  const int64_t plane = rows * columns;
  norms_.resize(static_cast<size_t>(plane));
  for (int64_t i = 0; i < plane; ++i) {
    norms_[i] = query_[i] * query_[i];
    for (int64_t c = 1; c < C; ++c) norms_[i] = std::fma(query_[c * plane + i], query_[c * plane + i], norms_[i]);
  }
  const int64_t side = args.lowres ? args.patch_size / 2 : args.patch_size, dilation = args.lowres ? 2 : 1;
  const int64_t span = (side - 1) * dilation;
  for (const Group& row : groups(args, args.row_begin, args.row_end, H, args.height)) {
    for (const Group& column : groups(args, args.column_begin, args.column_end, W, args.width))
      add_tiles(args, row, column, span, lanes, &tiles_);
  }
  plan_ = {};
  plan_.args = &args, plan_.query = query_.data(), plan_.query_norms = norms_.data();
  plan_.query_rows = rows, plan_.query_columns = columns;
  plan_.bank_rows = args.height + 2 * pad - less, plan_.bank_columns = args.width + 2 * pad - less;
  plan_.padding = pad, plan_.bank_width = args.grid(args.width);
  plan_.side = side, plan_.dilation = dilation;
  plan_.tiles = tiles_.data(), plan_.num_tiles = static_cast<int64_t>(tiles_.size());
  int64_t high = 0;
  for (const PatchTile& tile : tiles_) {
    const PatchAxis &row = tile.row, &column = tile.column;
    const int64_t pairs = column.count * column.bank_count;
    const int64_t wider = column.alike ? column.count + span : (column.count + span) * (column.bank_count + span);
    plan_.distances = std::max(plan_.distances, row.count * row.bank_count * pairs);
    plan_.squares = plan_.boxes = std::max(plan_.squares, wider);
    plan_.matches = std::max(plan_.matches, row.bank_count * column.bank_count);
    plan_.row_stride = std::max(plan_.row_stride, pairs);
    high = std::max(high, row.count + span);
  }
  // Rows an odd number of cache lines apart, so that a column of them does not compete for one place in the cache.
  const int64_t line = std::max<int64_t>(1, 16 / lanes);
  plan_.row_stride = ((plan_.row_stride + line - 1) / line | 1) * line;
  plan_.rows = high * plan_.row_stride;
  plan_.strip = std::max(high * kPatchStrip, plan_.squares);
}

}  // namespace pyattr::cpu
