// AVX2's products in three files, which are compiled at the same time: in floats, of several rows in floats, and those
// above them that choose.
#pragma once
#include "abi.h"

namespace offmoe {

void avx2_prepare_floats(const Matrix& matrix, int32_t type, const float* x, void* prepared);
void avx2_multiply_floats(const Matrix& matrix, int32_t type, int64_t begin, int64_t end, const void* const* x,
                          int32_t num_x, float* out, int64_t out_stride);

bool avx2_takes_tiles(const Matrix& matrix, int32_t num_x);
void avx2_multiply_tiles(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, int32_t num_x, float* out,
                         int64_t out_stride);

// As isa.h has them.
int64_t avx2_prepared_bytes(const Matrix& matrix, int32_t type);
void avx2_prepare(const Matrix& matrix, int32_t type, const float* x, void* prepared);
void avx2_multiply(const Matrix& matrix, int32_t type, int64_t begin, int64_t end, const void* const* x, int32_t num_x,
                   float* out, int64_t out_stride);

}  // namespace offmoe
