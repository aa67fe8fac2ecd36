// The sparse projection's inner loops: tables of where a run of columns goes, and the addition of a run of entries, either way: to
// the outputs, or (the transpose) from them. Included by one file per SIMD level, with internal linkage throughout.
//
// Floor: memory. A block of 32 columns is 128 bytes, with AVX2 four vectors of a load, a sign flip (shift, mask, xor), one or two
// permutations and a load, addition and store of the sums. Measured in the first-level cache of a Zen 3 core: 4.4 ns a block, and
// 1.2 ns for its tables, which samples share; that is 23 to 29 bytes a nanosecond, more than the core reads from memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/sketch.h"
#include "cpu/buffer.h"
#include "cpu/philox_calls.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyattr::cpu {
namespace {

// One nonzero of the matrix.
struct SketchWalk {
  int lanes;             // W
  int r;                 // which nonzero
  SketchGroup group;
  uint32_t seed, stream;
};

// Where a run of columns goes: filled in by make_run, for one nonzero.
struct SketchRun {
  int64_t num_pieces = 0;     // of tiles
  Aligned<uint32_t> words;    // [columns / 32] signs
  Aligned<uint32_t> targets;  // [columns / W] row of a block's lane 0 (xored with 0)
  Aligned<int64_t> stops;     // [columns / W] where a piece ends, in blocks
  Aligned<uint8_t> xors;      // [columns / W] what a piece's lanes are xored with

  SketchRun(int64_t capacity, int lanes)
      : words(aligned_array<uint32_t>(capacity / 32 + 32)),  // written eight calls at a time
        targets(aligned_array<uint32_t>(capacity / lanes + 8)),  // written in eights
        stops(aligned_array<int64_t>(capacity / lanes)),
        xors(aligned_array<uint8_t>(capacity / lanes)) {}
};

// targets[i] = lanes * (group.first + (at + i a) mod group.size) for i in [0, count), rounded up to whole eights.
inline void step_through(const SketchWalk& walk, uint64_t at, uint64_t a, int64_t count, uint32_t* targets) {
  const uint32_t size = static_cast<uint32_t>(walk.group.size), first = static_cast<uint32_t>(walk.group.first);
  const uint32_t stride = static_cast<uint32_t>(8 * a % size), lanes = static_cast<uint32_t>(walk.lanes);
  uint32_t place[8];
  for (int i = 0; i < 8; ++i) {
    place[i] = static_cast<uint32_t>(at);
    at = (at + a) % size;
  }
  for (int64_t k = 0; k < count; k += 8) {
    for (int i = 0; i < 8; ++i) {
      targets[k + i] = (first + place[i]) * lanes;
      const uint32_t next = place[i] + stride;
      place[i] = std::min(next, next - size);  // modulo: the smaller one has not wrapped below zero
    }
  }
}

inline void sketch_targets(const SketchWalk& walk, int64_t first, int64_t count, SketchRun& run) {
  const uint64_t size = static_cast<uint64_t>(walk.group.size);
  int64_t tile = first / walk.group.size, m = first % walk.group.size;
  run.num_pieces = 0;
  for (int64_t k = 0; k < count; ++tile, m = 0) {
    const SketchTile drawn = sketch_tile(tile, walk.r, walk.group.size, walk.lanes, walk.seed, walk.stream);
    const uint64_t a = (0x100000000u - kPrimeGaps[drawn.prime]) % size;
    const int64_t blocks = std::min(count - k, walk.group.size - m);
    step_through(walk, (a * static_cast<uint64_t>(m) + drawn.b) % size, a, blocks, run.targets.get() + k);
    k += blocks;
    run.stops[run.num_pieces] = k;
    run.xors[run.num_pieces++] = static_cast<uint8_t>(drawn.x);
  }
}

// first_column and columns are multiples of 128.
inline void make_run(const SketchWalk& walk, int64_t first_column, int64_t columns, SketchRun& run) {
  philox_calls(static_cast<uint32_t>(first_column / kSignsPerCall), columns / kSignsPerCall, static_cast<uint32_t>(walk.r),
               kSketchSigns, walk.seed, walk.stream, run.words.get());
  sketch_targets(walk, first_column / walk.lanes, columns / walk.lanes, run);
}

// For the columns c of a run: outs[row(c)] += sign(c) * ins[c], or, of the transpose, outs[c] += sign(c) * ins[row(c)].
template <int W, bool kTranspose>
void add_entries(const SketchRun& run, const float* ins, float* outs) {
  for (int64_t piece = 0, k = 0; piece < run.num_pieces; ++piece) {
    for (; k < run.stops[piece]; ++k) {
      const uint32_t word = run.words[k * W / 32] >> k * W % 32;
      for (int lane = 0; lane < W; ++lane) {
        const int64_t column = k * W + lane, row = run.targets[k] + (lane ^ run.xors[piece]);
        const float entry = ins[kTranspose ? row : column];
        outs[kTranspose ? column : row] += word >> lane & 1 ? entry : -entry;
      }
    }
  }
}

#if defined(__AVX2__)
// Blocks [begin, end) of one tile, whose lanes are all xored with the same number: `order` does so within four lanes, kHigh, the
// number's upper bits, exchanges the halves of a vector and the vectors. (vpermps would do eight lanes at once, for twice the time.)
// An exclusive or undoes itself, so that the transpose reads through the same exchanges.
template <int W, bool kTranspose, int kHigh>
void add_tile(const SketchRun& run, int64_t begin, int64_t end, __m256i order, const float* ins, float* outs) {
  const uint32_t* const words = run.words.get();
  const uint32_t* const targets = run.targets.get();
  const __m256i top = _mm256_set1_epi32(INT32_MIN);
  __m256i places[W / 8];
  for (int v = 0; v < W / 8; ++v)
    places[v] = _mm256_sub_epi32(_mm256_set1_epi32(31 - 8 * v), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  const auto exchange = [order](__m256 entry) {
    entry = _mm256_permutevar_ps(entry, order);
    return kHigh % 2 != 0 ? _mm256_permute2f128_ps(entry, entry, 1) : entry;
  };
  for (int64_t k = begin; k < end; ++k) {
    const __m256i clear = _mm256_set1_epi32(static_cast<int>(~(words[k * W / 32] >> k * W % 32)));
#pragma GCC unroll 4
    for (int v = 0; v < W / 8; ++v) {
      const __m256 flip = _mm256_castsi256_ps(_mm256_and_si256(_mm256_sllv_epi32(clear, places[v]), top));
      const int64_t columns = k * W + 8 * v, rows = targets[k] + 8 * (v ^ kHigh / 2);
      const __m256 entry = kTranspose ? _mm256_xor_ps(exchange(_mm256_loadu_ps(ins + rows)), flip)
                                      : exchange(_mm256_xor_ps(_mm256_loadu_ps(ins + columns), flip));
      float* const sum = outs + (kTranspose ? columns : rows);
      _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), entry));
    }
  }
}

template <int W, bool kTranspose>
void add_vectors(const SketchRun& run, const float* ins, float* outs) {
  for (int64_t piece = 0, begin = 0; piece < run.num_pieces; ++piece) {
    const int64_t end = run.stops[piece];
    const int exchange = run.xors[piece];
    const __m256i order = _mm256_xor_si256(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(exchange & 3));
    switch (exchange >> 2) {  // below W / 4
      case 0: add_tile<W, kTranspose, 0>(run, begin, end, order, ins, outs); break;
      case 1: add_tile<W, kTranspose, 1>(run, begin, end, order, ins, outs); break;
      case 2: add_tile<W, kTranspose, 2 % (W / 4)>(run, begin, end, order, ins, outs); break;
      case 3: add_tile<W, kTranspose, 3 % (W / 4)>(run, begin, end, order, ins, outs); break;
      case 4: add_tile<W, kTranspose, 4 % (W / 4)>(run, begin, end, order, ins, outs); break;
      case 5: add_tile<W, kTranspose, 5 % (W / 4)>(run, begin, end, order, ins, outs); break;
      case 6: add_tile<W, kTranspose, 6 % (W / 4)>(run, begin, end, order, ins, outs); break;
      default: add_tile<W, kTranspose, 7 % (W / 4)>(run, begin, end, order, ins, outs);
    }
    begin = end;
  }
}
#endif

template <int W, bool kTranspose>
void add_run(const SketchRun& run, const float* ins, float* outs) {
#if defined(__AVX2__)
  if constexpr (W >= 8) {
    add_vectors<W, kTranspose>(run, ins, outs);
  } else {
    add_entries<W, kTranspose>(run, ins, outs);
  }
#else
  add_entries<W, kTranspose>(run, ins, outs);
#endif
}

using AddRun = void (*)(const SketchRun&, const float*, float*);

template <bool kTranspose = false>
inline AddRun choose_add_run(int lanes) {
  switch (lanes) {
    case 32: return add_run<32, kTranspose>;
    case 16: return add_run<16, kTranspose>;
    case 8: return add_run<8, kTranspose>;
    case 4: return add_run<4, kTranspose>;
    case 2: return add_run<2, kTranspose>;
    default: return add_run<1, kTranspose>;
  }
}

}  // namespace
}  // namespace pyattr::cpu
