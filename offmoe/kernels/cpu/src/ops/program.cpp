// One token through a decoder: steps in order, as long as the experts that its routers choose are in RAM.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

#include "ops/jobs.h"
#include "ops/scalars.h"

namespace offmoe {
namespace {

constexpr int64_t kBlock = 512;
constexpr int64_t kMostTaps = 64, kStates = 1024;  // numbers of states at once, of at most kBlock channels

int64_t now_ns() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

// Of `count` numbers. `y` has as many, or is empty where there are none.
void compute(const Numbers& call, float* x, float* y, int64_t count) {
    const int32_t type = call.type;
    switch (call.what) {
        case SUM:
            if (call.scale != 1.0f) {
                for (int64_t i = 0; i < count; ++i) y[i] *= call.scale;
                round_row(type, y, count);
            }
            for (int64_t i = 0; i < count; ++i) x[i] += y[i];
            return;
        case GATE:
            for (int64_t i = 0; i < count; ++i) y[i] = 1.0f / (1.0f + std::exp(-y[i]));
            round_row(type, y, count);
            for (int64_t i = 0; i < count; ++i) x[i] *= y[i];
            return;
        case SCALE:
            for (int64_t i = 0; i < count; ++i) x[i] *= call.scale;
            return;
        case CAP:
            for (int64_t i = 0; i < count; ++i) x[i] /= call.scale;
            round_row(type, x, count);
            for (int64_t i = 0; i < count; ++i) x[i] = std::tanh(x[i]);
            round_row(type, x, count);
            for (int64_t i = 0; i < count; ++i) x[i] *= call.scale;
            return;
        case CLAMP:
            for (int64_t i = 0; i < count; ++i) x[i] = std::min(std::max(x[i], -call.scale), call.scale);
            return;
        case GATE_SOFTPLUS:
            for (int64_t i = 0; i < count; ++i) y[i] = softplus(y[i]);
            round_row(type, y, count);
            [[fallthrough]];
        default:
            for (int64_t i = 0; i < count; ++i) x[i] *= y[i];
    }
}

// The numbers of y for x's from `begin` on.
void read_shared(const Numbers& call, int64_t share, int64_t begin, int64_t count, float* y) {
    const int64_t size = call.type == F32 ? 4 : 2;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t from = (begin + i) / share;
        if (i > 0 && from == (begin + i - 1) / share) y[i] = y[i - 1];
        else read_row(call.type, static_cast<const uint8_t*>(call.y) + from * size, 1, y + i);
    }
}

void run_numbers(const Numbers& call) {
    const int64_t size = call.type == F32 ? 4 : 2;
    float x[kBlock], y[kBlock];
    const int64_t share = call.y == nullptr ? 1 : call.count / call.y_count;  // numbers of x that one of y serves
    for (int64_t begin = 0; begin < call.count; begin += kBlock) {
        const int64_t count = std::min(kBlock, call.count - begin), at = begin * size;
        read_row(call.type, static_cast<const uint8_t*>(call.x) + at, count, x);
        if (share > 1) read_shared(call, share, begin, count, y);
        else if (call.y != nullptr) read_row(call.type, static_cast<const uint8_t*>(call.y) + at, count, y);
        compute(call, x, y, count);
        write_row(call.type, x, count, static_cast<uint8_t*>(call.to) + at);
    }
}

// Channels in blocks whose states fit: converted together, since a call for each channel's few numbers costs more than they do.
void run_conv(const ShortConv& call) {
    const int64_t size = call.type == F32 ? 4 : 2, bytes = call.channels * size, taps = call.taps, most = std::min(kBlock, kStates / taps);
    const uint8_t* input = static_cast<const uint8_t*>(call.input);
    const uint8_t* conv = static_cast<const uint8_t*>(call.conv);
    float first[kBlock], second[kBlock], last[kBlock], states[kStates], weights[kStates];
    for (int64_t begin = 0; begin < call.channels; begin += most) {
        const int64_t count = std::min(most, call.channels - begin), at = begin * size;
        uint8_t* state = static_cast<uint8_t*>(call.state) + at * taps;
        read_row(call.type, input + at, count, first);
        read_row(call.type, input + bytes + at, count, second);
        read_row(call.type, input + 2 * bytes + at, count, last);
        read_row(call.type, state, count * taps, states);
        read_row(call.type, conv + at * taps, count * taps, weights);
        for (int64_t i = 0; i < count; ++i) first[i] *= last[i];
        round_row(call.type, first, count);
        if (call.bias != nullptr) read_row(call.type, static_cast<const uint8_t*>(call.bias) + at, count, last);
        else std::fill_n(last, count, 0.0f);
        for (int64_t i = 0; i < count; ++i) {
            float *inputs = states + i * taps, sum = last[i];
            const float* weight = weights + i * taps;
            for (int64_t tap = 0; tap + 1 < taps; ++tap) sum += (inputs[tap] = inputs[tap + 1]) * weight[tap];
            inputs[taps - 1] = first[i];
            last[i] = sum + first[i] * weight[taps - 1];
        }
        write_row(call.type, states, count * taps, state);
        round_row(call.type, last, count);
        for (int64_t i = 0; i < count; ++i) last[i] *= second[i];
        write_row(call.type, last, count, static_cast<uint8_t*>(call.output) + at);
    }
}

void run_activate(const Isa& isa, const Activate& call) {
    const int64_t size = call.type == F32 ? 4 : 2;
    float gate[kBlock] = {}, up[kBlock] = {}, out[kBlock];
    for (int64_t begin = 0; begin < call.count; begin += kBlock) {
        const int64_t count = std::min(kBlock, call.count - begin), at = begin * size;
        read_row(call.type, static_cast<const uint8_t*>(call.gate) + at, count, gate);
        read_row(call.type, static_cast<const uint8_t*>(call.up) + at, count, up);
        isa.activate(*call.activation, call.type, gate, up, count, out);
        write_row(call.type, out, count, static_cast<uint8_t*>(call.to) + at);
    }
}

void choose(const Choice& call) {
    float* logits = call.scores + 3 * call.route->num_experts;
    read_row(call.route->logits_type, call.logits, call.route->num_experts, logits);
    run_route(*call.route, logits, call.scores);
}

// False where one of them is not in RAM.
bool look_up(const Lookup& call) {
    bool all = true;
    for (int32_t k = 0; k < call.experts->top_k; ++k) {
        call.chosen[k] = call.table[call.ids[k]];
        all = all && call.chosen[k] != nullptr;
    }
    return all;
}

// 0, 1 where there was no memory, or -1 where an expert is missing.
int32_t run_op(Pool& pool, const Isa& isa, Workspace& space, const Op& op) {
    switch (op.kind) {
        case OP_LAYER: {
            Layer& call = *static_cast<Layer*>(op.call);
            call.attend.num_rows = *op.num_rows;
            return run_layer(pool, isa, space, call);
        }
        case OP_NORM: return run_norm(isa, space, *static_cast<const Norm*>(op.call));
        case OP_LINEAR: return run_linear(pool, isa, space, *static_cast<const Linear*>(op.call));
        case OP_ATTEND: {
            Attend& call = *static_cast<Attend*>(op.call);
            call.num_rows = *op.num_rows;
            return run_attend(pool, isa, space, call);
        }
        case OP_LATENT: {
            Latent& call = *static_cast<Latent*>(op.call);
            call.num_rows = *op.num_rows;
            return run_latent(pool, isa, space, call);
        }
        case OP_CHOOSE: choose(*static_cast<const Choice*>(op.call)); return 0;
        case OP_EXPERTS: {
            const Lookup& call = *static_cast<const Lookup*>(op.call);
            return look_up(call) ? run_experts(pool, isa, space, *call.experts) : -1;
        }
        case OP_MLP: return run_experts(pool, isa, space, *static_cast<const Call*>(op.call));
        case OP_DELTA: return run_delta(pool, isa, space, *static_cast<const Delta*>(op.call));
        case OP_COPY: {
            const Copy& call = *static_cast<const Copy*>(op.call);
            for (int64_t row = 0; row < call.rows; ++row)
                std::memcpy(static_cast<uint8_t*>(call.to) + row * call.row_bytes, static_cast<const uint8_t*>(call.x) + row * call.x_stride, static_cast<size_t>(call.row_bytes));
            return 0;
        }
        case OP_CONV: {
            const ShortConv& call = *static_cast<const ShortConv*>(op.call);
            if (call.taps > kMostTaps) return 1;
            run_conv(call);
            return 0;
        }
        case OP_MAMBA: return run_mamba(pool, isa, space, *static_cast<const Mamba*>(op.call));
        case OP_ACTIVATE: run_activate(isa, *static_cast<const Activate*>(op.call)); return 0;
        default: run_numbers(*static_cast<const Numbers*>(op.call)); return 0;
    }
}

}  // namespace

int64_t run_program(Pool& pool, const Isa& isa, Workspace& space, const Program& call) {
    const int64_t began = now_ns();
    for (int64_t i = call.begin; i < call.end; ++i) {
        Op& op = call.ops[i];
        const int32_t failed = run_op(pool, isa, space, op);
        if (failed > 0) return -1;
        if (failed < 0) return i;
        op.ended_ns = now_ns() - began;
    }
    return call.end;
}

}  // namespace offmoe
