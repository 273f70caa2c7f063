// One token through a Mamba-2 mixer as one job: the convolution, then a head a task, then the norm of a group.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa/generic/attend_parts.h"
#include "ops/jobs.h"
#include "ops/scalars.h"

namespace offmoe {
namespace {

constexpr int64_t kTaskChannels = 128, kMostTaps = 8;

enum Phase : int32_t { CONVOLVE, HEADS, NORM, END };

class MambaJob final : public Job {
public:
    MambaJob(Pool& pool, const Isa& isa, Workspace& space, const Mamba& call)
        : isa_(isa), call_(call), type_(call.type), size_(size_of(call.type)), values_(call.num_heads * call.width),
          keys_(call.num_groups * call.size), channels_(values_ + 2 * keys_), group_(values_ / call.num_groups) {
        worker_floats_ = std::max(2 * in_vectors(call.size), 3 * in_vectors(group_));
        mixed_ = reinterpret_cast<float*>(space.layer.reserve(4 * (in_vectors(channels_) + in_vectors(values_) + worker_floats_ * pool.num_threads())));
        read_ = mixed_ + in_vectors(channels_);
        workers_ = read_ + in_vectors(values_);
    }

    bool has_memory() const { return mixed_ != nullptr; }
    int32_t num_phases() const override { return END; }

    int64_t num_tasks(int32_t phase) const override {
        return phase == CONVOLVE ? (channels_ + kTaskChannels - 1) / kTaskChannels : phase == HEADS ? call_.num_heads : call_.num_groups;
    }

    void run(int32_t phase, int64_t task, int32_t worker) override {
        float* memory = workers_ + worker * worker_floats_;
        if (phase == CONVOLVE) convolve(task * kTaskChannels, std::min((task + 1) * kTaskChannels, channels_));
        else if (phase == HEADS) head(task, memory);
        else norm(task, memory);
    }

private:
    const uint8_t* input(int64_t at) const { return static_cast<const uint8_t*>(call_.input) + at * size_; }

    void convolve(int64_t begin, int64_t end) {
        float states[kTaskChannels * kMostTaps], weights[kTaskChannels * kMostTaps], newest[kTaskChannels];
        const int64_t taps = call_.taps, count = end - begin, bytes = begin * taps * size_;
        float* sums = mixed_ + begin;
        read_row(type_, static_cast<const uint8_t*>(call_.conv_state) + bytes, count * taps, states);
        read_row(type_, static_cast<const uint8_t*>(call_.conv) + bytes, count * taps, weights);
        read_row(type_, input(values_ + begin), count, newest);
        if (call_.conv_bias != nullptr) read_row(type_, static_cast<const uint8_t*>(call_.conv_bias) + begin * size_, count, sums);
        else std::fill_n(sums, count, 0.0f);
        for (int64_t i = 0; i < count; ++i) {
            float* row = states + i * taps;
            std::copy(row + 1, row + taps, row);
            row[taps - 1] = newest[i];
            for (int64_t tap = 0; tap < taps; ++tap) sums[i] += row[tap] * weights[i * taps + tap];
        }
        write_row(type_, states, count * taps, static_cast<uint8_t*>(call_.conv_state) + bytes);
        round_row(type_, sums, count);
        for (int64_t i = 0; i < count; ++i) sums[i] = silu(sums[i]);
        round_row(type_, sums, count);
    }

    void head(int64_t head, float* memory) {
        const int64_t size = call_.size, width = call_.width, group = head / (call_.num_heads / call_.num_groups);
        float *key = memory, *query = memory + in_vectors(size), time;
        const float *value = mixed_ + head * width, *keys = mixed_ + values_ + group * size;
        read_row(type_, input(values_ + channels_ + head), 1, &time);
        time += call_.time_bias[head];
        round_row(type_, &time, 1);
        time = softplus(time);
        round_row(type_, &time, 1);
        std::fill_n(key, in_vectors(size), 0.0f);
        std::fill_n(query, in_vectors(size), 0.0f);
        for (int64_t i = 0; i < size; ++i) key[i] = time * keys[i];
        round_row(type_, key, size);
        std::copy_n(keys + keys_, size, query);
        float* out = read_ + head * width;
        isa_.mamba_rule(call_.state + head * width * size, value, key, query, std::exp(-call_.rate[head] * time), width, size, type_, out);
        round_row(type_, out, width);
        for (int64_t i = 0; i < width; ++i) {
            float passed = value[i] * call_.skip[head];
            round_row(type_, &passed, 1);
            out[i] += passed;
        }
        round_row(type_, out, width);
    }

    void norm(int64_t group, float* memory) {
        const int64_t begin = group * group_, padded = in_vectors(group_);
        float *row = memory, *weight = row + padded, *gate = weight + padded;
        std::fill_n(row, 2 * padded, 0.0f);
        read_row(type_, input(begin), group_, gate);
        read_row(type_, static_cast<const uint8_t*>(call_.norm) + begin * size_, group_, weight);
        for (int64_t i = 0; i < group_; ++i) row[i] = read_[begin + i] * silu(gate[i]);
        isa_.norm_row(row, weight, type_, group_, call_.eps, WEIGHT_LAST, row);
        write_row(type_, row, group_, static_cast<uint8_t*>(call_.output) + begin * size_);
    }

    const Isa& isa_;
    const Mamba& call_;
    const int32_t type_;
    const int64_t size_, values_, keys_, channels_, group_;
    int64_t worker_floats_;
    float *mixed_, *read_, *workers_;
};

}  // namespace

int32_t run_mamba(Pool& pool, const Isa& isa, Workspace& space, const Mamba& call) {
    if (call.taps > kMostTaps) return 1;
    MambaJob job(pool, isa, space, call);
    if (!job.has_memory()) return 1;
    pool.run(job);
    return 0;
}

}  // namespace offmoe
