"""Compiled for the CPU (csrc/cpu): addresses and sizes go in, nothing of torch's ABI is used."""
