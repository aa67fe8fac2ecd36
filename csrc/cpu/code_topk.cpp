#include "code_topk.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

#include "common/parallel.h"
#include "common/simd_level.h"
#include "cpu/code_topk_body.h"

namespace pyattr::cpu {

#if defined(PYATTR_X86)
PassingCodes code_search_avx2(int members);
double code_value_avx2(const CodeTopkArgs& args, uint64_t code);
#endif

namespace {

constexpr int64_t kTaken = 128 * kCodeBlock;  // codes that a thread takes at a time
constexpr int64_t kFewest = 256;              // codes beyond k that a thread keeps before it drops the worst
constexpr double kRounding = 1e-9;            // of the limits, relative

struct Found {
  double value;
  int64_t index;
};

struct Better {
  bool largest;
  bool operator()(const Found& a, const Found& b) const {
    if (a.value != b.value) return largest ? a.value > b.value : a.value < b.value;
    return a.index < b.index;
  }
};

// The best k of what was offered, and a few more.
class Selection {
 public:
  Selection(const CodeTopkArgs& args, const std::vector<Found>& before) : block_{args, {}}, better_{args.largest} {
    if (static_cast<int64_t>(before.size()) == args.k) close(before.back());
    set_limits();
  }

  void offer(const Found& found) {
    if (closed_ && !better_(found, worst_)) return;
    kept_.push_back(found);
    const int64_t k = block_.args.k;
    if (static_cast<int64_t>(kept_.size()) < k + std::max(k, kFewest)) return;
    std::nth_element(kept_.begin(), kept_.begin() + (k - 1), kept_.end(), better_);
    kept_.resize(k);
    close(kept_.back());
    set_limits();
  }

  const CodeBlock& block() const { return block_; }
  const std::vector<Found>& kept() const { return kept_; }

 private:
  void close(const Found& worst) {
    closed_ = true;
    worst_ = worst;
  }

  // By weight, what |R c|^2 must reach, or must not exceed, for c to be as good as the worst.
  void set_limits() {
    const CodeTopkArgs& args = block_.args;
    constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
    for (int h = 0; h <= kCodeMembers; ++h) {
      int32_t& limit = block_.limits[h];
      limit = args.largest ? 0 : kMost;
      if (!closed_ || h >= args.members) continue;  // a code of all members' bits passes, to be refused
      const double form = worst_.value * ((args.members - h) * (args.members - h));
      if (args.largest) {
        const double reached = args.scale * std::sqrt(std::max(form * (1 - kRounding) - args.slack, 0.0)) * (1 - kRounding) - args.error;
        if (reached > 0) limit = static_cast<int32_t>(std::min(std::floor(reached * reached), double{kMost}));
      } else {
        const double reached = args.scale * std::sqrt(form * (1 + kRounding) + args.slack) * (1 + kRounding) + args.error;
        limit = static_cast<int32_t>(std::min(std::ceil(reached * reached), double{kMost}));
      }
    }
  }

  CodeBlock block_;
  Better better_;
  std::vector<Found> kept_;
  bool closed_ = false;
  Found worst_{};
};

}  // namespace

CodesFound code_topk(const CodeTopkArgs& args, int num_threads) {
  PassingCodes search = code_search(args.members);
  CodeValue value_of = code_value;
#if defined(PYATTR_X86)
  if (simd_level() != SimdLevel::scalar) search = code_search_avx2(args.members), value_of = code_value_avx2;
#endif
  const uint64_t every = args.members < 64 ? (uint64_t{1} << args.members) - 1 : ~uint64_t{0};
  std::vector<Found> best(args.found);
  for (int64_t i = 0; i < args.found; ++i) best[i] = {args.values[i], args.indices[i]};
  const Better better{args.largest};
  std::sort(best.begin(), best.end(), better);

  const int64_t takes = (args.num_codes + kTaken - 1) / kTaken;
  const int tasks = static_cast<int>(std::min<int64_t>(usable_threads(num_threads), takes));
  std::vector<Selection> selections(tasks, Selection(args, best));
  std::atomic<int64_t> next{0}, bad{std::numeric_limits<int64_t>::max()};
  parallel_for(tasks, num_threads, [&](int64_t task) {
    Selection& selection = selections[task];
    int32_t passing[kCodeBlock];
    // Taken in order, so that what precedes a bad code is looked at by someone.
    for (int64_t take; (take = next.fetch_add(1)) < takes && take * kTaken <= bad.load();) {
      const int64_t end = std::min(args.num_codes, (take + 1) * kTaken);
      for (int64_t begin = take * kTaken; begin < end; begin += kCodeBlock) {
        const uint64_t* const codes = args.codes + begin;
        const int64_t found = search(selection.block(), codes, std::min(kCodeBlock, end - begin), passing);
        for (int64_t i = 0; i < found; ++i) {
          const uint64_t code = codes[passing[i]];
          const int64_t place = begin + passing[i];
          if (code < every) {
            selection.offer({value_of(args, code), args.first + place});
            continue;
          }
          int64_t seen = bad.load();
          while (place < seen && !bad.compare_exchange_weak(seen, place)) {
          }
        }
      }
    }
  });
  if (bad.load() < args.num_codes) return {args.found, args.first + bad.load()};

  for (const Selection& selection : selections) best.insert(best.end(), selection.kept().begin(), selection.kept().end());
  const int64_t found = std::min<int64_t>(args.k, static_cast<int64_t>(best.size()));
  std::partial_sort(best.begin(), best.begin() + found, best.end(), better);
  for (int64_t i = 0; i < found; ++i) args.values[i] = best[i].value, args.indices[i] = best[i].index;
  return {found, -1};
}

}  // namespace pyattr::cpu
