// NEON with dot products of bytes: codes with activations rounded to integers; all others as NEON has them.
#include "isa/generic/activate.h"
#include "isa/generic/attend.h"
#include "isa/generic/decode.h"
#include "isa/neon_dot/integers.h"

namespace offmoe {
namespace {

int64_t prepared_bytes(const Matrix& matrix, int32_t type) {
    return coded_prepared_bytes(matrix, type) + (in_int16(matrix, type) ? kFormBytes : 0);
}

void prepare(const Matrix& matrix, int32_t type, const float* x, void* prepared) {
    if (!in_int16(matrix, type)) return kNeon.prepare(matrix, type, x, prepared);
    uint8_t* to = static_cast<uint8_t*>(prepared);
    const int32_t floats = round_row(matrix, x, to + kFormBytes) ? 0 : 1;
    std::memcpy(to, &floats, sizeof floats);
    if (floats) kNeon.prepare(matrix, type, x, to + kFormBytes);
}

void multiply(const Matrix& matrix, int32_t type, int64_t begin, int64_t end, const void* const* x, int32_t num_x, float* out,
              int64_t stride) {
    if (!in_int16(matrix, type)) return kNeon.multiply(matrix, type, begin, end, x, num_x, out, stride);
    if (num_x <= 2) prefetch_rows(matrix, begin, end);
    const void* rows[8];
    for (; begin < end; begin += 8, out += 8) {  // a second pass finds the rows in the cache
        const int64_t stop = begin + 8 < end ? begin + 8 : end;
        multiply_by_form(
            x, num_x,
            [&](int32_t first, int32_t count) {
                for (int32_t done = 0; done < count; done += 8) {
                    const int32_t some = count - done < 8 ? count - done : 8;
                    for (int32_t i = 0; i < some; ++i) rows[i] = floats_of(x[first + done + i]);
                    integer_products(matrix, begin, stop, rows, some, out + (first + done) * stride, stride);
                }
            },
            [&](int32_t row) {
                const void* floats = floats_of(x[row]);
                kNeon.multiply(matrix, type, begin, stop, &floats, 1, out + row * stride, stride);
            });
    }
}

}  // namespace

const Isa kNeonDot = {"neon_dot", prepared_bytes, prepare, multiply, general_activate,
                      norm_row, rotate, attend_any, delta_rule, mamba_rule, encode_neon, pack_neon, unpack_neon};

}  // namespace offmoe
