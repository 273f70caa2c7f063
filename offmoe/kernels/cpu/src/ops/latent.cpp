// One token's attention to cached latents as one job. Keys and values are linear in the latent, so their matrix is
// multiplied to each head's query before and to its result after (DeepSeek-V2, 2.1.2), and no key or value is made.
#include "ops/attend_job.h"

namespace offmoe {
namespace {

enum Phase : int32_t { COMPRESS, ABSORB, APPEND, ATTEND, JOIN, EXPAND, END };

class LatentJob final : public Job {
public:
    LatentJob(Pool& pool, const Isa& isa, Workspace& space, const Latent& call)
        : isa_(isa), call_(call), type_(call.type), size_(size_of(call.type)), row_bytes_((call.latent + call.rotated) * size_),
          call_of_heads_(as_attend(space)), attend_(pool, isa, space, call_of_heads_) {
        worker_floats_ = 2 * in_vectors(std::max({call.key_width, call.latent + call.rotated, call.value_width}));
        input_bytes_ = std::max(isa.prepared_bytes(call.keys[0], type_), isa.prepared_bytes(call.values[0], type_)) + kApart;
        inputs_ = space.hidden_inputs.reserve((input_bytes_ + 4 * worker_floats_) * pool.num_threads());
        workers_ = inputs_ + input_bytes_ * pool.num_threads();
    }

    bool has_memory() const { return call_of_heads_.query && inputs_ && attend_.has_memory(); }
    int32_t num_phases() const override { return END; }

    int64_t num_tasks(int32_t phase) const override {
        if (phase == ATTEND) return attend_.num_tasks(0);
        return phase == ABSORB || phase == EXPAND ? call_.num_heads : 1;
    }

    void run(int32_t phase, int64_t task, int32_t worker) override {
        float* memory = reinterpret_cast<float*>(workers_) + worker * worker_floats_;
        uint8_t* input = inputs_ + worker * input_bytes_;
        switch (phase) {
            case COMPRESS: return compress(memory);
            case ABSORB: return absorb(task, memory, input);
            case APPEND: return attend_.prepare();
            case ATTEND: return attend_.run(0, task, worker);
            case JOIN: return attend_.finish();
            default: return expand(task, memory, input);
        }
    }

private:
    // Heads that share one group of keys, a latent and the rotated key behind it, and of values, the latent alone.
    Attend as_attend(Workspace& space) const {
        Attend attend = {};
        uint8_t* memory = space.layer.reserve((call_.num_heads + 1) * row_bytes_ + call_.num_heads * call_.latent * size_);
        if (memory == nullptr) return attend;
        attend.query = memory;
        attend.key = attend.value = memory + call_.num_heads * row_bytes_;
        attend.output = memory + (call_.num_heads + 1) * row_bytes_;
        attend.keys = attend.values = call_.cache;
        attend.num_heads = call_.num_heads;
        attend.num_groups = 1;
        attend.width = attend.norm_width = call_.latent + call_.rotated;
        attend.value_width = call_.latent;
        attend.key_row_bytes = attend.value_row_bytes = call_.row_bytes;
        attend.num_rows = call_.num_rows;
        attend.scale = call_.scale;
        attend.type = type_;
        return attend;
    }

    // The token's latent normed, its key rotated.
    void compress(float* row) {
        const uint8_t* from = static_cast<const uint8_t*>(call_.compressed);
        uint8_t* to = static_cast<uint8_t*>(const_cast<void*>(call_of_heads_.key));
        float* weight = row + worker_floats_ / 2;
        read_padded(type_, call_.norm, call_.latent, weight);
        read_padded(type_, from, call_.latent, row);
        isa_.norm_row(row, weight, type_, call_.latent, call_.eps, call_.norm_kind, row);
        write_row(type_, row, call_.latent, to);
        turn(from + call_.latent * size_, to + call_.latent * size_);
    }

    // A head's query: what meets latents, and behind it what meets rotated keys.
    void absorb(int64_t head, float* row, uint8_t* input) {
        const uint8_t* from = static_cast<const uint8_t*>(call_.query) + head * (call_.key_width + call_.rotated) * size_;
        uint8_t* to = static_cast<uint8_t*>(const_cast<void*>(call_of_heads_.query)) + head * row_bytes_;
        multiply(call_.keys[head], from, row, input, to);
        turn(from + call_.key_width * size_, to + call_.latent * size_);
    }

    // A head's value of its mixed latent.
    void expand(int64_t head, float* row, uint8_t* input) {
        const uint8_t* from = static_cast<const uint8_t*>(call_of_heads_.output) + head * call_.latent * size_;
        multiply(call_.values[head], from, row, input, static_cast<uint8_t*>(call_.output) + head * call_.value_width * size_);
    }

    void multiply(const Matrix& matrix, const uint8_t* from, float* row, uint8_t* input, uint8_t* to) {
        float* out = row + worker_floats_ / 2;
        read_row(type_, from, matrix.columns, row);
        isa_.prepare(matrix, type_, row, input);
        const void* x = input;
        for (int64_t begin = 0; begin < matrix.rows; begin += kMostOutputs) {
            const int64_t end = std::min(begin + kMostOutputs, matrix.rows);
            isa_.multiply(matrix, type_, begin, end, &x, 1, out + begin, end - begin);
        }
        write_row(type_, out, matrix.rows, to);
    }

    // As the family's code: in complex numbers of float32 where pairs stay, else with each step rounded.
    void turn(const uint8_t* from, uint8_t* to) const {
        float x[kMostRotated], products[4][kMostRotated / 2];
        const int64_t half = call_.rotated / 2;
        const bool stay = call_.rotation == PAIRS, halves = call_.rotation == HALVES;
        read_row(type_, from, call_.rotated, x);
        for (int64_t i = 0; i < half; ++i) {
            const float a = x[halves ? i : 2 * i], b = x[halves ? half + i : 2 * i + 1];
            products[0][i] = a * call_.cos[i];
            products[1][i] = b * call_.sin[i];
            products[2][i] = b * call_.cos[i];
            products[3][i] = a * call_.sin[i];
        }
        for (float* row : products)
            if (!stay) round_row(type_, row, half);
        for (int64_t i = 0; i < half; ++i) {
            x[stay ? 2 * i : i] = products[0][i] - products[1][i];
            x[stay ? 2 * i + 1 : half + i] = products[2][i] + products[3][i];
        }
        write_row(type_, x, call_.rotated, to);
    }

    const Isa& isa_;
    const Latent& call_;
    const int32_t type_;
    const int64_t size_, row_bytes_;
    const Attend call_of_heads_;
    AttendJob attend_;
    int64_t worker_floats_, input_bytes_;
    uint8_t *inputs_, *workers_;
};

}  // namespace

int32_t run_latent(Pool& pool, const Isa& isa, Workspace& space, const Latent& call) {
    LatentJob job(pool, isa, space, call);
    if (!job.has_memory()) return 1;
    pool.run(job);
    return 0;
}

}  // namespace offmoe
