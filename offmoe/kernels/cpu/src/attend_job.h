// One token's attention as a job: query and key are made ready by one thread, then groups of heads are shared out.
#pragma once
#include <algorithm>

#include "jobs.h"

namespace offmoe {
namespace {

constexpr int64_t kLanes = 16;
// Bytes of keys and values from which on several threads share the groups: below, waking them costs as much.
constexpr int64_t kSharedBytes = 256 << 10;

int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }
int64_t size_of(int32_t type) { return type == F32 ? 4 : 2; }

float* floats(Scratch& scratch, int64_t count) { return reinterpret_cast<float*>(scratch.reserve(4 * count)); }

// As floats, padded with zeros to whole vectors.
void read_padded(int32_t type, const void* from, int64_t count, float* to) {
    std::fill(to + count, to + padded(count), 0.0f);
    read_row(type, from, count, to);
}

class AttendJob final : public Job {
public:
    AttendJob(Pool& pool, const Level& level, Workspace& space, const Attend& call)
        : level_(level), call_(call), width_(padded(call.width)), scratch_floats_(padded(level.attend_floats(call))) {
        const int64_t all_heads = call.num_heads + call.num_groups;
        heads_ = floats(space.inputs, all_heads * width_);
        small_ = floats(space.hidden, padded(std::max(call.norm_width, call.num_heads * call.width)) * 2 + 2 * padded(call.num_angles));
        scratch_ = floats(space.outputs, scratch_floats_ * pool.num_threads());
    }

    bool has_memory() const { return heads_ && small_ && scratch_; }
    int32_t num_phases() const override { return 1; }
    int64_t num_tasks(int32_t) const override { return call_.num_groups; }
    bool is_shared() const { return call_.num_rows * call_.num_groups * (call_.width + call_.value_width) * size_of(call_.type) > kSharedBytes; }

    void run(int32_t, int64_t group, int32_t worker) override {
        level_.attend(call_, group, heads_, scratch_ + worker * scratch_floats_);
    }

    // Query and key normed and rotated, key and value in the cache.
    void prepare() {
        float *angles = small_, *rows = small_ + 2 * padded(call_.num_angles);
        if (call_.cos != nullptr) {
            read_row(call_.type, call_.cos, call_.num_angles, angles);
            read_row(call_.type, call_.sin, call_.num_angles, angles + padded(call_.num_angles));
        }
        float* key = heads_ + call_.num_heads * width_;
        read_heads(call_.query, call_.query_norm, call_.num_heads, rows, heads_);
        read_heads(call_.key, call_.key_norm, call_.num_groups, rows, key);
        if (call_.cos != nullptr)
            for (int64_t head = 0; head < call_.num_heads + call_.num_groups; ++head)
                level_.rotate(heads_ + head * width_, angles, angles + padded(call_.num_angles), call_.rotary, call_.num_angles, call_.type);
        const int64_t last = call_.num_rows - 1, size = size_of(call_.type);
        for (int64_t group = 0; group < call_.num_groups; ++group) {
            write_row(call_.type, key + group * width_, call_.width, static_cast<uint8_t*>(call_.keys) + group * call_.key_group_bytes + last * call_.key_row_bytes);
            std::copy_n(static_cast<const uint8_t*>(call_.value) + group * call_.value_width * size, call_.value_width * size,
                        static_cast<uint8_t*>(call_.values) + group * call_.value_group_bytes + last * call_.value_row_bytes);
        }
    }

private:
    // `rows`: room for the norm's weights and one row of it.
    void read_heads(const void* from, const void* norm, int64_t num_heads, float* rows, float* heads) {
        const int64_t size = size_of(call_.type), norm_width = call_.norm_width == call_.width ? call_.width : num_heads * call_.width;
        const uint8_t* bytes = static_cast<const uint8_t*>(from);
        if (norm == nullptr) {
            for (int64_t head = 0; head < num_heads; ++head) read_padded(call_.type, bytes + head * call_.width * size, call_.width, heads + head * width_);
            return;
        }
        float* row = rows + padded(norm_width);
        read_padded(call_.type, norm, norm_width, rows);
        for (int64_t begin = 0; begin < num_heads * call_.width; begin += norm_width) {
            read_padded(call_.type, bytes + begin * size, norm_width, row);
            level_.norm_row(row, rows, call_.type, norm_width, call_.eps, call_.norm_kind, row);
            for (int64_t i = 0; i < norm_width; i += call_.width) {
                float* head = heads + (begin + i) / call_.width * width_;
                std::copy_n(row + i, call_.width, head);
                std::fill(head + call_.width, head + width_, 0.0f);
            }
        }
    }

    const Level& level_;
    const Attend& call_;
    const int64_t width_, scratch_floats_;
    float *heads_, *small_, *scratch_;
};

}  // namespace
}  // namespace offmoe
