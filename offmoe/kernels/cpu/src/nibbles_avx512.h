// Nibbles x bfloat16 for AVX-512: int4 and mxfp4.
//
// 64 bytes are 128 columns. Seen as 32 words of 16 bits, the i-th nibble of word l is column 4 l + i: four look-ups in a
// table of bfloat16 give four vectors, and x is prepared in their order. The look-up takes five bits of the word, so the
// table has every value twice. After the four products lane j of 16 has columns 8 j to 8 j + 7, which share a scale.
#pragma once
#include "dot_avx512.h"

namespace offmoe {
namespace {

struct NibbleTable {
    alignas(64) uint16_t values[32];
};

inline NibbleTable make_nibble_table(const Matrix& matrix) {
    static const float e2m1_values[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    NibbleTable table;
    for (int nibble = 0; nibble < 32; ++nibble) {
        const int code = nibble & 15;
        // Codes with zero points stay as they are: what the zero takes away is subtracted from the sum.
        float value = static_cast<float>(matrix.zeros ? code : code - matrix.zero);
        if (matrix.kind == MXFP4) value = code & 8 ? -e2m1_values[code & 7] : e2m1_values[code & 7];
        table.values[nibble] = static_cast<uint16_t>(bits<uint32_t>(value) >> 16);
    }
    return table;
}

// The scales of 128 columns, each in the lanes of its columns.
struct ScaleLanes {
    explicit ScaleLanes(const Matrix& matrix) : type(matrix.scale_type), group(matrix.group), columns(matrix.columns) {
        size = type == F32 ? 4 : type == E8M0 ? 1 : 2;
        most = group >= kChunk ? 1 : kChunk / group;
        const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        of_lane = group >= kChunk ? _mm512_setzero_si512()
                                  : _mm512_srlv_epi32(lane, _mm512_set1_epi32(group == 32 ? 2 : group == 64 ? 3 : 4));
        mask = static_cast<__mmask16>((1u << most * size) - 1u);
    }

    __m512 at(const uint8_t* scales, int64_t column) const {
        const int64_t first = column / group, left = (columns - column + group - 1) / group;
        const __mmask16 bytes = left < most ? static_cast<__mmask16>((1u << left * size) - 1u) : mask;
        const __m128i found = _mm_maskz_loadu_epi8(bytes, scales + first * size);
        if (type == F32) return _mm512_permutexvar_ps(of_lane, _mm512_castps128_ps512(_mm_castsi128_ps(found)));
        __m512i wide;
        if (type == BF16) {
            wide = _mm512_slli_epi32(_mm512_castsi256_si512(_mm256_cvtepu16_epi32(found)), 16);
        } else if (type == F16) {
            wide = _mm512_castps_si512(_mm512_castps256_ps512(_mm256_cvtph_ps(found)));
        } else {
            const __m512i exponent = _mm512_cvtepu8_epi32(found);
            wide = _mm512_slli_epi32(exponent, 23);
            wide = _mm512_mask_mov_epi32(wide, _mm512_testn_epi32_mask(exponent, exponent), _mm512_set1_epi32(0x00400000));
        }
        return _mm512_permutexvar_ps(of_lane, _mm512_castsi512_ps(wide));
    }

    int32_t type;
    int64_t group, columns, size, most;
    __m512i of_lane;
    __mmask16 mask;
};

template <bool ZEROS>
struct Nibbles {
    template <int R, int T>
    struct Rows {
        static void run(const Matrix& matrix, int64_t row, const void* const* x, float* out, int64_t stride) {
            const NibbleTable table_memory = make_nibble_table(matrix);
            const __m512i table = load_512(table_memory.values);
            const ScaleLanes lanes(matrix);
            const int64_t ahead = ahead_bytes(matrix, R), sums_at = 2 * padded(matrix.columns);
            __m512 sums[R][T];
            for (int r = 0; r < R; ++r)
                for (int t = 0; t < T; ++t) sums[r][t] = _mm512_setzero_ps();
            for (int64_t column = 0; column < matrix.columns; column += kChunk) {
                const int64_t num_bytes = (matrix.columns - column) / 2;
                for (int r = 0; r < R; ++r) {
                    const uint8_t* codes = matrix.codes + (row + r) * matrix.row_bytes + column / 2;
                    const __m512i word = _mm512_maskz_loadu_epi8(first_bytes(num_bytes), codes);
                    prefetch(codes + ahead);
                    const __m512i w[4] = {
                        _mm512_permutexvar_epi16(word, table),
                        _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4), table),
                        _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 8), table),
                        _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 12), table),
                    };
                    const __m512 scale = lanes.at(scales_of(matrix, row + r), column);
                    __m512 zero = _mm512_setzero_ps();
                    if constexpr (ZEROS) {
                        F32x16 scale_lanes, zero_lanes;
                        group_lanes(matrix, row + r, column, 8, scale_lanes, zero_lanes);
                        zero = bits<__m512>(zero_lanes);
                    }
                    for (int t = 0; t < T; ++t) {
                        const uint8_t* values = static_cast<const uint8_t*>(x[t]) + 2 * column;
                        __m512 part = dot(_mm512_setzero_ps(), w[0], load_512(values));
                        part = dot(part, w[1], load_512(values + 64));
                        part = dot(part, w[2], load_512(values + 128));
                        part = dot(part, w[3], load_512(values + 192));
                        if constexpr (ZEROS)
                            part = _mm512_fnmadd_ps(zero, _mm512_loadu_ps(static_cast<const uint8_t*>(x[t]) + sums_at + column / 2), part);
                        sums[r][t] = _mm512_fmadd_ps(part, scale, sums[r][t]);
                    }
                }
            }
            for (int r = 0; r < R; ++r)
                for (int t = 0; t < T; ++t) out[t * stride + r] = _mm512_reduce_add_ps(sums[r][t]);
        }
    };
};

}  // namespace
}  // namespace offmoe
