"""For Ascend NPUs (csrc/ascend)."""
