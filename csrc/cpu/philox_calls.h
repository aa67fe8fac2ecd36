// Philox4x32-10 for a run of calls, at the instruction set of the file that includes this.
//
// philox_calls(first, calls, c1, c2, ...): words[4 i] to words[4 i + 3] are those of counter (first + i, c1, c2, 0). Writes whole
// vectors: words needs room for calls rounded up to a multiple of 8. Internal linkage: each SIMD file has its own copy.
#pragma once

#include <cstdint>

#include "common/philox.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace pyattr::cpu {
namespace {

#if defined(__AVX512F__)

void philox_calls(uint32_t first, int64_t calls, uint32_t c1, uint32_t c2, uint32_t seed, uint32_t stream, uint32_t* words) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  const __m512i lanes = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  for (int64_t i = 0; i < calls; i += 8) {
    __m512i x0 = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first) + i), lanes);
    __m512i x1 = _mm512_set1_epi64(c1), x2 = _mm512_set1_epi64(c2), x3 = _mm512_setzero_si512();
    uint32_t k0 = seed, k1 = stream;
    for (int r = 0; r < kPhiloxRounds; ++r, k0 += kPhiloxW0, k1 += kPhiloxW1) {
      const __m512i p0 = _mm512_mul_epu32(x0, m0), p1 = _mm512_mul_epu32(x2, m1);
      x0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), x1, _mm512_set1_epi64(k0), 0x96);  // a ^ b ^ c
      x2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), x3, _mm512_set1_epi64(k1), 0x96);
      x1 = p1, x3 = p0;
    }
    const __m512i low = _mm512_mask_blend_epi32(0xAAAA, x0, _mm512_slli_epi64(x1, 32));   // words 0 and 1 of 8 calls
    const __m512i high = _mm512_mask_blend_epi32(0xAAAA, x2, _mm512_slli_epi64(x3, 32));  // words 2 and 3
    const __m512i first_four = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    const __m512i last_four = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    _mm512_storeu_si512(words + 4 * i, _mm512_permutex2var_epi64(low, first_four, high));
    _mm512_storeu_si512(words + 4 * i + 16, _mm512_permutex2var_epi64(low, last_four, high));
  }
}

#elif defined(__AVX2__)

// Each 32-bit word lives in a 64-bit lane, where vpmuludq reads and writes it without shuffles; what is left in a lane's upper
// half is never read.
void philox_calls(uint32_t first, int64_t calls, uint32_t c1, uint32_t c2, uint32_t seed, uint32_t stream, uint32_t* words) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  for (int64_t i = 0; i < calls; i += 8) {  // two vectors hide the multiplier's latency
    const __m256i base = _mm256_set1_epi64x(static_cast<int64_t>(first) + i);
    __m256i x0[2] = {_mm256_add_epi64(base, _mm256_setr_epi64x(0, 1, 2, 3)), _mm256_add_epi64(base, _mm256_setr_epi64x(4, 5, 6, 7))};
    __m256i x1[2] = {_mm256_set1_epi64x(c1), _mm256_set1_epi64x(c1)};
    __m256i x2[2] = {_mm256_set1_epi64x(c2), _mm256_set1_epi64x(c2)}, x3[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    uint32_t k0 = seed, k1 = stream;
    for (int r = 0; r < kPhiloxRounds; ++r, k0 += kPhiloxW0, k1 += kPhiloxW1) {
      for (int v = 0; v < 2; ++v) {
        const __m256i p0 = _mm256_mul_epu32(x0[v], m0), p1 = _mm256_mul_epu32(x2[v], m1);
        x0[v] = _mm256_xor_si256(_mm256_srli_epi64(p1, 32), _mm256_xor_si256(x1[v], _mm256_set1_epi64x(k0)));
        x2[v] = _mm256_xor_si256(_mm256_srli_epi64(p0, 32), _mm256_xor_si256(x3[v], _mm256_set1_epi64x(k1)));
        x1[v] = p1, x3[v] = p0;
      }
    }
    for (int v = 0; v < 2; ++v) {
      const __m256i low = _mm256_blend_epi32(x0[v], _mm256_slli_epi64(x1[v], 32), 0b10101010);   // words 0 and 1 of 4 calls
      const __m256i high = _mm256_blend_epi32(x2[v], _mm256_slli_epi64(x3[v], 32), 0b10101010);  // words 2 and 3
      const __m256i even = _mm256_unpacklo_epi64(low, high), odd = _mm256_unpackhi_epi64(low, high);  // calls 0 2, 1 3
      __m256i* const out = reinterpret_cast<__m256i*>(words + 4 * (i + 4 * v));
      _mm256_storeu_si256(out, _mm256_permute2x128_si256(even, odd, 0x20));
      _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(even, odd, 0x31));
    }
  }
}

#else

void philox_calls(uint32_t first, int64_t calls, uint32_t c1, uint32_t c2, uint32_t seed, uint32_t stream, uint32_t* words) {
  for (int64_t i = 0; i < calls; ++i) {
    const PhiloxBlock x = philox4x32_10(first + static_cast<uint32_t>(i), c1, seed, stream, c2);
    for (int w = 0; w < 4; ++w) words[4 * i + w] = x.word[w];
  }
}

#endif

}  // namespace
}  // namespace pyattr::cpu
