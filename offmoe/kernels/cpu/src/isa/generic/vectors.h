// Sixteen numbers at once in the compiler's own vector types: SSE2, AVX2, AVX-512 or NEON, whatever the file is
// compiled for. Everything here is in an unnamed namespace: each instruction set has its own copy.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "abi.h"

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Loops over accumulators: only unrolled do these stay in registers.
#define OFFMOE_UNROLL _Pragma("GCC unroll 16")
// What inner loops call: left to itself, GCC inlines less the more there is in a file.
#define OFFMOE_INLINE inline __attribute__((always_inline))

namespace offmoe {
namespace {

constexpr int64_t kLanes = 16;

typedef float F32x16 __attribute__((vector_size(64)));
typedef int32_t I32x16 __attribute__((vector_size(64)));
typedef uint32_t U32x16 __attribute__((vector_size(64)));
typedef uint16_t U16x16 __attribute__((vector_size(32)));
typedef uint8_t U8x16 __attribute__((vector_size(16)));
typedef int8_t I8x16 __attribute__((vector_size(16)));
typedef float F32x8 __attribute__((vector_size(32)));
typedef int32_t I32x8 __attribute__((vector_size(32)));
typedef uint32_t U32x8 __attribute__((vector_size(32)));
typedef uint16_t U16x8 __attribute__((vector_size(16)));
typedef uint8_t U8x8 __attribute__((vector_size(8)));

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class V>
inline V load(const void* address) {
    V value;
    std::memcpy(&value, address, sizeof value);
    return value;
}

template <class V = F32x16>
inline V splat(float value) { return value - V{}; }

// What a comparison of two of them gives: integers of the same size.
template <class V>
using IntsOf = decltype(V{} < V{});

template <class V>
inline V choose(IntsOf<V> mask, V yes, V no) {
    return bits<V>((mask & bits<IntsOf<V>>(yes)) | (~mask & bits<IntsOf<V>>(no)));
}

inline F32x16 from_bf16(U16x16 half) {
#if defined(__AVX512F__)
    return bits<F32x16>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits<__m256i>(half)), 16));
#else
    return bits<F32x16>(__builtin_convertvector(half, U32x16) << 16);
#endif
}

inline F32x16 from_f16(U16x16 half) {
#if defined(__AVX512F__)
    return bits<F32x16>(_mm512_cvtph_ps(bits<__m256i>(half)));
#elif defined(__F16C__)
    __m128i parts[2];
    std::memcpy(parts, &half, sizeof parts);
    const __m256 floats[2] = {_mm256_cvtph_ps(parts[0]), _mm256_cvtph_ps(parts[1])};
    return load<F32x16>(floats);
#elif defined(__aarch64__)
    float16x4_t parts[4];
    std::memcpy(parts, &half, sizeof parts);
    const float32x4_t floats[4] = {vcvt_f32_f16(parts[0]), vcvt_f32_f16(parts[1]), vcvt_f32_f16(parts[2]), vcvt_f32_f16(parts[3])};
    return load<F32x16>(floats);
#else
    const U32x16 wide = __builtin_convertvector(half, U32x16);
    const U32x16 magnitude = wide & 0x7fffu;
    const F32x16 small = __builtin_convertvector(bits<I32x16>(magnitude), F32x16) * 0x1p-24f;
    const U32x16 normal = (magnitude << 13) + (112u << 23);
    const U32x16 special = (magnitude << 13) | 0x7f800000u;
    const I32x16 is_small = magnitude < 0x0400u, is_special = magnitude >= 0x7c00u;
    const F32x16 value = choose(is_special, bits<F32x16>(special), choose(is_small, small, bits<F32x16>(normal)));
    return bits<F32x16>(bits<U32x16>(value) | ((wide & 0x8000u) << 16));
#endif
}

// The finite numbers of e4m3 and its NaN.
inline F32x16 from_fp8(U8x16 code) {
    const U32x16 wide = __builtin_convertvector(code, U32x16);
    const U32x16 magnitude = wide & 0x7fu;
    const F32x16 small = __builtin_convertvector(bits<I32x16>(magnitude), F32x16) * 0x1p-9f;
    const F32x16 normal = bits<F32x16>((magnitude << 20) + (120u << 23));
    const I32x16 is_small = magnitude < 8u, is_nan = magnitude == 0x7fu;
    const F32x16 value = choose(is_nan, splat(NAN), choose(is_small, small, normal));
    return bits<F32x16>(bits<U32x16>(value) | ((wide & 0x80u) << 24));
}

inline F32x16 e2m1(U32x16 nibble) {
    // 0 0.5 1 1.5 2 3 4 6: exponent and mantissa moved to their places, the two smallest apart.
    const U32x16 magnitude = nibble & 7u;
    const F32x16 small = __builtin_convertvector(bits<I32x16>(magnitude), F32x16) * 0.5f;
    const F32x16 normal = bits<F32x16>((magnitude << 22) + (126u << 23));
    const F32x16 value = choose(magnitude < 2u, small, normal);
    return bits<F32x16>(bits<U32x16>(value) | ((nibble & 8u) << 28));
}

// Rounded to bfloat16, to nearest even, as a float.
inline F32x16 round_bf16(F32x16 x) {
    const U32x16 u = bits<U32x16>(x);
    const U32x16 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
    return choose(x != x, x, bits<F32x16>(rounded));
}

// Rounded to float16, to nearest even, as a float; beyond 65504 infinite.
inline F32x16 round_f16(F32x16 x) {
    const U32x16 u = bits<U32x16>(x), sign = u & 0x80000000u, magnitude = u & 0x7fffffffu;
    const U32x16 rounded = (magnitude + 0x0fffu + ((magnitude >> 13) & 1u)) & 0xffffe000u;
    const F32x16 large = choose(rounded >= (143u << 23), splat(INFINITY), bits<F32x16>(rounded));
    const F32x16 small = (bits<F32x16>(magnitude) + 0.5f) - 0.5f;  // a float's last bit at 0.5 is 2^-24
    const F32x16 value = choose(magnitude < (113u << 23), small, large);
    return choose(x != x, x, bits<F32x16>(bits<U32x16>(value) | sign));
}

inline F32x16 round_to(int32_t type, F32x16 x) { return type == BF16 ? round_bf16(x) : type == F16 ? round_f16(x) : x; }

// The lanes in one fixed order.
inline float sum(F32x16 x) {
    float lanes[kLanes];
    std::memcpy(lanes, &x, sizeof lanes);
    for (int width = 8; width > 0; width /= 2)
        for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
    return lanes[0];
}

template <class V>
inline V minimum(V a, V b) { return choose((a < b) | (a != a), a, b); }
template <class V>
inline V maximum(V a, V b) { return choose((a > b) | (a != a), a, b); }

// 1.5 * 2^23: a number of up to 2^22 that it is added to and taken from again is rounded to a whole one.
constexpr float kRounder = 12582912.0f;

// e^x within two units of the last place (Cephes' polynomial).
template <class V>
inline V exponential(V x) {
    const V bounded = maximum(minimum(x, splat<V>(88.37626f)), splat<V>(-87.33654f));
    const V shifted = bounded * 1.44269504088896341f + kRounder;
    const V power = shifted - kRounder;
    const V rest = (bounded - power * 0.693359375f) - power * -2.12194440e-4f;
    V value = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    value = value * rest + 8.3334519073e-3f;
    value = value * rest + 4.1665795894e-2f;
    value = value * rest + 1.6666665459e-1f;
    value = value * rest + 5.0000001201e-1f;
    value = value * rest * rest + rest + 1.0f;
    const IntsOf<V> exponent = __builtin_convertvector(power, IntsOf<V>);
    const V scaled = bits<V>(bits<IntsOf<V>>(value) + (exponent << 23));
    const V limited = choose(x > 88.37626f, splat<V>(INFINITY), choose(x < -87.33654f, splat<V>(0.0f), scaled));
    return choose(x != x, x, limited);
}

// tanh x: a polynomial where x is small (Cephes' tanhf), else by e^2x.
template <class V>
inline V tangent(V x) {
    const V square = x * x;
    V small = square * -5.70498872745e-3f + 2.06390887954e-2f;
    small = small * square - 5.37397155531e-2f;
    small = small * square + 1.33314422036e-1f;
    small = small * square - 3.33332819422e-1f;
    small = small * square * x + x;
    const V large = 1.0f - 2.0f / (exponential(x + x) + 1.0f);
    return choose((x < 0.625f) & (x > -0.625f), small, large);
}

}  // namespace
}  // namespace offmoe
