// One token's attention as a job: query and key are made ready by one thread, groups of heads and chunks of rows shared
// out, and their parts joined by one.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "isa/generic/attend_parts.h"
#include "ops/jobs.h"

namespace offmoe {
namespace {

// Bytes of keys and values from which on several threads share the work: below, waking them costs as much.
constexpr int64_t kSharedBytes = 256 << 10;

float* floats(Scratch& scratch, int64_t count) { return reinterpret_cast<float*>(scratch.reserve(4 * count)); }

// As floats, padded with zeros to whole vectors.
void read_padded(int32_t type, const void* from, int64_t count, float* to) {
    std::fill(to + count, to + in_vectors(count), 0.0f);
    read_row(type, from, count, to);
}

class AttendJob final : public Job {
public:
    AttendJob(Pool& pool, const Isa& isa, Workspace& space, const Attend& call)
        : isa_(isa), call_(call), width_(in_vectors(call.width)), part_floats_(part_floats(call)) {
        const int64_t all_heads = call.num_heads + call.num_groups;
        heads_ = floats(space.inputs, all_heads * width_);
        small_ = floats(space.hidden, in_vectors(std::max(call.norm_width, call.num_heads * call.width)) * 2 + 2 * in_vectors(call.num_angles));
        scores_ = floats(space.outputs, score_floats(call) * pool.num_threads() + num_chunks(call) * call.num_heads * part_floats_);
        parts_ = scores_ + score_floats(call) * pool.num_threads();
    }

    bool has_memory() const { return heads_ && small_ && scores_; }
    int32_t num_phases() const override { return 1; }
    int64_t num_tasks(int32_t) const override { return call_.num_groups * num_chunks(call_); }
    bool is_shared() const { return call_.num_rows * call_.num_groups * (call_.width + call_.value_width) * size_of(call_.type) > kSharedBytes; }

    void run(int32_t, int64_t task, int32_t worker) override {
        const int64_t chunks = num_chunks(call_);
        isa_.attend(call_, task / chunks, task % chunks, heads_, parts_, scores_ + worker * score_floats(call_));
    }

    // The parts of all chunks to the output.
    void finish() {
        for (int64_t head = 0; head < call_.num_heads; ++head) {
            float* first = parts_ + head * part_floats_;
            const int64_t next = call_.num_heads * part_floats_, end = num_chunks(call_) * next;
            float most = first[0];
            const float sink = call_.sinks != nullptr ? call_.sinks[head] : -std::numeric_limits<float>::infinity();
            most = std::max(most, sink);
            for (int64_t at = next; at < end; at += next) most = std::max(most, first[at]);
            float total = std::exp(sink - most);
            for (int64_t at = 0; at < end; at += next) {
                const float weight = std::exp(first[at] - most);
                total += first[at + 1] * weight;
                float *sums = first + kVectorFloats, *added = sums + at;
                for (int64_t i = 0; i < call_.value_width; ++i) sums[i] = added[i] * weight + (at > 0 ? sums[i] : 0.0f);
            }
            for (int64_t i = 0; i < call_.value_width; ++i) first[kVectorFloats + i] /= total;
            write_row(call_.type, first + kVectorFloats, call_.value_width, static_cast<uint8_t*>(call_.output) + head * call_.value_width * size_of(call_.type));
        }
    }

    // Query and key normed and rotated, key and value in the cache, where they are given.
    void prepare() {
        float *angles = small_, *rows = small_ + 2 * in_vectors(call_.num_angles);
        if (call_.cos != nullptr) {
            read_row(call_.angle_type, call_.cos, call_.num_angles, angles);
            read_row(call_.angle_type, call_.sin, call_.num_angles, angles + in_vectors(call_.num_angles));
        }
        float* key = heads_ + call_.num_heads * width_;
        const void* query_norm = call_.norm_last ? nullptr : call_.query_norm;
        const void* key_norm = call_.norm_last ? nullptr : call_.key_norm;
        read_heads(call_.query, query_norm, call_.num_heads, rows, heads_);
        if (call_.key != nullptr) read_heads(call_.key, key_norm, call_.num_groups, rows, key);
        if (call_.cos != nullptr)
            for (int64_t head = 0; head < call_.num_heads + (call_.key != nullptr ? call_.num_groups : 0); ++head)
                rotate(heads_ + head * width_, angles);
        if (call_.norm_last) norm_heads(rows);
        if (call_.key == nullptr) return;
        const int64_t last = call_.num_rows - 1, size = size_of(call_.type);
        for (int64_t group = 0; group < call_.num_groups; ++group) {
            write_row(call_.type, key + group * width_, call_.width, static_cast<uint8_t*>(call_.keys) + group * call_.key_group_bytes + last * call_.key_row_bytes);
            std::copy_n(static_cast<const uint8_t*>(call_.value) + group * call_.value_width * size, call_.value_width * size,
                        static_cast<uint8_t*>(call_.values) + group * call_.value_group_bytes + last * call_.value_row_bytes);
        }
    }

private:
    void rotate(float* head, const float* angles) const {
        const float *cos = angles, *sin = angles + in_vectors(call_.num_angles);
        if (call_.neighbours) {
            for (int64_t i = 0; i < call_.rotary / 2; ++i) {
                float* pair = head + 2 * i;
                float products[4] = {pair[0] * cos[i], pair[1] * sin[i], pair[1] * cos[i], pair[0] * sin[i]};
                round_row(call_.angle_type, products, 4);
                pair[0] = products[0] - products[1];
                pair[1] = products[2] + products[3];
            }
            round_row(call_.angle_type, head, call_.rotary);
        } else {
            isa_.rotate(head, cos, sin, call_.rotary, call_.num_angles, call_.angle_type);
        }
        if (call_.angle_type != call_.type) round_row(call_.type, head, call_.rotary);
    }

    void norm_heads(float* weight) const {
        const int64_t num_keys = call_.key != nullptr ? call_.num_groups : 0;
        for (int64_t head = 0; head < call_.num_heads + num_keys; ++head) {
            const void* norm = head < call_.num_heads ? call_.query_norm : call_.key_norm;
            if (norm == nullptr) continue;
            if (head == 0 || head == call_.num_heads) read_padded(call_.type, norm, call_.width, weight);
            float* row = heads_ + head * width_;
            isa_.norm_row(row, weight, call_.type, call_.width, call_.eps, call_.norm_kind, row);
        }
    }

    // `rows`: room for the norm's weights and one row of it.
    void read_heads(const void* from, const void* norm, int64_t num_heads, float* rows, float* heads) {
        const int64_t size = size_of(call_.type), norm_width = call_.norm_width == call_.width ? call_.width : num_heads * call_.width;
        const uint8_t* bytes = static_cast<const uint8_t*>(from);
        if (norm == nullptr) {
            for (int64_t head = 0; head < num_heads; ++head) read_padded(call_.type, bytes + head * call_.width * size, call_.width, heads + head * width_);
            return;
        }
        float* row = rows + in_vectors(norm_width);
        read_padded(call_.type, norm, norm_width, rows);
        for (int64_t begin = 0; begin < num_heads * call_.width; begin += norm_width) {
            read_padded(call_.type, bytes + begin * size, norm_width, row);
            isa_.norm_row(row, rows, call_.type, norm_width, call_.eps, call_.norm_kind, row);
            for (int64_t i = 0; i < norm_width; i += call_.width) {
                float* head = heads + (begin + i) / call_.width * width_;
                std::copy_n(row + i, call_.width, head);
                std::fill(head + call_.width, head + width_, 0.0f);
            }
        }
    }

    const Isa& isa_;
    const Attend& call_;
    const int64_t width_, part_floats_;
    float *heads_, *small_, *scores_, *parts_;
};

}  // namespace
}  // namespace offmoe
