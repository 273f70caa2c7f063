// AVX2: products of several rows of x with weights that are numbers.
#include "isa/avx2/products.h"
#include "isa/avx2/tiles.h"

namespace offmoe {

bool avx2_takes_tiles(const Matrix& matrix, int32_t num_x) { return takes_tiles(matrix, num_x); }

void avx2_multiply_tiles(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, int32_t num_x, float* out,
                         int64_t stride) {
    tiled_multiply(matrix, begin, end, x, num_x, out, stride);
}

}  // namespace offmoe
