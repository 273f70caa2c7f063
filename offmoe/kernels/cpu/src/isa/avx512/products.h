// AVX-512's products in two files, which are compiled at the same time: with floats, and those with bfloat16.
#pragma once
#include "abi.h"

namespace offmoe {

// As isa.h has them.
void avx512_prepare_floats(const Matrix& matrix, int32_t type, const float* x, void* prepared);
void avx512_multiply_floats(const Matrix& matrix, int32_t type, int64_t begin, int64_t end, const void* const* x,
                            int32_t num_x, float* out, int64_t out_stride);

}  // namespace offmoe
