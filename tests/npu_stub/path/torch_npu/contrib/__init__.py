"""As torch_npu.contrib."""
