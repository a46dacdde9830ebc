"""Stage 1: fine-tune on the candidate sets of Stage 0, or with full softmax, in one loop.

    torchrun --nproc_per_node 4 -m megatron_replay.stage1 \\
        --load CHECKPOINT --data-path PREFIX --store DIR --save DIR --lr 1.25e-6 \\
        --tensor-model-parallel-size 4 --optimizer moclip --loss restricted

corpus joined with the store -> micro-batches -> hidden states -> loss at the selected positions
-> one step of the update rule. Stopping (SIGTERM, Ctrl-C, a crash) loses at most the steps since
the last checkpoint; the same command continues from there, in the same order of data.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_replay import cli, estimate, parallel, platform
from megatron_replay.config import Stage1Config


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m megatron_replay.stage1``."""
    return cli.launch("stage1", Stage1Config, run, estimate.stage1, parallel.explain, argv)


def run(config: Stage1Config) -> None:
    """Join the launched processes and train to the end, or until a signal stops the run."""
    groups = parallel.initialize(config.parallel, platform.select(config.parallel.platform))
    # Only now: megatron-core may be imported once the platform is prepared, not before.
    from megatron_replay.training.build import build_run
    from megatron_replay.training.train import StopRequest, train

    with StopRequest(groups.store) as stop:
        train(build_run(config, groups), stop)
    parallel.shutdown()


if __name__ == "__main__":
    cli.exit_now(main())
