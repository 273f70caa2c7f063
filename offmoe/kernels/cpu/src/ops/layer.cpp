// One token through a decoder layer up to its experts, as one job: threads are woken once. Every number is rounded
// where the modules round it, and computed by the functions that compute the modules one by one: the bits are theirs.
#include "ops/attend_job.h"

namespace offmoe {
namespace {

enum Phase : int32_t { NORM, PROJECT, TURN, ATTEND, JOIN, ADD, NORM_AGAIN, SCORE, ROUTE, END };

class LayerJob final : public Job {
public:
    LayerJob(Pool& pool, const Isa& isa, Workspace& space, const Layer& call)
        : isa_(isa), call_(call), type_(call.attend.type), attend_(pool, isa, space, call.attend) {
        for (int32_t i = 0; i < 4; ++i) add_matrix(i, *call.projections[i], type_);
        if (call.router != nullptr) add_matrix(4, *call.router, call.route.logits_type);
        const int64_t num_experts = call.router != nullptr ? call.route.num_experts : 0;
        const int64_t heads = call.attend.num_heads * call.attend.value_width;
        const int64_t sizes[] = {in_vectors(call.width), in_vectors(call.width), in_vectors(heads), in_vectors(num_experts), in_vectors(3 * num_experts), kMostOutputs * pool.num_threads()};
        int64_t total = 0, bytes = 0;
        for (int64_t size : sizes) total += size;
        for (int32_t i = 0; i < num_matrices_; ++i) bytes += input_bytes_[i];
        uint8_t* memory = space.layer.reserve(4 * total + bytes);
        if (memory == nullptr) return;
        has_memory_ = attend_.has_memory();
        float* at = reinterpret_cast<float*>(memory);
        float** const places[] = {&row_, &weight_, &heads_, &logits_, &scores_, &workers_};
        for (int32_t i = 0; i < 6; ++i) {
            *places[i] = at;
            at += sizes[i];
        }
        memory = reinterpret_cast<uint8_t*>(at);
        for (int32_t i = 0; i < num_matrices_; ++i) {
            inputs_[i] = memory;
            memory += input_bytes_[i];
        }
    }

    bool has_memory() const { return has_memory_; }
    int32_t num_phases() const override { return call_.router != nullptr ? END : SCORE; }

    int64_t num_tasks(int32_t phase) const override {
        switch (phase) {
            case PROJECT: return tasks_[0] + tasks_[1] + tasks_[2];
            case ATTEND: return attend_.num_tasks(0);
            case ADD: return tasks_[3];
            case SCORE: return tasks_[4];
            default: return 1;
        }
    }

    void run(int32_t phase, int64_t task, int32_t worker) override {
        switch (phase) {
            case NORM:
                norm(call_.x, call_.input_norm, call_.input_eps, call_.input_kind);
                for (int32_t i = 0; i < 3; ++i) isa_.prepare(*call_.projections[i], type_, row_, inputs_[i]);
                return;
            case PROJECT: return project(task, worker);
            case TURN: return attend_.prepare();
            case ATTEND: return attend_.run(0, task, worker);
            case JOIN:
                attend_.finish();
                read_row(type_, call_.attend.output, call_.attend.num_heads * call_.attend.value_width, heads_);
                return isa_.prepare(*call_.projections[3], type_, heads_, inputs_[3]);
            case ADD: return add(task, worker);
            case NORM_AGAIN:
                norm(call_.state, call_.output_norm, call_.output_eps, call_.output_kind);
                write_row(type_, row_, call_.width, call_.normed);
                if (call_.router != nullptr) isa_.prepare(*call_.router, call_.route.logits_type, row_, inputs_[4]);
                return;
            case SCORE: {
                const int64_t begin = task * outputs_[4];
                float* out = logits_ + begin;
                const int64_t count = multiply(4, begin, out);
                round_row(call_.route.logits_type, out, count);
                return;
            }
            default: return run_route(call_.route, logits_, scores_);
        }
    }

private:
    void add_matrix(int32_t idx, const Matrix& matrix, int32_t type) {
        matrices_[idx] = &matrix;
        types_[idx] = type;
        biases_[idx] = idx < 4 ? call_.biases[idx] : call_.router_bias;
        outputs_[idx] = task_outputs(matrix, kMostOutputs);
        tasks_[idx] = (matrix.rows + outputs_[idx] - 1) / outputs_[idx];
        input_bytes_[idx] = isa_.prepared_bytes(matrix, type) + kApart;
        num_matrices_ = idx + 1;
    }

    // `row_`: the normed row, each number of the layer's type.
    void norm(const void* x, const void* weight, float eps, int32_t kind) {
        read_padded(type_, weight, call_.width, weight_);
        read_padded(type_, x, call_.width, row_);
        isa_.norm_row(row_, weight_, type_, call_.width, eps, kind, row_);
    }

    // A task's outputs from `begin` on, not rounded; how many.
    int64_t multiply(int32_t idx, int64_t begin, float* out) {
        const int64_t end = std::min(begin + outputs_[idx], matrices_[idx]->rows);
        const void* x = inputs_[idx];
        isa_.multiply(*matrices_[idx], types_[idx], begin, end, &x, 1, out, end - begin);
        if (biases_[idx] != nullptr) add_bias(types_[idx], biases_[idx], begin, end - begin, out);
        return end - begin;
    }

    void project(int64_t task, int32_t worker) {
        int32_t idx = 0;
        for (; task >= tasks_[idx]; ++idx) task -= tasks_[idx];
        float* out = workers_ + worker * kMostOutputs;
        const int64_t begin = task * outputs_[idx], count = multiply(idx, begin, out);
        const void* to = idx == 0 ? call_.attend.query : idx == 1 ? call_.attend.key : call_.attend.value;
        write_row(type_, out, count, static_cast<uint8_t*>(const_cast<void*>(to)) + begin * size_of(type_));
    }

    void add(int64_t task, int32_t worker) {
        float *out = workers_ + worker * kMostOutputs, x[kMostOutputs];
        const int64_t begin = task * outputs_[3], count = multiply(3, begin, out);
        round_row(type_, out, count);
        read_row(type_, static_cast<const uint8_t*>(call_.x) + begin * size_of(type_), count, x);
        for (int64_t i = 0; i < count; ++i) out[i] += x[i];
        write_row(type_, out, count, static_cast<uint8_t*>(call_.state) + begin * size_of(type_));
    }

    const Isa& isa_;
    const Layer& call_;
    const int32_t type_;
    AttendJob attend_;
    bool has_memory_ = false;
    int32_t num_matrices_ = 0;
    const Matrix* matrices_[5];
    const void* biases_[5];
    int32_t types_[5];
    int64_t outputs_[5], tasks_[5], input_bytes_[5];
    uint8_t* inputs_[5];
    float *row_, *weight_, *heads_, *logits_, *scores_, *workers_;
};

}  // namespace

int32_t run_layer(Pool& pool, const Isa& isa, Workspace& space, const Layer& call) {
    LayerJob job(pool, isa, space, call);
    if (!job.has_memory()) return 1;
    pool.run(job);
    return 0;
}

}  // namespace offmoe
