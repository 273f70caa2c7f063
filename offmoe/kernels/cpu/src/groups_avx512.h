// Scales and zero points of a row as floats, made once a row: the loops over columns only load them.
#pragma once
#include "dot_avx512.h"

namespace offmoe {
namespace {

// More groups than any model has in a row; a matrix with more is left to the general kernels.
constexpr int64_t kMostGroups = 2048;

struct RowGroups {
    // A loop may load a whole vector from any of them.
    alignas(64) float scales[kMostGroups + kLanes];
    alignas(64) float zeros[kMostGroups + kLanes];
};

inline int64_t num_groups(const Matrix& matrix) { return (matrix.columns + matrix.group - 1) / matrix.group; }

inline void load_scales(const Matrix& matrix, int64_t row, int64_t count, RowGroups& groups) {
    const uint8_t* from = scales_of(matrix, row);
    for (int64_t i = 0; i < count; i += kLanes) {
        const __mmask16 lanes = static_cast<__mmask16>(count - i < kLanes ? (1 << (count - i)) - 1 : 0xffff);
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

// Zero points less `bias`.
inline void load_zeros(const Matrix& matrix, int64_t row, int64_t count, int64_t bias, RowGroups& groups) {
    if (!matrix.zeros_packed) {
        for (int64_t i = 0; i < count; ++i) groups.zeros[i] = static_cast<float>(zero_at(matrix, row, i) - bias);
        return;
    }
    const int64_t bits = code_bits(matrix.kind), per_word = 32 / bits;
    const uint8_t* from = matrix.zeros + row / per_word * matrix.zero_row_bytes;
    const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(row % per_word * bits));
    const __m512i mask = _mm512_set1_epi32((1 << bits) - 1);
    const __m512i less = _mm512_set1_epi32(static_cast<int>(bias));
    for (int64_t i = 0; i < count; i += kLanes) {
        const __mmask16 lanes = static_cast<__mmask16>(count - i < kLanes ? (1 << (count - i)) - 1 : 0xffff);
        const __m512i words = _mm512_srl_epi32(_mm512_maskz_loadu_epi32(lanes, from + 4 * i), shift);
        _mm512_store_ps(groups.zeros + i, _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(words, mask), less)));
    }
}

}  // namespace
}  // namespace offmoe
