"""The parts of Stage 1's loop: one step, the probe, the log, and stopping on request."""
