// Bfloat16 x bfloat16 for AVX-512.
#pragma once
#include "dot_avx512.h"

namespace offmoe {
namespace {

struct Dense {
    static constexpr int kRowsForFew = 1;  // at a time, for three or four rows of x

    explicit Dense(const Matrix& matrix) : matrix(matrix) {}

    template <int R, int T>
    void rows(int64_t row, const void* const* x, float* out, int64_t stride) {
        const uint8_t* codes[R];
        const uint8_t* xs[T];
        __m512 sums[R][T];
        OFFMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            codes[r] = matrix.codes + (row + r) * matrix.row_bytes;
            clear(sums[r]);
        }
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) xs[t] = static_cast<const uint8_t*>(x[t]);
        const int64_t num_bytes = 2 * matrix.columns;
        int64_t at = 0;
        for (; at + 64 <= num_bytes; at += 64) {
            __m512i w[R];
            OFFMOE_UNROLL
            for (int r = 0; r < R; ++r) {
                w[r] = load_512(codes[r] + at);
                prefetch(codes[r] + at);
            }
            add<R, T>(sums, w, xs, at);
        }
        if (at < num_bytes) {
            __m512i w[R];
            OFFMOE_UNROLL
            for (int r = 0; r < R; ++r) w[r] = _mm512_maskz_loadu_epi8(first_bytes(num_bytes - at), codes[r] + at);
            add<R, T>(sums, w, xs, at);
        }
        OFFMOE_UNROLL
        for (int r = 0; r < R; ++r) store(sums[r], out + r, stride);
    }

    template <int R, int T>
    static inline void add(__m512 (&sums)[R][T], const __m512i* w, const uint8_t* const* x, int64_t at) {
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            const __m512i values = load_512(x[t] + at);
            OFFMOE_UNROLL
            for (int r = 0; r < R; ++r) sums[r][t] = dot(sums[r][t], w[r], values);
        }
    }

    const Matrix& matrix;
};

}  // namespace
}  // namespace offmoe
