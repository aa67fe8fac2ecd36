#include "cpu/layer_sketch_body.h"

namespace pyattr::cpu {
void layer_chunk_avx512(const LayerTask& task) { layer_chunk(task); }
void layer_rows_avx512(const RowsTask& task) { layer_rows(task); }
}  // namespace pyattr::cpu
