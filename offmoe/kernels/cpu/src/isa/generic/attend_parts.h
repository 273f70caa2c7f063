// How one token's attention is shared out: into chunks of rows, whose parts are joined at the end.
#pragma once
#include <algorithm>
#include <cstdint>

#include "abi.h"

namespace offmoe {
namespace {

constexpr int64_t kVectorFloats = 16;
// Keys and values of a chunk stay in the second cache. Of more rows than these chunks hold, each is larger: parts take
// memory (17 MB for 128 heads and values of 512).
constexpr int64_t kChunkRows = 256, kMostChunks = 64;
// Heads that are computed together; any number of heads is made of 8, 4, 2 and 1.
constexpr int64_t kMostHeads = 8;

inline int64_t size_of(int32_t type) { return type == F32 ? 4 : 2; }
inline int64_t in_vectors(int64_t count) { return (count + kVectorFloats - 1) / kVectorFloats * kVectorFloats; }

inline int64_t chunk_rows(const Attend& a) {
    return kChunkRows * std::max<int64_t>(1, (a.num_rows + kChunkRows * kMostChunks - 1) / (kChunkRows * kMostChunks));
}
inline int64_t num_chunks(const Attend& a) { return (a.num_rows + chunk_rows(a) - 1) / chunk_rows(a); }
// Of one thread's scores.
inline int64_t score_floats(const Attend& a) { return chunk_rows(a) * kMostHeads; }
// A head's part of a chunk: the largest score, the sum of all e^(score - largest), and from the second vector on the
// values weighted so and added.
inline int64_t part_floats(const Attend& a) { return kVectorFloats + in_vectors(a.value_width); }

}  // namespace
}  // namespace offmoe
