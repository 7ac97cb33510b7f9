"""What Kubernetes does with the objects of an API server in memory: its controllers, scheduler and kubelets.

They are complete as far as the operator can tell. They act only when told, once for each call of `settle`, so
that a test decides what happens between which two passes.
"""

from collections.abc import Callable
from itertools import count
from typing import Any

from asyncrl_api.times import to_text
from asyncrl_operator.resources import (
    ASYNCRL_JOBS,
    CHILDREN,
    EVENTS,
    GROUP_LABEL,
    JOBS,
    NODES,
    PODS,
    SECRETS,
    STATEFUL_SETS,
    Json,
    Resource,
)
from support.cluster.api_calls import Request
from support.cluster.memory_api_server import FOREGROUND, MemoryApiServer

NUM_NODES = 4
MERGE = "application/merge-patch+json"


class Controllers:
    """Everybody who acts in a cluster except its users and the operator.

    Args:
        clock: Unix time, seconds.
    """

    def __init__(self, server: MemoryApiServer, clock: Callable[[], float]) -> None:
        self._server = server
        self._clock = clock
        self._numbers = count(1)
        self._held: set[str] = set()
        """The groups whose new pods find no node."""
        self._settled_at = 0
        """The server's version at which there was nothing left to do; 0: none so far."""
        for number in range(NUM_NODES):
            node: Json = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": f"n{number}"}}
            self._ask("POST", NODES.path(None), node | {"status": self._ready()})

    def settle(self) -> None:
        """Let each of them do everything that there is to do now."""
        if (version := self._server.version) == self._settled_at:
            return
        self._collect_garbage()
        for job in self._server.all(JOBS):
            self._run_job(job)
        for group in self._server.all(STATEFUL_SETS):
            self._run_set(group)
        for pod in self._server.all(PODS):
            self._run_pod(pod)
        self._settled_at = version if version == self._server.version else 0

    # -- what a test does to pods and nodes

    def pods(self, group: str) -> list[Json]:
        """Return the pods of a group that are not being deleted."""
        return [
            pod
            for pod in self._server.all(PODS)
            if pod["metadata"]["labels"][GROUP_LABEL] == group and "deletionTimestamp" not in pod["metadata"]
        ]

    def hold(self, *groups: str) -> None:
        """Find no node for new pods of these groups, and of no others, until told otherwise."""
        self._held, self._settled_at = set(groups), 0

    def end_trainer(self, code: int, reason: str = "Error") -> None:
        """End the trainer's pods with an exit code."""
        for pod in self.pods("trainer"):
            ended = {"exitCode": code, "reason": reason}
            status = {"name": "trainer", "state": {"terminated": ended}}
            phase = "Failed" if code else "Succeeded"
            conditions = [self._condition("Ready", False)]
            self.say(PODS, pod, {"phase": phase, "conditions": conditions, "containerStatuses": [status]})

    def set_ready(self, pod: Json, is_ready: bool) -> None:
        """Let the kubelet find a pod ready or not ready."""
        self.say(PODS, pod, {"conditions": [self._condition("Ready", is_ready)]})

    def say(self, resource: Resource, body: Json, status: Json) -> None:
        """Change the status of an object."""
        metadata = body["metadata"]
        path = resource.path(metadata.get("namespace"), metadata["name"], "status")
        self._ask("PATCH", path, {"status": status}, MERGE)

    # -- controllers

    def _collect_garbage(self) -> None:
        """Delete objects whose owners are gone, and release those that only waited for their dependents."""
        owned = [
            (resource, body) for resource in (*CHILDREN, SECRETS, PODS) for body in self._server.all(resource)
        ]
        owners = [body for _, body in owned] + self._server.all(ASYNCRL_JOBS)
        alive = {body["metadata"]["uid"] for body in owners}
        ending = {
            body["metadata"]["uid"] for body in owners if FOREGROUND in body["metadata"].get("finalizers", ())
        }
        blocked = set()
        for resource, body in owned:
            uids = {each["uid"] for each in body["metadata"].get("ownerReferences", ())}
            if uids & ending:
                blocked |= uids
            if uids and (not uids & (alive - ending)) and "deletionTimestamp" not in body["metadata"]:
                self._delete(resource, body)
        for resource, body in owned:
            if (uid := body["metadata"]["uid"]) in ending and uid not in blocked:
                path = resource.path(body["metadata"]["namespace"], body["metadata"]["name"])
                self._ask("PATCH", path, {"metadata": {"finalizers": None}}, MERGE)

    def _run_job(self, job: Json) -> None:
        pods, spec = self._pods_of(job), job["spec"]
        conditions = job.get("status", {}).get("conditions", [])
        if "deletionTimestamp" in job["metadata"] or conditions:
            return
        if any(pod["status"]["phase"] == "Failed" or "deletionTimestamp" in pod["metadata"] for pod in pods):
            for pod in pods:
                if pod["status"]["phase"] not in ("Failed", "Succeeded"):
                    self._delete(PODS, pod)
            failed = {
                "type": "Failed",
                "status": "True",
                "reason": "BackoffLimitExceeded",
                "message": "failed",
            }
            self.say(JOBS, job, {"conditions": [failed]})
        elif len(pods) == spec["completions"] and all(
            each["status"]["phase"] == "Succeeded" for each in pods
        ):
            done = {"type": "Complete", "status": "True", "reason": "CompletionsReached", "message": ""}
            self.say(JOBS, job, {"conditions": [done]})
        else:
            for index in range(len(pods), spec["completions"]):
                self._make_pod(JOBS, job, f"{job['metadata']['name']}-{index}-{next(self._numbers):05}")

    def _conclude(self, job: Json, kind: str, reason: str) -> None:
        condition = {"type": kind, "status": "True", "reason": reason, "message": reason}
        self.say(JOBS, job, {"conditions": [condition]})

    def _run_set(self, group: Json) -> None:
        if "deletionTimestamp" in group["metadata"]:
            return
        name = group["metadata"]["name"]
        wanted = [f"{name}-{index}" for index in range(group["spec"]["replicas"])]
        there = {pod["metadata"]["name"]: pod for pod in self._pods_of(group)}
        for pod_name, pod in there.items():
            if pod_name not in wanted and "deletionTimestamp" not in pod["metadata"]:
                self._delete(PODS, pod)
        for pod_name in wanted:
            if pod_name not in there:
                self._make_pod(STATEFUL_SETS, group, pod_name)

    def _make_pod(self, resource: Resource, owner: Json, name: str) -> None:
        """Create a pod, or report why it is refused in the status of its owner."""
        metadata, template = owner["metadata"], owner["spec"]["template"]
        reference = {"apiVersion": resource.api_version, "kind": resource.kind, "controller": True}
        reference |= {"name": metadata["name"], "uid": metadata["uid"]}
        made = {**template["metadata"], "name": name, "ownerReferences": [reference]}
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": made, "spec": template["spec"]}
        status, answer = self._server.answer(Request("POST", PODS.path(metadata["namespace"]), {}, body))
        if status >= 400:
            self._tell(resource, owner, "FailedCreate", f"Error creating: {answer['message']}")

    def _run_pod(self, pod: Json) -> None:
        metadata, phase = pod["metadata"], pod.get("status", {}).get("phase")
        if "deletionTimestamp" in metadata:
            self._delete(PODS, pod, gracePeriodSeconds=0)
        elif phase is None:
            self.say(PODS, pod, {"phase": "Pending"})
        elif phase == "Pending" and "nodeName" not in pod["spec"]:
            if metadata["labels"][GROUP_LABEL] in self._held:
                unschedulable = self._condition("PodScheduled", False) | {"reason": "Unschedulable"}
                message = {"message": "0/4 nodes are available"}
                self.say(PODS, pod, {"conditions": [unschedulable | message]})
            else:
                node = {"spec": {"nodeName": f"n{next(self._numbers) % NUM_NODES}"}}
                self._ask("PATCH", PODS.path(metadata["namespace"], metadata["name"]), node, MERGE)
        elif phase == "Pending":
            self.say(PODS, pod, {"phase": "Running"} | self._ready())

    # -- helpers

    def _pods_of(self, owner: Json) -> list[Json]:
        uid = owner["metadata"]["uid"]
        return [
            pod
            for pod in self._server.all(PODS)
            if any(each["uid"] == uid for each in pod["metadata"].get("ownerReferences", ()))
        ]

    def _ready(self) -> Json:
        return {"conditions": [self._condition("Ready", True)]}

    def _condition(self, kind: str, is_true: bool) -> Json:
        return {"type": kind, "status": str(is_true), "lastTransitionTime": to_text(self._clock())}

    def _tell(self, resource: Resource, about: Json, reason: str, message: str) -> None:
        involved = {"kind": resource.kind, "name": about["metadata"]["name"]}
        metadata = {"name": f"{involved['name']}.{next(self._numbers)}"}
        body: Json = {"metadata": metadata, "involvedObject": involved, "reason": reason, "message": message}
        body |= {"lastTimestamp": to_text(self._clock())}
        self._ask("POST", EVENTS.path(about["metadata"]["namespace"]), body)

    def _delete(self, resource: Resource, body: Json, **options: Any) -> None:
        metadata = body["metadata"]
        self._ask("DELETE", resource.path(metadata["namespace"], metadata["name"]), options)

    def _ask(self, verb: str, path: str, body: Json, content_type: str = "application/json") -> Json:
        query = {"fieldManager": "kubernetes"}
        status, answer = self._server.answer(Request(verb, path, query, body, content_type))
        assert status < 400, answer
        return answer
