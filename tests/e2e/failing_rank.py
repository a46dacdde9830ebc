"""Stage 1 with a fault: rank 1 raises, or hangs once, at its third step. For torchrun in tests."""

import itertools
import os
import signal
import sys
from pathlib import Path

from megatron_replay import cli, platform, stage1

platform.select("cpu").prepare()

from megatron_replay.training import train  # noqa: E402

take_step, calls = train.train_step, itertools.count(1)


def step(*args, **kwargs):
    if os.environ["RANK"] == "1" and next(calls) == 3:
        if os.environ["FAULT"] == "hang":
            hung = Path(os.environ["HUNG"])
            if hung.exists():  # torchrun has started it again
                return take_step(*args, **kwargs)
            hung.write_text(str(os.getpid()))
            signal.pause()
        raise RuntimeError("the device of this rank is broken")
    return take_step(*args, **kwargs)


if __name__ == "__main__":
    train.train_step = step
    cli.exit_now(stage1.main(sys.argv[1:]))
