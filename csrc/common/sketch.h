// Where the entries of the sparse projection's matrix lie; see csrc/sparse_project.h for what they are. For CPU and CUDA.
#pragma once

#include <cstdint>

#include "common/philox.h"

namespace pyattr {

// 2^32 minus its 64 largest primes: multipliers that are prime to every number of blocks.
constexpr int kNumPrimes = 64;
constexpr uint32_t kPrimeGaps[kNumPrimes] = {
    5,   17,   65,   99,   107,  135,  153,  185,  209,  267,  299,  315,  353,  369,  387,  419,  467,  483,  527,  629,  635, 639,
    645, 657,  677,  705,  713,  743,  819,  849,  855,  869,  923,  929,  959,  999,  1053, 1059, 1065, 1079, 1109, 1119,
    1133, 1143, 1167, 1175, 1197, 1209, 1223, 1253, 1289, 1295, 1319, 1325, 1329, 1347, 1359, 1385, 1409, 1449, 1455, 1457,
    1475, 1503};

// Third word of the Philox counter: 0 is the dense matrices'.
constexpr uint32_t kSketchSigns = 1, kSketchTiles = 2;

// W: columns of a block, a power of two up to 32 that divides D and leaves blocks to every nonzero (D >= nonzeros), as many to each
// where that can be.
inline int sketch_lanes(int64_t proj_dim, int nonzeros) {
  int lanes = 32;
  while (proj_dim % lanes != 0 || proj_dim / lanes < nonzeros ||
         (proj_dim % nonzeros == 0 && proj_dim / lanes % nonzeros != 0)) {
    lanes /= 2;
  }
  return lanes;
}

// The blocks of rows that nonzero r falls into.
struct SketchGroup {
  int64_t first, size;
};

inline SketchGroup sketch_group(int64_t proj_dim, int nonzeros, int r) {
  const int64_t blocks = proj_dim / sketch_lanes(proj_dim, nonzeros);
  const int64_t first = r * blocks / nonzeros;
  return {first, (r + 1) * blocks / nonzeros - first};
}

// How a tile of `size` blocks is permuted: its block m goes to block (a m + b) mod size of the group, lane l to lane l xor x.
struct SketchTile {
  uint32_t prime;  // a = 2^32 - kPrimeGaps[prime]
  uint32_t b, x;
};

PYATTR_HOST_DEVICE SketchTile sketch_tile(int64_t tile, int r, int64_t size, int lanes, uint32_t seed, uint32_t stream) {
  const PhiloxBlock call = philox4x32_10(static_cast<uint32_t>(tile), static_cast<uint32_t>(r), seed, stream, kSketchTiles,
                                         static_cast<uint32_t>(tile >> 32));
  return {call.word[0] % kNumPrimes, static_cast<uint32_t>(static_cast<uint64_t>(call.word[1]) * size >> 32),
          call.word[2] % static_cast<uint32_t>(lanes)};
}

}  // namespace pyattr
