"""A model's shape, and the shape as megatron-core's GPTModel with our norm, attention, head."""
