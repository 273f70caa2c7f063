// Bfloat16 x bfloat16 and bytes x bfloat16 for AVX-512.
#pragma once
#include "dot_avx512.h"

namespace offmoe {
namespace {

template <int R, int T>
struct Dense {
    static void run(const Matrix& matrix, int64_t row, const void* const* x, float* out, int64_t stride) {
        const uint8_t* codes = matrix.codes + row * matrix.row_bytes;
        const int64_t num_bytes = 2 * matrix.columns, ahead = ahead_bytes(matrix, R);
        __m512 sums[R][T];
        for (int r = 0; r < R; ++r)
            for (int t = 0; t < T; ++t) sums[r][t] = _mm512_setzero_ps();
        int64_t at = 0;
        for (; at + 64 <= num_bytes; at += 64) {
            __m512i w[R];
            for (int r = 0; r < R; ++r) {
                w[r] = load_512(codes + r * matrix.row_bytes + at);
                prefetch(codes + r * matrix.row_bytes + at + ahead);
            }
            for (int t = 0; t < T; ++t) {
                const __m512i values = load_512(static_cast<const uint8_t*>(x[t]) + at);
                for (int r = 0; r < R; ++r) sums[r][t] = dot(sums[r][t], w[r], values);
            }
        }
        if (at < num_bytes) {
            const __mmask64 rest = first_bytes(num_bytes - at);
            for (int r = 0; r < R; ++r) {
                const __m512i w = _mm512_maskz_loadu_epi8(rest, codes + r * matrix.row_bytes + at);
                for (int t = 0; t < T; ++t)
                    sums[r][t] = dot(sums[r][t], w, load_512(static_cast<const uint8_t*>(x[t]) + at));
            }
        }
        for (int r = 0; r < R; ++r)
            for (int t = 0; t < T; ++t) out[t * stride + r] = _mm512_reduce_add_ps(sums[r][t]);
    }
};

// 32 bytes of codes, less their zero, as bfloat16.
template <bool SIGNED>
inline __m512i from_int8(__m256i codes, __m512i zero) {
    const __m128i low = _mm256_castsi256_si128(codes), high = _mm256_extracti128_si256(codes, 1);
    const __m512i first = SIGNED ? _mm512_cvtepi8_epi32(low) : _mm512_cvtepu8_epi32(low);
    const __m512i second = SIGNED ? _mm512_cvtepi8_epi32(high) : _mm512_cvtepu8_epi32(high);
    return to_bf16(_mm512_cvtepi32_ps(_mm512_sub_epi32(second, zero)), _mm512_cvtepi32_ps(_mm512_sub_epi32(first, zero)));
}

template <bool SIGNED>
struct Int8 {
    template <int R, int T>
    struct Rows {
        static void run(const Matrix& matrix, int64_t row, const void* const* x, float* out, int64_t stride) {
            const int64_t ahead = ahead_bytes(matrix, R);
            __m512 sums[R][T];
            for (int r = 0; r < R; ++r)
                for (int t = 0; t < T; ++t) sums[r][t] = _mm512_setzero_ps();
            int64_t group = 0;
            for (int64_t begin = 0; begin < matrix.columns; begin += matrix.group, ++group) {
                const int64_t end = begin + matrix.group < matrix.columns ? begin + matrix.group : matrix.columns;
                for (int r = 0; r < R; ++r) {
                    const uint8_t* codes = matrix.codes + (row + r) * matrix.row_bytes;
                    const __m512i zero = _mm512_set1_epi32(zero_at(matrix, row + r, group));
                    __m512 part[T];
                    for (int t = 0; t < T; ++t) part[t] = _mm512_setzero_ps();
                    for (int64_t at = begin; at < end; at += 32) {
                        const __m256i code = at + 32 <= end
                            ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + at))
                            : _mm256_maskz_loadu_epi8(static_cast<__mmask32>(first_bytes(end - at)), codes + at);
                        if (at % 64 == 0) prefetch(codes + at + ahead);
                        const __m512i w = from_int8<SIGNED>(code, zero);
                        for (int t = 0; t < T; ++t)
                            part[t] = dot(part[t], w, load_512(static_cast<const uint8_t*>(x[t]) + 2 * at));
                    }
                    const __m512 scale = _mm512_set1_ps(scale_at(matrix, scales_of(matrix, row + r), group));
                    for (int t = 0; t < T; ++t) sums[r][t] = _mm512_fmadd_ps(part[t], scale, sums[r][t]);
                }
            }
            for (int r = 0; r < R; ++r)
                for (int t = 0; t < T; ++t) out[t * stride + r] = _mm512_reduce_add_ps(sums[r][t]);
        }
    };
};

// Both bytes of the bfloat16 of every e4m3 code without its sign: 128 entries each.
struct Fp8Tables {
    alignas(64) uint8_t low[128], high[128];
};

inline Fp8Tables make_fp8_tables() {
    Fp8Tables tables;
    for (int code = 0; code < 128; ++code) {
        U8x16 one = {};
        one[0] = static_cast<uint8_t>(code);
        const uint32_t value = bits<uint32_t>(from_fp8(one)[0]);
        tables.low[code] = static_cast<uint8_t>(value >> 16);
        tables.high[code] = static_cast<uint8_t>(value >> 24);
    }
    return tables;
}

// 64 codes become two vectors; x is prepared in that order: of every 16 columns the first vector has the first eight.
template <int R, int T>
struct Fp8 {
    static void run(const Matrix& matrix, int64_t row, const void* const* x, float* out, int64_t stride) {
        static const Fp8Tables tables = make_fp8_tables();
        const __m512i low0 = load_512(tables.low), low1 = load_512(tables.low + 64);
        const __m512i high0 = load_512(tables.high), high1 = load_512(tables.high + 64);
        const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
        const int64_t ahead = ahead_bytes(matrix, R);
        __m512 sums[R][T];
        for (int r = 0; r < R; ++r)
            for (int t = 0; t < T; ++t) sums[r][t] = _mm512_setzero_ps();
        int64_t group = 0;
        for (int64_t begin = 0; begin < matrix.columns; begin += matrix.group, ++group) {
            const int64_t end = begin + matrix.group < matrix.columns ? begin + matrix.group : matrix.columns;
            for (int r = 0; r < R; ++r) {
                const uint8_t* codes = matrix.codes + (row + r) * matrix.row_bytes;
                __m512 part[T];
                for (int t = 0; t < T; ++t) part[t] = _mm512_setzero_ps();
                for (int64_t at = begin; at < end; at += 64) {
                    const __m512i code = _mm512_maskz_loadu_epi8(first_bytes(end - at), codes + at);
                    prefetch(codes + at + ahead);
                    const __m512i low = _mm512_permutex2var_epi8(low0, code, low1);
                    // high | (code & sign)
                    const __m512i high =
                        _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(high0, code, high1), code, sign, 0xf8);
                    const __m512i first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
                    for (int t = 0; t < T; ++t) {
                        const uint8_t* values = static_cast<const uint8_t*>(x[t]) + 2 * at;
                        part[t] = dot(dot(part[t], first, load_512(values)), second, load_512(values + 64));
                    }
                }
                const __m512 scale = _mm512_set1_ps(scale_at(matrix, scales_of(matrix, row + r), group));
                for (int t = 0; t < T; ++t) sums[r][t] = _mm512_fmadd_ps(part[t], scale, sums[r][t]);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int t = 0; t < T; ++t) out[t * stride + r] = _mm512_reduce_add_ps(sums[r][t]);
    }
};

}  // namespace
}  // namespace offmoe
