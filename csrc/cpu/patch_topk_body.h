// The statistics of patch_topk for blocks of images, one image a lane; included by one file per SIMD level, internal linkage throughout.
//
// The k nearest of each lane: a distance t with exactly k of at most t, or one such that fewer than k are nearer and the rest are ties.
// It is found between two distances by passes that count, each halving or interpolating. A few nearest are bounded beforehand: of 16
// classes of distances the k-th least of the classes' minima is no less than the k-th least of all, and only vectors with a distance up
// to it in some lane are kept, 2 k of them or fewer for each lane. For more, the search starts from where the last position's ended.
// What is kept for the sake of another lane changes no lane's sum.
#include <utility>

#include "cpu/patch_stage.h"
#include "cpu/patch_weights.h"
#include "patch_topk.h"

namespace pyattr::cpu {
namespace {

constexpr int64_t kFew = 12;  // of the 16 classes

// The vectors that may count, in their order.
struct Candidates {
  reg* distances;
  reg* weights;
  int64_t count;
};

inline ireg count_within(const Candidates& kept, reg t) {
  ireg found[4] = {};
  int64_t i = 0;
  for (; i + 4 <= kept.count; i += 4) {
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) found[g] -= (ireg)(kept.distances[i + g] <= t);
  }
  for (; i < kept.count; ++i) found[0] -= (ireg)(kept.distances[i] <= t);
  return (found[0] + found[1]) + (found[2] + found[3]);
}

inline ireg select(ireg mask, ireg a, ireg b) { return (a & mask) | (b & ~mask); }

inline reg to_float(ireg x) { return __builtin_convertvector(x, reg); }

// A sorting network of kClasses lines (Batcher's odd-even merge sort, 1968) as pairs of lines, unrolled by the templates below: its lines
// then stay in registers.
struct Network {
  int first[63], second[63], count;
};

constexpr Network sorting_network() {
  Network made{};
  for (int p = 1; p < kClasses; p *= 2) {
    for (int q = p; q >= 1; q /= 2) {
      for (int j = q % p; j + q < kClasses; j += 2 * q) {
        for (int i = j; i < j + q && i + q < kClasses; ++i) {
          if (i / (2 * p) != (i + q) / (2 * p)) continue;
          made.first[made.count] = i, made.second[made.count] = i + q, ++made.count;
        }
      }
    }
  }
  return made;
}

template <int... I>
inline void sort_classes(reg* x, std::integer_sequence<int, I...>) {
  constexpr Network network = sorting_network();
  static_assert(network.count == sizeof...(I));
  const auto order = [x](int first, int second) {
    const reg a = x[first], b = x[second];
    x[first] = minimum(a, b), x[second] = maximum(a, b);
  };
  (order(network.first[I], network.second[I]), ...);
}

// The k-th least of each lane of the classes' minima.
inline reg kth_of_classes(const reg* least, int64_t k) {
  reg x[kClasses];
  std::copy_n(least, kClasses, x);
  sort_classes(x, std::make_integer_sequence<int, 63>{});
  return x[k - 1];
}

// The sum of the weights of the k nearest. `total` is the sum of all of them, `live` how many are not 0, or more; `most` is at least the
// k-th least distance or where weights end, `probe` where the search starts, and becomes where it ended.
inline reg top_sum(const Candidates& kept, int64_t k, reg total, ireg live, const Exponential& weight, reg most, reg& probe) {
  // All of a lane's weights where it has no more than k, or where one is NaN.
  const ireg wanted = splat(static_cast<int32_t>(k));
  ireg all = (live <= wanted) | ~(ireg)(total == total);
  ireg done = all, ties{};
  ireg low = (ireg)weight.m - 1, high = (ireg)most;  // bits of distances, which as integers have the same order
  ireg below{}, within = live;                       // fewer than k up to low, more than k up to high
  reg threshold = weight.m;
  ireg moved{};  // bits 1 and 2: which end has
  reg next = probe;
  for (int pass = 0; any(~done); ++pass) {
    const ireg c = count_within(kept, next);
    const ireg hit = (c == wanted) & ~done, more = (c > wanted) & ~done, less = (c < wanted) & ~done;
    threshold = blend(hit, next, threshold);
    all |= less & (ireg)(next >= weight.limit);
    done |= hit | all;
    high = select(more, (ireg)next, high), within = select(more, c, within);
    low = select(less, (ireg)next, low), below = select(less, c, below);
    moved |= (more & 1) | (less & 2);
    const ureg between = (ureg)high - (ureg)low;
    const ireg tied = (ireg)(between == 1) & ~done;
    threshold = blend(tied, (reg)low, threshold), ties = select(tied, wanted - below, ties);
    done |= tied;
    const ireg middle = (ireg)((ureg)low + (between >> 1));
    ireg guess = middle;
    if (pass % 3 != 2) {
      const reg share = to_float(wanted - below) / to_float(within - below);
      guess = (ireg)((reg)low + share * ((reg)high - (reg)low));
      // Outward from the start, until both ends have moved.
      const reg x = next - weight.m;
      const ireg outward = select((ireg)(more != 0), (ireg)(weight.m + 0.8f * x), (ireg)(weight.m + 1.25f * x));
      guess = select((ireg)(moved != 3), outward, guess);
    }
    const ireg inside = (guess > low) & (guess < high);
    next = (reg)select(inside, guess, middle);
  }
  reg sum{};
  for (int64_t i = 0; i < kept.count; ++i) sum += (reg)((ireg)kept.weights[i] & (ireg)(kept.distances[i] <= threshold));
  probe = blend(all, probe, threshold);
  if (any(ties != 0)) {
    const reg tied = weight((reg)high);
    sum += to_float(ties) * (reg)((ireg)tied & (ireg)(ties != 0));
  }
  return blend(all, total, sum);
}

// The first vector that holds each lane's least; 0 where none does.
inline ireg first_equal(const reg* d, int64_t count, reg m) {
  ireg found = splat(int32_t{-1});
  for (int64_t i = count - 1; i >= 0; --i) found = select((ireg)(d[i] == m), splat(static_cast<int32_t>(i)), found);
  return found & ~(found < 0);
}

// The statistics of one position: its sum of weights, and that of the k nearest. `reach` is how far beyond the least the last
// position's k nearest went.
inline void reduce(const reg* d, int64_t matches, int64_t k, const Exponential& weight, const reg* least, Candidates kept, reg& reach,
                   reg* sum, reg* top) {
  if (k <= kFew && k < matches) {
    const reg most = minimum(kth_of_classes(least, k), weight.limit);
    *sum = weigh(
        d, matches, weight,
        [&](int64_t, reg near, reg w) {
          kept.distances[kept.count] = near, kept.weights[kept.count] = w;
          kept.count += any((ireg)(near <= most)) ? 1 : 0;
        },
        [](int64_t) {});
    reg start = most;
    *top = top_sum(kept, k, *sum, splat(int32_t{1} << 30), weight, most, start);
    return;
  }
  ireg live{};
  *sum = weigh(
      d, matches, weight,
      [&](int64_t, reg near, reg w) {
        kept.distances[kept.count] = near, kept.weights[kept.count++] = w;
        live -= (ireg)(near <= weight.limit);
      },
      [](int64_t) {});
  if (k >= matches) {
    *top = *sum;
    return;
  }
  reg start = weight.m + reach;
  *top = top_sum(kept, k, *sum, live, weight, weight.limit, start);
  reach = start - weight.m;
}

void reduce_tile(const PatchTopkArgs& args, const PatchTile& tile, int64_t bank_width, int64_t first, const reg* distances,
                 reg* candidates) {
  const PatchAxis &row = tile.row, &column = tile.column;
  const int64_t matches = row.bank_count * column.bank_count, images = std::min(kLanes, args.num_images - first);
  const float slope = static_cast<float>(-args.inverse * 1.4426950408889634);
  const Candidates kept{candidates, candidates + matches + kGroup, 0};
  reg reach = splat(-1.0f / slope);
  for (int64_t r = 0; r < row.count; ++r) {
    for (int64_t c = 0; c < column.count; ++c) {
      const reg* const d = distances + (r * column.count + c) * matches;
      const int64_t u = (row.first + r - args.row_begin) * (args.column_end - args.column_begin) + column.first + c - args.column_begin;
      const int64_t at = u * args.stats_stride + first;
      reg least[kClasses], sum, top;
      class_minima(d, matches, least);
      const reg m = least_of(least);
      reduce(d, matches, args.k, Exponential(m, slope), least, kept, reach, &sum, &top);
      store(m, images, args.minima + at);
      store(sum, images, args.sums + at);
      store(top, images, args.tops + at);
      if (args.nearest != nullptr) {
        const ireg where = first_equal(d, matches, m);
        for (int64_t l = 0; l < images; ++l) {
          const int64_t bank_row = row.alike ? row.first + r : row.bank_first + where[l] / column.bank_count;
          const int64_t bank_column = column.alike ? column.first + c : column.bank_first + where[l] % column.bank_count;
          args.nearest[at + l] = static_cast<int32_t>(bank_row * bank_width + bank_column);
        }
      }
    }
  }
}

void topk_blocks(const PatchWork& work) {
  const PatchPlan& plan = *work.plan;
  const PatchTopkArgs& args = static_cast<const PatchTopkArgs&>(*plan.args);
  PatchScratch scratch(plan);
  const PatchBuffers buffers = scratch.buffers();
  const reg* const distances = reinterpret_cast<const reg*>(buffers.distances);
  auto candidates = aligned_array<reg>(2 * (plan.matches + kGroup));
  for (int64_t end = 0, block = 0;; ++block) {
    if (block == end) {
      block = __atomic_fetch_add(work.next, work.together, __ATOMIC_RELAXED);
      end = std::min(block + work.together, work.num_blocks);
      if (block >= end) return;
    }
    stage_images(plan, block * kLanes, scratch);
    for (int64_t t = 0; t < plan.num_tiles; ++t) {
      work.distances(plan, plan.tiles[t], buffers);
      reduce_tile(args, plan.tiles[t], plan.bank_width, block * kLanes, distances, candidates.get());
    }
  }
}

}  // namespace
}  // namespace pyattr::cpu
