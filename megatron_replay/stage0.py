"""Stage 0: one forward pass over the corpus; per selected position the candidate set goes to disk.

    torchrun --nproc_per_node 4 -m megatron_replay.stage0 \\
        --load CHECKPOINT --data-path PREFIX --store DIR --tensor-model-parallel-size 4

corpus -> shards of documents -> micro-batches -> hidden states -> logits, a chunk at a time
-> candidate sets (selection.candidates) -> one record per document (store.CandidateWriter).

A shard is a fixed range of documents and shares prefixes only within itself, so its bytes do not
depend on the number of processes, nor on which shards an interrupted run had already finished.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_replay import cli, estimate, parallel, platform
from megatron_replay.config import Stage0Config


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m megatron_replay.stage0``."""
    return cli.launch("stage0", Stage0Config, run, estimate.stage0, parallel.explain, argv)


def run(config: Stage0Config) -> None:
    """Join the launched processes and collect."""
    groups = parallel.initialize(config.parallel, platform.select(config.parallel.platform))
    # Only now: megatron-core may be imported once the platform is prepared, not before.
    from megatron_replay.collection.run import collect

    collect(config, groups)
    parallel.shutdown()


if __name__ == "__main__":
    cli.exit_now(main())
