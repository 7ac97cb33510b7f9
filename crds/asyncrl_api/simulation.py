"""What `asyncrl simulate` hands to the runtime: jobs that are simulated, and what they run on."""

from asyncrl_api.job import Spec
from asyncrl_api.wire import Wire


class SimulatedJob(Wire):
    """One job on one cluster."""

    name: str
    """What tells it from the others of a sweep; empty if there is none."""
    spec: Spec
    num_engines: int
    gpus_per_engine: int
    trainer_gpus: int


class SimulationPlan(Wire):
    """The jobs of one call, in the order in which they are printed."""

    jobs: tuple[SimulatedJob, ...]
