"""Turns a GPU budget into groups and processes. Pure; local runner and operator execute the same plan."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from asyncrl_api.base import parse_quantity
from asyncrl_api.job import AsyncRLJob, Spec
from asyncrl_api.parsing import FieldError, SpecError

Role = Literal["messaging", "trainer", "rollout"]

ENGINE_PORT, HEALTH_PORT, TRAINER_PORT, NATS_HEALTH_PORT = 30000, 30001, 29500, 8222
"""The ports in a pod, which has its own address."""
NATS_HEALTH_PATH = "/healthz"
NATS_PROBE_SECONDS = 10.0
"""The time between two probes. A stream that could not write once (its disk was full) takes nothing more
until its server has started again, which three bad answers bring about."""
ENGINE_MEMORY_SHARE = 0.6
"""The share of a GPU's memory for an engine's weights; the rest is KV cache and activations."""
TRAINER_BYTES_PER_PARAMETER = 18
"""The bytes for bf16 weights and gradients, fp32 master weights and two moments, sharded over the GPUs."""
TRAINER_MEMORY_SHARE = 0.7
"""The share of a GPU's memory for these; the rest is activations and buckets."""


@dataclass(frozen=True)
class Split:
    """How many GPUs each group gets (process slots if `allocation` is None)."""

    trainer: int
    rollout: int
    idle: int
    gpus_per_replica: int
    reason: str

    @property
    def num_replicas(self) -> int:
        return self.rollout // self.gpus_per_replica


@dataclass(frozen=True)
class Probe:
    """An HTTP liveness probe: after `failures` bad answers in a row the process is restarted."""

    url: str
    period_seconds: float = 5.0
    failures: int = 3


@dataclass(frozen=True)
class Process:
    """One process, which is one container in a cluster."""

    name: str
    """The name, such as `rollout-0-engine`; the log has it too."""
    role: Role
    gpus: int
    command: tuple[str, ...]
    probe: Probe | None = None


@dataclass(frozen=True)
class ProcessGroup:
    """Processes that are scaled and restarted together."""

    role: Role
    num_replicas: int
    gpus: int
    processes: tuple[Process, ...]


@dataclass(frozen=True)
class Plan:
    split: Split
    groups: tuple[ProcessGroup, ...]

    @property
    def processes(self) -> list[Process]:
        return [process for group in self.groups for process in group.processes]


class Places(Protocol):
    """The places of files and processes, which the executor knows."""

    @property
    def config(self) -> str:
        """The path of the run configuration."""
        ...

    @property
    def nats_config(self) -> str | None:
        """The path of the embedded server's configuration; None for a shared server."""
        ...

    def trainer_host(self) -> str: ...
    def nats_health_address(self) -> tuple[str, int]: ...
    def engine_address(self, replica: int) -> tuple[str, int]: ...
    def health_address(self, replica: int) -> tuple[str, int]: ...


def plan(job: AsyncRLJob, places: Places, attempt: int = 1) -> Plan:
    """Return every process of a job with its command.

    Raises:
        SpecError: the budget is too small for a trainer and the engines that the model needs.
    """
    split = plan_split(job.spec)
    groups = [_rollout_group(job.spec, split, places), _trainer_group(split, places, attempt)]
    if places.nats_config is not None:
        host, port = places.nats_health_address()
        probe = Probe(f"http://{host}:{port}{NATS_HEALTH_PATH}", NATS_PROBE_SECONDS)
        nats = Process("nats", "messaging", 0, messaging_command(places.nats_config, port), probe)
        groups.insert(0, ProcessGroup("messaging", 1, 0, (nats,)))
    return Plan(split, tuple(groups))


def plan_split(spec: Spec) -> Split:
    """Divide the budget between trainer and rollout.

    In mode Auto the split begins near `initialRolloutPercent`, in whole replicas, with the fewest idle GPUs.

    Raises:
        SpecError: no split fits.
    """
    budget, size = spec.gpu_budget, gpus_per_replica(spec)
    if size > spec.trainer.gpus_per_node:
        rule = f"makes an engine take {size} GPUs, but a node has {spec.trainer.gpus_per_node}"
        raise _too_small("spec.model.parameterCount", rule, spec.model.parameter_count)
    if budget.mode == "Manual":
        return _manual_split(spec, size)
    wanted = budget.total * budget.auto.initial_rollout_percent / 100
    reachable = min(wanted, spec.rollout.max_replicas * size)

    def distance(split: Split) -> tuple[float, float]:
        is_capped = split.num_replicas == spec.rollout.max_replicas  # then what is left is given back
        second = abs(split.trainer - (budget.total - wanted)) if is_capped else split.idle
        return abs(split.rollout - reachable), second

    sizes = [n for n in trainer_sizes(spec) if n >= smallest_trainer(spec)]
    splits = []
    for trainer in sizes:
        replicas = min(spec.rollout.max_replicas, (budget.total - trainer) // size)
        if replicas >= spec.rollout.min_replicas:
            rollout = replicas * size
            splits.append(Split(trainer, rollout, budget.total - trainer - rollout, size, "InitialRatio"))
    if not splits:
        needed = smallest_trainer(spec) + spec.rollout.min_replicas * size
        rule = (
            f"cannot hold a trainer and {spec.rollout.min_replicas} engine(s) of {size}: {needed} are needed"
        )
        raise _too_small("spec.gpuBudget.total", rule, budget.total)
    return min(splits, key=distance)


def _manual_split(spec: Spec, size: int) -> Split:
    """Return the user's split; GPUs that do not make a whole replica, or are beyond `maxReplicas`, are idle.

    The manifest's rules have checked what it says; what is derived from the model's size is checked here.
    """
    split, total = spec.gpu_budget.split, spec.gpu_budget.total
    assert split is not None
    if split.trainer < (smallest := smallest_trainer(spec)):
        rule = f"must be at least {smallest}, for a trainer of {spec.model.parameter_count} parameters"
        raise _too_small("spec.gpuBudget.split.trainer", rule, split.trainer)
    replicas, fewest = min(spec.rollout.max_replicas, split.rollout // size), spec.rollout.min_replicas
    if replicas < fewest:
        rule = f"must be at least {fewest * size}, for {fewest} engine(s) of {size}"
        raise _too_small("spec.gpuBudget.split.rollout", rule, split.rollout)
    rollout = replicas * size
    return Split(split.trainer, rollout, total - split.trainer - rollout, size, "Manual")


def _too_small(path: str, rule: str, value: int) -> SpecError:
    return SpecError([FieldError(path, f"{rule} (BudgetTooSmall)", value)])


def gpus_per_replica(spec: Spec) -> int:
    """Return the tensor-parallel size: the manifest's, or the least power of two that holds the weights."""
    if spec.rollout.gpus_per_replica:
        return spec.rollout.gpus_per_replica
    if not (spec.model.parameter_count and spec.gpu_budget.gpu_memory):
        return 1
    bytes_per_parameter = 2 if spec.model.dtype == "BFloat16" else 4
    weights = spec.model.parameter_count * bytes_per_parameter
    room = parse_quantity(spec.gpu_budget.gpu_memory) * ENGINE_MEMORY_SHARE
    size = 1
    while size * room < weights:
        size *= 2
    return size


def smallest_trainer(spec: Spec) -> int:
    """Return the smallest size of a trainer that holds weights, gradients and optimizer state.

    If the sizes of model and GPU are unknown, it is the smallest size that a trainer may have.
    """
    needed = 1
    if spec.model.parameter_count and spec.gpu_budget.gpu_memory:
        room = parse_quantity(spec.gpu_budget.gpu_memory) * TRAINER_MEMORY_SHARE
        needed = math.ceil(spec.model.parameter_count * TRAINER_BYTES_PER_PARAMETER / room)
    unit, per_node = spec.trainer.gpu_granularity, spec.trainer.gpus_per_node
    if math.ceil(needed / unit) * unit > per_node:
        unit = math.lcm(unit, per_node)
    return math.ceil(needed / unit) * unit


def trainer_sizes(spec: Spec) -> list[int]:
    """Return the sizes that a trainer may have: its pods are equal, so whole nodes, or a part of one node."""
    per_node, granularity = spec.trainer.gpus_per_node, spec.trainer.gpu_granularity
    sizes = range(granularity, spec.gpu_budget.total + 1, granularity)
    return [size for size in sizes if size <= per_node or size % per_node == 0]


def num_trainer_pods(spec: Spec, gpus: int) -> int:
    """Return how many equal pods a trainer of this size has: one, or one on each of its nodes."""
    return max(1, gpus // spec.trainer.gpus_per_node)


def messaging_command(config: str, health_port: int) -> tuple[str, ...]:
    """Return the command of an embedded NATS server, which says on a port of its own whether it can write."""
    return "nats-server", "-c", config, "-m", str(health_port)


def _rollout_group(spec: Spec, split: Split, places: Places) -> ProcessGroup:
    processes: list[Process] = []
    for replica in range(split.num_replicas):
        name, size = f"rollout-{replica}", split.gpus_per_replica
        engine, worker = rollout_commands(spec, size, places, name, replica)
        host, port = places.health_address(replica)
        engine_probe, worker_probe = (Probe(f"http://{host}:{port}/{each}") for each in ("engine", "worker"))
        processes.append(Process(f"{name}-engine", "rollout", size, engine, engine_probe))
        processes.append(Process(f"{name}-worker", "rollout", 0, worker, worker_probe))
    return ProcessGroup("rollout", split.num_replicas, split.rollout, tuple(processes))


def rollout_commands(
    spec: Spec, gpus_per_replica: int, places: Places, name: str, replica: int = 0
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the commands of an engine and of its worker.

    Args:
        name: the name of the worker; a worker that replaces it has the same.
    """
    engine_host, engine_port = places.engine_address(replica)
    health_host, health_port = places.health_address(replica)
    worker = ["asyncrl-runtime", "worker", "--config", places.config, "--name", name]
    worker += ["--engine-url", f"http://{engine_host}:{engine_port}"]
    worker += ["--host", health_host, "--health-port", str(health_port)]
    engine = _engine_command(spec, gpus_per_replica, places.config, engine_host, engine_port)
    return engine, tuple(worker)


def _engine_command(spec: Spec, gpus_per_replica: int, config: str, host: str, port: int) -> tuple[str, ...]:
    address = ("--config", config, "--host", host, "--port", str(port))
    arguments = spec.rollout.engine.args
    if spec.rollout.engine.type == "CPU":
        return ("asyncrl-runtime", "engine", *address, *arguments)
    if spec.rollout.engine.type == "Emulated":
        return ("asyncrl-runtime", "emulated-engine", *address, *arguments)
    return ("asyncrl-runtime", "sglang", *address, "--gpus", str(gpus_per_replica), *arguments)


def _trainer_group(split: Split, places: Places, attempt: int) -> ProcessGroup:
    command = trainer_command(places, attempt=attempt, ranks=split.trainer)
    trainer = Process("trainer", "trainer", split.trainer, command)
    return ProcessGroup("trainer", 1, split.trainer, (trainer,))


def trainer_command(
    places: Places, *, attempt: int, ranks: int, nodes: int = 1, extra: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the command of one attempt of the trainer, on each of its nodes.

    Args:
        ranks: the number of ranks on one node.
        nodes: the number of nodes; more than one are pods of an Indexed Job, each of which has its index in
            its environment.
    """
    command = ("asyncrl-runtime", "trainer", "--config", places.config, "--attempt", str(attempt))
    group = ("--node", "$(JOB_COMPLETION_INDEX)", "--nodes", str(nodes)) if nodes > 1 else ()
    return (*command, "--ranks", str(ranks), *group, "--host", places.trainer_host(), *extra)
