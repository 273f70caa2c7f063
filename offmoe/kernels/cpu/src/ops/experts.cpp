#include <algorithm>
#include <atomic>
#include <memory>

#include "ops/jobs.h"

namespace offmoe {
namespace {

constexpr int64_t kTaskBytes = 256 << 10;  // of weights: about ten microseconds
constexpr int64_t kTaskTokens = 32;       // rows of x that are multiplied before the weights are read again
constexpr int64_t kPreparedNumbers = 4 << 20;  // of the rows of a linear that are prepared at a time: 16 MiB

int64_t value_bytes(int32_t type) { return type == F32 ? 4 : 2; }

int64_t clamp(int64_t value, int64_t low, int64_t high) { return std::min(std::max(value, low), high); }

}  // namespace

// `width` is that of a row in bytes.
int64_t task_outputs(const Matrix& matrix, int64_t most) {
    const int64_t width = matrix.transposed ? matrix.columns * (matrix.kind == DENSE_F32 ? 4 : 2) : matrix.row_bytes;
    const int64_t outputs = kTaskBytes / std::max<int64_t>(width, 1) / 16 * 16;
    return clamp(outputs, matrix.transposed ? 256 : 16, most);
}

void add_bias(int32_t type, const void* bias, int64_t begin, int64_t count, float* row) {
    float values[kMostOutputs];
    read_row(type, static_cast<const uint8_t*>(bias) + begin * value_bytes(type), count, values);
    for (int64_t i = 0; i < count; ++i) row[i] += values[i];
}

namespace {

struct Tile {
    float* out;
    int64_t stride;
};

// Outputs [begin, end) of matrices joined along their outputs.
void multiply_joined(const Isa& isa, const Matrix* parts, int32_t num_parts, int32_t type, int64_t begin,
                     int64_t end, const void* const* x, int32_t num_x, Tile tile) {
    for (int32_t part = 0; part < num_parts && begin < end; ++part) {
        const int64_t rows = parts[part].rows, stop = std::min(end, rows);
        if (begin < rows) {
            isa.multiply(parts[part], type, begin, stop, x, num_x, tile.out, tile.stride);
            tile.out += stop - begin;
            begin = stop;
        }
        begin -= rows;
        end -= rows;
    }
}

class ExpertsJob final : public Job {
public:
    ExpertsJob(Pool& pool, const Isa& isa, Workspace& space, const Call& call)
        : isa_(isa), space_(space), call_(call), num_rows_(call.begin[call.num_experts]),
          gated_(call.activation->gated != 0), left_(new std::atomic<int64_t>[call.num_experts]) {
        const Matrix &up = *call.experts[0]->up, &down = *call.experts[0]->down;
        up_outputs_ = task_outputs(up, kMostOutputs) / (gated_ ? 2 : 1);
        down_outputs_ = task_outputs(down, kMostOutputs);
        input_bytes_ = isa.prepared_bytes(up, call.type) + kApart;
        hidden_bytes_ = isa.prepared_bytes(down, call.type) + kApart;
        const int64_t worker_floats = kTaskTokens * kMostOutputs + std::max(call.width, call.hidden) + kMostOutputs;
        worker_bytes_ = (4 * worker_floats + 63) / 64 * 64;
        inputs_ = space.inputs.reserve(input_bytes_ * call.num_tokens);
        hidden_ = reinterpret_cast<float*>(space.hidden.reserve(4 * call.hidden * num_rows_));
        hidden_inputs_ = space.hidden_inputs.reserve(hidden_bytes_ * num_rows_);
        workers_ = space.outputs.reserve(worker_bytes_ * pool.num_threads());
        space.rows.resize(num_rows_);
        space.hidden_rows.resize(num_rows_);
        for (int64_t row = 0; row < num_rows_; ++row) {
            space.rows[row] = inputs_ + input_bytes_ * call.token[row];
            space.hidden_rows[row] = hidden_inputs_ + hidden_bytes_ * row;
        }
        for (int32_t phase = 0; phase < 2; ++phase) {
            const int64_t tasks = tasks_an_expert(phase);
            space.first_task[phase].assign(1, 0);
            for (int32_t e = 0; e < call.num_experts; ++e) {
                const bool any = call.begin[e + 1] > call.begin[e];
                space.first_task[phase].push_back(space.first_task[phase].back() + (any ? tasks : 0));
                left_[e].store(tasks_an_expert(0), std::memory_order_relaxed);
            }
        }
    }

    bool has_memory() const { return inputs_ && hidden_ && hidden_inputs_ && workers_; }
    int32_t num_phases() const override { return call_.total ? 4 : 3; }

    int64_t num_tasks(int32_t phase) const override {
        if (phase == 0) return call_.num_tokens;
        if (phase < 3) return space_.first_task[phase - 1].back();
        return call_.num_tokens * sum_blocks();
    }

    void run(int32_t phase, int64_t task, int32_t worker) override {
        float* memory = reinterpret_cast<float*>(workers_ + worker_bytes_ * worker);
        if (phase == 0) return prepare_input(task, memory);
        if (phase == 3) return sum(task, memory);
        const std::vector<int64_t>& first = space_.first_task[phase - 1];
        const auto after = std::upper_bound(first.begin(), first.end(), task);
        const int32_t expert = static_cast<int32_t>(after - first.begin()) - 1;
        if (phase == 1) up(expert, task - first[expert], memory);
        else down(expert, task - first[expert], memory);
    }

private:
    int64_t tasks_an_expert(int32_t phase) const {
        const int64_t outputs = phase == 0 ? call_.hidden : call_.width, step = phase == 0 ? up_outputs_ : down_outputs_;
        return (outputs + step - 1) / step;
    }

    int64_t sum_blocks() const { return (call_.width + kMostOutputs - 1) / kMostOutputs; }

    void prepare_input(int64_t token, float* memory) {
        read_row(call_.x_type, static_cast<const uint8_t*>(call_.x) + token * call_.x_row_bytes, call_.width, memory);
        if (call_.x_type != call_.type) round_row(call_.type, memory, call_.width);
        isa_.prepare(*call_.experts[0]->up, call_.type, memory, inputs_ + input_bytes_ * token);
    }

    // Hidden units [begin, end) of an expert's rows; who computes its last prepares them for `down`.
    void up(int32_t e, int64_t task, float* memory) {
        const Expert& expert = *call_.experts[e];
        const int64_t begin = task * up_outputs_, end = std::min<int64_t>(begin + up_outputs_, call_.hidden);
        for (int64_t row = call_.begin[e]; row < call_.begin[e + 1]; row += kTaskTokens) {
            const int32_t count = static_cast<int32_t>(std::min<int64_t>(kTaskTokens, call_.begin[e + 1] - row));
            up_rows(expert, begin, end, row, count, memory);
        }
        if (left_[e].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
        for (int64_t row = call_.begin[e]; row < call_.begin[e + 1]; ++row)
            isa_.prepare(*expert.down, call_.type, hidden_ + row * call_.hidden, hidden_inputs_ + row * hidden_bytes_);
    }

    void up_rows(const Expert& expert, int64_t begin, int64_t end, int64_t row, int32_t count, float* memory) {
        const int64_t units = end - begin, stride = gated_ ? 2 * units : units;
        const void* const* x = space_.rows.data() + row;
        if (!gated_) {
            project(expert, begin, end, x, count, {memory, stride});
        } else if (call_.activation->interleaved) {
            project(expert, 2 * begin, 2 * end, x, count, {memory, stride});
        } else {
            project(expert, begin, end, x, count, {memory, stride});
            project(expert, call_.hidden + begin, call_.hidden + end, x, count, {memory + units, stride});
        }
        float turned[kMostOutputs];
        for (int32_t t = 0; t < count; ++t) {
            const float *gate = memory + t * stride, *values = gate + units;
            if (!gated_) values = gate;
            if (gated_ && call_.activation->interleaved) {
                for (int64_t i = 0; i < units; ++i) {
                    turned[i] = gate[2 * i];
                    turned[units + i] = gate[2 * i + 1];
                }
                gate = turned;
                values = turned + units;
            }
            isa_.activate(*call_.activation, call_.type, gate, values, units, hidden_ + (row + t) * call_.hidden + begin);
        }
    }

    void project(const Expert& expert, int64_t begin, int64_t end, const void* const* x, int32_t count, Tile tile) {
        multiply_joined(isa_, expert.up, expert.num_up, call_.type, begin, end, x, count, tile);
        round_rows(expert.up_bias, begin, end, count, tile);
    }

    void round_rows(const void* bias, int64_t begin, int64_t end, int32_t count, Tile tile) {
        for (int32_t t = 0; t < count; ++t) {
            float* row = tile.out + t * tile.stride;
            round_row(call_.type, row, end - begin);
            if (bias == nullptr) continue;
            add_bias(call_.type, bias, begin, end - begin, row);
            round_row(call_.type, row, end - begin);
        }
    }

    void down(int32_t e, int64_t task, float* memory) {
        const Expert& expert = *call_.experts[e];
        const int64_t begin = task * down_outputs_, end = std::min<int64_t>(begin + down_outputs_, call_.width);
        for (int64_t row = call_.begin[e]; row < call_.begin[e + 1]; row += kTaskTokens) {
            const int32_t count = static_cast<int32_t>(std::min<int64_t>(kTaskTokens, call_.begin[e + 1] - row));
            const Tile tile{memory, end - begin};
            multiply_joined(isa_, expert.down, expert.num_down, call_.type, begin, end,
                            space_.hidden_rows.data() + row, count, tile);
            round_rows(expert.down_bias, begin, end, count, tile);
            for (int32_t t = 0; t < count; ++t) write_row(call_.type, memory + t * (end - begin), end - begin, output(call_.choice[row + t], begin));
        }
    }

    uint8_t* output(int64_t choice, int64_t column) const {
        return static_cast<uint8_t*>(call_.y) + choice * call_.y_row_bytes + column * value_bytes(call_.type);
    }

    // A token's rows, in the router's order. Products and sum have the wider of both types, as torch has it.
    void sum(int64_t task, float* memory) {
        const int64_t token = task / sum_blocks(), begin = task % sum_blocks() * kMostOutputs;
        const int64_t count = std::min<int64_t>(kMostOutputs, call_.width - begin);
        const int32_t type = call_.type == call_.weights_type ? call_.type : F32;
        float* row = memory + kMostOutputs;
        std::fill_n(memory, count, 0.0f);
        for (int32_t k = 0; k < call_.top_k; ++k) {
            const int64_t choice = token * call_.top_k + k;
            float weight;
            read_row(call_.weights_type, static_cast<const uint8_t*>(call_.weights) + choice * value_bytes(call_.weights_type), 1, &weight);
            read_row(call_.type, output(choice, begin), count, row);
            for (int64_t i = 0; i < count; ++i) row[i] *= weight;
            round_row(type, row, count);
            for (int64_t i = 0; i < count; ++i) memory[i] += row[i];
        }
        round_row(type, memory, count);
        write_row(call_.total_type, memory, count, static_cast<uint8_t*>(call_.total) + token * call_.total_row_bytes + begin * value_bytes(call_.total_type));
    }

    const Isa& isa_;
    Workspace& space_;
    const Call& call_;
    const int64_t num_rows_;
    const bool gated_;
    std::unique_ptr<std::atomic<int64_t>[]> left_;  // tasks of every expert's up
    int64_t up_outputs_, down_outputs_, input_bytes_, hidden_bytes_, worker_bytes_;
    uint8_t *inputs_, *hidden_inputs_, *workers_;
    float* hidden_;
};

class LinearJob final : public Job {
public:
    LinearJob(Pool& pool, const Isa& isa, Workspace& space, const Linear& call)
        : isa_(isa), space_(space), call_(call), outputs_(task_outputs(*call.matrix, kMostOutputs)),
          input_bytes_(isa.prepared_bytes(*call.matrix, call.type) + kApart) {
        worker_bytes_ = (4 * (kTaskTokens * kMostOutputs + call.matrix->columns) + 63) / 64 * 64;
        inputs_ = space.inputs.reserve(input_bytes_ * call.num_x);
        workers_ = space.outputs.reserve(worker_bytes_ * pool.num_threads());
        space.rows.resize(call.num_x);
        for (int32_t row = 0; row < call.num_x; ++row) space.rows[row] = inputs_ + input_bytes_ * row;
    }

    bool has_memory() const { return inputs_ && workers_; }
    int32_t num_phases() const override { return 2; }

    int64_t num_tasks(int32_t phase) const override {
        return phase == 0 ? call_.num_x : (call_.matrix->rows + outputs_ - 1) / outputs_;
    }

    void run(int32_t phase, int64_t task, int32_t worker) override {
        float* memory = reinterpret_cast<float*>(workers_ + worker_bytes_ * worker);
        const int64_t columns = call_.matrix->columns;
        if (phase == 0) {
            read_row(call_.x_type, static_cast<const uint8_t*>(call_.x) + task * call_.x_row_bytes, columns, memory);
            if (call_.x_type != call_.type) round_row(call_.type, memory, columns);
            isa_.prepare(*call_.matrix, call_.type, memory, inputs_ + input_bytes_ * task);
            return;
        }
        const int64_t begin = task * outputs_, end = std::min<int64_t>(begin + outputs_, call_.matrix->rows);
        for (int32_t row = 0; row < call_.num_x; row += kTaskTokens) {
            const int32_t count = std::min<int32_t>(kTaskTokens, call_.num_x - row);
            isa_.multiply(*call_.matrix, call_.type, begin, end, space_.rows.data() + row, count, memory, end - begin);
            for (int32_t t = 0; t < count; ++t) {
                float* out = memory + t * (end - begin);
                if (call_.bias) add_bias(call_.type, call_.bias, begin, end - begin, out);
                write_row(call_.type, out, end - begin, static_cast<uint8_t*>(call_.y) + (row + t) * call_.y_row_bytes + begin * value_bytes(call_.type));
            }
        }
    }

private:
    const Isa& isa_;
    Workspace& space_;
    const Linear& call_;
    const int64_t outputs_, input_bytes_;
    int64_t worker_bytes_;
    uint8_t *inputs_, *workers_;
};

}  // namespace

int32_t run_experts(Pool& pool, const Isa& isa, Workspace& space, const Call& call) {
    if (call.num_experts == 0 || call.begin[call.num_experts] == 0) return 0;
    ExpertsJob job(pool, isa, space, call);
    if (!job.has_memory()) return 1;
    pool.run(job);
    return 0;
}

int32_t run_linear(Pool& pool, const Isa& isa, Workspace& space, const Linear& call) {
    const int32_t most = static_cast<int32_t>(std::max(kTaskTokens, kPreparedNumbers / call.matrix->columns));
    for (int32_t row = 0; row < call.num_x; row += most) {
        Linear part = call;
        part.x = static_cast<const uint8_t*>(call.x) + row * call.x_row_bytes;
        part.y = static_cast<uint8_t*>(call.y) + row * call.y_row_bytes;
        part.num_x = std::min(most, call.num_x - row);
        LinearJob job(pool, isa, space, part);
        if (!job.has_memory()) return 1;
        pool.run(job);
    }
    return 0;
}

}  // namespace offmoe
