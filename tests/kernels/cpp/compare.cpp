// Compares every instruction set that this processor has with the portable one: what all calls of the library write, and
// rows of weights times rows of x before they are rounded. Prints the largest error of each kind; exit code 1 where one is
// beyond its bound, or where what must be equal is not.
//
//     compare [share]    one case of `share` is taken (default 1: all cases)
//
// Errors are relative to the largest number that the portable set wrote in that call; where it wrote fewer than eight, in
// which all might be small by chance, to the largest of all calls of its kind.
#include <algorithm>
#include <cmath>
#include <map>
#include <string>

#include "calls.h"
#include "isa/isa.h"

namespace made {
namespace {

struct Written {
    std::string kind;
    int32_t type;
    std::vector<uint8_t> bytes;
};

struct Worst {
    int64_t calls = 0, different = 0;
    double error = 0.0, bound = 0.0;
};

std::vector<Written> all_written;

std::vector<const Isa*> known_isas() {
    return {
#ifdef OFFMOE_HAS_AVX512
        &kAvx512,
#endif
#ifdef OFFMOE_HAS_AVX2
        &kAvx2,
#endif
#ifdef OFFMOE_HAS_NEON_DOT
        &kNeonDot,
#endif
#ifdef OFFMOE_HAS_NEON
        &kNeon,
#endif
        &kPortable};
}

const char* const kTypeNames[] = {"float32", "bfloat16", "float16"};

void keep(const char* what, const char* name, int32_t type, const Buffer& written) {
    std::string kind = std::string(what) + (*name ? " " : "") + name;
    if (type >= 0) kind += std::string(", ") + kTypeNames[type];
    all_written.push_back({std::move(kind), type, {written.at(), written.at() + written.size()}});
}

std::vector<double> numbers_of(const Written& written) {
    const int64_t count = static_cast<int64_t>(written.bytes.size()) / bytes_of(written.type);
    std::vector<double> numbers(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) numbers[i] = number_at(written.type, written.bytes.data() + i * bytes_of(written.type));
    return numbers;
}

double largest_of(const std::vector<double>& numbers) {
    double largest = 0.0;
    for (double number : numbers)
        if (std::isfinite(number)) largest = std::max(largest, std::fabs(number));
    return largest;
}

// The last bits of a number of this type.
double step_of(int32_t type) { return type == F32 ? 0x1p-23 : type == BF16 ? 0x1p-7 : 0x1p-10; }

// By how much two instruction sets may differ: what is added up in another order, in 16-bit integers (int16_rows.h), and
// by how many steps what is rounded to the type several times on its way.
double bound_of(const std::string& kind, int32_t type) {
    const auto begins = [&](const char* with) { return kind.rfind(with, 0) == 0; };
    const auto ends = [&](const std::string& with) { return kind.size() > with.size() && kind.compare(kind.size() - with.size(), with.size(), with) == 0; };
    if (begins("product of float32")) return 0x1p-17;
    if (begins("product")) return ends(" fp8, float32") || ends("f32, float32") || ends("f16, float32") ? 0x1p-17 : 0x1p-14;
    const double sums = 0x1p-17 + (type == F32 ? 0.0 : 0x1p-14);
    if (begins("linear") || begins("norm") || begins("attention")) return sums + step_of(type);
    return 4 * (sums + step_of(type));
}

// Of one call by both.
void compare_one(const Written& ours, const Written& portable, const std::map<std::string, double>& largest, Worst& worst) {
    ++worst.calls;
    if (ours.type < 0) {
        worst.different += ours.bytes != portable.bytes;
        return;
    }
    const std::vector<double> a = numbers_of(ours), b = numbers_of(portable);
    const double scale = b.size() < 8 ? largest.at(portable.kind) : largest_of(b);
    for (size_t i = 0; i < a.size(); ++i) {
        if (std::isfinite(a[i]) && std::isfinite(b[i])) worst.error = std::max(worst.error, std::fabs(a[i] - b[i]) / std::max(scale, 1e-30));
        else if (!(std::isnan(a[i]) && std::isnan(b[i])) && a[i] != b[i]) ++worst.different;
    }
}

// 0, or 1 where some kind is beyond its bound. Other experts than the portable set's are chosen where two logits are as good
// as equal; what comes after them has nothing to be compared with.
int compare(const char* isa, const std::vector<Written>& ours, const std::vector<Written>& portable) {
    require(ours.size() == portable.size(), "calls", isa, static_cast<int64_t>(ours.size()), static_cast<int64_t>(portable.size()), 0);
    std::map<std::string, double> largest;
    for (const Written& one : portable)
        if (one.type >= 0) largest[one.kind] = std::max(largest[one.kind], largest_of(numbers_of(one)));
    std::map<std::string, Worst> kinds;
    bool same_experts = true;
    for (size_t i = 0; i < ours.size(); ++i) {
        if (ours[i].type == kIds) same_experts = ours[i].bytes == portable[i].bytes;
        if (!same_experts && portable[i].kind.rfind("program, ", 0) == 0) continue;
        Worst& worst = kinds[portable[i].kind];
        worst.bound = portable[i].type < 0 ? 0.0 : bound_of(portable[i].kind, portable[i].type);
        compare_one(ours[i], portable[i], largest, worst);
    }
    int failed = 0;
    for (const auto& [kind, worst] : kinds) {
        const bool may_differ = kind == "layer: ids" && worst.different * 20 <= worst.calls;
        const bool holds = worst.error <= worst.bound && (worst.different == 0 || may_differ);
        failed |= !holds;
        std::printf("%s %s: %lld calls, largest error %.2g (bound %.2g), %lld different%s\n", isa, kind.c_str(), static_cast<long long>(worst.calls),
                    worst.error, worst.bound, static_cast<long long>(worst.different), holds ? "" : "  BEYOND");
    }
    return failed;
}

// Rows of weights times rows of x as an instruction set has them, before they are rounded; and each row of x alone, which
// must give the same bits.
void try_products(const Isa& isa, int64_t share) {
    Random random(21);
    int64_t turn = 0;
    for (const Format& format : kFormats)
        for (const Variant& variant : variants_of(format))
            for (int64_t given : {31, 95, 257, 520, 1100})
                for (int32_t num_x : {1, 2, 3, 4, 5, 8, 13, 33})
                    for (int32_t type : {F32, BF16, F16}) {
                        if (++turn % share) continue;
                        const int64_t rows = 19, columns = (given + format.multiple - 1) / format.multiple * format.multiple;
                        const Weights weights(random, format, variant, rows, columns);
                        const int64_t bytes = isa.prepared_bytes(weights.matrix, type);
                        const Buffer values = random_numbers(random, type, num_x * columns), prepared(num_x * bytes + 64);
                        const Buffer out(num_x * rows * 4), alone(rows * 4);
                        std::vector<float> x(static_cast<size_t>(columns));
                        std::vector<const void*> at;
                        uint8_t* to = prepared.at() + (64 - reinterpret_cast<uintptr_t>(prepared.at()) % 64) % 64;
                        for (int32_t t = 0; t < num_x; ++t, to += bytes) {
                            for (int64_t i = 0; i < columns; ++i) x[i] = static_cast<float>(number_at(type, values.at() + (t * columns + i) * bytes_of(type)));
                            if (t % 4 == 1 && type != F16) x[columns / 2] = 0x1p66f;  // beyond what is rounded to integers
                            isa.prepare(weights.matrix, type, x.data(), to);
                            at.push_back(to);
                        }
                        isa.multiply(weights.matrix, type, 0, rows, at.data(), num_x, reinterpret_cast<float*>(out.at()), rows);
                        keep((std::string("product of ") + kTypeNames[type]).c_str(), format.name, F32, out);
                        for (int32_t t = 0; t < num_x; ++t) {
                            isa.multiply(weights.matrix, type, 0, rows, &at[t], 1, reinterpret_cast<float*>(alone.at()), rows);
                            require(std::memcmp(alone.at(), out.at() + t * rows * 4, static_cast<size_t>(rows * 4)) == 0, "bits depend on company", format.name, columns, num_x, t);
                        }
                    }
}

std::vector<Written> run_all(int32_t idx, const char* name, int64_t share) {
    all_written.clear();
    const Handles handles(idx);
    int64_t calls = 0;
    for (const auto attempt : {try_linears, try_experts, try_attention, try_latent}) calls += attempt(handles, share);
    for (const auto attempt : {try_norms, try_layers, try_encodes, try_deltas, try_packing}) calls += attempt(handles);
    for (const Isa* isa : known_isas())
        if (std::strcmp(isa->name, name) == 0) try_products(*isa, share);
    std::printf("%s: %lld calls, %zu outputs\n", name, static_cast<long long>(calls), all_written.size());
    std::fflush(stdout);
    return std::move(all_written);
}

}  // namespace
}  // namespace made

int main(int argc, char** argv) {
    using namespace made;
    const int64_t share = argc > 1 ? std::max(1, std::atoi(argv[1])) : 1;
    watcher = keep;
    std::vector<std::pair<int32_t, const char*>> usable_isas;
    int32_t usable = 0;
    for (int32_t idx = 0; const char* isa = offmoe_isa(idx, &usable); ++idx)
        if (usable) usable_isas.push_back({idx, isa});
    const std::vector<Written> portable = run_all(usable_isas.back().first, "portable", share);
    int failed = usable_isas.size() < 2;  // nothing was compared
    usable_isas.pop_back();
    for (const auto& [idx, isa] : usable_isas) failed |= compare(isa, run_all(idx, isa, share), portable);
    std::puts(failed ? "FAILED" : "every kernel is within its bound");
    return failed;
}
