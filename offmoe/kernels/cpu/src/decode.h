// One token's work between matrix products: RMS norm, rotary embedding, attention over cached rows. Compiled for each
// instruction set. float32 inside; rounded to the model's type where transformers' modules round.
#pragma once
#include <algorithm>

#include "jobs.h"
#include "vectors.h"

namespace offmoe {
namespace {

inline int64_t in_vectors(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }
inline int64_t size_of(int32_t type) { return type == F32 ? 4 : 2; }

template <int32_t TYPE>
inline F32x16 load_type(const uint8_t* from) {
    if constexpr (TYPE == F32) return load<F32x16>(from);
    else if constexpr (TYPE == BF16) return from_bf16(load<U16x16>(from));
    else return from_f16(load<U16x16>(from));
}

// x and weight are padded with zeros to whole vectors; x may be out.
inline void norm_row(const float* x, const float* weight, int32_t type, int64_t width, float eps, int32_t kind,
                     float* out) {
    F32x16 squares = {};
    for (int64_t i = 0; i < width; i += kLanes) {
        const F32x16 lanes = load<F32x16>(x + i);
        squares += lanes * lanes;
    }
    const F32x16 scale = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps));
    for (int64_t i = 0; i < width; i += kLanes) {
        const F32x16 normed = load<F32x16>(x + i) * scale, w = load<F32x16>(weight + i);
        const F32x16 value = kind == WEIGHT_LAST ? round_to(type, normed) * w
                           : kind == WEIGHT_FIRST ? normed * w : normed * (1.0f + w);
        const F32x16 rounded = round_to(type, value);
        std::memcpy(out + i, &rounded, sizeof rounded);
    }
}

// Half the numbers of a head turn with the other half. `num_angles`: all of `rotary`, or half, which serve both halves.
inline void rotate(float* head, const float* cos, const float* sin, int64_t rotary, int64_t num_angles, int32_t type) {
    const int64_t half = rotary / 2, second = num_angles == half ? 0 : half;
    for (int64_t i = 0; i < half; i += kLanes) {
        const int64_t bytes = 4 * std::min(kLanes, half - i);
        F32x16 a = {}, b = {}, cos_a = {}, sin_a = {}, cos_b = {}, sin_b = {};
        std::memcpy(&a, head + i, static_cast<size_t>(bytes));
        std::memcpy(&b, head + half + i, static_cast<size_t>(bytes));
        std::memcpy(&cos_a, cos + i, static_cast<size_t>(bytes));
        std::memcpy(&sin_a, sin + i, static_cast<size_t>(bytes));
        std::memcpy(&cos_b, cos + second + i, static_cast<size_t>(bytes));
        std::memcpy(&sin_b, sin + second + i, static_cast<size_t>(bytes));
        const F32x16 first = round_to(type, round_to(type, a * cos_a) - round_to(type, b * sin_a));
        const F32x16 last = round_to(type, round_to(type, b * cos_b) + round_to(type, a * sin_b));
        std::memcpy(head + i, &first, static_cast<size_t>(bytes));
        std::memcpy(head + half + i, &last, static_cast<size_t>(bytes));
    }
}

template <int32_t TYPE>
inline float dot(const uint8_t* row, const float* query, int64_t width) {
    const int64_t whole = width / kLanes * kLanes;
    F32x16 sums = {};
    for (int64_t i = 0; i < whole; i += kLanes) sums += load_type<TYPE>(row + i * size_of(TYPE)) * load<F32x16>(query + i);
    if (whole < width) {
        uint8_t last[64] = {};
        std::memcpy(last, row + whole * size_of(TYPE), static_cast<size_t>((width - whole) * size_of(TYPE)));
        sums += load_type<TYPE>(last) * load<F32x16>(query + whole);
    }
    return sum(sums);
}

template <int32_t TYPE>
inline void add_scaled(float* sums, const uint8_t* row, float weight, int64_t width) {
    const int64_t whole = width / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        const F32x16 value = load<F32x16>(sums + i) + load_type<TYPE>(row + i * size_of(TYPE)) * weight;
        std::memcpy(sums + i, &value, sizeof value);
    }
    if (whole < width) {
        uint8_t last[64] = {};
        std::memcpy(last, row + whole * size_of(TYPE), static_cast<size_t>((width - whole) * size_of(TYPE)));
        const F32x16 value = load<F32x16>(sums + whole) + load_type<TYPE>(last) * weight;
        std::memcpy(sums + whole, &value, sizeof value);
    }
}

inline void soften(float* scores, int64_t count, const float* sink) {
    float most = *std::max_element(scores, scores + count);
    if (sink != nullptr) most = std::max(most, *sink);
    float total = sink != nullptr ? std::exp(*sink - most) : 0.0f;
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t lanes = std::min(kLanes, count - i);
        F32x16 value = {};
        std::memcpy(&value, scores + i, static_cast<size_t>(4 * lanes));
        value = exponential(value - splat(most));
        std::memcpy(scores + i, &value, static_cast<size_t>(4 * lanes));
        for (int64_t lane = 0; lane < lanes; ++lane) total += value[lane];
    }
    for (int64_t i = 0; i < count; ++i) scores[i] /= total;
}

// Floats that attend_group needs.
inline int64_t attend_floats(const Attend& a) {
    const int64_t heads = a.num_heads / a.num_groups;
    return in_vectors(heads * a.num_rows) + heads * in_vectors(a.value_width);
}

// The heads that share the keys and values of `group`. `query`: all heads, padded widths; `scratch`: scores and sums.
template <int32_t TYPE>
void attend_group(const Attend& a, int64_t group, const float* query, float* scratch) {
    const int64_t heads = a.num_heads / a.num_groups, first = group * heads;
    const int64_t width = in_vectors(a.width), value_width = in_vectors(a.value_width);
    const uint8_t* keys = static_cast<const uint8_t*>(a.keys) + group * a.key_group_bytes;
    const uint8_t* values = static_cast<const uint8_t*>(a.values) + group * a.value_group_bytes;
    float* scores = scratch;
    float* sums = scratch + in_vectors(heads * a.num_rows);
    for (int64_t row = 0; row < a.num_rows; ++row)
        for (int64_t head = 0; head < heads; ++head)
            scores[head * a.num_rows + row] =
                a.scale * dot<TYPE>(keys + row * a.key_row_bytes, query + (first + head) * width, a.width);
    for (int64_t head = 0; head < heads; ++head) {
        float sink = 0;
        if (a.sinks != nullptr) read_row(TYPE, static_cast<const uint8_t*>(a.sinks) + (first + head) * size_of(TYPE), 1, &sink);
        soften(scores + head * a.num_rows, a.num_rows, a.sinks != nullptr ? &sink : nullptr);
    }
    std::fill(sums, sums + heads * value_width, 0.0f);
    for (int64_t row = 0; row < a.num_rows; ++row)
        for (int64_t head = 0; head < heads; ++head)
            add_scaled<TYPE>(sums + head * value_width, values + row * a.value_row_bytes,
                             scores[head * a.num_rows + row], a.value_width);
    uint8_t* out = static_cast<uint8_t*>(a.output) + first * a.value_width * size_of(TYPE);
    for (int64_t head = 0; head < heads; ++head)
        write_row(TYPE, sums + head * value_width, a.value_width, out + head * a.value_width * size_of(TYPE));
}

inline void attend_any(const Attend& a, int64_t group, const float* query, float* scratch) {
    switch (a.type) {
        case F32: return attend_group<F32>(a, group, query, scratch);
        case BF16: return attend_group<BF16>(a, group, query, scratch);
        default: return attend_group<F16>(a, group, query, scratch);
    }
}

}  // namespace
}  // namespace offmoe
