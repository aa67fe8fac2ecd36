// The work on attention and its tangents, wave by wave: probabilities of some rows, then tangents of those rows, a few at a time.
#include "attention_jvp.h"

#include <algorithm>

#include "common/parallel.h"
#include "common/simd_level.h"
#include "cpu/attention_jvp_body.h"
#include "cpu/buffer.h"

namespace pyattr::cpu {

#if defined(PYATTR_X86)
const AttentionKernels& attention_kernels_avx2();
const AttentionKernels& attention_kernels_avx512();
#endif

namespace {

// Bounds of the extra memory, in floats. Nothing of them changes a bit of the results.
constexpr int64_t kProbabilities = 2 << 20;  // 8 MB of P at a time
constexpr int64_t kPacked = 1 << 20;         // 4 MB of packed tangents at a time
constexpr int64_t kTile = 32 << 10;          // 128 KB of S_dot in a thread: a quarter of a second-level cache
constexpr int64_t kMostRows = 96, kFewestRows = 12;
constexpr int64_t kPackPanels = 8;           // packed by one thread at a time

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Aligned<float> floats(int64_t count) { return aligned_array<float>(std::max<int64_t>(count, 1)); }

// Heads [head, head + heads) of B H, queries [first, first + rows) of each.
struct Wave {
  int64_t head, heads, first, rows;
};

class Run {
 public:
  Run(const AttentionJvpArgs& args, const AttentionKernels& kernels, int num_threads)
      : args_(args), kernels_(kernels), threads_(usable_threads(num_threads)) {
    keys_stride_ = ceil_div(args.keys, kAttentionLanes) * kAttentionLanes;
    values_stride_ = ceil_div(args.value_width, kAttentionLanes) * kAttentionLanes;
    key_panels_ = ceil_div(args.keys, kernels.panel);
    value_panels_ = ceil_div(args.value_width, kernels.panel);
    key_floats_ = key_panels_ * kernels.panel * args.width;
    value_floats_ = value_panels_ * kernels.panel * args.keys;
  }

  void operator()() {
    const int64_t all_heads = args_.batch * args_.heads, L = args_.queries;
    if (all_heads == 0 || L == 0 || args_.value_width == 0) return;
    const int64_t head_floats = L * keys_stride_ + key_floats_ + value_floats_;
    const int64_t together = std::clamp(kProbabilities / std::max<int64_t>(head_floats, 1), int64_t{1}, all_heads);
    const int64_t fit = std::max(kProbabilities / std::max<int64_t>(keys_stride_, 1), kMostRows);
    const int64_t slab = together > 1 ? L : std::min(L, fit);
    const auto packed = floats(together * (key_floats_ + value_floats_));
    const auto probabilities = floats(together * slab * keys_stride_);
    key_ = packed.get(), value_ = key_ + together * key_floats_, probabilities_ = probabilities.get();
    for (int64_t head = 0; head < all_heads; head += together) {
      const int64_t heads = std::min(together, all_heads - head);
      pack(args_.key, true, head, heads, 1, key_);
      pack(args_.value, false, head, heads, 1, value_);
      for (int64_t first = 0; first < L; first += slab) wave({head, heads, first, std::min(slab, L - first)});
    }
  }

 private:
  // Packs heads of an operand, for `tangents` of them from 0 on where it is a primal; [tangents][heads][floats of one].
  void pack(const AttentionOperand& operand, bool keys, int64_t first, int64_t count, int64_t tangents, float* to, int64_t k = 0) {
    if (operand.data == nullptr) return;
    const int64_t panels = keys ? key_panels_ : value_panels_, pieces = ceil_div(panels, kPackPanels);
    const int64_t bytes = args_.dtype == Dtype::float32 ? 4 : 2;
    parallel_for(tangents * count * pieces, threads_, [&](int64_t task) {
      const int64_t item = task / pieces, begin = task % pieces * kPackPanels;
      const int64_t head = first + item % count;
      const int64_t offset = at(operand, k + item / count, head / args_.heads, head % args_.heads, 0);
      AttentionPack work{static_cast<const char*>(operand.data) + offset * bytes, args_.dtype, args_.width, operand.strides[4],
                         args_.keys, operand.strides[3], begin, std::min(panels, begin + kPackPanels),
                         to + item * (keys ? key_floats_ : value_floats_)};
      if (!keys) {
        work.inner = args_.keys, work.inner_stride = operand.strides[3];
        work.columns = args_.value_width, work.column_stride = operand.strides[4];
      }
      kernels_.pack(work);
    });
  }

  void wave(const Wave& wave) {
    const int64_t K = args_.tangents;
    rows_ = block_rows(wave);
    blocks_ = ceil_div(wave.rows, rows_);
    each_block(wave, 1, [&](AttentionRows& rows, int64_t) { kernels_.primal(rows); });
    const int64_t pair_floats = (args_.key_dot.data ? key_floats_ : 0) + (args_.value_dot.data ? value_floats_ : 0);
    // Enough for every thread to have two tasks, whatever they take.
    const int64_t fewest = ceil_div(2 * threads_, blocks_ * wave.heads);
    const int64_t most = kPacked / std::max<int64_t>(pair_floats * wave.heads, 1);
    const int64_t together = std::min(K, std::max({int64_t{1}, fewest, most}));
    const auto packed = floats(together * wave.heads * pair_floats);
    float* const key_dot = packed.get();
    float* const value_dot = key_dot + (args_.key_dot.data ? together * wave.heads * key_floats_ : 0);
    for (int64_t k = 0; k < K; k += together) {
      const int64_t count = std::min(together, K - k);
      pack(args_.key_dot, true, wave.head, wave.heads, count, key_dot, k);
      pack(args_.value_dot, false, wave.head, wave.heads, count, value_dot, k);
      each_block(wave, count, [&](AttentionRows& rows, int64_t item) {
        rows.k = k + item / wave.heads;
        rows.key_dot = args_.key_dot.data ? key_dot + item * key_floats_ : nullptr;
        rows.value_dot = args_.value_dot.data ? value_dot + item * value_floats_ : nullptr;
        kernels_.tangent(rows);
      });
    }
  }

  // Rows of a block: a tile of S_dot that stays in the cache, and blocks for every thread.
  int64_t block_rows(const Wave& wave) const {
    const int64_t fits = std::clamp(kTile / std::max<int64_t>(keys_stride_, 1), kFewestRows, kMostRows);
    const int64_t wanted = ceil_div(2 * threads_, wave.heads * std::max<int64_t>(args_.tangents, 1));
    const int64_t blocks = std::max(ceil_div(wave.rows, fits), std::min(wanted, ceil_div(wave.rows, kFewestRows)));
    return ceil_div(ceil_div(wave.rows, blocks), kernels_.rows) * kernels_.rows;
  }

  // body(rows, item) for every block of rows of items [tangent][head of the wave]; each thread has its scratch.
  template <typename Body>
  void each_block(const Wave& wave, int64_t tangents, const Body& body) {
    const int64_t count = tangents * wave.heads * blocks_, workers = std::min<int64_t>(threads_, count);
    int64_t next = 0;
    parallel_for(workers, threads_, [&](int64_t) {
      const auto scratch = floats(attention_scratch(rows_, args_.width, keys_stride_, values_stride_));
      for (;;) {
        const int64_t task = __atomic_fetch_add(&next, int64_t{1}, __ATOMIC_RELAXED);
        if (task >= count) return;
        const int64_t item = task / blocks_, first = task % blocks_ * rows_, local = item % wave.heads, head = wave.head + local;
        AttentionRows rows{&args_, head / args_.heads, head % args_.heads, wave.first + first, std::min(rows_, wave.rows - first),
                           key_ + local * key_floats_, value_ + local * value_floats_,
                           probabilities_ + (local * wave.rows + first) * keys_stride_, keys_stride_, values_stride_, 0, nullptr,
                           nullptr, scratch.get()};
        body(rows, item);
      }
    });
  }

  const AttentionJvpArgs& args_;
  const AttentionKernels& kernels_;
  int threads_;
  int64_t keys_stride_, values_stride_, key_panels_, value_panels_, key_floats_, value_floats_;
  int64_t rows_ = 0, blocks_ = 0;
  float *key_ = nullptr, *value_ = nullptr, *probabilities_ = nullptr;
};

}  // namespace

void attention_jvp(const AttentionJvpArgs& args, int num_threads) {
  const AttentionKernels* kernels = &kAttentionKernels;
#if defined(PYATTR_X86)
  if (simd_level() == SimdLevel::avx2) kernels = &attention_kernels_avx2();
  if (simd_level() == SimdLevel::avx512) kernels = &attention_kernels_avx512();
#endif
  Run(args, *kernels, num_threads)();
}

}  // namespace pyattr::cpu
