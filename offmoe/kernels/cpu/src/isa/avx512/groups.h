// Scales and zero points of a row as floats, made once a row: the loops over columns only load them.
#pragma once
#include "isa/avx512/dot.h"

namespace offmoe {
namespace {

// More groups than any model has in a row; a matrix with more is left to the general kernels.
constexpr int64_t kMostGroups = 2048;

struct RowGroups {
    // A loop may load a whole vector from any of them.
    alignas(64) float scales[kMostGroups + kLanes];
    alignas(64) float zeros[kMostGroups + kLanes];
};

OFFMOE_INLINE __mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>(count >= kLanes ? 0xffff : (1 << count) - 1); }

inline int64_t num_groups(const Matrix& matrix) { return (matrix.columns + matrix.group - 1) / matrix.group; }

inline void load_scales(const Matrix& matrix, int64_t row, int64_t count, RowGroups& groups) {
    const uint8_t* from = scales_of(matrix, row);
    for (int64_t i = 0; i < count; i += kLanes) {
        const __mmask16 lanes = first_lanes(count - i);
        __m512 values;
        if (matrix.scale_type == F32) {
            values = _mm512_maskz_loadu_ps(lanes, from + 4 * i);
        } else if (matrix.scale_type == E8M0) {
            const __m512i exponent = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, from + i));
            const __mmask16 smallest = _mm512_testn_epi32_mask(exponent, exponent);
            values = _mm512_castsi512_ps(
                _mm512_mask_mov_epi32(_mm512_slli_epi32(exponent, 23), smallest, _mm512_set1_epi32(0x00400000)));
        } else {
            const __m256i half = _mm256_maskz_loadu_epi16(lanes, from + 2 * i);
            values = matrix.scale_type == F16 ? _mm512_cvtph_ps(half)
                                              : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        }
        _mm512_store_ps(groups.scales + i, values);
    }
}

// A row's zero points less `bias`, in words along the rows.
struct PackedZeros {
    PackedZeros(const Matrix& matrix, int64_t row, int64_t bias) {
        const int64_t bits = code_bits(matrix.kind), per_word = 32 / bits;
        words = matrix.zeros + row / per_word * matrix.zero_row_bytes;
        shift = _mm_cvtsi32_si128(static_cast<int>(row % per_word * bits));
        mask = _mm512_set1_epi32((1 << bits) - 1);
        less = _mm512_set1_epi32(static_cast<int>(bias));
    }

    OFFMOE_INLINE __m512 at(int64_t group, __mmask16 lanes) const {
        const __m512i found = _mm512_srl_epi32(_mm512_maskz_loadu_epi32(lanes, words + 4 * group), shift);
        return _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(found, mask), less));
    }

    // Times bfloat16 scales; zeros after the last of `count` groups.
    OFFMOE_INLINE __m512 scaled(const uint8_t* scales, int64_t group, int64_t count) const {
        const __mmask16 lanes = first_lanes(count - group);
        const __m512i halves = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, scales + 2 * group));
        return _mm512_maskz_mul_ps(lanes, at(group, lanes), _mm512_castsi512_ps(_mm512_slli_epi32(halves, 16)));
    }

    const uint8_t* words;
    __m128i shift;
    __m512i mask, less;
};

// Zero points less `bias`.
inline void load_zeros(const Matrix& matrix, int64_t row, int64_t count, int64_t bias, RowGroups& groups) {
    if (!matrix.zeros_packed) {
        for (int64_t i = 0; i < count; ++i) groups.zeros[i] = static_cast<float>(zero_at(matrix, row, i) - bias);
        return;
    }
    const PackedZeros packed(matrix, row, bias);
    for (int64_t i = 0; i < count; i += kLanes) _mm512_store_ps(groups.zeros + i, packed.at(i, first_lanes(count - i)));
}

// Zero points times their scales, both loaded; zeros after the last, to the end of a vector.
inline void scale_zeros(int64_t count, RowGroups& groups) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const __mmask16 lanes = first_lanes(count - i);
        const __m512 zeros = _mm512_maskz_loadu_ps(lanes, groups.zeros + i);
        _mm512_store_ps(groups.zeros + i, _mm512_maskz_mul_ps(lanes, zeros, _mm512_loadu_ps(groups.scales + i)));
    }
}

}  // namespace
}  // namespace offmoe
