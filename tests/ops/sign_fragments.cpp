// The host half of the CUDA kernels' coordinate and number formats, as C functions for test_sign_fragments.py.
#include "cuda/sign_fragment.cuh"

#include "cuda/limbs.cuh"
#include "cuda/normal_entry.cuh"
#include "cuda/stage_layout.cuh"

using namespace pyattr;
using namespace pyattr::cuda;

namespace {
template <class Slots>
int slot_column(int lane, int quarter, int j, int e) {
  return Slots::group_column(lane, quarter, Slots::pair_group(j, e)) + Slots::pair_element(j, e);
}
template <int kSamples>
void unit(int index, int* out) {
  const StageUnit u = stage_unit<kSamples>(index);
  out[0] = u.sample, out[1] = u.lane, out[2] = u.quarter;
}
}  // namespace

extern "C" {
int slot_column_of_signs(int step, int half_register, int lane, int half) {
  return sign_slot_column(step, half_register, lane, half);
}
int staged_column(int normal, int lane, int quarter, int j, int e) {
  return normal ? slot_column<NormalSlots>(lane, quarter, j, e) : slot_column<SignSlots>(lane, quarter, j, e);
}
int staged_group(int normal, int lane, int quarter, int group) {
  return normal ? NormalSlots::group_column(lane, quarter, group) : SignSlots::group_column(lane, quarter, group);
}
void staged_unit(int samples, int index, int* out) {
  samples == 8 ? unit<8>(index, out) : samples == 32 ? unit<32>(index, out) : unit<64>(index, out);
}
int raw_byte(int element_bytes, int sample, int chunk) {
  return element_bytes == 4 ? raw_offset<4>(sample, chunk) : raw_offset<2>(sample, chunk);
}
int operand_byte(int samples, int sample, int lane, int quarter) {
  return samples == 8    ? operand_offset<8>(sample, lane, quarter)
         : samples == 32 ? operand_offset<32>(sample, lane, quarter)
                         : operand_offset<64>(sample, lane, quarter);
}

// registers[row][step][half_register][lane] of one block.
void sign_registers(uint32_t block, const uint32_t* rows, int num_rows, uint32_t seed, uint32_t stream, uint32_t minus_ones,
                    uint32_t* registers) {
  const PhiloxKeys keys = philox_keys(seed, stream);
  for (int r = 0; r < num_rows; ++r) {
    const PhiloxBlock call = philox4x32_10(block, rows[r], keys);
    for (int step = 0; step < 8; ++step) {
      for (int half_register = 0; half_register < 2; ++half_register) {
        for (int lane = 0; lane < 4; ++lane) {
          *registers++ = expand_signs(call.word[lane], 2 * step + half_register, minus_ones);
        }
      }
    }
  }
}

void normal_pairs(const uint32_t* a, const uint32_t* b, int64_t count, float* even, float* odd) {
  for (int64_t i = 0; i < count; ++i) {
    const NormalPair pair = normal_pair(a[i], b[i]);
    even[i] = pair.even, odd[i] = pair.odd;
  }
}

void limbs(int num_limbs, const uint32_t* bits, int64_t count, uint32_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    uint32_t two[2], three[3];
    num_limbs == 2 ? split_limbs(bits[i], two) : split_limbs(bits[i], three);
    for (int l = 0; l < num_limbs; ++l) *out++ = num_limbs == 2 ? two[l] : three[l];
  }
}
uint32_t packed(uint32_t low, uint32_t high) { return pack_upper(low, high); }
}
