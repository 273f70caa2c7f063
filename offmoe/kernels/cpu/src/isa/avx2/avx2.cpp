// AVX2: codes by kernels of their own, everything else in the compiler's vectors.
#include "isa/avx2/coded.h"
#include "isa/avx2/products.h"
#include "isa/generic/activate.h"
#include "isa/generic/attend.h"
#include "isa/generic/decode.h"

namespace offmoe {

void avx2_prepare_floats(const Matrix& matrix, int32_t type, const float* x, void* prepared) {
    coded_prepare<Avx2Vectors>(matrix, type, x, prepared);
}

void avx2_multiply_floats(const Matrix& matrix, int32_t type, int64_t begin, int64_t end, const void* const* x,
                          int32_t num_x, float* out, int64_t stride) {
    if (avx2_takes_tiles(matrix, num_x)) return avx2_multiply_tiles(matrix, begin, end, x, num_x, out, stride);
    coded_multiply<Avx2Vectors>(matrix, type, begin, end, x, num_x, out, stride);
}

const Isa kAvx2 = {"avx2", avx2_prepared_bytes, avx2_prepare, avx2_multiply,
    general_activate, norm_row, rotate, attend_any, delta_rule, mamba_rule, encode_avx2, pack_avx2, unpack_avx2};

}  // namespace offmoe
