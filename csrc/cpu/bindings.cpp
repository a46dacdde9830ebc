// megatron_replay.kernels._cpu. Tensors come as integers, their data pointers: nothing of torch's
// ABI is used, so the module fits every torch. kernels/cpu checks what it passes; nothing here
// does.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "levels.h"
#include "momentum_step.h"
#include "restricted_head.h"
#include "select_candidates.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Addresses = std::vector<Address>;
using Sizes = std::vector<std::int64_t>;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

template <class T>
std::vector<T*> pointers(const Addresses& addresses) {
    std::vector<T*> found;
    found.reserve(addresses.size());
    for (const Address address : addresses) found.push_back(pointer<T>(address));
    return found;
}

const std::array<std::string, 3> kLevels{"base", "avx2", "avx512"};

void use_level(const std::string& name) {
    for (int i = 0; i <= static_cast<int>(best_level()); ++i)
        if (kLevels[i] == name) {
            level() = static_cast<Level>(i);
            return;
        }
    throw std::invalid_argument("this processor has no level " + name);
}

using Matrix = std::tuple<Address, std::int64_t, bool>;

Operand operand(const Matrix& matrix) {
    const auto [address, stride, is_bf16] = matrix;
    return {pointer<const void>(address), stride, is_bf16};
}

// Address, type (LogitType's order), rows, size, stride.
using Rows = std::tuple<Address, int, std::int64_t, std::int64_t, std::int64_t>;

Logits rows(const Rows& given) {
    const auto [address, type, count, size, stride] = given;
    return {pointer<const void>(address), static_cast<LogitType>(type), count, size, stride};
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
    module.doc() = "Compiled for the CPU; called through megatron_replay.kernels.cpu_*.";
    const py::call_guard<py::gil_scoped_release> without_gil;

    module.def("level", [] { return kLevels[static_cast<int>(level())]; });
    module.def("use_level", use_level);
    module.def(
        "dot_products",
        [](const Addresses& exp_avgs, const Addresses& grads, const Sizes& sizes, Address sums,
           int threads) {
            dot_products(pointers<const float>(exp_avgs), pointers<const float>(grads), sizes,
                         pointer<double>(sums), threads);
        },
        without_gil);
    module.def(
        "square_sums",
        [](const Addresses& grads, const Sizes& sizes, Address sums, int threads) {
            square_sums(pointers<const float>(grads), sizes, pointer<double>(sums), threads);
        },
        without_gil);
    module.def(
        "momentum_step",
        [](const Addresses& params, const Addresses& grads, const Addresses& exp_avgs,
           const Addresses& exp_avg_sqs, const Addresses& copies, const Sizes& sizes,
           Address coefficients, std::int64_t scalars, std::int64_t stride, bool bounded,
           Address sums, int threads) {
            if (scalars * sizeof(float) != sizeof(Coefficients))
                throw std::invalid_argument("momentum_step: coefficients of another version");
            const Step step{pointers<float>(params),         pointers<const float>(grads),
                            pointers<float>(exp_avgs),       pointers<float>(exp_avg_sqs),
                            pointers<std::uint16_t>(copies), sizes};
            momentum_step(step, pointer<const Coefficients>(coefficients), stride, bounded,
                          pointer<double>(sums), threads);
        },
        without_gil);
    module.def(
        "arctangent",
        [](Address y, Address x, Address out, std::int64_t size) {
            arctangent(pointer<const float>(y), pointer<const float>(x), pointer<float>(out), size);
        },
        without_gil);
    module.def(
        "row_maxima",
        [](const Rows& logits, Address maxima, int threads) {
            row_maxima(rows(logits), pointer<float>(maxima), threads);
        },
        without_gil);
    module.def(
        "shard_tokens",
        [](const Rows& logits, std::int64_t vocab_start, std::int64_t count, bool given,
           Address maxima, Address totals, Address values, Address ids, int threads) {
            shard_tokens(rows(logits), vocab_start, count, given, pointer<float>(maxima),
                         pointer<std::int64_t>(totals), pointer<float>(values),
                         pointer<std::int32_t>(ids), threads);
        },
        without_gil);
    module.def(
        "cut_tokens",
        [](Address values, Address candidate_ids, std::int64_t rows, std::int64_t count,
           Address totals, Address maxima, Address labels, Address label_logits, double uncovered,
           Address ids, Address offsets, Address num_candidates, Address label_appended,
           Address inside, int threads) {
            const Cut cut{pointer<std::int32_t>(ids), pointer<std::int64_t>(offsets),
                          pointer<std::int64_t>(num_candidates),
                          pointer<std::uint8_t>(label_appended), pointer<std::int64_t>(inside)};
            cut_tokens(pointer<const float>(values), pointer<const std::int32_t>(candidate_ids),
                       rows, count, pointer<const std::int64_t>(totals),
                       pointer<const float>(maxima), pointer<const std::int64_t>(labels),
                       pointer<const float>(label_logits), uncovered, cut, threads);
        },
        without_gil);
    py::class_<RestrictedHead>(module, "RestrictedHead")
        .def(py::init([](Address ids, Address offsets, Address labels, std::int64_t positions,
                         std::int64_t rows, int threads) {
                 return new RestrictedHead(pointer<const std::int32_t>(ids),
                                           pointer<const std::int64_t>(offsets),
                                           pointer<const std::int64_t>(labels), positions, rows,
                                           threads);
             }),
             without_gil)
        .def(
            "forward",
            [](RestrictedHead& head, const Matrix& hidden, const Matrix& weight,
               std::int64_t channels, Address max, Address sum, Address label_logit, int threads) {
                head.forward(operand(hidden), operand(weight), channels, pointer<float>(max),
                             pointer<float>(sum), pointer<float>(label_logit), threads);
            },
            without_gil)
        .def(
            "backward",
            [](RestrictedHead& head, const Matrix& hidden, const Matrix& weight,
               std::int64_t channels, Address top, Address total, Address grad,
               Address hidden_grad, Address weight_grad, std::int64_t weight_grad_stride,
               int threads) {
                head.backward(operand(hidden), operand(weight), channels,
                              pointer<const float>(top), pointer<const float>(total),
                              pointer<const float>(grad), pointer<float>(hidden_grad),
                              pointer<float>(weight_grad), weight_grad_stride, threads);
            },
            without_gil);
}
