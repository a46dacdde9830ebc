"""Weights in and out: Hugging Face directories, and training checkpoints that reshard."""
