"""Print the learning rate at which AdamW moves the weights about as far as another run did.

    python examples/quickstart/match_learning_rate.py --base DIR --lr 3e-4 --moved DIR --target DIR

A run that forgets less may just have moved less, so it is compared with AdamW at a learning rate
that moves as little. Over the rates that matter here, the distance grows as a power of the learning
rate, distance ~ lr^0.6 (docs/log.md), so one run at --lr predicts the rate for any distance.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_replay.checkpoint.weight_distance import relative_l2
from megatron_replay.errors import ReplayError

EXPONENT = 0.6


def main() -> int:
    """Print the rate; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--lr", type=float, required=True, help="rate that --moved was trained at")
    parser.add_argument("--moved", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True, help="whose distance to match")
    options = parser.parse_args()
    try:
        ratio = relative_l2(options.target, options.base) / relative_l2(options.moved, options.base)
    except ReplayError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{options.lr * ratio ** (1 / EXPONENT):.3g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
