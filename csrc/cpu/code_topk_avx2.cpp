#include "cpu/code_topk_body.h"

namespace pyattr::cpu {
PassingCodes code_search_avx2(int members) { return code_search(members); }
double code_value_avx2(const CodeTopkArgs& args, uint64_t code) { return code_value(args, code); }
}  // namespace pyattr::cpu
