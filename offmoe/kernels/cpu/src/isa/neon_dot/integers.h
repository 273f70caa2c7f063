// Rows of codes x activations rounded to 16-bit integers, for NEON with dot products of bytes (FEAT_DotProd): `sdot`
// multiplies sixteen pairs of bytes exactly and adds up each four, so activations are two bytes: 256 * upper + lower.
//
// 32 activations share a unit, a power of two of which the largest of them is less than 2^15; at least 2^14, or 16,319 where
// it would be more than 32,639, which two signed bytes do not hold. Rounded to whole units, each is off by at most half a unit,
// less than 2^-14.9 of that largest one. Codes times these integers are added up in 32 bits without a further error: at most
// 128 * 2^15 * 8 = 2^25 a lane. The unit and the weights' scale then make a float of them, as coded.h does.
//
// A row whose numbers are infinite or NaN, or in which some group's largest one is not zero and outside 2^-64 to 2^65, is
// kept in floats and multiplied as coded.h does. That depends on the row alone.
#pragma once
#include "isa/generic/integers.h"
#include "isa/neon/coded.h"

namespace offmoe {
namespace {

constexpr int32_t kMostInteger = 127 * 256 + 127;

// 32 activations: upper bytes, lower bytes, unit. As long as 32 floats, in whose places coded.h looks for it.
struct IntegerPiece {
    int8_t upper[kPiece], lower[kPiece];
    float unit;
    float unused[kPiece / 2 - 1];
};
static_assert(sizeof(IntegerPiece) == kPiece * sizeof(float), "a piece lies where 32 floats would");

// The Unit of coded.h whose numbers are bytes.
struct NeonDotVectors : NeonVectors {
    typedef TwoBytes Weights;

    static OFFMOE_INLINE Weights widen(I8x32 bytes) { return offmoe::bits<TwoBytes>(bytes); }

    static OFFMOE_INLINE Vec dot(const Weights& w, const float* x) {
        const uint8_t* from = reinterpret_cast<const uint8_t*>(x);
        const int32x4_t upper = vdotq_s32(vdotq_s32(vdupq_n_s32(0), w.first, part(from, 0)), w.second, part(from, 1));
        const int32x4_t lower = vdotq_s32(vdotq_s32(vdupq_n_s32(0), w.first, part(from, 2)), w.second, part(from, 3));
        return vmulq_n_f32(both(upper, lower), x[kPiece / 2]);
    }

    static OFFMOE_INLINE Vec dot_halves(const Weights& w, const float* x, float a, float b) {
        const uint8_t* from = reinterpret_cast<const uint8_t*>(x);
        const int32x4_t none = vdupq_n_s32(0);
        const float32x4_t first = both(vdotq_s32(none, w.first, part(from, 0)), vdotq_s32(none, w.first, part(from, 2)));
        const float32x4_t second = both(vdotq_s32(none, w.second, part(from, 1)), vdotq_s32(none, w.second, part(from, 3)));
        return vmulq_n_f32(vfmaq_n_f32(vmulq_n_f32(first, a), second, b), x[kPiece / 2]);
    }

private:
    static OFFMOE_INLINE int8x16_t part(const uint8_t* from, int i) { return load<int8x16_t>(from + 16 * i); }
    static OFFMOE_INLINE float32x4_t both(int32x4_t upper, int32x4_t lower) {
        return vcvtq_f32_s32(vaddq_s32(vshlq_n_s32(upper, 8), lower));
    }
};

// 32 floats as integers. False where they have no unit.
inline bool round_piece(const float* x, int32_t* out, float* unit) {
    float largest = 0.0f;
    for (int64_t i = 0; i < kPiece; ++i) {
        const float magnitude = std::fabs(x[i]);
        if (!(magnitude <= 0x1p65f)) return false;
        largest = magnitude > largest ? magnitude : largest;
    }
    const uint32_t exponent = bits<uint32_t>(largest) >> 23;
    if (largest != 0.0f && (exponent < kLeastExponent || exponent > kMostExponent)) return false;
    float inverse = largest == 0.0f ? 0.0f : bits<float>((268 - exponent) << 23);
    *unit = largest == 0.0f ? 0.0f : bits<float>((exponent - 14) << 23);
    if (largest * inverse > kMostInteger) inverse *= 0.5f, *unit *= 2.0f;
    for (int64_t i = 0; i < kPiece; i += 4) vst1q_s32(out + i, vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + i), inverse)));
    return true;
}

// A row as `coded_prepare` has it, of integers. False where some piece has no unit.
inline bool round_row(const Matrix& matrix, const float* x, uint8_t* prepared) {
    const int64_t count = num_pieces(matrix);
    float* sums = reinterpret_cast<float*>(prepared) + count * kPiece;
    int64_t column_at[kPiece];
    for (int64_t at = 0; at < kPiece; ++at) column_at[at] = in_nibbles(matrix) ? at % 16 * 2 + at / 16 : at;
    for (int64_t piece = 0; piece < count; ++piece, prepared += sizeof(IntegerPiece)) {
        const int64_t begin = piece * kPiece, left = matrix.columns - begin;
        float numbers[kPiece] = {};
        std::memcpy(numbers, x + begin, static_cast<size_t>(left < kPiece ? left : kPiece) * sizeof(float));
        int32_t whole[kPiece], sum = 0;
        IntegerPiece made = {};
        if (!round_piece(numbers, whole, &made.unit)) return false;
        for (int64_t at = 0; at < kPiece; ++at) {
            const int32_t number = whole[column_at[at]], upper = (number + 128) >> 8;
            made.upper[at] = static_cast<int8_t>(upper);
            made.lower[at] = static_cast<int8_t>(number - 256 * upper);
            sum += number;
        }
        sums[piece] = static_cast<float>(sum) * made.unit;
        if (matrix.kind == MXFP4) made.unit *= 0.5f;  // of twice the numbers
        std::memcpy(prepared, &made, sizeof made);
    }
    for (int64_t piece = count; piece < whole_eights(count); ++piece) sums[piece] = 0.0f;
    return true;
}

// Rows of x that are all in integers.
inline void integer_products(const Matrix& matrix, int64_t begin, int64_t end, const void* const* x, int32_t num_x, float* out,
                             int64_t stride) {
    using Unit = NeonDotVectors;
    const bool zeros = matrix.zeros != nullptr;
    switch (matrix.kind) {
        case INT8:
            if (zeros || matrix.zero != (matrix.code_signed ? 0 : 128))
                return coded_kind<Unit, INT8, true>(matrix, begin, end, x, num_x, out, stride);
            return coded_kind<Unit, INT8, false>(matrix, begin, end, x, num_x, out, stride);
        case INT4:
            if (zeros || matrix.zero != 8) return coded_kind<Unit, INT4, true>(matrix, begin, end, x, num_x, out, stride);
            return coded_kind<Unit, INT4, false>(matrix, begin, end, x, num_x, out, stride);
        case MXFP4: return coded_kind<Unit, MXFP4, false>(matrix, begin, end, x, num_x, out, stride);
        case Q4_0: return coded_kind<Unit, Q4_0, false>(matrix, begin, end, x, num_x, out, stride);
        case Q8_0: return coded_kind<Unit, Q8_0, false>(matrix, begin, end, x, num_x, out, stride);
        case Q4_K: return coded_kind<Unit, Q4_K, false>(matrix, begin, end, x, num_x, out, stride);
        case Q5_K: return coded_kind<Unit, Q5_K, false>(matrix, begin, end, x, num_x, out, stride);
        case Q6_K: return coded_kind<Unit, Q6_K, false>(matrix, begin, end, x, num_x, out, stride);
        case IQ4_NL: return coded_kind<Unit, IQ4_NL, false>(matrix, begin, end, x, num_x, out, stride);
        case IQ4_XS: return coded_kind<Unit, IQ4_XS, false>(matrix, begin, end, x, num_x, out, stride);
        default: return coded_kind<Unit, MXFP4_BLOCKS, false>(matrix, begin, end, x, num_x, out, stride);
    }
}

}  // namespace
}  // namespace offmoe
