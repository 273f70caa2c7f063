// What Python and the library pass each other. Every struct is mirrored in ../structs.py; strides are in bytes.
#pragma once
#include <cstdint>

namespace offmoe {

enum Type : int32_t { F32 = 0, BF16 = 1, F16 = 2, E8M0 = 3 };
// From Q4_0 on GGUF's blocks, which hold their scales: the other fields on scales and zeros mean nothing there.
enum Kind : int32_t {
    DENSE_F32 = 0, DENSE_BF16 = 1, DENSE_F16 = 2, INT8 = 3, INT4 = 4, MXFP4 = 5, FP8 = 6,
    Q4_0 = 7, Q8_0 = 8, Q4_K = 9, Q5_K = 10, Q6_K = 11, MXFP4_BLOCKS = 12, IQ4_NL = 13, IQ4_XS = 14,
    PACKED = 15  // bfloat16 in 12 bits (isa/generic/packed.h): `scales` are the rows' heads, `zeros` their escapes
};
enum Curve : int32_t { NONE = 0, SILU = 1, GELU = 2, GELU_TANH = 3, RELU = 4, RELU_SQUARED = 5 };

// N rows (outputs) of K columns (inputs). A quantised weight is (code - zero) * scale; `zero` without `zeros`.
struct Matrix {
    const uint8_t* codes;
    const uint8_t* scales;
    const uint8_t* zeros;
    int64_t rows, columns;
    int64_t row_bytes;
    int64_t scale_row_bytes;
    int64_t zero_row_bytes;
    int32_t kind;
    int32_t scale_type;
    int32_t group;       // columns that share a scale
    int32_t group_rows;  // rows that share a scale
    int32_t zero;
    int32_t code_signed;   // INT8: bytes are signed
    int32_t zeros_packed;  // zeros lie in 32-bit words along the rows; otherwise they are bytes like the codes
    int32_t transposed;    // dense: stored as (K, N), row_bytes between neighbouring columns
};

struct Activation {
    int32_t curve, gated, interleaved;
    float alpha, gate_limit, up_limit, offset;  // a limit that is not there is infinite
};

// `up` parts join to (2F, D) or (F, D), `down` parts to (D, F). Biases are of the layer's type, or null.
struct Expert {
    const Matrix* up;
    const Matrix* down;
    const void* up_bias;
    const void* down_bias;
    int32_t num_up, num_down;
};

// Numbers to codes with a scale a group: 4 or 8 bits a code, `offset` added. Groups (of 32, 64 or 128) lie one after the
// other. `divisors`: by which the largest number of a group is divided for the scales that are tried. `is_finite` is
// written: 0 where a number is infinite or none at all, and codes and scales then mean nothing.
struct Encode {
    const void* values;
    void* codes;
    void* scales;
    const float* divisors;
    int64_t num_groups;
    int32_t num_divisors, group, bits_a_code, offset, value_type, scale_type, is_finite;
};

// Rows of bfloat16 numbers, side by side, to rows of PACKED. Several threads may pack rows of one matrix: `num_escapes` is
// theirs together. Where it ends above `most_escapes` the matrix does not fit, and means nothing.
struct Pack {
    const void* values;
    uint8_t* codes;
    void* heads;
    uint32_t* escapes;
    uint32_t* num_escapes;
    int64_t rows, columns, row_bytes, most_escapes;
};

// Rows [begin, end) of a PACKED matrix to bfloat16 numbers, `to_row_bytes` apart.
struct Unpack {
    const Matrix* matrix;
    void* to;
    int64_t begin, end, to_row_bytes;
};

// Rows of one layer: expert e computes rows begin[e] to begin[e + 1]; row r reads x[token[r]], writes y[choice[r]].
struct Call {
    const Activation* activation;
    const Expert* const* experts;
    const int32_t* begin;
    const int32_t* token;
    const int32_t* choice;
    const void* x;
    void* y;
    const void* weights;  // (T, K) contiguous, with `total`; or null
    void* total;          // (T, D): the weighted sum of a token's K rows of y
    int64_t x_row_bytes, y_row_bytes, total_row_bytes;
    int32_t num_experts, num_tokens, top_k;
    int32_t type;  // of the arithmetic, y and biases
    int32_t x_type, weights_type, total_type;
    int32_t width, hidden;  // D, F
};

// y[t] = x[t] @ matrix.T + bias, in `type`; the bias, of that type or null, is added before the rounding.
struct Linear {
    const Matrix* matrix;
    const void* bias;
    const void* x;
    void* y;
    int64_t x_row_bytes, y_row_bytes;
    int32_t num_x, type, x_type;
};

// What an RMS norm does to x / rms(x): rounds it, then multiplies; multiplies, then rounds; multiplies with 1 + weight.
// CENTRED is a layer norm: WEIGHT_FIRST after the mean was subtracted.
enum NormKind : int32_t { WEIGHT_LAST = 0, WEIGHT_FIRST = 1, ONE_PLUS_WEIGHT = 2, CENTRED = 3 };

// Rows of x, normed one by one. All of `type`, contiguous; y may be x.
struct Norm {
    const void* x;
    const void* weight;
    const void* bias;  // of a CENTRED one, or null
    void* y;
    int64_t rows, width;
    float eps;
    int32_t kind, type;
};

// One token's attention: norms and rotates its query and key, appends key and value to the cache as its last row, and
// attends to all `num_rows` rows. Query (heads, width), key (groups, width) and value (groups, value_width) are
// contiguous and all of `type`, like everything else here but angles and sinks.
struct Attend {
    const void* query;
    const void* key;  // null where the cache has key and value of the token already
    const void* value;
    const void* query_norm;  // weights, or null
    const void* key_norm;
    const void* cos;  // num_angles each, or null
    const void* sin;
    const float* sinks;  // a logit a head that attends to nothing, or null
    void* keys;         // the first row that is attended to
    void* values;
    void* output;  // (heads, value_width)
    int64_t num_heads, num_groups, width, value_width;
    int64_t norm_width;  // of a head, or of all heads together
    int64_t rotary, num_angles;
    int64_t key_group_bytes, key_row_bytes, value_group_bytes, value_row_bytes;
    int64_t num_rows;
    float eps, scale;
    int32_t norm_kind, type;
    int32_t angle_type;  // of cos and sin; where it is another, what turns is rounded once, at the end
    int32_t neighbours;  // each number turns with the one beside it, not with one of the other half
    int32_t norm_last;   // norms, of one head each, come after turning
    float cap;           // scores become cap * tanh(score / cap); 0: they do not
};

// Which numbers turn with each other, and where they go: a half with the other half; neighbours, apart into halves;
// neighbours, as complex numbers of float32 that are rounded at the end alone.
enum Rotation : int32_t { HALVES = 0, APART = 1, PAIRS = 2 };
constexpr int64_t kMostRotated = 512;

// One token's attention to latents: norms its latent, rotates its key and each head's query, appends latent and key to
// the cache as its last row, and attends to all `num_rows` rows. All of `type` but the angles.
struct Latent {
    const void* query;       // (heads, key_width + rotated)
    const void* compressed;  // (latent + rotated): the token's, latent and key as they were projected
    const void* norm;        // (latent)
    const float* cos;        // (rotated / 2)
    const float* sin;
    const Matrix* keys;    // a head each, (latent, key_width): from the query's part to what meets latents
    const Matrix* values;  // a head each, (value_width, latent)
    void* cache;           // the first row that is attended to: a latent, and behind it its rotated key
    void* output;          // (heads, value_width)
    int64_t num_heads, key_width, rotated, latent, value_width;
    int64_t row_bytes, num_rows;
    float eps, scale;
    int32_t norm_kind, rotation, type;
};

// How a router turns logits into experts and their weights: scores of all, the best top_k of them (of corrected scores,
// where there is a correction, in the best groups), their scores divided by the sum, times `scale`. In float32, or
// (`rounded`) each number rounded to the logits' type.
// The scores of the two OF_CHOSEN are made of the chosen logits alone. SPARSE_MIXER (Liu et al. 2024, arXiv 2409.12136)
// takes the largest logit top_k times; its score is its softmax among those not taken yet that are near to it: at most
// `jitter` * max(|logit|, largest) below.
enum Scoring : int32_t { SOFTMAX = 0, SIGMOID = 1, SOFTMAX_OF_CHOSEN = 2, SIGMOID_OF_CHOSEN = 3, SPARSE_MIXER = 4 };

struct Route {
    const float* correction;    // a number an expert, or null
    const float* expert_scale;  // a number an expert, which multiplies its weight, or null
    int64_t* ids;             // (top_k)
    void* weights;            // (top_k), of weights_type
    float scale, added;       // `added` to the sum
    float hidden_score;       // of experts in groups that are not among the best
    float jitter;             // of SPARSE_MIXER
    int32_t scoring, num_experts, top_k;
    int32_t num_groups, top_groups, best_of_group;  // a group counts as much as its best one or two together
    int32_t normalised, sorted;
    int32_t logits_type, weights_type, rounded;
};

// One token through a decoder layer up to its experts: norm, attention, the sum with x, norm, router. `attend` has
// room for query, key, value and output. All of its type.
struct Layer {
    Attend attend;
    const void* x;  // (width)
    const void* input_norm;
    const void* output_norm;
    const Matrix* projections[4];  // query, key, value, output
    const void* biases[4];         // or null
    void* state;                   // (width): x and attention's output
    void* normed;                  // (width)
    const Matrix* router;          // or null, and then there is no route
    const void* router_bias;       // of the logits' type, or null
    Route route;
    int64_t width;
    float input_eps, output_eps;
    int32_t input_kind, output_kind;
};

// The experts that a router chose, found in the table of a layer, and their weighted sum.
struct Lookup {
    Call* experts;               // its K experts are looked up in `table`
    const int64_t* ids;          // (K): what the router chose
    const Expert* const* table;  // for each expert of the layer: where it is described, null where it is not in RAM
    const Expert** chosen;       // (K): where `experts` has its experts
};

// A router's logits of one row, of the route's type, to experts and weights.
struct Choice {
    const Route* route;
    const void* logits;
    float* scores;  // room for four numbers an expert
};

// Rows that lie apart, put together: (rows, row_bytes) from every x_stride bytes.
struct Copy {
    const void* x;
    void* to;
    int64_t rows, row_bytes, x_stride;
};

// One token through a gated delta net (Yang et al. 2024, arXiv 2412.06464), after its projections and before its last
// one: a short convolution with SiLU over queries, keys and values, the delta rule on each value head's state, the RMS
// norm of its output and a SiLU gate. Several value heads may share a key head. Projections are of `type`, and for each
// key head lie `..._stride` numbers apart.
struct Delta {
    const void* query;
    const void* key;
    const void* value;
    const void* gate;
    const void* beta;
    const void* decay;
    const void* conv;     // (2 * keys * key_width + values * value_width, taps): of queries, keys, values
    void* conv_state;     // as large: the last inputs, the newest last
    float* state;         // (values, key_width, value_width)
    const float* rate;    // (values): the state decays by e^(-rate * softplus(decay + decay_bias))
    const float* decay_bias;
    const void* norm;  // (value_width)
    void* output;      // (values, value_width)
    int64_t query_stride, key_stride, value_stride, gate_stride, beta_stride, decay_stride;
    int64_t num_keys, num_values, key_width, value_width, taps;
    float eps;
    int32_t type;
};

// One token through a short convolution (LFM2): of the three parts of its input, the last times the first passes a
// convolution over the last `taps` tokens, and the second multiplies what comes out. All of `type`.
struct ShortConv {
    const void* input;  // (3, channels)
    const void* conv;   // (channels, taps)
    const void* bias;   // (channels), or null
    void* state;        // (channels, taps): the last inputs, the newest last
    void* output;       // (channels)
    int64_t channels, taps;
    int32_t type;
};

// One token through a Mamba-2 mixer (Dao & Gu 2024, arXiv 2405.21060) between its projections: a short convolution with
// SiLU over values, keys and queries (x, B and C), the state space of each head, a SiLU gate and an RMS norm of groups.
struct Mamba {
    const void* input;      // gate (heads * width), values (heads * width), keys and queries (groups * size), time (heads)
    const void* conv;       // (channels, taps): of values, keys, queries
    const void* conv_bias;  // (channels), or null
    void* conv_state;       // (channels, taps): the last inputs, the newest last
    float* state;           // (heads, width, size)
    const float* rate;      // (heads): the state decays by e^(-rate * softplus(time + time_bias))
    const float* time_bias;
    const float* skip;  // (heads): the part of a value that passes by the state
    const void* norm;   // (heads * width)
    void* output;       // (heads * width)
    int64_t num_heads, num_groups, width, size, taps;
    float eps;
    int32_t type;
};

// f(gate) * (up + offset), as the experts' activation; of `type`.
struct Activate {
    const Activation* activation;
    const void* gate;
    const void* up;
    void* to;
    int64_t count;
    int32_t type;
};

// What is done number by number, each step rounded to `type`. y has `count` numbers, or fewer, each of which serves as
// many neighbours of x.
enum Elementwise : int32_t {
    SUM = 0,         // x + scale * y (no product where the scale is 1)
    GATE = 1,        // x * sigmoid(y)
    SCALE = 2,       // x * scale
    CAP = 3,         // scale * tanh(x / scale)
    CLAMP = 4,       // x between -scale and scale
    MULTIPLY = 5,    // x * y
    GATE_SOFTPLUS = 6  // x * log(1 + e^y)
};

struct Numbers {
    const void* x;
    const void* y;
    void* to;
    int64_t count, y_count;
    float scale;
    int32_t what, type;
};

// One step of a program. `call` is a struct of its kind. `num_rows`: of the cache that it appends to, this token's own
// included; or null, where there is none.
enum OpKind : int32_t {
    OP_LAYER = 0, OP_NORM = 1, OP_LINEAR = 2, OP_ATTEND = 3, OP_LATENT = 4, OP_CHOOSE = 5, OP_EXPERTS = 6, OP_MLP = 7,
    OP_NUMBERS = 8, OP_COPY = 9, OP_DELTA = 10, OP_CONV = 11, OP_ACTIVATE = 12, OP_MAMBA = 13
};

struct Op {
    void* call;
    const int64_t* num_rows;
    int64_t ended_ns;  // since the program began
    int32_t kind;
};

// One token through a decoder: `ops` from `begin` on, in order.
struct Program {
    Op* ops;
    int64_t begin, end;
};

}  // namespace offmoe
