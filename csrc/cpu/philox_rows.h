// Philox4x32-10 for a run of rows, at the instruction set of the file that includes this.
//
// philox_rows(c0, first_row, rows, ...): words 0 and 1 (low[j]) and 2 and 3 (high[j]) of counter (c0, first_row + j, 0, 0). Writes
// whole vectors: low and high need room for rows rounded up to a multiple of 8. Internal linkage: each SIMD file has its own copy.
#pragma once

#include <cstdint>

#include "common/philox.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyattr::cpu {
namespace {

#if defined(__AVX512F__)

void philox_rows(uint32_t c0, int64_t first_row, int64_t rows, uint32_t seed, uint32_t stream, uint64_t* low,
                 uint64_t* high) {
  __m512i key0[kPhiloxRounds], key1[kPhiloxRounds];
  for (uint32_t r = 0; r < kPhiloxRounds; ++r) {
    key0[r] = _mm512_set1_epi64(seed + r * kPhiloxW0);
    key1[r] = _mm512_set1_epi64(stream + r * kPhiloxW1);
  }
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t j = 0; j < rows; j += 8) {
    __m512i x0 = _mm512_set1_epi64(c0), x1 = _mm512_add_epi64(_mm512_set1_epi64(first_row + j), lanes);
    __m512i x2 = _mm512_setzero_si512(), x3 = x2;
    for (int r = 0; r < kPhiloxRounds; ++r) {
      const __m512i p0 = _mm512_mul_epu32(x0, m0), p1 = _mm512_mul_epu32(x2, m1);
      x0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), x1, key0[r], 0x96);  // a ^ b ^ c
      x2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), x3, key1[r], 0x96);
      x1 = p1, x3 = p0;
    }
    _mm512_storeu_si512(low + j, _mm512_mask_blend_epi32(0xAAAA, x0, _mm512_slli_epi64(x1, 32)));
    _mm512_storeu_si512(high + j, _mm512_mask_blend_epi32(0xAAAA, x2, _mm512_slli_epi64(x3, 32)));
  }
}

#elif defined(__AVX2__)

// Each 32-bit word lives in a 64-bit lane, where vpmuludq reads and writes it without
// shuffles; what is left in a lane's upper half is never read.
void philox_rows(uint32_t c0, int64_t first_row, int64_t rows, uint32_t seed, uint32_t stream, uint64_t* low,
                 uint64_t* high) {
  __m256i key0[kPhiloxRounds], key1[kPhiloxRounds];
  for (uint32_t r = 0; r < kPhiloxRounds; ++r) {
    key0[r] = _mm256_set1_epi64x(seed + r * kPhiloxW0);
    key1[r] = _mm256_set1_epi64x(stream + r * kPhiloxW1);
  }
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  const __m256i call = _mm256_set1_epi64x(c0), zero = _mm256_setzero_si256();
  for (int64_t j = 0; j < rows; j += 8) {  // two vectors hide the multiplier's latency
    const __m256i row = _mm256_set1_epi64x(first_row + j);
    __m256i a0 = call, a1 = _mm256_add_epi64(row, _mm256_setr_epi64x(0, 1, 2, 3)), a2 = zero, a3 = zero;
    __m256i b0 = call, b1 = _mm256_add_epi64(row, _mm256_setr_epi64x(4, 5, 6, 7)), b2 = zero, b3 = zero;
    for (int r = 0; r < kPhiloxRounds; ++r) {
      const __m256i pa0 = _mm256_mul_epu32(a0, m0), pa1 = _mm256_mul_epu32(a2, m1);
      const __m256i pb0 = _mm256_mul_epu32(b0, m0), pb1 = _mm256_mul_epu32(b2, m1);
      a0 = _mm256_xor_si256(_mm256_srli_epi64(pa1, 32), _mm256_xor_si256(a1, key0[r]));
      b0 = _mm256_xor_si256(_mm256_srli_epi64(pb1, 32), _mm256_xor_si256(b1, key0[r]));
      a2 = _mm256_xor_si256(_mm256_srli_epi64(pa0, 32), _mm256_xor_si256(a3, key1[r]));
      b2 = _mm256_xor_si256(_mm256_srli_epi64(pb0, 32), _mm256_xor_si256(b3, key1[r]));
      a1 = pa1, a3 = pa0, b1 = pb1, b3 = pb0;
    }
    const auto join = [](__m256i first, __m256i second) {
      return _mm256_blend_epi32(first, _mm256_slli_epi64(second, 32), 0b10101010);
    };
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + j), join(a0, a1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + j + 4), join(b0, b1));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + j), join(a2, a3));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + j + 4), join(b2, b3));
  }
}

#else

void philox_rows(uint32_t c0, int64_t first_row, int64_t rows, uint32_t seed, uint32_t stream, uint64_t* low,
                 uint64_t* high) {
  for (int64_t j = 0; j < rows; ++j) {
    const PhiloxBlock x = philox4x32_10(c0, static_cast<uint32_t>(first_row + j), seed, stream);
    low[j] = x.word[0] | static_cast<uint64_t>(x.word[1]) << 32;
    high[j] = x.word[2] | static_cast<uint64_t>(x.word[3]) << 32;
  }
}

#endif

}  // namespace
}  // namespace pyattr::cpu
