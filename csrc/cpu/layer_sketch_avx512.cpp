#include "cpu/layer_sketch_body.h"

namespace pyattr::cpu {
void layer_chunk_avx512(const LayerTask& task) { layer_chunk(task); }
}  // namespace pyattr::cpu
