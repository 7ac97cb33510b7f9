"""Every reason of a condition and of an Event: what it means and what to do. Pure.

The tables in docs/kubernetes.md are made from these (`make crd`). Beside them a condition may have a word of
kubelet's for a container that cannot start (`CrashLoopBackOff`, say), which is passed on as it came.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """One CamelCase word of a condition or an Event, for whoever reads it there."""

    name: str
    meaning: str
    remedy: str = ""
    """What to do about it. Empty where there is nothing to mend: the word says how the job stands."""


ALL: dict[str, Reason] = {}
"""By name, in the order of the documentation."""


def _reason(name: str, meaning: str, remedy: str = "") -> str:
    assert name not in ALL, f"{name} stands here twice"
    ALL[name] = Reason(name, meaning, remedy)
    return name


# -- what keeps a job from going on, or ended it

INVALID_SPEC = _reason(
    "InvalidSpec",
    "the API server refused what the spec asks for, an overlay say; nothing was started",
    "mend the field that the message names, apply again",
)
BUDGET_TOO_SMALL = _reason(
    "BudgetTooSmall",
    "the derived sizes do not fit into `gpuBudget.total`",
    "raise it, or set `rollout.gpusPerReplica`",
)
MISSING_REFERENCE = _reason(
    "MissingReference",
    "a ConfigMap, Secret, ServiceAccount or claim that the spec names is not there",
    "make it; the job goes on by itself",
)
NAME_CONFLICT = _reason(
    "NameConflict",
    "an object of a name that the job needs exists and is not the job's",
    "rename or delete one of the two",
)
CRD_TOO_OLD = _reason(
    "CRDTooOld",
    "the CRD lacks fields that this operator relies on; nothing is touched",
    "apply the CRD of the operator's version",
)
WAITING_FOR_PREDECESSOR = _reason(
    "WaitingForPredecessor",
    "pods of an earlier job of this name still end",
    "wait; they count against the budget",
)
QUOTA_EXCEEDED = _reason(
    "QuotaExceeded",
    "a ResourceQuota refuses",
    "raise it, lower `gpuBudget.total`, or give requests by overlay",
)
_REFUSED = "the message says which; change the policy or the overlay"
ADMISSION_DENIED = _reason("AdmissionDenied", "an admission webhook or policy refuses", _REFUSED)
FORBIDDEN = _reason("Forbidden", "the API server refuses what the operator may not do there", _REFUSED)
PODS_REFUSED = _reason("PodsRefused", "pods are refused, by the pod security level say", _REFUSED)
UNSCHEDULABLE = _reason(
    "Unschedulable",
    "no node has room; the scheduler's words follow",
    "free GPUs, lower the budget; `pendingDeadlineSeconds` ends the wait",
)
IMAGE_PULL = _reason(
    "ImagePull",
    "an image is not there or may not be fetched",
    "`trainer.image`, `rollout.engine.image`, `scheduling.imagePullSecrets`",
)
_LOGS = "logs of the group that is named"
TRAINER_STARTING = _reason("TrainerStarting", "the trainer's pods start, the model is fetched", _LOGS)
MESSAGING_STARTING = _reason("MessagingStarting", "the NATS server starts", _LOGS)
ROLLOUT_STARTING = _reason("RolloutStarting", "the trainer runs, and no engine is ready yet", _LOGS)
TRAINER_FAILED = _reason(
    "TrainerFailed",
    "a trainer pod ended with an exit code; the next attempt waits for its backoff",
    "its logs; `failurePolicy.trainer`",
)
OOM_KILLED = _reason(
    "OOMKilled",
    "a trainer pod used more memory than its limit; the next attempt waits for its backoff",
    "memory by overlay",
)
_BY_ITSELF = "nothing, a new attempt begins at once; `maxDisruptions` bounds it"
DISRUPTED = _reason("Disrupted", "a trainer pod was preempted or evicted, or its node drained", _BY_ITSELF)
NODE_LOST = _reason("NodeLost", "the node of a trainer pod is gone or not ready", _BY_ITSELF)
KILLED = _reason("Killed", "a signal ended the trainer", _BY_ITSELF)
JOB_DELETED = _reason("JobDeleted", "somebody deleted the trainer's Job", _BY_ITSELF)
POD_DELETED = _reason("PodDeleted", "somebody deleted a trainer pod", _BY_ITSELF)
PODS_LOST = _reason("PodsLost", "the trainer's Job failed without an exit code", _BY_ITSELF)
FATAL_EXIT = _reason(
    "FatalExit",
    "bad configuration, data or numbers (exit codes 64, 65, 78): no retry",
    "the trainer's last log lines name the field; a finished job is replaced by a new one",
)
HUNG = _reason(
    "Hung",
    "the trainer made no progress for `failurePolicy.trainer.hangSeconds` while it was its turn, or was not "
    "heard of for a minute longer",
    "logs of all ranks",
)
REPORT_STALE = _reason(
    "ReportStale",
    "the trainer has not reported for a while",
    "its logs; the API server may be out of its reach",
)
MESSAGING_NOT_READY = _reason(
    "MessagingNotReady",
    "the NATS pod is not ready; training goes on with what has arrived",
    "`kubectl logs NAME-nats-0`",
)
_ENGINES = "logs of the engines that are not ready"
ROLLOUT_SHORT = _reason("RolloutShort", "engines are missing", _ENGINES)
ROLLOUT_BELOW_MINIMUM = _reason(
    "RolloutBelowMinimum",
    "engines are missing: below `minAvailablePercent`, and after `belowMinimumSeconds` the job fails",
    _ENGINES,
)
ROLLOUT_UPDATE_STUCK = _reason(
    "RolloutUpdateStuck",
    "an updated engine has not got ready in 15 min; the old ones are kept",
    "mend image or arguments, apply again",
)
STALENESS_EXCEEDED = _reason(
    "StalenessExceeded",
    "samples older than `staleness.maxVersions` arrive at the trainer",
    "fewer engines, a larger `batchSize`, or a higher bound",
)
DEADLINE_EXCEEDED = _reason(
    "DeadlineExceeded", "`activeDeadlineSeconds` is over", "a new job with a longer one"
)
PENDING_DEADLINE_EXCEEDED = _reason(
    "PendingDeadlineExceeded", "`pendingDeadlineSeconds` is over", "a new job with a longer one"
)

# -- how a job stands where nothing is to be mended

RUNNING = _reason("Running", "the job runs")
DEGRADED = _reason("Degraded", "the job runs, but not as it should: condition Degraded says why")
SUSPENDING = _reason("Suspending", "pods end; the trainer makes a checkpoint before")
SUSPENDED = _reason("Suspended", "`spec.suspend` is set, and no pod runs")
RESUMED = _reason("Resumed", "a suspended job goes on from its checkpoint")
QUEUED = _reason("Queued", "the job waits for its turn in a queue")
COMPLETE = _reason("Complete", "the last step is trained")
SUCCEEDED = _reason("Succeeded", "the job has finished, and was complete")
FAILED = _reason("Failed", "the job has failed: condition Failed has the reason")
CONFIG_CHANGED = _reason("ConfigChanged", "a field marked R was changed, and the trainer is restarted for it")
RESIZED = _reason("Resized", "the trainer is restarted with another number of GPUs")
READY = _reason("Ready", "all pods of the group are ready")
NOT_READY = _reason("NotReady", "some pods of the group are not ready")
NOT_MADE = _reason("NotMade", "the group is not there yet")
SHARED = _reason("Shared", "a shared NATS server is used, which is not the job's")
ENDED = _reason("Ended", "the job is over, and so are the group's pods")
NO_QUEUE = _reason("NoQueue", "nothing has to admit the job")
AS_EXPECTED = _reason("AsExpected", "nothing is wrong")
NOT_SUSPENDED = _reason("NotSuspended", "the job is not suspended")
NOT_COMPLETE = _reason("NotComplete", "there are steps left")
NOT_FAILED = _reason("NotFailed", "the job has not failed")
NOT_FINISHED = _reason("NotFinished", "the job is neither complete nor failed")

# -- what is told in Events alone

STARTED = _reason("Started", "the first attempt of the trainer begins")
TRAINER_RESTART = _reason("TrainerRestart", "an attempt of the trainer ended; its message begins with why")
SPLIT_CHANGED = _reason("SplitChanged", "trainer and engines have other shares of the GPUs")
ROLLOUT_SCALED = _reason("RolloutScaled", "there are more or fewer engines")
CHECKPOINT_SAVED = _reason("CheckpointSaved", "a checkpoint is complete; told every ten minutes at most")
POD_FORCE_DELETED = _reason("PodForceDeleted", "a pod was deleted without grace, since its node is dead")
CHILD_RECREATED = _reason("ChildRecreated", "an object of the job was missing and is made again")
DRIFT_CORRECTED = _reason("DriftCorrected", "somebody changed an object of the job; it is set back")
TTL_EXPIRED = _reason("TTLExpired", "the objects of the finished job are deleted")


def render_tables() -> str:
    """Return the tables of docs/kubernetes.md: what to mend first, then the words that ask for nothing."""
    told = [each for each in ALL.values() if each.remedy]
    others = [each for each in ALL.values() if not each.remedy]
    lines = ["| reason | what it means | what to do |", "|---|---|---|"]
    lines += [f"| `{each.name}` | {each.meaning} | {each.remedy} |" for each in told]
    lines += ["", "These say how a job stands, and ask for nothing:", ""]
    lines += ["| reason | what it means |", "|---|---|"]
    lines += [f"| `{each.name}` | {each.meaning} |" for each in others]
    return "\n".join(lines) + "\n"
