// One token's work between matrix products: RMS norm, rotary embedding, the delta rule; attend.h has attention. Compiled for each
// instruction set. float32 inside; rounded to the model's type where transformers' modules round.
#pragma once
#include <algorithm>

#include "vectors.h"

namespace offmoe {
namespace {

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

// `count` of a state's columns from `from` on; state = decay * state, then the part of the value that the key does not
// find in it is written to it, and the query reads it.
template <int64_t kVectors>
inline void delta_columns(float* state, const float* query, const float* key, const float* value, float decay, float beta,
                          int64_t key_width, int64_t value_width, float* out) {
    F32x16 found[kVectors] = {}, read[kVectors] = {}, added[kVectors];
    for (int64_t i = 0; i < key_width; ++i) {
        const float* row = state + i * value_width;
        OFFMOE_UNROLL
        for (int64_t v = 0; v < kVectors; ++v) {
            found[v] += load<F32x16>(row + v * kLanes) * decay * key[i];
        }
    }
    OFFMOE_UNROLL
    for (int64_t v = 0; v < kVectors; ++v) added[v] = (load<F32x16>(value + v * kLanes) - found[v]) * beta;
    for (int64_t i = 0; i < key_width; ++i) {
        float* row = state + i * value_width;
        OFFMOE_UNROLL
        for (int64_t v = 0; v < kVectors; ++v) {
            const F32x16 lanes = load<F32x16>(row + v * kLanes) * decay + added[v] * key[i];
            std::memcpy(row + v * kLanes, &lanes, sizeof lanes);
            read[v] += lanes * query[i];
        }
    }
    std::memcpy(out, read, sizeof read);
}

// Columns that a pass takes at once: those of 128 keys stay in the first cache between its two readings.
constexpr int64_t kColumns = 2 * kLanes;

inline void delta_rule(float* state, const float* query, const float* key, const float* value, float decay, float beta,
                       int64_t key_width, int64_t value_width, float* out) {
    int64_t at = 0;
    for (; at + kColumns <= value_width; at += kColumns)
        delta_columns<kColumns / kLanes>(state + at, query, key, value + at, decay, beta, key_width, value_width, out + at);
    for (; at + kLanes <= value_width; at += kLanes)
        delta_columns<1>(state + at, query, key, value + at, decay, beta, key_width, value_width, out + at);
    for (; at < value_width; ++at) {
        float found = 0, read = 0;
        for (int64_t i = 0; i < key_width; ++i) found += (state[i * value_width + at] *= decay) * key[i];
        const float added = (value[at] - found) * beta;
        for (int64_t i = 0; i < key_width; ++i) read += (state[i * value_width + at] += added * key[i]) * query[i];
        out[at] = read;
    }
}

// One head of a Mamba-2 state, (width, size): state = decay * state + value x key, and the query reads it. Products and
// what is read are of `type`. key and query are padded with zeros to whole vectors.
inline void mamba_rule(float* state, const float* value, const float* key, const float* query, float decay, int64_t width,
                       int64_t size, int32_t type, float* out) {
    for (int64_t row = 0; row < width; ++row, state += size) {
        F32x16 total = {};
        for (int64_t i = 0; i < size; i += kLanes) {
            const size_t bytes = static_cast<size_t>(4 * std::min(kLanes, size - i));
            F32x16 lanes = {};
            std::memcpy(&lanes, state + i, bytes);
            lanes = lanes * decay + round_to(type, load<F32x16>(key + i) * value[row]);
            std::memcpy(state + i, &lanes, bytes);
            total += round_to(type, lanes) * load<F32x16>(query + i);
        }
        out[row] = sum(total);
    }
}

}  // namespace
}  // namespace offmoe
