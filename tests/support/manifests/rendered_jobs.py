"""Jobs of different shapes, with all their objects."""

from typing import Any

from asyncrl_api.job import AsyncRLJob
from asyncrl_api.marks import merge
from asyncrl_api.parsing import parse_job
from asyncrl_operator.decide.desired import DesiredTrainer
from asyncrl_operator.render.manifests import (
    Defaults,
    render_credentials,
    render_messaging,
    render_rollout,
    render_shared,
    render_trainer,
)
from support.manifests.smallest import SMALLEST

DEFAULTS = Defaults("localhost/runtime:1", "localhost/nats:1", ("registry",))

BASE = merge(SMALLEST, {"metadata": {"namespace": "team", "uid": "0b5e1a52-7c7b-4e0e-9a53-8d1f0c0c7d11"}})
SHAPES: dict[str, dict[str, Any]] = {
    "cpu": {
        "gpuBudget": {"total": 3, "allocation": "None"},
        "rollout": {"engine": {"type": "CPU"}},
        "weightSync": {"backend": "Gloo"},
    },
    "staged": {
        "model": {"parameterCount": 14_800_000_000},
        "gpuBudget": {"total": 16},
        "weightSync": {"mode": "Staged"},
    },
    "two-nodes": {
        "model": {"cache": {"claimName": "models"}, "secretRef": {"name": "hub"}},
        "gpuBudget": {"total": 32, "mode": "Manual", "split": {"trainer": 16, "rollout": 16}},
        "rollout": {"gpusPerReplica": 4},
    },
    "everything": {
        "messaging": {"embedded": {"storage": {"type": "Persistent", "size": "20Gi"}}},
        "reward": {"type": "Function", "function": "rewards:score", "configMapRef": {"name": "code"}},
        "rollout": {
            "engine": {"image": "localhost/sglang:2", "args": ["--mem-fraction-static", "0.8"]},
            "podTemplate": {
                "metadata": {"labels": {"team": "a"}},
                "spec": {
                    "containers": [{"name": "engine", "env": [{"name": "NCCL_DEBUG", "value": "INFO"}]}],
                    "tolerations": [{"key": "spot", "operator": "Exists"}],
                },
            },
        },
        "trainer": {"image": "localhost/train:2", "terminationGracePeriodSeconds": 120},
        "scheduling": {
            "nodeSelector": {"pool": "gpu"},
            "topologyKey": "rack",
            "network": {"rdmaResource": "rdma/hca", "rdmaCount": 1},
            "imagePullSecrets": [{"name": "mine"}],
        },
    },
    "odd-spellings": {
        "messaging": {"embedded": {"storage": {"type": "Persistent", "size": "2048Mi"}}},
        "scheduling": {"sharedMemory": "1024Mi"},
        "rollout": {
            "podTemplate": {
                "spec": {
                    "hostPID": False,
                    "containers": [
                        {
                            "name": "engine",
                            "tty": False,
                            "env": [{"name": "NOTHING", "value": ""}],
                            "resources": {
                                "requests": {"cpu": 2, "memory": "1000Mi"},
                                "limits": {"cpu": "2.5", "memory": "1024Mi"},
                            },
                        }
                    ],
                }
            }
        },
    },
    "shared-nats": {
        "messaging": {
            "mode": "Shared",
            "shared": {"url": "nats://nats.infra:4222", "credentialsSecretRef": {"name": "nats"}},
        },
    },
}


def job_of(shape: str, **metadata: str) -> AsyncRLJob:
    """Return a job of one of the shapes; `metadata` replaces name, namespace or uid."""
    return parse_job(merge(BASE, {"spec": SHAPES[shape], "metadata": metadata}))


def render_all(job: AsyncRLJob) -> list[dict[str, Any]]:
    """Return all objects of a job that runs, the trainer at 16 GPUs where it has a split of its own."""
    spec, split = job.spec, job.spec.gpu_budget.split
    objects = render_shared(job, DEFAULTS)
    if spec.messaging.mode == "Embedded":
        objects += [render_credentials(job, lambda: "secret"), *render_messaging(job, DEFAULTS, 1)]
    objects += render_trainer(job, DEFAULTS, DesiredTrainer(3, split.trainer if split else 2))
    size = max(1, spec.rollout.gpus_per_replica)
    return objects + render_rollout(job, DEFAULTS, 2, size)


SPELLINGS: dict[object, str] = {
    "1000": "1k",
    "1024": "1024",
    1024: "1024",
    2: "2",
    0.5: "500m",
    "0.5": "500m",
    "1000m": "1",
    "1e3": "1e3",
    "12E6": "12e6",
    "1500Mi": "1500Mi",
    "1024Mi": "1Gi",
    "0.5Gi": "512Mi",
    "1.5Gi": "1536Mi",
    "1023Ki": "1023Ki",
    "0.5Ki": "512",
    "1.0005Ki": "1024512m",
    "0Gi": "0",
    "100u": "1m",
    "1E": "1E",
    "1000G": "1T",
    "+1": "1",
    "05": "5",
}
"""Quantities of memory, as written and as they are sent to the API server, which keeps them so."""
