// AVX-512: rows of weights with floats that are not bfloat16.
#include "isa/avx512/products.h"

#include "isa/avx512/coded_floats.h"

namespace offmoe {

void avx512_prepare_floats(const Matrix& matrix, int32_t type, const float* x, void* prepared) {
    coded_prepare<Avx512Vectors>(matrix, type, x, prepared);
}

void avx512_multiply_floats(const Matrix& matrix, int32_t type, int64_t begin, int64_t end, const void* const* x,
                            int32_t num_x, float* out, int64_t stride) {
    coded_multiply<Avx512Vectors>(matrix, type, begin, end, x, num_x, out, stride);
}

}  // namespace offmoe
