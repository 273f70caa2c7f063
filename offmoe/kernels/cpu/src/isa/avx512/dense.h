// Bfloat16 x bfloat16 for AVX-512.
#pragma once
#include "isa/avx512/dot.h"

namespace offmoe {
namespace {

struct Dense {
    static constexpr int kRowsForOne = 1;  // at a time, for one or two rows of x
    static constexpr int kRowsForFew = 1;  // for three or four
    static constexpr int64_t kStep = kChunk;  // blocks of columns begin at a multiple

    explicit Dense(const Matrix& matrix) : matrix(matrix) {}

    void start(int64_t row, int, bool) { codes_of_first = matrix.codes + row * matrix.row_bytes; }

    // Adds columns [first, last) of rows [r, r + R) of those that were started; `sums`: T a row.
    template <int R, int T>
    void block(int r, const void* const* x, int64_t first, int64_t last, __m512* sums_of_rows) const {
        const uint8_t* codes[R];
        const uint8_t* xs[T];
        __m512 sums[R][T];
        begin_block(codes_of_first + r * matrix.row_bytes, matrix.row_bytes, x, sums_of_rows, codes, xs, sums);
        const int64_t ahead = ahead_bytes(matrix, R, T), end = 2 * last;
        int64_t at = 2 * first;
        for (; at + 64 <= end; at += 64) {
            __m512i w[R];
            OFFMOE_UNROLL
            for (int i = 0; i < R; ++i) {
                w[i] = load_512(codes[i] + at);
                prefetch(codes[i] + at + ahead);
            }
            add<R, T>(sums, w, xs, at);
        }
        if (at < end) {
            __m512i w[R];
            OFFMOE_UNROLL
            for (int i = 0; i < R; ++i) w[i] = _mm512_maskz_loadu_epi8(first_bytes(end - at), codes[i] + at);
            add<R, T>(sums, w, xs, at);
        }
        end_block(sums, sums_of_rows);
    }

    template <int R, int T>
    static OFFMOE_INLINE void add(__m512 (&sums)[R][T], const __m512i* w, const uint8_t* const* x, int64_t at) {
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            const __m512i values = load_512(x[t] + at);
            OFFMOE_UNROLL
            for (int r = 0; r < R; ++r) sums[r][t] = dot(sums[r][t], w[r], values);
        }
    }

    const Matrix& matrix;
    const uint8_t* codes_of_first = nullptr;
};

}  // namespace
}  // namespace offmoe
