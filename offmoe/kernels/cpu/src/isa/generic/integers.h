// Rows of x rounded to 16-bit integers: which products take them, and the rows among them that stay in floats.
#pragma once
#include "isa/generic/pieces.h"

namespace offmoe {
namespace {

// Integers are multiplied with codes of at most 8 bits.
constexpr bool is_int16_kind(int32_t kind) { return !is_dense(kind) && kind != FP8; }

inline bool in_int16(const Matrix& matrix, int32_t type) {
    return type != F32 && is_int16_kind(matrix.kind) && takes_codes(matrix);
}

// Exponents, as floats have them, of the largest number of a group that is rounded: 2^-64 to 2^65.
constexpr uint32_t kLeastExponent = 127 - 64, kMostExponent = 127 + 64;

// What a prepared row begins with: whether it is in floats, which then follow.
constexpr int64_t kFormBytes = 64;
inline bool is_floats(const void* prepared) { return load<int32_t>(prepared) != 0; }
inline const void* floats_of(const void* prepared) { return static_cast<const uint8_t*>(prepared) + kFormBytes; }

// Calls `integers(first, count)` for neighbouring rows of x in integers, and `floats(row)` for each one in floats.
template <class Integers, class Floats>
inline void multiply_by_form(const void* const* x, int32_t num_x, Integers integers, Floats floats) {
    for (int32_t first = 0, next; first < num_x; first = next) {
        next = first;
        while (next < num_x && !is_floats(x[next])) ++next;
        if (next > first) integers(first, next - first);
        for (; next < num_x && is_floats(x[next]); ++next) floats(next);
    }
}

}  // namespace
}  // namespace offmoe
