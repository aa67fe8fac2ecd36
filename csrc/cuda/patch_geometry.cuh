// Which windows of a query meet which windows of an image, and how they are cut into tiles.
//
// The windows that no border cuts (all, where cuts do not matter) meet one rectangle of an image's windows; kPatchRows of them are
// a tile. Where windows match only those cut alike, a position that is cut along an axis meets on that axis itself alone.
#pragma once

#include "common/philox.h"

namespace pyattr::cuda {

constexpr int kPatchRows = 8;  // query windows of a tile

// One axis of the windows' positions.
struct PatchAxis {
  int begin, end;     // the query's positions that are wanted
  int first, whole;   // of them those that no border cuts, side by side; all of them where cuts do not matter
  int image_first, image_whole;  // the positions of an image that these meet
};

struct PatchGeometry {
  int channels;
  int pad;         // zeros on every side
  int taps, step;  // a window is taps x taps samples, `step` apart: (p, 1), or (p / 2, 2) of 2 x 2 block sums
  bool blocks;     // of 2 x 2 blocks
  PatchAxis rows, columns;
  int image_columns;  // positions of an image along a row
};

// A rectangle of positions.
struct PatchRectangle {
  int row, column, rows, columns;
};
PYATTR_HOST_DEVICE int patch_count(const PatchRectangle& r) { return r.rows * r.columns; }

struct PatchWindow {
  bool there;
  int row, column;
};

PYATTR_HOST_DEVICE int64_t patch_samples(const PatchGeometry& g) { return static_cast<int64_t>(g.channels) * g.taps * g.taps; }

PYATTR_HOST_DEVICE int64_t patch_whole(const PatchGeometry& g) { return static_cast<int64_t>(g.rows.whole) * g.columns.whole; }
// Tiles of whole windows: an even number, so that two go together.
PYATTR_HOST_DEVICE int64_t patch_tiles(const PatchGeometry& g) {
  return (patch_whole(g) + 2 * kPatchRows - 1) / (2 * kPatchRows) * 2;
}
// The positions of an image that whole windows meet.
PYATTR_HOST_DEVICE PatchRectangle patch_images(const PatchGeometry& g) {
  return {g.rows.image_first, g.columns.image_first, g.rows.image_whole, g.columns.image_whole};
}
// The window of a tile's row, if the tile has one for it.
PYATTR_HOST_DEVICE PatchWindow patch_window(const PatchGeometry& g, int64_t tile, int row) {
  const int64_t index = tile * kPatchRows + row;
  if (index >= patch_whole(g)) return {false, 0, 0};
  return {true, g.rows.first + static_cast<int>(index / g.columns.whole), g.columns.first + static_cast<int>(index % g.columns.whole)};
}

// The cut windows: first those whose row is cut, then those whose column alone is.
PYATTR_HOST_DEVICE int64_t patch_cut_windows(const PatchGeometry& g) {
  const int64_t all = static_cast<int64_t>(g.rows.end - g.rows.begin) * (g.columns.end - g.columns.begin);
  return all - patch_whole(g);
}
PYATTR_HOST_DEVICE int patch_cut_position(const PatchAxis& axis, int index) {
  const int position = axis.begin + index;
  return position < axis.first ? position : position + axis.whole;
}
PYATTR_HOST_DEVICE PatchWindow patch_cut_window(const PatchGeometry& g, int index) {
  const int across = g.columns.end - g.columns.begin, in_rows = (g.rows.end - g.rows.begin - g.rows.whole) * across;
  if (index < in_rows) return {true, patch_cut_position(g.rows, index / across), g.columns.begin + index % across};
  index -= in_rows;
  return {true, g.rows.first + index % g.rows.whole, patch_cut_position(g.columns, index / g.rows.whole)};
}
// The positions of an image that a cut window meets.
PYATTR_HOST_DEVICE PatchRectangle patch_cut_images(const PatchGeometry& g, const PatchWindow& window) {
  PatchRectangle images{window.row, window.column, 1, 1};
  if (window.row >= g.rows.first && window.row < g.rows.first + g.rows.whole) {
    images.row = g.rows.image_first, images.rows = g.rows.image_whole;
  }
  if (window.column >= g.columns.first && window.column < g.columns.first + g.columns.whole) {
    images.column = g.columns.image_first, images.columns = g.columns.image_whole;
  }
  return images;
}

}  // namespace pyattr::cuda
