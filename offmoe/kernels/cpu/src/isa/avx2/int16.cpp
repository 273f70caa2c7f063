// AVX2: products of codes with activations rounded to 16-bit integers; all others in floats.
#include "isa/avx2/int16.h"
#include "isa/avx2/products.h"

namespace offmoe {

int64_t avx2_prepared_bytes(const Matrix& matrix, int32_t type) {
    const int64_t floats = coded_prepared_bytes(matrix, type);
    if (!in_int16(matrix, type)) return floats;
    const int64_t integers = Int16Row(matrix).num_bytes;
    return integers > kFormBytes + floats ? integers : kFormBytes + floats;
}

void avx2_prepare(const Matrix& matrix, int32_t type, const float* x, void* prepared) {
    if (!in_int16(matrix, type)) return avx2_prepare_floats(matrix, type, x, prepared);
    uint8_t* to = static_cast<uint8_t*>(prepared);
    const int32_t floats = round_row16(matrix, x, to) ? 0 : 1;
    std::memcpy(to, &floats, sizeof floats);
    if (floats) avx2_prepare_floats(matrix, type, x, to + kFormBytes);
}

void avx2_multiply(const Matrix& matrix, int32_t type, int64_t begin, int64_t end, const void* const* x, int32_t num_x,
                   float* out, int64_t stride) {
    if (!in_int16(matrix, type)) return avx2_multiply_floats(matrix, type, begin, end, x, num_x, out, stride);
    if (num_x <= 2) prefetch_rows(matrix, begin, end);
    multiply_by_form(
        x, num_x,
        [&](int32_t first, int32_t count) { int16_products(matrix, begin, end, x + first, count, out + first * stride, stride); },
        [&](int32_t row) {
            const void* floats = floats_of(x[row]);
            avx2_multiply_floats(matrix, type, begin, end, &floats, 1, out + row * stride, stride);
        });
}

}  // namespace offmoe
