// Rows of attention and of a tangent of it; included by one file per SIMD level, with internal linkage throughout.
//
// Every product has its right operand packed into panels of two registers' columns, [inner][columns], and is summed in kTileRows x 2
// registers. Order of summation, the same at every level: an entry of a product is one chain of fused multiply-adds for each kInner
// of the inner dimension, chains added in order; a row's sums are 16 interleaved ones, then a tree. Floor: the multiply-adds, two
// vectors of them a cycle (41 G a second of a library's 43 on a Zen 3 core, L = E = 256).
#include <algorithm>
#include <cmath>

#include "common/narrow.h"
#include "cpu/attention_task.h"
#include "cpu/registers.h"
#include "cpu/stage.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyattr::cpu {
namespace {

using reg = register_t<kRegisterLanes>;
typedef int32_t ireg __attribute__((vector_size(4 * kRegisterLanes)));
typedef uint32_t ureg __attribute__((vector_size(4 * kRegisterLanes)));  // where bits may run over

constexpr int64_t kPanel = 2 * kRegisterLanes;
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#else
constexpr int kTileRows = 6;
#endif
constexpr int64_t kInner = 256;
constexpr int kSums = 16;  // interleaved sums of a row
constexpr int kSumRegisters = kSums / kRegisterLanes;

inline reg multiply_add(reg a, reg b, reg c) {
#if defined(__AVX512F__)
  return (reg)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (reg)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  for (int i = 0; i < kRegisterLanes; ++i) c[i] = std::fma(a[i], b[i], c[i]);  // the same bits, without the speed
  return c;
#endif
}

inline reg splat(float x) {
#if defined(__AVX512F__)
  return (reg)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (reg)_mm256_set1_ps(x);
#else
  return reg{x, x, x, x};
#endif
}

inline reg load(const float* from) {
  reg value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
inline void store(float* to, reg value) { std::memcpy(to, &value, sizeof value); }

inline reg only_where(ireg mask, reg a) { return (reg)((ireg)a & mask); }

// c[m * c_stride + j] (+)= sum over i of a[m * a_stride + i] * panel[i * kPanel + j] for m < kRows, j < kPanel.
template <int kRows>
inline void multiply_tile(const float* a, int64_t a_stride, const float* panel, int64_t inner, bool add, float* c, int64_t c_stride) {
  reg sum[kRows][2] = {};
  for (int64_t i = 0; i < inner; ++i, panel += kPanel) {
    const reg b[2] = {load(panel), load(panel + kRegisterLanes)};
#pragma GCC unroll 12
    for (int m = 0; m < kRows; ++m) {
      const reg row = splat(a[m * a_stride + i]);
      sum[m][0] = multiply_add(row, b[0], sum[m][0]);
      sum[m][1] = multiply_add(row, b[1], sum[m][1]);
    }
  }
#pragma GCC unroll 12
  for (int m = 0; m < kRows; ++m) {
    float* const to = c + m * c_stride;
    store(to, add ? load(to) + sum[m][0] : sum[m][0]);
    store(to + kRegisterLanes, add ? load(to + kRegisterLanes) + sum[m][1] : sum[m][1]);
  }
}

template <int kRows = kTileRows - 1>
inline void multiply_last(int64_t rows, const float* a, int64_t a_stride, const float* panel, int64_t inner, bool add, float* c,
                          int64_t c_stride) {
  if constexpr (kRows > 0) {
    if (rows == kRows) return multiply_tile<kRows>(a, a_stride, panel, inner, add, c, c_stride);
    multiply_last<kRows - 1>(rows, a, a_stride, panel, inner, add, c, c_stride);
  }
}

// c [rows, c_stride] (+)= a [rows, inner] times the packed [inner, columns]; writes whole panels.
inline void multiply(const float* a, int64_t a_stride, int64_t rows, const float* packed, int64_t inner, int64_t columns, bool add,
                     float* c, int64_t c_stride) {
  for (int64_t column = 0; column < columns; column += kPanel, packed += inner * kPanel) {
    int64_t i = 0;
    do {  // an empty sum is written too
      const int64_t count = std::min(kInner, inner - i);
      const float* const panel = packed + i * kPanel;
      int64_t m = 0;
      for (; m + kTileRows <= rows; m += kTileRows)
        multiply_tile<kTileRows>(a + m * a_stride + i, a_stride, panel, count, add || i > 0, c + m * c_stride + column, c_stride);
      multiply_last(rows - m, a + m * a_stride + i, a_stride, panel, count, add || i > 0, c + m * c_stride + column, c_stride);
      i += kInner;
    } while (i < inner);
  }
}

template <typename T, typename Widen>
void pack_panels(const AttentionPack& task, Widen widen_one) {
  const int64_t I = task.inner;
  for (int64_t p = task.begin; p < task.end; ++p) {
    float* const to = task.packed + p * I * kPanel;
    const T* const from = static_cast<const T*>(task.source) + p * kPanel * task.column_stride;
    const int64_t columns = std::min(kPanel, task.columns - p * kPanel);
    if (columns < kPanel) std::fill_n(to, I * kPanel, 0.0f);
    if (task.column_stride == 1 && columns == kPanel) {
      for (int64_t i = 0; i < I; ++i)
        for (int64_t j = 0; j < kPanel; ++j) to[i * kPanel + j] = widen_one(from[i * task.inner_stride + j]);
    } else {
      for (int64_t i = 0; i < I; ++i)
        for (int64_t j = 0; j < columns; ++j) to[i * kPanel + j] = widen_one(from[i * task.inner_stride + j * task.column_stride]);
    }
  }
}

void pack(const AttentionPack& task) {
  switch (task.dtype) {
    case Dtype::float32:
      return pack_panels<float>(task, widen);
    case Dtype::bfloat16:
      return pack_panels<uint16_t>(task, widen_bfloat16);
    case Dtype::float16:
      return pack_panels<uint16_t>(task, widen_float16);
  }
}

inline int64_t at(const AttentionOperand& operand, int64_t k, int64_t b, int64_t h, int64_t row) {
  return k * operand.strides[0] + b * operand.strides[1] + h * operand.strides[2] + row * operand.strides[3];
}

template <typename T, typename Widen>
void widen_rows(const T* from, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, float* to, int64_t stride,
                Widen widen_one) {
  for (int64_t m = 0; m < rows; ++m) {
    const T* const row = from + m * row_stride;
    if (column_stride == 1) {
      for (int64_t i = 0; i < columns; ++i) to[m * stride + i] = widen_one(row[i]);
    } else {
      for (int64_t i = 0; i < columns; ++i) to[m * stride + i] = widen_one(row[i * column_stride]);
    }
  }
}

// The task's rows of the queries, or of their tangent k, as [rows, stride] float32.
void take_queries(const AttentionRows& task, const AttentionOperand& operand, int64_t k, float* to, int64_t stride) {
  const AttentionJvpArgs& args = *task.args;
  const int64_t first = at(operand, k, task.b, task.h, task.first), row = operand.strides[3], column = operand.strides[4];
  const float* const wide = static_cast<const float*>(operand.data) + first;
  const uint16_t* const narrow = static_cast<const uint16_t*>(operand.data) + first;
  switch (args.dtype) {
    case Dtype::float32:
      return widen_rows(wide, task.rows, args.width, row, column, to, stride, widen);
    case Dtype::bfloat16:
      return widen_rows(narrow, task.rows, args.width, row, column, to, stride, widen_bfloat16);
    case Dtype::float16:
      return widen_rows(narrow, task.rows, args.width, row, column, to, stride, widen_float16);
  }
}

// [rows, V] of a tile as the rows of `out`, contiguous.
void give_rows(const AttentionRows& task, const float* from, void* out) {
  const AttentionJvpArgs& args = *task.args;
  const int64_t V = args.value_width;
  const int64_t first = (((task.k * args.batch + task.b) * args.heads + task.h) * args.queries + task.first) * V;
  for (int64_t m = 0; m < task.rows; ++m, from += task.values_stride) {
    float* const wide = static_cast<float*>(out) + first + m * V;
    uint16_t* const narrow = static_cast<uint16_t*>(out) + first + m * V;
    switch (args.dtype) {
      case Dtype::float32:
        std::memcpy(wide, from, static_cast<size_t>(V) * sizeof(float));
        break;
      case Dtype::bfloat16:
        for (int64_t i = 0; i < V; ++i) narrow[i] = narrow_bfloat16(from[i]);
        break;
      case Dtype::float16:
        for (int64_t i = 0; i < V; ++i) narrow[i] = narrow_float16(from[i]);
        break;
    }
  }
}

// What is added to the scores of query l: the mask's entry, -inf where the pair is forbidden and beyond the keys.
void row_bias(const AttentionRows& task, int64_t l, float* bias) {
  const AttentionJvpArgs& args = *task.args;
  const int64_t S = args.keys;
  const int64_t first = task.b * args.mask_strides[0] + task.h * args.mask_strides[1] + l * args.mask_strides[2];
  const int64_t last = args.causal ? std::min(S, l + 1) : S, step = args.mask_strides[3];
  switch (args.mask_kind) {
    case MaskKind::none:
      std::fill_n(bias, last, 0.0f);
      break;
    case MaskKind::allowed:
      for (int64_t s = 0; s < last; ++s) bias[s] = static_cast<const uint8_t*>(args.mask)[first + s * step] ? 0.0f : -HUGE_VALF;
      break;
    case MaskKind::added:
      for (int64_t s = 0; s < last; ++s) bias[s] = static_cast<const float*>(args.mask)[first + s * step];
      break;
  }
  std::fill_n(bias + last, task.keys_stride - last, -HUGE_VALF);
}

// e^x for x <= 0, 0 below -87; NaN for NaN. 2^z = 2^n 2^f with |f| <= 1/2 and 2^f by a polynomial: relative error below 2e-7.
inline reg exponential(reg x) {
  const reg shifted = multiply_add(x, splat(0x1.715476p0f), splat(0x1.8p23f));  // whose last bits are n
  reg f = multiply_add(x, splat(0x1.715476p0f), 0x1.8p23f - shifted);
  f = multiply_add(x, splat(0x1.4ae0cp-26f), f);
  reg p = multiply_add(splat(0.001326472731307149f), f, splat(0.009671512991189957f));
  p = multiply_add(p, f, splat(0.05550733581185341f));
  p = multiply_add(p, f, splat(0.24022242426872253f));
  p = multiply_add(p, f, splat(0.6931470036506653f));
  p = multiply_add(p, f, splat(1.0f));
  const reg power = (reg)(((ureg)shifted << 23) + 0x3f800000u);
  return only_where(~(ireg)(x < -87.0f), p * power);
}

struct RowSum {
  reg parts[kSumRegisters] = {};

  float total() const {
    float values[kSums];
    std::memcpy(values, parts, sizeof values);
    for (int width = kSums / 2; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) values[i] += values[i + width];
    return values[0];
  }
};

// Scores [keys_stride] to probabilities. A row of nothing but -inf becomes zeros.
void softmax(float* scores, const float* bias, int64_t count, float scale) {
  reg most = splat(-HUGE_VALF);
  for (int64_t s = 0; s < count; s += kRegisterLanes) {
    const ireg forbidden = (ireg)(load(bias + s) == -HUGE_VALF);  // whatever its score
    const reg x = load(scores + s) * splat(scale) + load(bias + s);
    const reg score = (reg)(((ireg)x & ~forbidden) | ((ireg)splat(-HUGE_VALF) & forbidden));
    store(scores + s, score);
    const ireg more = (ireg)(score > most);
    most = (reg)(((ireg)score & more) | ((ireg)most & ~more));
  }
  float largest = -HUGE_VALF;  // a NaN among the scores may be missed: its exponential is NaN
  for (int i = 0; i < kRegisterLanes; ++i) largest = most[i] > largest ? most[i] : largest;
  const reg base = splat(largest == -HUGE_VALF ? 0.0f : largest);
  RowSum sum;
  for (int64_t s = 0; s < count; s += kSums) {
    for (int r = 0; r < kSumRegisters; ++r) {
      const reg e = exponential(load(scores + s + r * kRegisterLanes) - base);
      store(scores + s + r * kRegisterLanes, e);
      sum.parts[r] += e;
    }
  }
  const float total = sum.total();
  const reg all = splat(total == 0.0f ? 1.0f : total);
  for (int64_t s = 0; s < count; s += kRegisterLanes) {
    const ireg forbidden = (ireg)(load(bias + s) == -HUGE_VALF);
    const reg p = only_where(~forbidden, load(scores + s) / all);
    store(scores + s, (reg)((ireg)p | ((ireg)splat(-0.0f) & forbidden)));
  }
}

void primal(const AttentionRows& task) {
  const AttentionJvpArgs& args = *task.args;
  const int64_t stride = (args.width + kAttentionLanes - 1) / kAttentionLanes * kAttentionLanes;
  float* const queries = task.scratch;
  float* const bias = queries + task.rows * stride;
  float* const out = bias + task.keys_stride;
  take_queries(task, args.query, 0, queries, stride);
  float* const scores = task.probabilities;
  multiply(queries, stride, task.rows, task.key, args.width, args.keys, false, scores, task.keys_stride);
  for (int64_t m = 0; m < task.rows; ++m) {
    row_bias(task, task.first + m, bias);
    softmax(scores + m * task.keys_stride, bias, task.keys_stride, args.scale);
  }
  multiply(scores, task.keys_stride, task.rows, task.value, args.keys, args.value_width, false, out, task.values_stride);
  give_rows(task, out, args.y);
}

inline ireg forbidden(reg p) { return (ireg)p == INT32_MIN; }  // -0.0

// Tangents of scores to those of probabilities: P * (S_dot - rowsum(P * S_dot)), S_dot = scale * scores_dot.
void softmax_dot(const float* probabilities, float* scores_dot, int64_t count, float scale) {
  RowSum sum;
  for (int64_t s = 0; s < count; s += kSums) {
    for (int r = 0; r < kSumRegisters; ++r) {
      const reg p = load(probabilities + s + r * kRegisterLanes);
      const reg scaled = only_where(~forbidden(p), load(scores_dot + s + r * kRegisterLanes) * splat(scale));
      store(scores_dot + s + r * kRegisterLanes, scaled);
      sum.parts[r] = multiply_add(p, scaled, sum.parts[r]);
    }
  }
  const reg mean = splat(sum.total());
  for (int64_t s = 0; s < count; s += kRegisterLanes) {
    const reg p = load(probabilities + s);
    store(scores_dot + s, only_where(~forbidden(p), p * (load(scores_dot + s) - mean)));
  }
}

void tangent(const AttentionRows& task) {
  const AttentionJvpArgs& args = *task.args;
  const int64_t stride = (args.width + kAttentionLanes - 1) / kAttentionLanes * kAttentionLanes;
  float* const queries = task.scratch;
  float* const weights = queries + task.rows * stride;
  float* const out = weights + task.rows * task.keys_stride;
  const bool moved = args.query_dot.data != nullptr || task.key_dot != nullptr;
  if (moved) {
    if (args.query_dot.data != nullptr) {
      take_queries(task, args.query_dot, task.k, queries, stride);
      multiply(queries, stride, task.rows, task.key, args.width, args.keys, false, weights, task.keys_stride);
    }
    if (task.key_dot != nullptr) {
      take_queries(task, args.query, 0, queries, stride);
      multiply(queries, stride, task.rows, task.key_dot, args.width, args.keys, args.query_dot.data != nullptr, weights,
               task.keys_stride);
    }
    for (int64_t m = 0; m < task.rows; ++m)
      softmax_dot(task.probabilities + m * task.keys_stride, weights + m * task.keys_stride, task.keys_stride, args.scale);
    multiply(weights, task.keys_stride, task.rows, task.value, args.keys, args.value_width, false, out, task.values_stride);
  }
  if (task.value_dot != nullptr)
    multiply(task.probabilities, task.keys_stride, task.rows, task.value_dot, args.keys, args.value_width, moved, out,
             task.values_stride);
  give_rows(task, out, args.y_dot);
}

constexpr AttentionKernels kAttentionKernels{kPanel, kTileRows, pack, primal, tangent};

}  // namespace
}  // namespace pyattr::cpu
