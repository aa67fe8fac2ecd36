#include "cpu/layer_sketch_body.h"

namespace pyattr::cpu {
void layer_chunk_avx2(const LayerTask& task) { layer_chunk(task); }
}  // namespace pyattr::cpu
