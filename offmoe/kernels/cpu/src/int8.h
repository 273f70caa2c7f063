// Integer weights x activations rounded to 8 bits, for any processor. x is rounded in groups of 32 columns: a number is
// code * scale, with scale = largest / 127 and code = x * (127 / largest), rounded to nearest even; both quotients are
// float32. Products are then exact in integers, 32 columns at a time, and summed in float32 with both scales.
//
// A prepared row: the codes of all groups, then a scale a group, then the codes' sum a group, which zero points take
// away. For nibbles the columns with even numbers lie before the odd ones in every group, as unpacking leaves them.
#pragma once
#include <algorithm>

#include "general.h"

namespace offmoe {
namespace {

constexpr int64_t kXGroup = 32;
// Largest numbers below this count as zero: dividing by them would overflow.
constexpr float kSmallest = 0x1p-100f;

// Whether x is rounded for this matrix. Others are multiplied as they always are.
inline bool takes_int8(const Matrix& matrix) {
    if (matrix.kind != INT8 && matrix.kind != INT4 && matrix.kind != MXFP4) return false;
    return !matrix.transposed && (matrix.group % kXGroup == 0 || matrix.group >= matrix.columns);
}

inline int64_t num_x_groups(const Matrix& matrix) { return (matrix.columns + kXGroup - 1) / kXGroup; }

// What is subtracted from codes as they are unpacked for a product: nibbles stay as they are, e2m1 is 2 * value + 12,
// bytes become signed. The product's weights are (unpacked - unpacked_zero) * scale.
inline float unpacked_zero(const Matrix& matrix, int64_t row, int64_t group) {
    if (matrix.kind == MXFP4) return 12.0f;
    const int64_t signs = matrix.kind == INT8 && !matrix.code_signed ? 128 : 0;
    return static_cast<float>(zero_at(matrix, row, group) - signs);
}

inline bool has_zero(const Matrix& matrix) {
    return matrix.kind != INT8 || matrix.zeros != nullptr || matrix.zero != (matrix.code_signed ? 0 : 128);
}

// 32 numbers to codes and their scale; a scale of NaN where one of them is not finite.
inline float round_group(const float* x, int8_t* codes) {
    const F32x16 first = load<F32x16>(x), second = load<F32x16>(x + kLanes);
    const F32x16 largest_of = maximum(maximum(first, -first), maximum(second, -second));
    float lanes[kLanes], largest = 0.0f;
    std::memcpy(lanes, &largest_of, sizeof lanes);
    bool finite = true;
    for (float lane : lanes) {
        finite &= lane <= 0x1.fffffep127f;
        largest = std::max(largest, lane);
    }
    if (!finite || largest < kSmallest) {
        std::memset(codes, 0, kXGroup);
        return finite ? 0.0f : NAN;
    }
    const double steps = 127.0f / largest;
    for (int64_t i = 0; i < kXGroup; ++i) {  // products are exact in doubles: a fused addition changes nothing
        const double shifted = x[i] * steps + 6755399441055744.0;  // 1.5 * 2^52: rounds to an integer
        codes[i] = static_cast<int8_t>(static_cast<int32_t>(shifted - 6755399441055744.0));
    }
    return largest / 127.0f;
}

struct Rounded {
    const int8_t* codes;
    const float* scales;
    const float* sums;

    Rounded(const void* prepared, int64_t num_groups)
        : codes(static_cast<const int8_t*>(prepared)),
          scales(reinterpret_cast<const float*>(codes + num_groups * kXGroup)), sums(scales + num_groups) {}
};

// LEVEL multiplies what is not rounded.
template <const Level& LEVEL>
int64_t int8_prepared_bytes(const Matrix& matrix, int32_t type) {
    if (!takes_int8(matrix)) return LEVEL.prepared_bytes(matrix, type);
    return (num_x_groups(matrix) * (kXGroup + 8) + 63) / 64 * 64;
}

template <const Level& LEVEL>
void int8_prepare(const Matrix& matrix, int32_t type, const float* x, void* prepared) {
    if (!takes_int8(matrix)) return LEVEL.prepare(matrix, type, x, prepared);
    const int64_t count = num_x_groups(matrix);
    int8_t* codes = static_cast<int8_t*>(prepared);
    float *scales = reinterpret_cast<float*>(codes + count * kXGroup), *sums = scales + count;
    for (int64_t group = 0; group < count; ++group, codes += kXGroup) {
        float last[kXGroup] = {};
        const float* from = x + group * kXGroup;
        if (group * kXGroup + kXGroup > matrix.columns) {
            std::memcpy(last, from, sizeof(float) * (matrix.columns - group * kXGroup));
            from = last;
        }
        int8_t rounded[kXGroup];
        scales[group] = round_group(from, rounded);
        int32_t sum = 0;
        for (int64_t i = 0; i < kXGroup; ++i) {
            sum += rounded[i];
            codes[in_nibbles(matrix) ? i / 2 + i % 2 * 16 : i] = rounded[i];
        }
        sums[group] = static_cast<float>(sum);
    }
    if (matrix.kind == MXFP4)  // weights are unpacked to twice their values
        for (int64_t group = 0; group < count; ++group) scales[group] *= 0.5f;
}

// One group of 32 columns after the other. `Unit` has an instruction set's vectors:
//   Weights unpack<KIND>(matrix, codes)     32 codes of a row, in the order of x
//   Sums    dot<KIND>(weights, x)           sums of their products, exact, as floats in lanes
//   total(sums)                             the lanes in one fixed order
template <class Unit, int32_t KIND, int T>
void int8_rows(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, float* out, int64_t stride) {
    constexpr int64_t group_bytes = KIND == INT8 ? kXGroup : kXGroup / 2;
    const int64_t count = num_x_groups(matrix), whole = matrix.columns / kXGroup;
    const bool zeros = has_zero(matrix);
    for (int64_t row = begin; row < end; ++row) {
        const uint8_t *codes = matrix.codes + row * matrix.row_bytes, *scales = scales_of(matrix, row);
        typename Unit::Sums sums[T] = {};
        float taken[T] = {}, scale = 0.0f, zero = 0.0f;
        int64_t left = 0, group_of_w = -1;
        alignas(64) uint8_t last[kXGroup] = {};
        for (int64_t group = 0; group < count; ++group, codes += group_bytes) {
            const uint8_t* from = codes;
            if (group == whole) {
                std::memcpy(last, codes, row_code_bytes(matrix) - whole * group_bytes);
                from = last;
            }
            if (left-- == 0) {
                scale = scale_at(matrix, scales, ++group_of_w);
                if (zeros) zero = unpacked_zero(matrix, row, group_of_w);
                left = matrix.group >= matrix.columns ? count : matrix.group / kXGroup - 1;
            }
            const typename Unit::Weights w = Unit::template unpack<KIND>(matrix, from);
            OFFMOE_UNROLL
            for (int t = 0; t < T; ++t) {
                const Rounded row_of_x(x[t], count);
                const float both = scale * row_of_x.scales[group];
                sums[t] += Unit::template dot<KIND>(w, row_of_x.codes + group * kXGroup) * both;
                if (zeros) taken[t] += zero * row_of_x.sums[group] * both;
            }
        }
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) out[t * stride + row - begin] = Unit::total(sums[t]) - taken[t];
    }
}

template <class Unit, int32_t KIND>
void int8_kind(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, int32_t num_x, float* out,
               int64_t stride) {
    for (; num_x >= 4; num_x -= 4, x += 4, out += 4 * stride) int8_rows<Unit, KIND, 4>(matrix, begin, end, x, out, stride);
    for (; num_x > 0; --num_x, ++x, out += stride) int8_rows<Unit, KIND, 1>(matrix, begin, end, x, out, stride);
}

template <class Unit, const Level& LEVEL>
void int8_multiply(const Matrix& matrix, int32_t type, int64_t begin, int64_t end, const void* const* x, int32_t num_x,
                   float* out, int64_t stride) {
    if (!takes_int8(matrix)) return LEVEL.multiply(matrix, type, begin, end, x, num_x, out, stride);
    for (; begin < end; begin += 8, out += 8) {  // a second pass finds the rows in the cache
        const int64_t stop = std::min(begin + 8, end);
        switch (matrix.kind) {
            case INT8: int8_kind<Unit, INT8>(matrix, begin, stop, x, num_x, out, stride); break;
            case INT4: int8_kind<Unit, INT4>(matrix, begin, stop, x, num_x, out, stride); break;
            default: int8_kind<Unit, MXFP4>(matrix, begin, stop, x, num_x, out, stride); break;
        }
    }
}

// 2 * e2m1 + 12 by its four bits.
constexpr uint8_t kE2m1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// The compiler's own vectors.
struct AnyUnit {
    using Sums = F32x16;
    struct Weights {
        I32x16 first, second;
    };

    template <int32_t KIND>
    static inline Weights unpack(const Matrix& matrix, const uint8_t* codes) {
        if constexpr (KIND == INT8) {
            const uint8_t flip = matrix.code_signed ? 0 : 0x80;
            return {__builtin_convertvector(bits<I8x16>(load<U8x16>(codes) ^ flip), I32x16),
                    __builtin_convertvector(bits<I8x16>(load<U8x16>(codes + 16) ^ flip), I32x16)};
        }
        uint8_t low[16], high[16];
        for (int i = 0; i < 16; ++i) {
            low[i] = KIND == MXFP4 ? kE2m1[codes[i] & 15] : codes[i] & 15;
            high[i] = KIND == MXFP4 ? kE2m1[codes[i] >> 4] : codes[i] >> 4;
        }
        return {__builtin_convertvector(load<U8x16>(low), I32x16), __builtin_convertvector(load<U8x16>(high), I32x16)};
    }

    template <int32_t KIND>
    static inline F32x16 dot(const Weights& w, const int8_t* x) {
        const I32x16 products = w.first * __builtin_convertvector(load<I8x16>(x), I32x16) +
                                w.second * __builtin_convertvector(load<I8x16>(x + 16), I32x16);
        return __builtin_convertvector(products, F32x16);
    }

    static inline float total(F32x16 sums) { return sum(sums); }
};

}  // namespace
}  // namespace offmoe
