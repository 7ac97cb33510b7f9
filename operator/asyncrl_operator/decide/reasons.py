"""Every reason of a condition or an Event: what it means and what to do about it. Pure.

The tables in docs/kubernetes.md are made from these (`make crd`). A condition may also have a reason that is
not here: the kubelet's word for a container that cannot start (`CrashLoopBackOff`, say) is passed on as is.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """One CamelCase word of a condition or an Event, explained to whoever finds it there."""

    name: str
    meaning: str
    remedy: str = ""
    """What to do about it. Empty if there is nothing to fix, since the word only says how the job stands."""


ALL: dict[str, Reason] = {}
"""The reasons by name, in the order in which the documentation lists them."""


def _reason(name: str, meaning: str, remedy: str = "") -> str:
    assert name not in ALL, f"{name} is defined twice"
    ALL[name] = Reason(name, meaning, remedy)
    return name


# -- what keeps a job from going on, or has ended it

INVALID_SPEC = _reason(
    "InvalidSpec",
    "the API server refused something that the spec asks for, such as an overlay; nothing was started",
    "fix the field that the message names and apply the job again",
)
BUDGET_TOO_SMALL = _reason(
    "BudgetTooSmall",
    "the sizes derived from the spec do not fit into `gpuBudget.total`",
    "raise the budget, or set `rollout.gpusPerReplica`",
)
MISSING_REFERENCE = _reason(
    "MissingReference",
    "a ConfigMap, Secret, ServiceAccount or claim that the spec names does not exist",
    "create it; the job then goes on by itself",
)
NAME_CONFLICT = _reason(
    "NameConflict",
    "the job needs an object of a certain name, and an object of that name exists that is not the job's",
    "delete the other object, or rename it or the job",
)
CRD_TOO_OLD = _reason(
    "CRDTooOld",
    "the CRD lacks fields that this operator relies on; nothing is touched",
    "apply the CRD that belongs to the operator's version",
)
WAITING_FOR_PREDECESSOR = _reason(
    "WaitingForPredecessor",
    "pods of an earlier job with this name are still ending",
    "wait for them to end; until then they count against the budget",
)
QUOTA_EXCEEDED = _reason(
    "QuotaExceeded",
    "a ResourceQuota does not allow what the job needs",
    "raise the quota, lower `gpuBudget.total`, or set requests in an overlay",
)
_REFUSED = "see the message for what refuses; change that policy, or the overlay"
ADMISSION_DENIED = _reason(
    "AdmissionDenied", "an admission webhook or policy refuses an object of the job", _REFUSED
)
FORBIDDEN = _reason(
    "Forbidden", "the API server refuses something that the operator may not do in this namespace", _REFUSED
)
PODS_REFUSED = _reason(
    "PodsRefused", "pods of the job are refused, by the pod security level for example", _REFUSED
)
UNSCHEDULABLE = _reason(
    "Unschedulable",
    "no node has room for a pod; the message ends with the scheduler's own words",
    "free some GPUs or lower the budget; `pendingDeadlineSeconds` limits the wait",
)
IMAGE_PULL = _reason(
    "ImagePull",
    "an image does not exist or may not be pulled",
    "check `trainer.image`, `rollout.engine.image` and `scheduling.imagePullSecrets`",
)
_LOGS = "wait; if it takes too long, read the logs of that group"
TRAINER_STARTING = _reason(
    "TrainerStarting", "the trainer's pods are starting, and the model is being fetched", _LOGS
)
MESSAGING_STARTING = _reason("MessagingStarting", "the NATS server is starting", _LOGS)
ROLLOUT_STARTING = _reason("RolloutStarting", "the trainer runs, and no engine is ready yet", _LOGS)
TRAINER_FAILED = _reason(
    "TrainerFailed",
    "a trainer pod failed with an exit code; the next attempt begins after a backoff",
    "read the pod's logs; `failurePolicy.trainer` sets the number of retries and the backoff",
)
STEP_FAILED = _reason(
    "StepFailed",
    "a recorded step raised an exception of its own (exit code 74); the next attempt repeats it, or discards "
    "its prompt groups after the second time",
    "read the pod's logs; if memory ran out, lower `training.tokensPerMicroBatch`",
)
OOM_KILLED = _reason(
    "OOMKilled",
    "a trainer pod used more memory than its limit allows; the next attempt begins after a backoff",
    "raise the memory limit in an overlay",
)
_BY_ITSELF = "nothing: a new attempt begins at once, up to `maxDisruptions` times"
DISRUPTED = _reason(
    "Disrupted", "a trainer pod was preempted or evicted, or its node was drained", _BY_ITSELF
)
NODE_LOST = _reason("NodeLost", "the node of a trainer pod is gone or not ready", _BY_ITSELF)
KILLED = _reason("Killed", "a signal ended the trainer", _BY_ITSELF)
JOB_DELETED = _reason("JobDeleted", "somebody deleted the trainer's Job", _BY_ITSELF)
POD_DELETED = _reason("PodDeleted", "somebody deleted a trainer pod", _BY_ITSELF)
PODS_LOST = _reason("PodsLost", "the trainer's Job failed without an exit code", _BY_ITSELF)
FATAL_EXIT = _reason(
    "FatalExit",
    "the configuration, the data or the numbers are bad (exit codes 64, 65, 78), so there is no retry",
    "the trainer's last log lines name the field: fix it, and replace the finished job with a new one",
)
HUNG = _reason(
    "Hung",
    "the trainer made no progress for `failurePolicy.trainer.hangSeconds` while it was its turn, or has not "
    "reported for a minute longer than that",
    "read the logs of all ranks",
)
REPORT_STALE = _reason(
    "ReportStale",
    "the trainer has not reported for five minutes or more",
    "read its logs; perhaps it cannot reach the API server",
)
MESSAGING_NOT_READY = _reason(
    "MessagingNotReady",
    "the NATS pod is not ready; training goes on with what has already arrived",
    "read `kubectl logs NAME-nats-0`",
)
_ENGINES = "read the logs of the engines that are not ready"
ROLLOUT_SHORT = _reason("RolloutShort", "fewer engines are ready than there should be", _ENGINES)
ROLLOUT_BELOW_MINIMUM = _reason(
    "RolloutBelowMinimum",
    "fewer engines are ready than `minAvailablePercent` asks for; with `onBelowMinimum: Fail` the job fails "
    "after `belowMinimumSeconds`",
    _ENGINES,
)
ROLLOUT_UPDATE_STUCK = _reason(
    "RolloutUpdateStuck",
    "an updated engine has not become ready within 15 minutes; the old ones are kept",
    "fix the image or the arguments and apply the job again",
)
DISK_FAILING = _reason(
    "DiskFailing",
    "the claim of the checkpoints does not take what the trainer writes; it tries again for ten minutes, and "
    "nothing is lost",
    "free some space or enlarge the claim; if the message says read-only or I/O error, look at its storage",
)
STALENESS_EXCEEDED = _reason(
    "StalenessExceeded",
    "samples older than `staleness.maxVersions` arrive at the trainer",
    "use fewer engines, a larger `batchSize` or a higher bound",
)
OPERATOR_ERROR = _reason(
    "OperatorError",
    "the operator's passes over the job fail, three times in a row or more; the message is the first line of "
    "the error. What a pass can still do is done, and it is tried again at least every 30 s",
    "read the operator's logs; report it if the message names no object that somebody has changed by hand",
)
UPDATES_SKIPPED = _reason(
    "UpdatesSkipped",
    "the gradients of some optimizer updates of the last 20 steps were not finite, so the policy was not "
    "updated; the job ends after more than `failurePolicy.trainer.maxSkippedUpdates` in a row",
    "lower `training.learningRate`, or bound rewards with `algorithm.rewardClip`",
)
DEADLINE_EXCEEDED = _reason(
    "DeadlineExceeded", "`activeDeadlineSeconds` have passed", "create a new job with a longer deadline"
)
PENDING_DEADLINE_EXCEEDED = _reason(
    "PendingDeadlineExceeded",
    "the job was not running after `pendingDeadlineSeconds`",
    "create a new job with a longer deadline",
)

# -- how a job stands when there is nothing to fix

RUNNING = _reason("Running", "the job runs")
DEGRADED = _reason("Degraded", "the job runs, but not as it should: the condition Degraded says why")
SUSPENDING = _reason("Suspending", "the job's pods are ending; the trainer makes a checkpoint first")
SUSPENDED = _reason("Suspended", "`spec.suspend` is set, and no pod runs")
RESUMED = _reason("Resumed", "a suspended job goes on from its checkpoint")
QUEUED = _reason("Queued", "the job waits for its turn in a queue")
COMPLETE = _reason("Complete", "the last step has been trained")
MASTERED = _reason(
    "Mastered",
    "the policy solves its prompts, so that `sampling.filter` keeps no group of them any more; the job is "
    "complete before `training.maxSteps`, with its last evaluation, checkpoint and export",
)
SUCCEEDED = _reason("Succeeded", "the job has finished and is complete")
FAILED = _reason("Failed", "the job has failed: the condition Failed has the reason")
CONFIG_CHANGED = _reason("ConfigChanged", "a field marked R was changed, so the trainer is restarted")
RESIZED = _reason("Resized", "the trainer is restarted with another number of GPUs")
READY = _reason("Ready", "all pods of the group are ready")
NOT_READY = _reason("NotReady", "some pods of the group are not ready")
NOT_MADE = _reason("NotMade", "the group has not been created yet")
SHARED = _reason("Shared", "the job uses a shared NATS server, which is not its own")
ENDED = _reason("Ended", "the job is over, and the group's pods have ended with it")
NO_QUEUE = _reason("NoQueue", "the job needs no queue to admit it")
AS_EXPECTED = _reason("AsExpected", "nothing is wrong")
NOT_SUSPENDED = _reason("NotSuspended", "the job is not suspended")
NOT_COMPLETE = _reason("NotComplete", "there are steps left to train")
NOT_FAILED = _reason("NotFailed", "the job has not failed")
NOT_FINISHED = _reason("NotFinished", "the job is neither complete nor failed")

# -- reasons that only Events have

STARTED = _reason("Started", "the first attempt of the trainer begins")
TRAINER_RESTART = _reason(
    "TrainerRestart", "an attempt of the trainer ended; the message begins with the reason"
)
SPLIT_CHANGED = _reason("SplitChanged", "the GPUs are divided anew between trainer and engines")
ROLLOUT_SCALED = _reason("RolloutScaled", "the number of engines has changed")
CHECKPOINT_SAVED = _reason("CheckpointSaved", "a checkpoint is complete; reported at most every ten minutes")
POD_FORCE_DELETED = _reason(
    "PodForceDeleted", "a pod was deleted without a grace period, since its node is dead"
)
CHILD_RECREATED = _reason("ChildRecreated", "an object of the job was missing and has been created again")
DRIFT_CORRECTED = _reason("DriftCorrected", "somebody changed an object of the job; the change is undone")
TTL_EXPIRED = _reason(
    "TTLExpired", "the time to live of the finished job is over, and its objects are deleted"
)


def render_tables() -> str:
    """Return the tables of docs/kubernetes.md: first what calls for action, then the words that do not."""
    told = [each for each in ALL.values() if each.remedy]
    others = [each for each in ALL.values() if not each.remedy]
    lines = ["| reason | what it means | what to do |", "|---|---|---|"]
    lines += [f"| `{each.name}` | {each.meaning} | {each.remedy} |" for each in told]
    lines += ["", "These reasons only say how a job stands; there is nothing to do about them:", ""]
    lines += ["| reason | what it means |", "|---|---|"]
    lines += [f"| `{each.name}` | {each.meaning} |" for each in others]
    return "\n".join(lines) + "\n"
