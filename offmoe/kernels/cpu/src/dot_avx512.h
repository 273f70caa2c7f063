// What the bfloat16 kernels for AVX-512 share. A kernel multiplies one row of weights with T rows of x; an output is
// added up in an order that does not depend on T. `vdpbf16ps` multiplies 32 pairs exactly and adds two products to each
// of 16 float32 sums. Codes are unpacked to small numbers that bfloat16 or float32 hold exactly, and the scale is
// applied to the float32 sum of each group.
//
// Rows are read one after the other, as they lie: several at a time, a page apart, share a set of the first cache and
// come at little more than half the speed (measured, AMD Zen 4).
#pragma once
#include <immintrin.h>

#include "general.h"

namespace offmoe {
namespace {

// How many rows of x one pass over the weights multiplies; with more, the weights come from the cache again.
constexpr int kMostX = 8;
// How far ahead weights are asked for.
constexpr int64_t kAheadBytes = 2048;

inline __m512i load_512(const void* from) { return _mm512_loadu_si512(from); }
inline __m512 load_floats(const void* from) { return _mm512_loadu_ps(from); }
inline __m512 dot(__m512 sums, __m512i weights, __m512i x) {
    return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(weights), reinterpret_cast<__m512bh>(x));
}

// The first `count` of 64 bytes.
inline __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1ull; }

inline void prefetch(const void* from) {
    _mm_prefetch(static_cast<const char*>(from) + kAheadBytes, _MM_HINT_T0);
}

template <int T>
inline void clear(__m512 (&sums)[T]) {
    OFFMOE_UNROLL
    for (int t = 0; t < T; ++t) sums[t] = _mm512_setzero_ps();
}

template <int T>
inline void store(const __m512 (&sums)[T], float* out, int64_t stride) {
    OFFMOE_UNROLL
    for (int t = 0; t < T; ++t) out[t * stride] = _mm512_reduce_add_ps(sums[t]);
}

}  // namespace
}  // namespace offmoe
