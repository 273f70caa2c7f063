// What the bfloat16 kernels for AVX-512 share. A kernel multiplies one row of weights with T rows of x; an output is
// added up in an order that does not depend on T. `vdpbf16ps` multiplies 32 pairs exactly and adds two products to each
// of 16 float32 sums. Codes are unpacked to small numbers that bfloat16 or float32 hold exactly, and the scale is
// applied to the float32 sum of each group.
//
// For one or two rows of x, the weights come from memory and are asked for twice: far ahead into the second cache, where
// what is asked for keeps the memory busy while codes are unpacked, and again shortly before they are used. Only then is
// it worth while to multiply two rows at once; with the second alone it halves the speed (measured, AMD Zen 4). For more
// rows of x, what is read again and again is x: it is taken in blocks of columns that stay in the first cache, each for
// sixteen rows of weights.
#pragma once
#include <immintrin.h>

#include "isa/generic/general.h"

namespace offmoe {
namespace {

// How many rows of x one pass over the weights multiplies; with more, the weights come from the cache again.
constexpr int kMostX = 8;
// Rows of weights that a block of columns serves.
constexpr int kBlockRows = 16;
// Columns of a block, over all rows of x: 8 KiB of bfloat16.
constexpr int64_t kBlockColumns = 4096;

constexpr bool in_blocks(int num_x) { return num_x > 2; }

OFFMOE_INLINE __m512i load_512(const void* from) { return _mm512_loadu_si512(from); }
OFFMOE_INLINE __m512 load_floats(const void* from) { return _mm512_loadu_ps(from); }
OFFMOE_INLINE __m512 dot(__m512 sums, __m512i weights, __m512i x) {
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(x));
}

// The first `count` of 64 bytes.
OFFMOE_INLINE __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1ull; }

OFFMOE_INLINE void prefetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0); }
OFFMOE_INLINE void prefetch_far(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T1); }

// How far ahead weights are asked for: further on, or in blocks the same columns of the next rows.
constexpr int64_t kNearBytes = 2048, kFarBytes = 16384;
inline int64_t ahead_bytes(const Matrix& matrix, int rows, int num_x) {
    return in_blocks(num_x) ? rows * matrix.row_bytes : kNearBytes;
}

// The first bytes of rows [begin, end), which nobody asked for yet.
inline void prefetch_first(const uint8_t* rows, int64_t row_bytes, int64_t num_rows, int64_t most) {
    const int64_t num_bytes = row_bytes * num_rows < most ? row_bytes * num_rows : most;
    for (int64_t at = 0; at < num_bytes; at += 64) prefetch_far(rows + at);
}

template <int T>
OFFMOE_INLINE void clear(__m512 (&sums)[T]) {
    OFFMOE_UNROLL
    for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
}

template <int R, int T>
OFFMOE_INLINE void begin_block(const uint8_t* first, int64_t row_bytes, const void* const* x, const __m512* kept,
                        const uint8_t* (&codes)[R], const uint8_t* (&xs)[T], __m512 (&sums)[R][T]) {
    OFFMOE_UNROLL
    for (int t = 0; t < T; ++t) xs[t] = static_cast<const uint8_t*>(x[t]);
    OFFMOE_UNROLL
    for (int i = 0; i < R; ++i) {
        codes[i] = first + i * row_bytes;
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) sums[i][t] = kept[i * T + t];
    }
}

template <int R, int T>
OFFMOE_INLINE void end_block(const __m512 (&sums)[R][T], __m512* kept) {
    OFFMOE_UNROLL
    for (int i = 0; i < R; ++i) {
        OFFMOE_UNROLL
        for (int t = 0; t < T; ++t) kept[i * T + t] = sums[i][t];
    }
}

}  // namespace
}  // namespace offmoe
