// What the bfloat16 kernels for AVX-512 share. A kernel multiplies R neighbouring rows of weights with T rows of x;
// outputs are added up in an order that depends on neither. `vdpbf16ps` multiplies 32 pairs exactly and adds two
// products to each of 16 float32 sums. Weights that are not bfloat16 are unpacked to small numbers that bfloat16 holds
// exactly, and the scale is applied to the float32 sum of each group.
#pragma once
#include <immintrin.h>

#include "general.h"

namespace offmoe {
namespace {

// How many rows of x one pass over the weights multiplies; with more, the weights come from the cache again.
constexpr int kMostX = 8;

inline __m512bh as_bf16(__m512i bits) { return reinterpret_cast<__m512bh>(bits); }
inline __m512i load_512(const void* from) { return _mm512_loadu_si512(from); }
inline __m512 dot(__m512 sums, __m512i weights, __m512i x) {
    return _mm512_dpbf16_ps(sums, as_bf16(weights), as_bf16(x));
}

// Two vectors of whole numbers up to 256 as bfloat16.
inline __m512i to_bf16(__m512 high, __m512 low) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// The first `count` of 64 bytes.
inline __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1ull; }

inline void prefetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0); }

// How far ahead: the next rows, or far enough that memory answers in time.
inline int64_t ahead_bytes(const Matrix& matrix, int rows) {
    const int64_t next = rows * matrix.row_bytes;
    return next < 1024 ? 1024 : next > 16384 ? 16384 : next;
}

}  // namespace
}  // namespace offmoe
