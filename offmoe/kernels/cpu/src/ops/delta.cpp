// One token through a gated delta net as one job: the convolution, then a value head a task.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "isa/generic/attend_parts.h"
#include "ops/jobs.h"
#include "ops/scalars.h"

namespace offmoe {
namespace {

constexpr int64_t kTaskChannels = 512, kTaskInputs = 4096;
constexpr float kSquares = 1e-6f;      // added to a key's sum of squares, as transformers' modules do

enum Phase : int32_t { CONVOLVE, HEADS, END };

class DeltaJob final : public Job {
public:
    DeltaJob(Pool& pool, const Isa& isa, Workspace& space, const Delta& call)
        : isa_(isa), call_(call), type_(call.type), size_(size_of(call.type)),
          keys_(call.num_keys * call.key_width), channels_(2 * keys_ + call.num_values * call.value_width),
          task_channels_(std::min(kTaskChannels, kTaskInputs / call.taps)) {
        worker_floats_ = 2 * in_vectors(call.key_width) + 4 * in_vectors(call.value_width);
        mixed_ = reinterpret_cast<float*>(space.layer.reserve(4 * (in_vectors(channels_) + worker_floats_ * pool.num_threads())));
        workers_ = mixed_ + in_vectors(channels_);
    }

    bool has_memory() const { return mixed_ != nullptr; }
    int32_t num_phases() const override { return END; }

    int64_t num_tasks(int32_t phase) const override {
        return phase == HEADS ? call_.num_values : (channels_ + task_channels_ - 1) / task_channels_;
    }

    void run(int32_t phase, int64_t task, int32_t worker) override {
        if (phase == CONVOLVE) convolve(task * task_channels_, std::min((task + 1) * task_channels_, channels_));
        else head(task, workers_ + worker * worker_floats_);
    }

private:
    // The newest inputs of channels up to `end`, which lie by heads in the projections' rows.
    void newest(int64_t channel, int64_t end, float* to) const {
        const int64_t shared = call_.num_values / call_.num_keys * call_.value_width;
        for (int64_t run; channel < end; channel += run, to += run) {
            const bool is_value = channel >= 2 * keys_, is_query = channel < keys_;
            const int64_t at = is_value ? channel - 2 * keys_ : is_query ? channel : channel - keys_;
            const int64_t width = is_value ? shared : call_.key_width;
            const int64_t stride = is_value ? call_.value_stride : is_query ? call_.query_stride : call_.key_stride;
            const void* from = is_value ? call_.value : is_query ? call_.query : call_.key;
            run = std::min(width - at % width, end - channel);
            read_row(type_, static_cast<const uint8_t*>(from) + (at / width * stride + at % width) * size_, run, to);
        }
    }

    void convolve(int64_t begin, int64_t end) {
        float states[kTaskInputs], weights[kTaskInputs], last[kTaskChannels];
        const int64_t taps = call_.taps, count = end - begin, bytes = begin * taps * size_;
        float* sums = mixed_ + begin;
        read_row(type_, static_cast<const uint8_t*>(call_.conv_state) + bytes, count * taps, states);
        read_row(type_, static_cast<const uint8_t*>(call_.conv) + bytes, count * taps, weights);
        newest(begin, end, last);
        for (int64_t i = 0; i < count; ++i) {
            float *row = states + i * taps, sum = 0;
            std::copy(row + 1, row + taps, row);
            row[taps - 1] = last[i];
            for (int64_t tap = 0; tap < taps; ++tap) sum += row[tap] * weights[i * taps + tap];
            sums[i] = sum;
        }
        write_row(type_, states, count * taps, static_cast<uint8_t*>(call_.conv_state) + bytes);
        round_row(type_, sums, count);
        for (int64_t i = 0; i < count; ++i) sums[i] = silu(sums[i]);
        round_row(type_, sums, count);
    }

    // A head's query or key, of length 1.
    void normed(const float* from, float scale, float* to) const {
        float squares = 0;
        for (int64_t i = 0; i < call_.key_width; ++i) squares += from[i] * from[i];
        const float factor = 1.0f / std::sqrt(squares + kSquares);
        for (int64_t i = 0; i < call_.key_width; ++i) to[i] = from[i] * factor * scale;
    }

    float number(const void* from, int64_t stride, int64_t head) const {
        const int64_t shared = call_.num_values / call_.num_keys;
        float value;
        read_row(type_, static_cast<const uint8_t*>(from) + (head / shared * stride + head % shared) * size_, 1, &value);
        return value;
    }

    void head(int64_t head, float* memory) {
        const int64_t width = call_.value_width, shared = call_.num_values / call_.num_keys, key_head = head / shared;
        float *query = memory, *key = query + in_vectors(call_.key_width), *out = key + in_vectors(call_.key_width);
        float *gate = out + in_vectors(width), *weight = gate + in_vectors(width);
        normed(mixed_ + key_head * call_.key_width, 1.0f / std::sqrt(static_cast<float>(call_.key_width)), query);
        normed(mixed_ + keys_ + key_head * call_.key_width, 1.0f, key);
        float beta = 1.0f / (1.0f + std::exp(-number(call_.beta, call_.beta_stride, head)));
        round_row(type_, &beta, 1);
        const float time = number(call_.decay, call_.decay_stride, head) + call_.decay_bias[head];
        const float soft = softplus(time);
        isa_.delta_rule(call_.state + head * call_.key_width * width, query, key, mixed_ + 2 * keys_ + head * width,
                          std::exp(-call_.rate[head] * soft), beta, call_.key_width, width, out);
        round_row(type_, out, width);
        std::fill(out + width, out + in_vectors(width), 0.0f);
        std::fill_n(weight, in_vectors(width), 0.0f);
        read_row(type_, call_.norm, width, weight);
        isa_.norm_row(out, weight, type_, width, call_.eps, WEIGHT_LAST, out);
        const uint8_t* gates = static_cast<const uint8_t*>(call_.gate);
        read_row(type_, gates + (key_head * call_.gate_stride + head % shared * width) * size_, width, gate);
        for (int64_t i = 0; i < width; ++i) out[i] *= silu(gate[i]);
        write_row(type_, out, width, static_cast<uint8_t*>(call_.output) + head * width * size_);
    }

    const Isa& isa_;
    const Delta& call_;
    const int32_t type_;
    const int64_t size_, keys_, channels_, task_channels_;
    int64_t worker_floats_;
    float *mixed_, *workers_;
};

}  // namespace

int32_t run_delta(Pool& pool, const Isa& isa, Workspace& space, const Delta& call) {
    if (call.taps > 64) return 1;
    DeltaJob job(pool, isa, space, call);
    if (!job.has_memory()) return 1;
    pool.run(job);
    return 0;
}

}  // namespace offmoe
