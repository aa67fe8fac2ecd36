// What the operations on patches take: one query, some images of a bank, and which patches may match. Plain addresses and sizes.
//
// x[u] and s y_n[v] are p x p windows, stride 1, of images with (p - 1) / 2 zeros on each side (none with Border::inside): H' = H for
// odd p, H - 1 for even p (H - p + 1 inside). d(u, n, v) = |x[u] - s y_n[v]|^2 summed over channels; with `lowres` (even p) both
// windows are first summed in 2 x 2 blocks, times 1/2: the dilation-2 box filter of side p / 2 of the squared difference of the padded
// images' stride-1 block sums.
//
// Border::cut_alike: along each axis the pixels cut off before and after a window must be equal. A window that
// is cut off on an axis is the only one of its kind there; those that are not all match each other.
// Every backend reduces each (u, n) to numbers relative to the image's own nearest patch, and images are joined in float64 in
// their order, so that no chunking changes a bit.
#pragma once

#include <algorithm>
#include <cstdint>

namespace pyattr {

enum class Pixel : int32_t { float16 = 0, bfloat16 = 1, float32 = 2, uint8 = 3 };  // uint8 b is (2 b - 255) / 255
enum class Border : int32_t { cut_alike = 0, zero = 1, inside = 2 };

struct PatchArgs {
  const float* query;       // [C, Hq, Wq], contiguous
  const void* bank;         // [N, C, H, W] of pixel, strides in elements
  Pixel pixel;
  int64_t bank_strides[4];
  int64_t num_images;       // N
  int64_t channels;         // C
  int64_t query_height, query_width;
  int64_t height, width;    // of the bank; the query's too but with Border::inside
  int64_t patch_size;       // p
  Border border;
  bool lowres;
  double scale;             // s
  double inverse;           // 1 / (2 sigma^2)
  // The query's positions wanted, a rectangle of its grid [Hq', Wq']; U = rows * columns, row by row.
  int64_t row_begin, row_end, column_begin, column_end;
  int64_t stats_stride;     // elements between the statistics of two positions; at least N

  int64_t padding() const { return border == Border::inside ? 0 : (patch_size - 1) / 2; }
  int64_t grid(int64_t size) const { return size + 2 * padding() - patch_size + 1; }  // H' of H
  int64_t positions() const { return (row_end - row_begin) * (column_end - column_begin); }
};

// The positions [first, last) of an axis whose windows no border cuts; empty where the window is longer than the image.
struct Interior {
  int64_t first, last;
};

inline Interior interior(int64_t size, int64_t patch_size) {
  const int64_t pad = (patch_size - 1) / 2;
  return {pad, std::max(pad, size - patch_size + 1 + pad)};
}

}  // namespace pyattr
