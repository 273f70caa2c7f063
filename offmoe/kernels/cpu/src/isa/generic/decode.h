// One token's work between matrix products: RMS norm, rotary embedding, the delta rule; attend.h has attention. Compiled for each
// instruction set. float32 inside; rounded to the model's type where transformers' modules round.
#pragma once
#include <algorithm>

#include "isa/generic/vectors.h"

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

// Columns of a state that are taken at once: what is found and read for them stays in the first cache.
constexpr int64_t kColumns = 256;

// `found[j] += factors[0] * row[j] + ...` over kRows rows of a state, in their order.
template <int kRows>
inline void delta_find(const float* row, const float* factors, int64_t width, int64_t count, float* found) {
    for (int64_t j = 0; j < count; j += kLanes) {
        F32x16 total = load<F32x16>(found + j);
        OFFMOE_UNROLL
        for (int i = 0; i < kRows; ++i) total += load<F32x16>(row + i * width + j) * factors[i];
        std::memcpy(found + j, &total, sizeof total);
    }
}

// `row = decay * row + key * added` over kRows rows, which the query reads.
template <int kRows>
inline void delta_write(float* row, const float* query, const float* key, float decay, int64_t width, int64_t count,
                        const float* added, float* read) {
    for (int64_t j = 0; j < count; j += kLanes) {
        const F32x16 more = load<F32x16>(added + j);
        F32x16 total = load<F32x16>(read + j);
        OFFMOE_UNROLL
        for (int i = 0; i < kRows; ++i) {
            const F32x16 lanes = load<F32x16>(row + i * width + j) * decay + more * key[i];
            std::memcpy(row + i * width + j, &lanes, sizeof lanes);
            total += lanes * query[i];
        }
        std::memcpy(read + j, &total, sizeof total);
    }
}

// The first of `left` columns of a state, whole vectors; gives their number. state = decay * state, then the part of the
// value that the key does not find in it is written to it, and the query reads it. Rows are taken in their order, some at
// a time: they are read from memory once and from the second cache once.
inline int64_t delta_columns(float* state, const float* query, const float* key, const float* value, float decay,
                             float beta, int64_t key_width, int64_t value_width, int64_t left, float* out) {
    alignas(64) float found[kColumns] = {}, read[kColumns] = {};
    const int64_t count = std::min(kColumns, left / kLanes * kLanes);
    int64_t i = 0;
    for (; i + 4 <= key_width; i += 4) {
        const float factors[] = {decay * key[i], decay * key[i + 1], decay * key[i + 2], decay * key[i + 3]};
        delta_find<4>(state + i * value_width, factors, value_width, count, found);
    }
    for (; i < key_width; ++i) {
        const float factor = decay * key[i];
        delta_find<1>(state + i * value_width, &factor, value_width, count, found);
    }
    for (int64_t j = 0; j < count; ++j) found[j] = (value[j] - found[j]) * beta;
    for (i = 0; i + 2 <= key_width; i += 2)
        delta_write<2>(state + i * value_width, query + i, key + i, decay, value_width, count, found, read);
    for (; i < key_width; ++i)
        delta_write<1>(state + i * value_width, query + i, key + i, decay, value_width, count, found, read);
    std::memcpy(out, read, static_cast<size_t>(4 * count));
    return count;
}

inline void delta_rule(float* state, const float* query, const float* key, const float* value, float decay, float beta,
                       int64_t key_width, int64_t value_width, float* out) {
    int64_t at = 0;
    while (value_width - at >= kLanes)
        at += delta_columns(state + at, query, key, value + at, decay, beta, key_width, value_width, value_width - at, out + at);
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
