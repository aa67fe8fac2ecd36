#include "code_topk.h"

#include <stdexcept>

#include "bind/bind.h"

namespace {
void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}
}  // namespace

void bind_code_topk(pybind11::module_& m) {
  m.def("code_topk_planes", [](int members) { return pyattr::code_planes_before(pyattr::code_pieces(members)); });
  m.def("code_topk_cpu", [](uintptr_t codes, int64_t num_codes, int64_t first, int members, uintptr_t matrix, uintptr_t tables,
                            double scale, double error, double slack, bool largest, int64_t k, int64_t found, uintptr_t values,
                            uintptr_t indices, int num_threads) {
    require(members >= 2 && members <= pyattr::kCodeMembers, "members must lie in [2, 64]");
    require(num_codes >= 0 && k >= 1 && found >= 0 && found <= k, "sizes must not be negative, k positive, found at most k");
    require((codes != 0 || num_codes == 0) && matrix != 0 && tables != 0 && values != 0 && indices != 0, "an array is a null address");
    require(codes % sizeof(uint64_t) == 0 && tables % 32 == 0, "an array is not aligned");
    const pyattr::CodeTopkArgs args{reinterpret_cast<const uint64_t*>(codes), num_codes, first, members,
                                    reinterpret_cast<const int64_t*>(matrix), reinterpret_cast<const int16_t*>(tables),
                                    scale, error, slack, largest, k, found,
                                    reinterpret_cast<double*>(values), reinterpret_cast<int64_t*>(indices)};
    pybind11::gil_scoped_release release;
    const pyattr::CodesFound done = pyattr::cpu::code_topk(args, num_threads);
    return std::pair<int64_t, int64_t>(done.found, done.bad);
  });
}
