// Stands in for CANN's header of this name: runs csrc/ascend's kernels on a CPU and checks them.
//
// Written from the public documentation of the API, for the vector cores of a 910B; it has what the
// kernels use, and no more. A mistake ends the launch with a Finding that names kernel, core and
// call. README.md beside the tests says what is checked, and what is not.
#ifndef ASCEMU_KERNEL_OPERATOR_H
#define ASCEMU_KERNEL_OPERATOR_H

#include "ascemu/copies.h"
#include "ascemu/core.h"
#include "ascemu/queues.h"
#include "ascemu/reductions.h"
#include "ascemu/tensors.h"
#include "ascemu/vectors.h"

#define __global__
#define __aicore__
#define __gm__
#define GM_ADDR std::uint8_t*
#define KERNEL_TASK_TYPE_DEFAULT(type) ascemu::core().vector_only = (type) == KERNEL_TYPE_AIV_ONLY

enum { KERNEL_TYPE_AIV_ONLY, KERNEL_TYPE_AIC_ONLY };

#endif
