"""How a budget becomes groups, processes and commands."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import typer.main
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl_api.job import Spec
from asyncrl_api.parsing import SpecError
from asyncrl_operator.layout import (
    Plan,
    Split,
    Staging,
    gpus_per_replica,
    plan,
    plan_split,
    smallest_trainer,
    staging,
    trainer_command,
    trainer_sizes,
)
from asyncrl_operator.local.cli import render_plan, render_staging
from asyncrl_runtime.main import app
from support.messages.samples import make_job


@dataclass(frozen=True)
class Places:
    config: str = "/job/config.json"
    nats_config: str | None = "/job/nats.conf"

    def trainer_host(self) -> str:
        return "10.0.0.1"

    def nats_health_address(self) -> tuple[str, int]:
        return "10.0.0.2", 8222

    def engine_address(self, replica: int) -> tuple[str, int]:
        return f"10.0.1.{replica}", 30000

    def health_address(self, replica: int) -> tuple[str, int]:
        return f"10.0.2.{replica}", 30001

    def receiver_address(self, replica: int) -> tuple[str, int]:
        return "127.0.0.1", 30002

    def staging_folder(self, replica: int) -> str:
        return f"/staging/{replica}"


def spec(*overrides: str) -> Spec:
    return make_job(*overrides).spec


def refusal(*overrides: str) -> str:
    with pytest.raises(SpecError) as refused:
        plan_split(spec(*overrides))
    (error,) = refused.value.errors
    return str(error)


# The split in mode Auto


@st.composite
def budgets(draw: st.DrawFn) -> Spec:
    """Any spec that the rules accept, one with derived sizes for which there may be no room included."""
    per_node, granularity = draw(st.sampled_from([1, 4, 6, 8])), draw(st.integers(1, 12))
    replicas, size = draw(st.integers(1, 4)), draw(st.integers(0, per_node))
    least = granularity + replicas * max(size, 1)
    values = {
        "gpuBudget.total": draw(st.integers(least, least + 60)),
        "gpuBudget.auto.initialRolloutPercent": draw(st.integers(1, 99)),
        "gpuBudget.gpuMemory": draw(st.sampled_from(["''", "16Gi", "80Gi"])),
        "model.parameterCount": draw(st.sampled_from([0, 10**9, 7 * 10**9, 70 * 10**9])),
        "rollout.gpusPerReplica": size,
        "rollout.minReplicas": replicas,
        "rollout.maxReplicas": draw(st.integers(replicas, 64)),
        "trainer.gpuGranularity": granularity,
        "trainer.gpusPerNode": per_node,
    }
    return spec(*(f"{path}={value}" for path, value in values.items()))


def is_trainer_size(trainer: int, of: Spec) -> bool:
    per_node = of.trainer.gpus_per_node
    return trainer % of.trainer.gpu_granularity == 0 and (trainer <= per_node or trainer % per_node == 0)


def possible_splits(of: Spec) -> list[tuple[int, int]]:
    """All (trainer, replicas) that keep to every bound, by trying every pair."""
    size, total = gpus_per_replica(of), of.gpu_budget.total
    return [
        (trainer, replicas)
        for trainer in range(smallest_trainer(of), total + 1)
        if is_trainer_size(trainer, of) and size <= of.trainer.gpus_per_node
        for replicas in range(of.rollout.min_replicas, of.rollout.max_replicas + 1)
        if trainer + replicas * size <= total
    ]


@given(budgets())
@settings(max_examples=70)
def test_a_split_keeps_to_every_bound_and_exists_whenever_one_is_possible(chosen: Spec) -> None:
    if not (possible := possible_splits(chosen)):
        with pytest.raises(SpecError, match="BudgetTooSmall"):
            plan_split(chosen)
        return
    split = plan_split(chosen)
    assert (split.trainer, split.num_replicas) in possible
    assert split.rollout == split.num_replicas * gpus_per_replica(chosen)
    assert split.trainer + split.rollout + split.idle == chosen.gpu_budget.total
    assert plan_split(chosen) == split


@given(budgets())
@settings(max_examples=70)
def test_no_split_is_nearer_to_the_wanted_share_or_as_near_with_less_idle(chosen: Spec) -> None:
    size, total = gpus_per_replica(chosen), chosen.gpu_budget.total
    wanted = total * chosen.gpu_budget.auto.initial_rollout_percent / 100
    possible = possible_splits(chosen)
    if not possible or wanted > (chosen.rollout.max_replicas - 1) * size:
        return  # what a cap on engines leaves over has its own test
    split = plan_split(chosen)
    assert split.idle < size or split.num_replicas == chosen.rollout.max_replicas
    assert (abs(split.rollout - wanted), split.idle) == min(
        (abs(n * size - wanted), total - trainer - n * size)
        for trainer, n in possible
        if (trainer, n + 1) not in possible
    )


@pytest.mark.parametrize(
    ("overrides", "trainer", "rollout", "idle"),
    [
        ([], 2, 6, 0),
        (["gpuBudget.auto.initialRolloutPercent=50"], 4, 4, 0),
        (["gpuBudget.total=2"], 1, 1, 0),
        (["gpuBudget.total=16"], 4, 12, 0),
        (["gpuBudget.total=16", "rollout.gpusPerReplica=4"], 4, 12, 0),
        (["rollout.gpusPerReplica=3"], 2, 6, 0),
        (["rollout.gpusPerReplica=4"], 4, 4, 0),
        (["gpuBudget.total=7", "rollout.gpusPerReplica=3"], 1, 6, 0),
        (["gpuBudget.total=15", "trainer.gpuGranularity=2", "rollout.gpusPerReplica=4"], 2, 12, 1),
        (["gpuBudget.total=100", "gpuBudget.auto.initialRolloutPercent=70"], 32, 64, 4),  # maxReplicas: 64
        (["rollout.maxReplicas=2"], 2, 2, 4),  # the trainer does not take what engines may not
        (["gpuBudget.total=40", "gpuBudget.auto.initialRolloutPercent=50"], 16, 24, 0),  # whole nodes
    ],
)
def test_the_budget_is_split_near_the_share_in_whole_replicas_and_nodes(
    overrides: list[str], trainer: int, rollout: int, idle: int
) -> None:
    split = plan_split(spec(*overrides))
    assert (split.trainer, split.rollout, split.idle) == (trainer, rollout, idle)
    assert split.reason == "InitialRatio"


# The split in mode Manual

MANUAL = "gpuBudget.mode=Manual"


@given(trainer=st.integers(1, 8), rollout=st.integers(1, 32), total=st.integers(1, 64))
@settings(max_examples=50)
def test_a_manual_split_is_the_users(trainer: int, rollout: int, total: int) -> None:
    split = f"gpuBudget.split={{trainer: {trainer}, rollout: {rollout}}}"
    overrides = [MANUAL, split, f"gpuBudget.total={total}"]
    if trainer + rollout > total:
        with pytest.raises(SpecError, match=r"must be at most gpuBudget\.total"):
            spec(*overrides)
        return
    expected = Split(trainer, rollout, total - trainer - rollout, 1, "Manual")
    assert plan_split(spec(*overrides)) == expected


def test_engines_beyond_the_most_are_left_out_of_a_manual_split() -> None:
    chosen = plan_split(spec(MANUAL, "gpuBudget.split={trainer: 2, rollout: 6}", "rollout.maxReplicas=4"))
    assert (chosen.trainer, chosen.rollout, chosen.idle, chosen.num_replicas) == (2, 4, 2, 4)


# Sizes that follow from the model

SEVEN_BILLION = ["model.parameterCount=7000000000", "gpuBudget.total=64"]


@pytest.mark.parametrize(
    ("overrides", "engine", "trainer"),
    [
        ([], 1, 1),
        (["model.parameterCount=7000000000"], 1, 1),  # the GPU's memory is not told
        (["gpuBudget.gpuMemory=80Gi"], 1, 1),  # the model's size is not told
        # 14 GB of weights in 0.6 x 85.9 GB; 126 GB in 0.7 x 85.9 = 60.1 GB each: 2.1
        ([*SEVEN_BILLION, "gpuBudget.gpuMemory=80Gi"], 1, 3),
        ([*SEVEN_BILLION, "gpuBudget.gpuMemory=80Gi", "trainer.gpuGranularity=4"], 1, 4),
        # 28 GB of weights in float32; 0.6 x 25.8 = 15.5 GB each: 1.8; 126 GB in 18.0: 7.0
        ([*SEVEN_BILLION, "gpuBudget.gpuMemory=24Gi", "model.dtype=Float32"], 2, 7),
        # 14 GB in 0.6 x 10 = 6 GB each: 2.3, so 4; 126 GB in 7 GB each: 18, so whole nodes: 24
        ([*SEVEN_BILLION, "gpuBudget.gpuMemory=10G"], 4, 24),
        ([*SEVEN_BILLION, "gpuBudget.gpuMemory=10G", "trainer.gpuGranularity=3"], 4, 24),
        ([*SEVEN_BILLION, "gpuBudget.gpuMemory=10G", "trainer.gpusPerNode=4"], 4, 20),
        # 140 GB in 51.5 GB each: 2.7, so 4; 1260 GB in 60.1 GB each: 21, so 24
        (
            ["model.parameterCount=70000000000", "gpuBudget.gpuMemory=80Gi", "gpuBudget.total=64"],
            4,
            24,
        ),
        ([*SEVEN_BILLION, "gpuBudget.gpuMemory=80Gi", "rollout.gpusPerReplica=2"], 2, 3),
        # the least that is both a multiple of 12 and whole nodes of 8
        (["trainer.gpuGranularity=12", "gpuBudget.total=64"], 1, 24),
        (["trainer.gpuGranularity=16", "gpuBudget.total=64"], 1, 16),
    ],
)
def test_sizes_are_derived_where_model_and_memory_are_told(
    overrides: list[str], engine: int, trainer: int
) -> None:
    chosen = spec(*overrides)
    assert (gpus_per_replica(chosen), smallest_trainer(chosen)) == (engine, trainer)
    split = plan_split(chosen)
    assert split.gpus_per_replica == engine and split.trainer >= trainer


def test_a_trainer_is_one_part_of_a_node_or_whole_nodes() -> None:
    assert trainer_sizes(spec("gpuBudget.total=33", "trainer.gpuGranularity=2")) == [2, 4, 6, 8, 16, 24, 32]
    assert trainer_sizes(spec("gpuBudget.total=50", "trainer.gpuGranularity=3")) == [3, 6, 24, 48]


@pytest.mark.parametrize(("granularity", "size"), [(1, 1), (1, 8), (3, 2), (5, 1), (7, 4), (16, 1)])
def test_the_budget_that_a_refusal_names_is_the_least(granularity: int, size: int) -> None:
    overrides = [f"trainer.gpuGranularity={granularity}", f"rollout.gpusPerReplica={size}"]
    overrides += ["model.parameterCount=10000000000", "gpuBudget.gpuMemory=16G"]
    refused = refusal(*overrides, f"gpuBudget.total={granularity + size}")
    needed = int(refused.removesuffix(" are needed (BudgetTooSmall)").rpartition(" ")[2])
    assert plan_split(spec(*overrides, f"gpuBudget.total={needed}"))
    assert f"{needed} are needed" in refusal(*overrides, f"gpuBudget.total={needed - 1}")


def test_what_does_not_fit_is_refused_with_what_would() -> None:
    large = ["model.parameterCount=70000000000", "gpuBudget.gpuMemory=80Gi"]
    assert refusal(*large, "gpuBudget.total=16") == (
        "spec.gpuBudget.total: 16: cannot hold a trainer and 1 engine(s) of 4: 28 are needed (BudgetTooSmall)"
    )
    assert refusal(*large, "gpuBudget.total=16", "trainer.gpusPerNode=2") == (
        "spec.model.parameterCount: 70000000000: makes an engine take 4 GPUs, but a node has 2 "
        "(BudgetTooSmall)"
    )
    manual = [*large, "gpuBudget.total=64", MANUAL]
    assert refusal(*manual, "gpuBudget.split={trainer: 16, rollout: 8}") == (
        "spec.gpuBudget.split.trainer: 16: must be at least 24, for a trainer of 70000000000 parameters "
        "(BudgetTooSmall)"
    )
    split = ["gpuBudget.split={trainer: 24, rollout: 7}", "rollout.minReplicas=2"]
    assert refusal(*manual, *split) == (
        "spec.gpuBudget.split.rollout: 7: must be at least 8, for 2 engine(s) of 4 (BudgetTooSmall)"
    )


# Processes and their commands


@given(budgets())
@settings(max_examples=40)
def test_each_replica_has_an_engine_and_a_worker_and_each_gpu_one_process(chosen: Spec) -> None:
    if not possible_splits(chosen):
        return
    planned = plan(make_job().model_copy(update={"spec": chosen}), Places())
    rollout = {group.role: group for group in planned.groups}["rollout"]
    assert len(rollout.processes) == 2 * rollout.num_replicas == 2 * planned.split.num_replicas
    assert len({process.name for process in planned.processes}) == len(planned.processes)
    assert sum(process.gpus for process in planned.processes) == planned.split.trainer + planned.split.rollout
    assert sum(group.gpus for group in planned.groups) == planned.split.trainer + planned.split.rollout


def parse(command: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return command and options of `asyncrl-runtime` as its own parser understands them."""
    program, name, *arguments = command
    assert program == "asyncrl-runtime"
    group: Any = typer.main.get_command(app)
    return name, group.commands[name].make_context(name, arguments).params


def small_plan(*overrides: str, places: Places | None = None) -> Plan:
    on_cpus = ["gpuBudget.total=3", "gpuBudget.allocation=None", "rollout.engine.type=CPU"]
    return plan(make_job(*on_cpus, *overrides), places or Places(), attempt=5)


def test_the_programs_accept_the_commands() -> None:
    planned = small_plan("rollout.engine.args=[--max-total-tokens, '4096']")
    parsed = {p.name: parse(p.command) for p in planned.processes if p.name != "nats"}
    told = {
        name: (command, {key: str(value) for key, value in options.items()})
        for name, (command, options) in parsed.items()
    }
    engine = {"config": "/job/config.json", "host": "10.0.1.1", "port": "30000"}
    assert told["rollout-1-engine"] == (
        "engine",
        {**engine, "max_running_requests": "0", "max_total_tokens": "4096"},
    )
    engine_url = "http://10.0.1.1:30000"
    worker = {"config": "/job/config.json", "name": "rollout-1", "count": "1", "engine_url": engine_url}
    worker |= {"host": "10.0.2.1", "health_port": "30001", "receiver_url": ""}
    assert told["rollout-1-worker"] == ("worker", worker)
    trainer = {"config": "/job/config.json", "attempt": "5", "ranks": "1", "host": "10.0.0.1"}
    assert told["trainer"] == (
        "trainer",
        {**trainer, "node": "0", "nodes": "1", "verify_weights": "False"},
    )


def test_beside_each_engine_is_a_receiver_if_weights_are_staged() -> None:
    planned = small_plan("weightSync.mode=Staged", "weightSync.stagingMegabytes=8")
    commands = {
        process.name: parse(process.command) for process in planned.processes if process.name != "nats"
    }
    receiver = {"config": "/job/config.json", "host": "127.0.0.1", "port": "30002", "folder": "/staging/1"}
    name, options = commands["rollout-1-receiver"]
    assert (name, {key: str(value) for key, value in options.items()}) == ("receiver", receiver)
    assert commands["rollout-1-worker"][1]["receiver_url"] == "http://127.0.0.1:30002"
    assert not [each.name for each in small_plan().processes if "receiver" in each.name]


@pytest.mark.parametrize(
    ("dtype", "megabytes", "volume", "trainer"),
    [
        ("BFloat16", 0, 1.05 * 2e9 + 64 * 2**20, 4e9),
        ("Float32", 0, 1.05 * 4e9 + 64 * 2**20, 8e9),
        ("BFloat16", 2000, 2000 * 2**20, 4e9),
    ],
)
def test_what_staging_takes_follows_from_the_model(
    dtype: str, megabytes: int, volume: float, trainer: float
) -> None:
    assert staging(spec("model.parameterCount=1000000000")) is None
    size = [f"weightSync.stagingMegabytes={megabytes}", "model.parameterCount=1000000000"]
    taken = staging(spec("weightSync.mode=Staged", f"model.dtype={dtype}", *size))
    assert taken == Staging(volume=int(volume), receiver=int(volume) + 256 * 2**20, trainer=int(trainer))


def test_a_plan_says_what_staging_takes() -> None:
    assert render_staging(Staging(2 * 2**30, 3 * 2**30, 4 * 2**30)) == (
        "staged weights: a volume of 2,048 MiB in the memory of each rollout pod, whose receiver asks for "
        "3,072 MiB; up to 4,096 MiB more in the trainer's first pod"
    )


def test_a_later_attempt_of_the_trainer_is_told_its_number() -> None:
    command = trainer_command(Places(), attempt=7, ranks=4, extra=["--verify-weights"])
    name, options = parse(command)
    assert name == "trainer"
    assert (options["attempt"], options["ranks"], options["verify_weights"]) == (7, 4, True)


def test_each_process_is_probed_where_it_or_its_worker_answers() -> None:
    probes = {p.name: p.probe.url for p in small_plan().processes if p.probe is not None}
    assert probes == {
        "nats": "http://10.0.0.2:8222/healthz",
        "rollout-0-engine": "http://10.0.2.0:30001/engine",
        "rollout-0-worker": "http://10.0.2.0:30001/worker",
        "rollout-1-engine": "http://10.0.2.1:30001/engine",
        "rollout-1-worker": "http://10.0.2.1:30001/worker",
    }


def test_a_shared_server_is_not_started() -> None:
    assert [group.role for group in small_plan().groups] == ["messaging", "rollout", "trainer"]
    shared = small_plan(places=Places(nats_config=None))
    assert [group.role for group in shared.groups] == ["rollout", "trainer"]


def test_sglang_is_told_its_gpus_and_address() -> None:
    planned = plan(make_job("rollout.gpusPerReplica=2", "rollout.engine.args=[--mem, '0.8']"), Places())
    (engine, *_) = [p for p in planned.processes if p.name.endswith("-engine")]
    assert engine.gpus == 2
    assert " ".join(engine.command) == (
        "asyncrl-runtime sglang --config /job/config.json --host 10.0.1.0 --port 30000 --gpus 2 --mem 0.8"
    )


def test_a_plan_reads_as_text() -> None:
    planned = small_plan("rollout.maxReplicas=1")
    assert (
        render_plan(planned)
        == """\
GPUs: trainer 1, rollout 1 (1 x 1), idle 1 (InitialRatio)
messaging: 1 replica(s), 0 GPU(s)
  nats: 0 GPU(s)
    nats-server -c /job/nats.conf -m 8222
rollout: 1 replica(s), 1 GPU(s)
  rollout-0-engine: 1 GPU(s)
    asyncrl-runtime engine --config /job/config.json --host 10.0.1.0 --port 30000
  rollout-0-worker: 0 GPU(s)
    asyncrl-runtime worker --config /job/config.json --name rollout-0 --engine-url http://10.0.1.0:30000 \
--host 10.0.2.0 --health-port 30001
trainer: 1 replica(s), 1 GPU(s)
  trainer: 1 GPU(s)
    asyncrl-runtime trainer --config /job/config.json --attempt 5 --ranks 1 --host 10.0.0.1"""
    )
