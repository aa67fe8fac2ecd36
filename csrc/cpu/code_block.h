// What code_topk's kernels do with a block of codes; one file per SIMD level defines it.
#pragma once

#include "code_topk.h"

namespace pyattr::cpu {

constexpr int64_t kCodeBlock = 512;

struct CodeBlock {
  const CodeTopkArgs& args;
  int32_t limits[kCodeMembers + 1];  // by h, of |R c|^2 times scale^2; a code passes at its limit
};

// Writes the places of the codes that pass, and returns how many; where one of them has a bit from n on, only
// the places of codes that are to be refused. count is at most kCodeBlock.
using PassingCodes = int64_t (*)(const CodeBlock& block, const uint64_t* codes, int64_t count, int32_t* passing);
// v(c).
using CodeValue = double (*)(const CodeTopkArgs& args, uint64_t code);

}  // namespace pyattr::cpu
