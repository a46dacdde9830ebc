// megatron_replay.kernels._ascend. Tensors and streams come as integers: nothing of torch's ABI is
// used, so the module fits every torch and torch_npu. kernels/ascend_head.py and ascend_selection.py check
// what they pass; nothing here does.
#include <pybind11/pybind11.h>

#include "gather_dot.h"
#include "segment_axpy.h"
#include "select_candidates.h"

namespace py = pybind11;

namespace {

using replay::Address;
using Size = std::uint32_t;

// 40 of a 910B3 or B4, 48 of a B1 or B2.
std::int64_t vector_cores(std::uint32_t device) {
    std::int64_t found = 0;
    if (const auto code = aclGetDeviceCapability(device, ACL_DEVICE_INFO_VECTOR_CORE_NUM, &found))
        throw std::runtime_error("cannot ask device " + std::to_string(device) +
                                 " for its vector cores: ACL error " + std::to_string(code));
    return found;
}

}  // namespace

PYBIND11_MODULE(_ascend, module) {
    module.doc() = "Called through megatron_replay.kernels.ascend_head and ascend_selection.";
    const py::call_guard<py::gil_scoped_release> without_gil;

    module.def("vector_cores", vector_cores);
    module.def(
        "gather_dot",
        [](Address stream, Size blocks, int dtype, Address hidden, Address weight, Address ids,
           Address offsets, Address z, Size tokens, Size rows, Size pairs, Size channels) {
            replay::gather_dot(stream, blocks, static_cast<replay::Dtype>(dtype), hidden, weight,
                               ids, offsets, z, {tokens, rows, pairs, channels});
        },
        without_gil);
    module.def(
        "segment_axpy",
        [](Address stream, Size blocks, int dtype, Address source, Address indices,
           Address coefficients, Address offsets, Address rows, Address out, Size sources,
           Size outputs, Size segments, Size pairs, Size channels) {
            replay::segment_axpy(stream, blocks, static_cast<replay::Dtype>(dtype), source, indices,
                                 coefficients, offsets, rows, out,
                                 {sources, outputs, segments, pairs, channels});
        },
        without_gil);
    module.def(
        "select_candidates",
        [](Address stream, Size blocks, int dtype, Address logits, Address largest, Address maxima,
           Address sums, Size rows, Size size, Size stride, Size lanes) {
            replay::select_candidates(stream, blocks, static_cast<replay::Dtype>(dtype), logits,
                                      largest, maxima, sums, {rows, size, stride, lanes});
        },
        without_gil);
}
