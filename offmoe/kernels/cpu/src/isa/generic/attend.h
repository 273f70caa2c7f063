// One token's attention to cached rows, chunk by chunk: a chunk's keys and values stay in the cache while the heads that
// share them are computed, several at a time. Threads share out chunks as well as groups. A part is relative to its own
// largest score (AttendJob joins them), so the bits depend on the number of rows alone and not on threads.
#pragma once
#include <algorithm>
#include <limits>
#include <type_traits>

#include "isa/generic/attend_parts.h"
#include "isa/generic/vectors.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace offmoe {
namespace {

// The processor's own vectors, and how many of them are added to at once: half of its registers.
#if defined(__AVX512F__)
typedef F32x16 Wide;
constexpr int64_t kAtOnce = 16;
#elif defined(__AVX2__)
typedef float Wide __attribute__((vector_size(32)));
constexpr int64_t kAtOnce = 8;
#else
typedef F32x16 Wide;
constexpr int64_t kAtOnce = 2;
#endif
constexpr int64_t kWide = sizeof(Wide) / sizeof(float);
constexpr int64_t kAheadRows = 16;

#if defined(__AVX512BF16__)
// Numbers of a vector of bfloat16 pairs; of a head's query that are multiplied as such.
constexpr int64_t kPairs = 32, kMostPairs = 1024;
inline int64_t in_pairs(int64_t width) { return (width + kPairs - 1) / kPairs * kPairs; }
#endif

template <int32_t TYPE>
inline Wide load_type(const uint8_t* from) {
    if constexpr (TYPE == F32) return load<Wide>(from);
#if defined(__AVX2__) && !defined(__AVX512F__)
    else if constexpr (TYPE == BF16) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16));
    else return _mm256_cvtph_ps(load<__m128i>(from));
#else
    else if constexpr (TYPE == BF16) return from_bf16(load<U16x16>(from));
    else return from_f16(load<U16x16>(from));
#endif
}

// The numbers of a row of `width` from `i` on, less than a vector of them, with zeros after its end.
template <int32_t TYPE>
inline Wide load_last(const uint8_t* row, int64_t i, int64_t width) {
    uint8_t last[64] = {};
    std::memcpy(last, row + i * size_of(TYPE), static_cast<size_t>((width - i) * size_of(TYPE)));
    return load_type<TYPE>(last);
}

#if defined(__AVX512F__)
// Lanes of two vectors whose blocks of 2 * width lanes are halved: the first halves, and from `width` on the second.
struct Folds {
    int32_t lanes[4][2][kLanes] = {};
    constexpr Folds() {
        for (int step = 0; step < 4; ++step)
            for (int lane = 0; lane < kLanes; ++lane) {
                const int width = 8 >> step, first = lane / 8 * 16 + lane % 8 / width * 2 * width + lane % width;
                lanes[step][0][lane] = first;
                lanes[step][1][lane] = first + width;
            }
    }
};
alignas(64) constexpr Folds kFolds;

inline F32x16 fold(F32x16 a, F32x16 b, int step) {
    const __m512i low = load<__m512i>(kFolds.lanes[step][0]), high = load<__m512i>(kFolds.lanes[step][1]);
    const __m512 x = bits<__m512>(a), y = bits<__m512>(b);
    return bits<F32x16>(_mm512_permutex2var_ps(x, low, y)) + bits<F32x16>(_mm512_permutex2var_ps(x, high, y));
}
#endif

// totals[i]: the lanes of x[i]. x is used up.
inline void totals_of(Wide (&x)[kAtOnce], float scale, float* totals) {
#if defined(__AVX512F__)
    OFFMOE_UNROLL
    for (int i = 0; i < 8; ++i) x[i] = fold(x[2 * i], x[2 * i + 1], 0);
    OFFMOE_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = fold(x[2 * i], x[2 * i + 1], 1);
    OFFMOE_UNROLL
    for (int i = 0; i < 2; ++i) x[i] = fold(x[2 * i], x[2 * i + 1], 2);
    const Wide sums = fold(x[0], x[1], 3) * scale;
    std::memcpy(totals, &sums, sizeof sums);
#elif defined(__AVX2__)
    OFFMOE_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = _mm256_hadd_ps(x[2 * i], x[2 * i + 1]);
    const __m256 first = _mm256_hadd_ps(x[0], x[1]), second = _mm256_hadd_ps(x[2], x[3]);
    const Wide sums = (_mm256_permute2f128_ps(first, second, 0x20) + _mm256_permute2f128_ps(first, second, 0x31)) * scale;
    std::memcpy(totals, &sums, sizeof sums);
#else
    for (int64_t i = 0; i < kAtOnce; ++i) totals[i] = sum(x[i]) * scale;
#endif
}

// Numbers [first, first + kAtOnce) of the scores of some rows for HEADS heads: number i is of row i / HEADS and head
// i % HEADS.
template <int32_t TYPE, int64_t HEADS>
inline void score_some(const uint8_t* const* rows, const float* query, int64_t width, int64_t first, float scale, float* scores) {
    Wide sums[kAtOnce] = {};
    const int64_t whole = width / kWide * kWide, next = in_vectors(width);
    const auto add = [&](int64_t at, auto read) {
        OFFMOE_UNROLL
        for (int64_t i = 0; i < kAtOnce; ++i)
            sums[i] += read(rows[(first + i) / HEADS]) * load<Wide>(query + (first + i) % HEADS * next + at);
    };
    for (int64_t at = 0; at < whole; at += kWide) add(at, [&](const uint8_t* row) { return load_type<TYPE>(row + at * size_of(TYPE)); });
    if (whole < width) add(whole, [&](const uint8_t* row) { return load_last<TYPE>(row, whole, width); });
    totals_of(sums, scale, scores + first);
}

#if defined(__AVX512BF16__)
// The same for rows of bfloat16: the products of two numbers each are exact and added in float32. `query`: of each head,
// bfloat16 too (rotation rounds to it), padded with zeros to whole vectors of 32.
template <int64_t HEADS>
inline void score_pairs(const uint8_t* const* rows, const uint16_t* query, int64_t width, float scale, float* scores) {
    Wide sums[kAtOnce] = {};
    const int64_t whole = width / kPairs * kPairs, next = in_pairs(width);
    const auto add = [&](int64_t at, auto read) {
        OFFMOE_UNROLL
        for (int64_t i = 0; i < kAtOnce; ++i) {
            const __m512bh key = bits<__m512bh>(read(rows[i / HEADS])), other = load<__m512bh>(query + i % HEADS * next + at);
            sums[i] = bits<F32x16>(_mm512_dpbf16_ps(bits<__m512>(sums[i]), key, other));
        }
    };
    for (int64_t at = 0; at < whole; at += kPairs) add(at, [&](const uint8_t* row) { return load<__m512i>(row + 2 * at); });
    if (whole < width) {
        const __mmask32 rest = static_cast<__mmask32>((uint64_t{1} << (width - whole)) - 1);
        add(whole, [&](const uint8_t* row) { return _mm512_maskz_loadu_epi16(rest, row + 2 * whole); });
    }
    totals_of(sums, scale, scores);
}
#endif

// The scores of `num_rows` rows for HEADS heads: HEADS numbers a row, and more up to a multiple of sixteen.
template <int32_t TYPE, int64_t HEADS>
inline void score(const uint8_t* keys, int64_t row_bytes, int64_t num_rows, const float* query, int64_t width, float scale, float* scores) {
    constexpr int64_t kRows = kLanes / HEADS;
#if defined(__AVX512BF16__)
    alignas(64) uint16_t pairs[TYPE == BF16 ? HEADS * kMostPairs : 1];
    const bool in_pairs_fits = TYPE == BF16 && in_pairs(width) <= kMostPairs;
    if (in_pairs_fits) {
        std::fill_n(pairs, HEADS * in_pairs(width), uint16_t{0});
        for (int64_t head = 0; head < HEADS; ++head)
            for (int64_t i = 0; i < width; ++i) pairs[head * in_pairs(width) + i] = static_cast<uint16_t>(bits<uint32_t>(query[head * in_vectors(width) + i]) >> 16);
    }
#endif
    for (int64_t row = 0; row < num_rows; row += kRows) {
        const uint8_t* from[kRows];
        for (int64_t i = 0; i < kRows; ++i) from[i] = keys + std::min(row + i, num_rows - 1) * row_bytes;
        for (int64_t i = 0; i < kRows; ++i)
            for (int64_t at = 0; at < width * size_of(TYPE); at += 64) __builtin_prefetch(from[i] + kAheadRows * row_bytes + at);
#if defined(__AVX512BF16__)
        if (in_pairs_fits) {
            score_pairs<HEADS>(from, pairs, width, scale, scores + row * HEADS);
            continue;
        }
#endif
        OFFMOE_UNROLL
        for (int64_t i = 0; i < kLanes; i += kAtOnce) score_some<TYPE, HEADS>(from, query, width, i, scale, scores + row * HEADS);
    }
}

// cap * tanh(score / cap).
inline void cap_scores(float* scores, int64_t count, float cap) {
    for (int64_t i = 0; i < count; i += kWide) {
        const Wide capped = tangent(load<Wide>(scores + i) / cap) * cap;
        std::memcpy(scores + i, &capped, sizeof capped);
    }
}

// Scores to weights e^(score - largest), zero after the last row; each head's largest and sum go to its part.
template <int64_t HEADS>
inline void weigh(float* scores, int64_t num_rows, float* const* parts) {
    const int64_t count = num_rows * HEADS, end = in_vectors(count);
    std::fill(scores + count, scores + end, -std::numeric_limits<float>::infinity());
    Wide most = load<Wide>(scores), totals = {};
    for (int64_t i = kWide; i < end; i += kWide) most = maximum(most, load<Wide>(scores + i));
    float largest[kWide], lanes[kWide];
    std::memcpy(largest, &most, sizeof most);
    for (int64_t i = HEADS; i < kWide; ++i) largest[i % HEADS] = std::max(largest[i % HEADS], largest[i]);
    for (int64_t i = HEADS; i < kWide; ++i) largest[i] = largest[i % HEADS];
    most = load<Wide>(largest);
    for (int64_t i = 0; i < end; i += kWide) {
        const Wide weights = exponential(load<Wide>(scores + i) - most);
        std::memcpy(scores + i, &weights, sizeof weights);
        totals += weights;
    }
    std::memcpy(lanes, &totals, sizeof totals);
    for (int64_t i = HEADS; i < kWide; ++i) lanes[i % HEADS] += lanes[i];
    for (int64_t head = 0; head < HEADS; ++head) {
        parts[head][0] = largest[head];
        parts[head][1] = lanes[head];
    }
}

// The weighted sums of STRIP vectors of the rows, from number `at` on, for COUNT of HEADS heads, whose weights are `weights`.
template <int32_t TYPE, int64_t HEADS, int64_t COUNT, int64_t STRIP, class Read>
inline void add_strip(const uint8_t* values, int64_t row_bytes, int64_t num_rows, const float* weights, int64_t at, float* const* parts, Read read) {
    Wide sums[COUNT][STRIP] = {};
    for (int64_t row = 0; row < num_rows; ++row, values += row_bytes, weights += HEADS) {
        // A strip of each row: what the processor does not foresee.
        __builtin_prefetch(values + kAheadRows * row_bytes + at * size_of(TYPE));
        Wide lanes[STRIP];
        OFFMOE_UNROLL
        for (int64_t i = 0; i < STRIP; ++i) lanes[i] = read(values, at + i * kWide);
        OFFMOE_UNROLL
        for (int64_t head = 0; head < COUNT; ++head)
            OFFMOE_UNROLL
            for (int64_t i = 0; i < STRIP; ++i) sums[head][i] += lanes[i] * weights[head];
    }
    for (int64_t head = 0; head < COUNT; ++head) std::memcpy(parts[head] + kVectorFloats + at, sums[head], sizeof sums[head]);
}

// All numbers, for HEADS heads.
template <int32_t TYPE, int64_t HEADS>
inline void add_values(const uint8_t* values, int64_t row_bytes, int64_t num_rows, int64_t width, const float* weights, float* const* parts) {
    constexpr int64_t kCount = std::min(HEADS, kAtOnce), kStrip = std::min<int64_t>(kAtOnce / kCount, 8);
    const auto whole = [](const uint8_t* row, int64_t at) { return load_type<TYPE>(row + at * size_of(TYPE)); };
    const auto last = [width](const uint8_t* row, int64_t at) { return load_last<TYPE>(row, at, width); };
    for (int64_t head = 0; head < HEADS; head += kCount) {
        int64_t at = 0;
        for (; at + kStrip * kWide <= width; at += kStrip * kWide)
            add_strip<TYPE, HEADS, kCount, kStrip>(values, row_bytes, num_rows, weights + head, at, parts + head, whole);
        for (; at + kWide <= width; at += kWide)
            add_strip<TYPE, HEADS, kCount, 1>(values, row_bytes, num_rows, weights + head, at, parts + head, whole);
        if (at < width) add_strip<TYPE, HEADS, kCount, 1>(values, row_bytes, num_rows, weights + head, at, parts + head, last);
    }
}

template <int32_t TYPE, int64_t HEADS>
void attend_heads(const Attend& a, int64_t group, int64_t head, int64_t first_row, int64_t num_rows, const float* query, float* parts, float* scores) {
    const uint8_t* keys = static_cast<const uint8_t*>(a.keys) + group * a.key_group_bytes + first_row * a.key_row_bytes;
    const uint8_t* values = static_cast<const uint8_t*>(a.values) + group * a.value_group_bytes + first_row * a.value_row_bytes;
    float* own[HEADS];
    for (int64_t i = 0; i < HEADS; ++i) own[i] = parts + (head + i) * part_floats(a);
    score<TYPE, HEADS>(keys, a.key_row_bytes, num_rows, query + head * in_vectors(a.width), a.width, a.scale, scores);
    if (a.cap != 0.0f) cap_scores(scores, num_rows * HEADS, a.cap);
    weigh<HEADS>(scores, num_rows, own);
    add_values<TYPE, HEADS>(values, a.value_row_bytes, num_rows, a.value_width, scores, own);
}

// The heads that share the keys and values of `group`, and chunk number `chunk` of them. `query`: all heads, padded
// widths; `parts`: of all chunks; `scores`: score_floats.
template <int32_t TYPE>
void attend_chunk(const Attend& a, int64_t group, int64_t chunk, const float* query, float* parts, float* scores) {
    const int64_t heads = a.num_heads / a.num_groups, first_row = chunk * chunk_rows(a);
    const int64_t num_rows = std::min(chunk_rows(a), a.num_rows - first_row);
    float* own = parts + chunk * a.num_heads * part_floats(a);
    int64_t head = group * heads;
    const int64_t end = head + heads;
    const auto take = [&](auto count) {
        constexpr int64_t kHeads = decltype(count)::value;
        for (; end - head >= kHeads; head += kHeads)
            attend_heads<TYPE, kHeads>(a, group, head, first_row, num_rows, query, own, scores);
    };
    take(std::integral_constant<int64_t, 8>{});
    take(std::integral_constant<int64_t, 4>{});
    take(std::integral_constant<int64_t, 2>{});
    take(std::integral_constant<int64_t, 1>{});
}

inline void attend_any(const Attend& a, int64_t group, int64_t chunk, const float* query, float* parts, float* scores) {
    switch (a.type) {
        case F32: return attend_chunk<F32>(a, group, chunk, query, parts, scores);
        case BF16: return attend_chunk<BF16>(a, group, chunk, query, parts, scores);
        default: return attend_chunk<F16>(a, group, chunk, query, parts, scores);
    }
}

}  // namespace
}  // namespace offmoe
