// Which windows of a query meet which windows of an image, and how they are cut into tiles.
//
// A tile is kPatchRows query windows that all meet the same rectangle of bank windows. Where windows match only those cut alike,
// the query windows fall into groups: per axis the whole positions together, every cut one alone; a group meets the windows of an
// image at the same positions. Otherwise there is one group, which meets all.
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

struct PatchTile {
  PatchRectangle queries, images;
  int64_t first;  // of the tile's query windows, in the rectangle row by row
};

PYATTR_HOST_DEVICE int64_t patch_samples(const PatchGeometry& g) { return static_cast<int64_t>(g.channels) * g.taps * g.taps; }

PYATTR_HOST_DEVICE int patch_cuts(const PatchAxis& axis) { return axis.end - axis.begin - axis.whole; }
PYATTR_HOST_DEVICE int patch_cut(const PatchAxis& axis, int64_t index) {
  const int position = axis.begin + static_cast<int>(index);
  return position < axis.first ? position : position + axis.whole;
}
PYATTR_HOST_DEVICE int64_t patch_tiles_of(int64_t windows) { return (windows + kPatchRows - 1) / kPatchRows; }

// Tiles of windows that no border cuts: an even number, so that two go together.
PYATTR_HOST_DEVICE int64_t patch_whole_tiles(const PatchGeometry& g) {
  return (patch_tiles_of(static_cast<int64_t>(g.rows.whole) * g.columns.whole) + 1) / 2 * 2;
}
PYATTR_HOST_DEVICE int64_t patch_tiles(const PatchGeometry& g) {
  const int64_t cut_rows = patch_cuts(g.rows), cut_columns = patch_cuts(g.columns);
  return patch_whole_tiles(g) + cut_rows * patch_tiles_of(g.columns.whole) + cut_columns * patch_tiles_of(g.rows.whole) +
         cut_rows * cut_columns;
}

PYATTR_HOST_DEVICE PatchTile patch_tile(const PatchGeometry& g, int64_t tile) {
  const PatchAxis &rows = g.rows, &columns = g.columns;
  const int64_t whole = patch_whole_tiles(g);
  if (tile < whole) {
    return {{rows.first, columns.first, rows.whole, columns.whole},
            {rows.image_first, columns.image_first, rows.image_whole, columns.image_whole},
            tile * kPatchRows};
  }
  tile -= whole;
  const int64_t across = patch_tiles_of(columns.whole), down = patch_tiles_of(rows.whole);
  const int64_t in_rows = patch_cuts(rows) * across, in_columns = patch_cuts(columns) * down;
  if (tile < in_rows) {
    const int row = patch_cut(rows, tile / across);
    return {{row, columns.first, 1, columns.whole}, {row, columns.image_first, 1, columns.image_whole}, tile % across * kPatchRows};
  }
  tile -= in_rows;
  if (tile < in_columns) {
    const int column = patch_cut(columns, tile / down);
    return {{rows.first, column, rows.whole, 1}, {rows.image_first, column, rows.image_whole, 1}, tile % down * kPatchRows};
  }
  tile -= in_columns;
  const int row = patch_cut(rows, tile / patch_cuts(columns)), column = patch_cut(columns, tile % patch_cuts(columns));
  return {{row, column, 1, 1}, {row, column, 1, 1}, 0};
}

PYATTR_HOST_DEVICE int patch_count(const PatchRectangle& r) { return r.rows * r.columns; }

// Whether the tile has a window for this row, and its position in the query's grid.
struct PatchWindow {
  bool there;
  int row, column;
};
PYATTR_HOST_DEVICE PatchWindow patch_window(const PatchTile& tile, int row) {
  const int64_t index = tile.first + row;
  if (index >= patch_count(tile.queries)) return {false, 0, 0};
  return {true, tile.queries.row + static_cast<int>(index / tile.queries.columns),
          tile.queries.column + static_cast<int>(index % tile.queries.columns)};
}

}  // namespace pyattr::cuda
