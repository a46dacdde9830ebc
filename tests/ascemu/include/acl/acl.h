// Stands in for CANN's header of this name: what csrc/ascend's host code uses of it.
#ifndef ASCEMU_ACL_H
#define ASCEMU_ACL_H

#include <cstdint>

using aclrtStream = void*;
using aclError = int;
enum aclDeviceInfo { ACL_DEVICE_INFO_VECTOR_CORE_NUM = 1 };

// There is one device, 0, with the cores of a 910B3.
inline aclError aclGetDeviceCapability(std::uint32_t device, aclDeviceInfo, std::int64_t* value) {
    *value = 40;
    return device == 0 ? 0 : 107001;  // an invalid device
}

#endif
