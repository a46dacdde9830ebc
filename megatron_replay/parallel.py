"""The process groups of a run: built once by megatron-core, then passed explicitly."""

from __future__ import annotations

import datetime
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megatron_replay.config import ParallelConfig
from megatron_replay.errors import ConfigError, ReplayError, TrainingError
from megatron_replay.platform import Platform

T = TypeVar("T")


@dataclass(frozen=True)
class Parallel:
    """This process's place in the TP x PP x DP grid, and its groups.

    ``model_group`` spans TP x PP, one model replica; ``tp_dp_group`` spans all processes that hold
    one pipeline stage. ``writer`` is the process that logs: last pipeline stage (which has the
    loss), tensor rank 0, data rank 0.
    ``timeout`` is how long a collective of any group waits for a rank.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    tp_dp_group: dist.ProcessGroup
    device: torch.device
    timeout: datetime.timedelta

    @property
    def first_stage(self) -> bool:
        """Whether this process holds the embedding."""
        return self.pp_rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether this process holds the output layer and computes the loss."""
        return self.pp_rank == self.pp_size - 1

    @property
    def writer(self) -> bool:
        """Whether this process writes logs and prints progress."""
        return self.last_stage and self.tp_rank == 0 and self.dp_rank == 0

    def vocabulary_shard(self, vocab_size: int) -> range:
        """The ids whose rows of the embedding and the output layer this TP rank has.

        As in Megatron, each rank's weights have ceil(V / TP) rows. Where TP does not divide V, the
        last rank's end with padding: rows of zeros, which no loss reads and no gradient reaches.
        """
        rows = -(-vocab_size // self.tp_size)
        start = self.tp_rank * rows
        return range(start, min(start + rows, vocab_size))

    @property
    def store(self) -> dist.Store:  # type: ignore[name-defined]
        """The key-value store that this run's processes share; each access costs a message."""
        return dist.distributed_c10d._get_default_store()

    def broadcast(self, value: T) -> T:
        """Rank 0's ``value``, on every process. One object broadcast over the world."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def agreed(self, work: Callable[[], T]) -> list[T]:
        """The results of ``work()`` on each process; where it failed on any, all raise the error.

        Otherwise the others would wait for the failed one until the collectives time out. One
        all-gather of objects over the world.

        Raises:
            ReplayError: that of the lowest rank that failed.
        """
        outcome: T | ReplayError
        try:
            outcome = work()
        except ReplayError as error:
            outcome = error
        outcomes: list[Any] = [None] * self.world_size
        dist.all_gather_object(outcomes, outcome)
        for result in outcomes:
            if isinstance(result, ReplayError):
                raise result
        return outcomes

    def from_rank_zero(self, work: Callable[[], T]) -> T:
        """The result of ``work()`` on rank 0, on every process; all raise its error."""
        return cast(T, self.agreed(lambda: work() if self.rank == 0 else None)[0])

    def on_rank_zero(self, work: Callable[[], object]) -> None:
        """Do ``work`` on rank 0; the others wait for it, and raise its error."""

        def quietly() -> None:  # what it returns may be nothing that can be sent
            if self.rank == 0:
                work()

        self.agreed(quietly)


def environment_world_size() -> int:
    """How many processes were started for this run; 1 without a launcher.

    Raises:
        ConfigError: a launcher started several and did not set torchrun's variables, or not all.
    """
    environment = os.environ
    text = environment.get("WORLD_SIZE")
    if text is None:
        for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if environment.get(name, "1") not in ("", "1"):
                raise _not_torchrun(f"{name}={environment[name]} and no WORLD_SIZE")
        text = "1"
    if not text.isdecimal() or int(text) < 1:
        raise _not_torchrun(f"WORLD_SIZE={text!r}")
    limits = {"RANK": int(text), "LOCAL_RANK": int(text)}
    limits |= {} if dist.is_initialized() else {"MASTER_ADDR": 0, "MASTER_PORT": 1 << 16}
    missing = [name for name in limits if not environment.get(name)]
    if int(text) > 1 and missing:
        raise _not_torchrun(f"WORLD_SIZE={text} and no {', '.join(missing)}")
    for name, limit in limits.items():
        value = environment.get(name, "0")
        if limit and not (value.isdecimal() and int(value) < limit):
            raise _not_torchrun(f"WORLD_SIZE={text} and {name}={value!r}")
    return int(text)


def _not_torchrun(found: str) -> ConfigError:
    return ConfigError(
        "the variables that connect these processes are missing or unusable",
        where="environment",
        expected="RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them",
        found=found,
        fix="Start one torchrun on each node (srun --ntasks-per-node 1 torchrun ...), or set them: "
        "under srun RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID",
    )


def data_parallel_size(config: ParallelConfig, world_size: int) -> int:
    """World size over TP x PP.

    Raises:
        ConfigError: the processes do not make a whole number of model replicas.
    """
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    if world_size % (tp * pp):
        raise ConfigError(
            "the processes do not make whole replicas of the model",
            where="torchrun",
            expected=f"a multiple of TP {tp} x PP {pp} = {tp * pp} processes",
            found=world_size,
            fix=f"Start it with torchrun --nproc_per_node {tp * pp} -m ..., or on several nodes",
        )
    return world_size // (tp * pp)


def initialize(config: ParallelConfig, platform: Platform) -> Parallel:
    """Join the processes torchrun started and build the groups.

    Raises:
        ConfigError: the world does not divide into TP x PP, or torchrun's variables are missing.
        TrainingError: some of the processes did not connect in time.
    """
    world_size = environment_world_size()
    data_parallel_size(config, world_size)
    if world_size == 1:
        # One process, as under plain python: a rendezvous of this process only.
        for name, value in {
            "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
        }.items():  # fmt: skip
            os.environ.setdefault(name, value)
    platform.prepare(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        timeout = _timeout(config)
        try:
            dist.init_process_group(
                platform.communication_backend, timeout=timeout, **_this_rounds_store(timeout)
            )
        except (dist.DistError, TimeoutError) as error:
            host, port = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise TrainingError(
                f"rank {os.environ['RANK']} of {world_size} did not connect to the others within "
                f"--distributed-timeout-minutes: {str(error).splitlines()[0]}",
                where=f"MASTER_ADDR={host} MASTER_PORT={port}",
                fix="Start every rank, and check that each can reach that address; or raise "
                "--distributed-timeout-minutes",
            ) from error
    return build_groups(config, platform.device)


def _this_rounds_store(timeout: datetime.timedelta) -> dict[str, Any]:
    """A store for this round of ``torchrun --max-restarts``; {} where torch makes its own.

    torchrun keeps one store for all rounds, and torch writes a rank's address under the same key in
    each, so ranks would connect to dead ones. So rank 0 draws a name for the round, and sends it to
    each rank under a key that the rank drew: a reply to a dead rank is never read.

    Raises:
        TimeoutError: a rank did not connect in time.
    """
    environment = os.environ
    if (
        environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        or environment.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0"
    ):
        return {}
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    store = dist.TCPStore(  # type: ignore[attr-defined]
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        is_master=False,
        timeout=timeout,
        wait_for_workers=False,
    )
    name = secrets.token_hex(8)
    if rank > 0:
        store.set(f"asks/{rank}", name)
        name = store.get(f"answer/{name}").decode()
        store.set(f"heard/{name}/{rank}", "")
    missing = set(range(1, world_size)) if rank == 0 else set()
    deadline = time.monotonic() + timeout.total_seconds()
    while missing:
        for other in sorted(missing):
            if store.check([f"heard/{name}/{other}"]):
                missing.remove(other)
            elif store.check([f"asks/{other}"]):
                store.set("answer/" + store.get(f"asks/{other}").decode(), name)
        if time.monotonic() > deadline:
            raise TimeoutError(f"ranks {sorted(missing)} have not connected")
        time.sleep(0.01)
    found = dist.PrefixStore(f"round/{name}", store)  # type: ignore[attr-defined]
    return {"store": found, "rank": rank, "world_size": world_size}


def build_groups(config: ParallelConfig, device: torch.device) -> Parallel:
    """Megatron's groups over the default process group, which must exist already."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    parallel_state.initialize_model_parallel(
        tp,
        pp,
        distributed_timeout_minutes=config.distributed_timeout_minutes,
        # Nothing here uses them: their tensors would travel by the hosts.
        create_gloo_process_groups=False,
    )
    # megatron-core draws initial weights from these generators; a checkpoint overwrites them.
    model_parallel_cuda_manual_seed(1234)
    return Parallel(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=pp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        model_group=parallel_state.get_model_parallel_group(),
        tp_dp_group=parallel_state.get_tensor_and_data_parallel_group(),
        device=device,
        timeout=_timeout(config),
    )


def _timeout(config: ParallelConfig) -> datetime.timedelta:
    return datetime.timedelta(minutes=config.distributed_timeout_minutes)


#: Seconds within which a rank that is alive has registered that it failed as well.
ANSWER_SECONDS = 15.0
#: How torch and its backends report a rank that is late or has exited.
_LOST = re.compile(r"time[ds]? ?out|closed by peer|connection (reset|refused)", re.I)


def explain(error: Exception) -> ReplayError | None:
    """An error that names the ranks that a collective waited for in vain, or what to do where a
    device is full; None: another error.

    Every rank that gets such an error calls this and registers itself in the run's store. A rank
    that has not done so within some seconds is stuck or dead.
    """
    if isinstance(error, RuntimeError) and "out of memory" in str(error):
        return TrainingError(
            str(error).splitlines()[0],
            fix="--dry-run predicts the memory; lower --micro-batch-size, use more devices, or in "
            "Stage 1 --recompute-granularity full",
        )
    if not dist.is_initialized() or dist.get_world_size() == 1 or not _LOST.search(str(error)):
        return None
    others = set(range(dist.get_world_size())) - {dist.get_rank()}
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"met an error/{dist.get_rank()}", "")
        deadline = time.monotonic() + ANSWER_SECONDS
        while others and time.monotonic() < deadline:
            others = {other for other in others if not store.check([f"met an error/{other}"])}
            time.sleep(0.1)
    except RuntimeError:  # the store's server has exited
        return None
    if not others:
        return None
    ranks = ", ".join(map(str, sorted(others)))
    return TrainingError(
        f"rank {ranks} does not answer; the others waited for it as long as "
        f"--distributed-timeout-minutes allows: {str(error).splitlines()[0]}",
        fix="Check that process and its machine (stopped, out of memory, a device or disk that "
        "hangs), or raise --distributed-timeout-minutes if it was only slow. Then rerun the same "
        "command: it continues from the last checkpoint",
    )


def shutdown() -> None:
    """Leave the process groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
