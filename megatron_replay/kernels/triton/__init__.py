"""For CUDA, in Triton."""
