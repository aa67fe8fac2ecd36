// The statistics of patch_topk for blocks of images, one image a lane; included by one file per SIMD level, internal linkage throughout.
//
// The k largest weights of each lane: a threshold t with exactly k weights of at least t, or a weight t such that fewer than k are
// larger and the rest are ties. It is found by halving an interval of floats in counting passes, starting from where the last
// position's lay; once the interval is narrow, only vectors with a weight above its lower end are counted.
#include "cpu/patch_weights.h"
#include "patch_topk.h"

namespace pyattr::cpu {
namespace {

constexpr int32_t kSmallestNormal = 0x00800000, kTwo = 0x40000000;  // bits of floats: as integers in the same order
constexpr int32_t kFirstStep = 1 << 21;                              // a quarter of an octave

inline ireg count_from(const reg* w, int64_t count, ireg bits) {  // weights that are at least this
  const reg t = (reg)bits;
  ireg found[2] = {};
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    found[0] -= (ireg)(w[i] >= t);
    found[1] -= (ireg)(w[i + 1] >= t);
  }
  if (i < count) found[0] -= (ireg)(w[i] >= t);
  return found[0] + found[1];
}

inline ireg select(ireg mask, ireg a, ireg b) { return (a & mask) | (b & ~mask); }

// The sum of the k largest of count vectors of weights, whose sum is `total`; `guess` is the last position's threshold and becomes
// this one's. Overwrites w.
inline reg top_sum(reg* w, int64_t count, int64_t k, reg total, ireg& guess) {
  if (count <= k) return total;
  const ireg wanted = splat(static_cast<int32_t>(k));
  // All of a lane's weights where it has no more than k, or where one is NaN.
  const ireg all = (count_from(w, count, splat(kSmallestNormal)) <= wanted) | ~(ireg)(total == total);
  ireg low = splat(kSmallestNormal), high = splat(kTwo);  // more than k are at least low, fewer than k at least high
  ireg above{};                                           // how many are at least high
  ireg done = all, threshold = splat(kTwo), ties{};
  ireg probe = guess, step = splat(kFirstStep), bracketed{};  // bits 1 and 2: an end has moved
  bool packed = false;
  while (any(~done)) {
    const ireg c = count_from(w, count, probe);
    const ireg hit = (c == wanted) & ~done, more = (c > wanted) & ~done, less = (c < wanted) & ~done;
    threshold = select(hit, probe, threshold);
    done |= hit;
    low = select(more, probe, low);
    high = select(less, probe, high), above = select(less, c, above);
    bracketed |= (more & 1) | (less & 2);
    const ireg tied = (high - low == 1) & ~done;
    threshold = select(tied, high, threshold), ties = select(tied, wanted - above, ties);
    done |= tied;
    // Outward from the guess until both ends have moved, then halves.
    const ireg middle = low + ((high - low) >> 1);
    const ireg onward = select((ireg)(more != 0), probe + step, probe - step);
    const ireg inside = (onward > low) & (onward < high) & (bracketed != 3);
    probe = select(inside, onward, middle);
    step += step & ~(ireg)(step > (1 << 26));
    if (!packed && !any(~done & ~((bracketed & 1) == 1))) {
      const reg floor = (reg)select(done, threshold, low);
      int64_t kept = 0;
      for (int64_t i = 0; i < count; ++i) {
        const reg x = w[i];
        w[kept] = x;
        kept += any((ireg)(x >= floor)) ? 1 : 0;
      }
      count = kept, packed = true;
    }
  }
  const reg t = (reg)threshold;
  reg sum{};
  for (int64_t i = 0; i < count; ++i) sum += (reg)((ireg)w[i] & (ireg)(w[i] >= t));
  guess = select(all, guess, threshold);
  for (int i = 0; i < kRegisterLanes; ++i) {
    if (ties[i] > 0) sum[i] += static_cast<float>(ties[i]) * ((reg)low)[i];
  }
  return blend(all, total, sum);
}

// The first vector that holds each lane's least; 0 where none does.
inline ireg first_equal(const reg* d, int64_t count, reg m) {
  ireg found = splat(int32_t{-1});
  for (int64_t i = count - 1; i >= 0; --i) found = select((ireg)(d[i] == m), splat(static_cast<int32_t>(i)), found);
  return found & ~(found < 0);
}

void reduce_tile(const PatchTopkArgs& args, const PatchTile& tile, int64_t first, const PatchScratch& scratch, reg* weights) {
  const PatchAxis &row = tile.row, &column = tile.column;
  const int64_t matches = row.bank_count * column.bank_count, images = std::min(kLanes, args.num_images - first);
  const int64_t width = args.width + 2 * (args.border == Border::inside ? 0 : (args.patch_size - 1) / 2) - args.patch_size + 1;
  const float slope = static_cast<float>(-args.inverse * 1.4426950408889634);
  ireg guess = splat(int32_t{0x3f000000});
  for (int64_t r = 0; r < row.count; ++r) {
    for (int64_t c = 0; c < column.count; ++c) {
      const reg* const d = scratch.distances.get() + (r * column.count + c) * matches;
      const int64_t u = (row.first + r - args.row_begin) * (args.column_end - args.column_begin) + column.first + c - args.column_begin;
      const int64_t at = u * args.stats_stride + first;
      const reg m = least(d, matches);
      const Weights found = weigh<true>(d, matches, m, slope, weights);
      store(m, images, args.minima + at);
      store(found.sum, images, args.sums + at);
      store(top_sum(weights, found.count, args.k, found.sum, guess), images, args.tops + at);
      if (args.nearest != nullptr) {
        const ireg where = first_equal(d, matches, m);
        for (int64_t l = 0; l < images; ++l) {
          const int64_t bank_row = row.alike ? row.first + r : row.bank_first + where[l] / column.bank_count;
          const int64_t bank_column = column.alike ? column.first + c : column.bank_first + where[l] % column.bank_count;
          args.nearest[at + l] = static_cast<int32_t>(bank_row * width + bank_column);
        }
      }
    }
  }
}

void topk_blocks(const PatchWork& work) {
  const PatchPlan& plan = *work.plan;
  const PatchTopkArgs& args = static_cast<const PatchTopkArgs&>(*plan.args);
  PatchScratch scratch(plan);
  auto weights = aligned_array<reg>(plan.matches + kGroup);
  for (;;) {
    const int64_t block = __atomic_fetch_add(work.next, 1, __ATOMIC_RELAXED);
    if (block >= work.num_blocks) return;
    stage_images(plan, block * kLanes, scratch);
    for (int64_t t = 0; t < plan.num_tiles; ++t) {
      tile_distances(plan, plan.tiles[t], scratch);
      reduce_tile(args, plan.tiles[t], block * kLanes, scratch, weights.get());
    }
  }
}

}  // namespace
}  // namespace pyattr::cpu
