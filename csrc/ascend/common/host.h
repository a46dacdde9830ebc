// What the host side of every operator needs.
#ifndef REPLAY_ASCEND_HOST_H
#define REPLAY_ASCEND_HOST_H

#include <acl/acl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace replay {

// A pointer to the device's memory, or a stream, as an integer: nothing of torch's ABI is used.
using Address = std::uintptr_t;

// The dtypes of kernels/ascend_head.py, in its order.
enum class Dtype : int { fp32, fp16, bf16 };

inline std::uint8_t* memory(Address address) { return reinterpret_cast<std::uint8_t*>(address); }

inline aclrtStream stream(Address address) { return reinterpret_cast<aclrtStream>(address); }

// Calls `launch` with the kernel of `dtype`. The CANN build makes an aclrtlaunch_NAME of every
// kernel, which returns once the kernel is in the stream, and 0 if it is.
template <class Kernel, class Launch>
void launch_for(Dtype dtype, const char* name, Kernel fp32, Kernel fp16, Kernel bf16,
                Launch launch) {
    const Kernel kernel = dtype == Dtype::fp32 ? fp32 : dtype == Dtype::fp16 ? fp16 : bf16;
    if (const std::uint32_t code = launch(kernel))
        throw std::runtime_error(std::string(name) + ": the launch failed with ACL error " +
                                 std::to_string(code));
}

}  // namespace replay

#endif
