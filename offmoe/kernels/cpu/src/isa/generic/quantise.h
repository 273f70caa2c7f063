// Floats to int4 or int8 with a scale a group of columns: the search of formats/encode.py, with the same numbers to the
// bit. It does what PyTorch's AVX2 kernels do, in their order: no product is fused with a sum (the flags of these files),
// a group's numbers go to four sums of eight lanes by turns, those are added in order, and then the lanes in order.
//
// Eight groups at a time. Numbers of one group lie side by side in vectors of eight; what there is once a group (the
// largest number, scales, errors) is a lane of one vector. No vectors of sixteen: GCC 12 compares those lane by lane where
// registers are shorter, and the whole took twice as long.
#pragma once
#include "isa/generic/vectors.h"
#include "isa/isa.h"
#include "ops/values.h"

namespace offmoe {
namespace {

constexpr int64_t kGroups = 8;

OFFMOE_INLINE F32x8 read_eight(int32_t type, const uint8_t* from) {
    if (type == F32) return load<F32x8>(from);
    if (type == BF16) return bits<F32x8>(__builtin_convertvector(load<U16x8>(from), U32x8) << 16);
    U16x16 halves = {};
    std::memcpy(&halves, from, 16);
    const F32x16 floats = from_f16(halves);
    return load<F32x8>(&floats);
}

// Rounded to the type that they are stored as, to nearest even (vectors.h says how).
OFFMOE_INLINE F32x8 rounded_to(int32_t type, F32x8 x) {
    if (type == F32) return x;
    const U32x8 u = bits<U32x8>(x), magnitude = u & 0x7fffffffu;
    if (type == BF16) return choose(x != x, x, bits<F32x8>((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u));
    const U32x8 rounded = (magnitude + 0x0fffu + ((magnitude >> 13) & 1u)) & 0xffffe000u;
    const F32x8 large = choose(bits<I32x8>(rounded) >= (143 << 23), splat<F32x8>(INFINITY), bits<F32x8>(rounded));
    const F32x8 small = (bits<F32x8>(magnitude) + 0.5f) - 0.5f;
    const F32x8 value = choose(bits<I32x8>(magnitude) < (113 << 23), small, large);
    return choose(x != x, x, bits<F32x8>(bits<U32x8>(value) | (u & 0x80000000u)));
}

// Numbers that are none are let through, as in `clamp_`.
OFFMOE_INLINE F32x8 clamped(F32x8 x, F32x8 low, F32x8 high) {
#if defined(__AVX2__)  // of two, the second one where one is NaN
    return bits<F32x8>(_mm256_min_ps(bits<__m256>(high), _mm256_max_ps(bits<__m256>(low), bits<__m256>(x))));
#else
    const F32x8 above = choose(x < low, low, x);
    return choose(above > high, high, above);
#endif
}

// Whole numbers from `low` to `high`.
OFFMOE_INLINE F32x8 steps_of(F32x8 values, float inverse, F32x8 low, F32x8 high) {
    return (clamped(values * inverse, low, high) + kRounder) - kRounder;
}

// The eight lanes of each of eight vectors, added in order from zero.
OFFMOE_INLINE F32x8 totals(const F32x8* lanes) {
#if defined(__AVX2__)
    __m256 pairs[8], quads[8];
    for (int i = 0; i < 8; i += 2) {
        const __m256 a = bits<__m256>(lanes[i]), b = bits<__m256>(lanes[i + 1]);
        pairs[i] = _mm256_unpacklo_ps(a, b);
        pairs[i + 1] = _mm256_unpackhi_ps(a, b);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; ++j) {
            quads[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
            quads[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
        }
    __m256 sum = _mm256_setzero_ps();  // quads[i] and quads[4 + i]: lanes i and 4 + i of all eight
    for (int i = 0; i < 4; ++i) sum = _mm256_add_ps(sum, _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x20));
    for (int i = 0; i < 4; ++i) sum = _mm256_add_ps(sum, _mm256_permute2f128_ps(quads[i], quads[4 + i], 0x31));
    return bits<F32x8>(sum);
#else
    F32x8 sums;
    for (int64_t i = 0; i < kGroups; ++i) {
        float sum = 0.0f;
        for (int lane = 0; lane < 8; ++lane) sum += lanes[i][lane];
        sums[i] = sum;
    }
    return sums;
#endif
}

// As they are stored; one where that is zero, so that nothing is divided by it.
OFFMOE_INLINE F32x8 stored(int32_t type, F32x8 scales) {
    const F32x8 rounded = rounded_to(type, scales);
    return choose(rounded == 0.0f, splat<F32x8>(1.0f), rounded);
}

// Eight codes, the first in the lowest bits.
OFFMOE_INLINE void write_codes(F32x8 steps, int32_t bits_a_code, int32_t offset, uint8_t* to) {
    const I32x8 codes = __builtin_convertvector(steps, I32x8) + offset;
    if (bits_a_code == 8) {
        const U8x8 bytes = __builtin_convertvector(codes, U8x8);
        std::memcpy(to, &bytes, sizeof bytes);
        return;
    }
    const U32x8 places = {0, 4, 8, 12, 16, 20, 24, 28}, moved = bits<U32x8>(codes) << places;
    uint64_t parts[4];
    std::memcpy(parts, &moved, sizeof parts);
    const uint64_t two = (parts[0] | parts[1]) | (parts[2] | parts[3]);
    const uint32_t word = static_cast<uint32_t>(two) | static_cast<uint32_t>(two >> 32);
    std::memcpy(to, &word, sizeof word);
}

// Eight groups of 8 * V numbers.
template <int V>
struct GroupSearch {
    explicit GroupSearch(const Encode& call)
        : call(call), low(splat<F32x8>(static_cast<float>(-call.offset))), high(splat<F32x8>(static_cast<float>(call.offset - 1))) {}

    // Of `count` groups, the first of them number `first`; the others are zeros. False where a number is not finite.
    inline bool read(int64_t first, int64_t count) {
        const int64_t size = call.value_type == F32 ? 4 : 2;
        const uint8_t* from = static_cast<const uint8_t*>(call.values) + first * V * 8 * size;
        U32x8 odd = {};
        for (int64_t i = 0; i < kGroups * V; ++i, from += 8 * size) {
            const F32x8 some = i < count * V ? read_eight(call.value_type, from) : F32x8{};
            odd |= bits<U32x8>((bits<I32x8>(some) & 0x7f800000) == 0x7f800000);
            values[i] = some;
        }
        uint64_t parts[4];
        std::memcpy(parts, &odd, sizeof parts);
        return (parts[0] | parts[1] | parts[2] | parts[3]) == 0;
    }

    // The largest number of each group, with the other sign: steps of such a scale end on the longer side.
    inline F32x8 largest() const {
        F32x8 found;
        for (int64_t g = 0; g < kGroups; ++g) {
            F32x8 least = values[g * V], most = least;
            for (int i = 1; i < V; ++i) {
                const F32x8 some = values[g * V + i];
                least = choose(some < least, some, least);
                most = choose(some > most, some, most);
            }
            float bottom = least[0], top = most[0];
            for (int lane = 1; lane < 8; ++lane) {
                bottom = least[lane] < bottom ? least[lane] : bottom;
                top = most[lane] > top ? most[lane] : top;
            }
            found[g] = top > -bottom ? -top : -bottom;
        }
        return found;
    }

    // Take those scales that leave a smaller squared error than the best so far.
    inline void consider(F32x8 wanted) {
        alignas(32) float scales[8], inverses[8];
        const F32x8 tried = stored(call.scale_type, wanted), inverse = 1.0f / tried;
        std::memcpy(scales, &tried, sizeof scales);
        std::memcpy(inverses, &inverse, sizeof inverses);
        F32x8 lanes[kGroups];
        const F32x8* from = values;
        for (int64_t g = 0; g < kGroups; ++g, from += V) {
            F32x8 sums[4] = {};
            OFFMOE_UNROLL
            for (int i = 0; i < V; ++i) {
                const F32x8 away = steps_of(from[i], inverses[g], low, high) * scales[g] - from[i];
                sums[i % 4] += away * away;
            }
            lanes[g] = ((sums[0] + sums[1]) + sums[2]) + sums[3];
        }
        const F32x8 error = totals(lanes);
        const I32x8 better = error < least_error;
        best = choose(better, tried, best);
        least_error = choose(better, error, least_error);
    }

    // Scales by least squares for the steps that the best ones give.
    inline F32x8 fitted() const {
        const F32x8 inverses = 1.0f / best;
        F32x8 products[kGroups], squares[kGroups];
        for (int64_t g = 0; g < kGroups; ++g) {
            F32x8 by[4] = {}, of[4] = {};
            OFFMOE_UNROLL
            for (int i = 0; i < V; ++i) {
                const F32x8 steps = steps_of(values[g * V + i], inverses[g], low, high);
                by[i % 4] += values[g * V + i] * steps;
                of[i % 4] += steps * steps;
            }
            products[g] = ((by[0] + by[1]) + by[2]) + by[3];
            squares[g] = ((of[0] + of[1]) + of[2]) + of[3];
        }
        const F32x8 below = totals(squares);
        return totals(products) / choose(below < 1.0f, splat<F32x8>(1.0f), below);
    }

    inline void write(int64_t first, int64_t count) const {
        const F32x8 inverses = 1.0f / best;
        uint8_t* to = static_cast<uint8_t*>(call.codes) + first * V * call.bits_a_code;
        for (int64_t g = 0; g < count; ++g)
            for (int i = 0; i < V; ++i, to += call.bits_a_code)
                write_codes(steps_of(values[g * V + i], inverses[g], low, high), call.bits_a_code, call.offset, to);
        const int64_t size = call.scale_type == F32 ? 4 : 2;
        float scales[kGroups];
        std::memcpy(scales, &best, sizeof scales);
        write_row(call.scale_type, scales, count, static_cast<uint8_t*>(call.scales) + first * size);
    }

    const Encode& call;
    const F32x8 low, high;
    F32x8 values[kGroups * V], best = splat<F32x8>(1.0f), least_error = splat<F32x8>(INFINITY);
};

template <int V>
bool encode_of(const Encode& call, int64_t begin, int64_t end) {
    bool finite = true;
    for (; begin < end; begin += kGroups) {
        const int64_t count = end - begin < kGroups ? end - begin : kGroups;
        GroupSearch<V> search(call);
        finite &= search.read(begin, count);
        const F32x8 largest = search.largest();
        for (int32_t i = 0; i <= call.num_divisors; ++i)
            search.consider(i < call.num_divisors ? largest / call.divisors[i] : search.fitted());
        search.write(begin, count);
    }
    return finite;
}

// Groups [begin, end) of a call; false where one of their numbers is not finite.
inline bool encode_groups(const Encode& call, int64_t begin, int64_t end) {
    switch (call.group) {
        case 32: return encode_of<4>(call, begin, end);
        case 64: return encode_of<8>(call, begin, end);
        default: return encode_of<16>(call, begin, end);
    }
}

}  // namespace
}  // namespace offmoe
