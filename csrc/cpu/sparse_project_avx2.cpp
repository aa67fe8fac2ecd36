#include "cpu/sparse_project_body.h"

namespace pyattr::cpu {
void sketch_chunk_avx2(const SketchTask& task) { project_chunk(task); }
void transpose_chunk_avx2(const TransposeTask& task) { transpose_chunk(task); }
}  // namespace pyattr::cpu
