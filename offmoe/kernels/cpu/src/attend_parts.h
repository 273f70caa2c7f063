// How one token's attention is shared out: into chunks of rows, whose parts are joined at the end.
#pragma once
#include <cstdint>

#include "abi.h"

namespace offmoe {
namespace {

constexpr int64_t kVectorFloats = 16;
// Keys and values of a chunk stay in the second cache.
constexpr int64_t kChunkRows = 256;
// Heads that are computed together; any number of heads is made of 8, 4, 2 and 1.
constexpr int64_t kMostHeads = 8;
constexpr int64_t kScoreFloats = kChunkRows * kMostHeads;

inline int64_t size_of(int32_t type) { return type == F32 ? 4 : 2; }
inline int64_t in_vectors(int64_t count) { return (count + kVectorFloats - 1) / kVectorFloats * kVectorFloats; }

inline int64_t num_chunks(const Attend& a) { return (a.num_rows + kChunkRows - 1) / kChunkRows; }
// A head's part of a chunk: the largest score, the sum of all e^(score - largest), and from the second vector on the
// values weighted so and added.
inline int64_t part_floats(const Attend& a) { return kVectorFloats + in_vectors(a.value_width); }

}  // namespace
}  // namespace offmoe
