"""What a manifest may say and hardly anyone means: `asyncrl validate` warns of it, and the trainer's log."""

from asyncrl_api.training_spec import AlgorithmSpec

WIDEST_SEQUENCE_CLIP = 0.01
"""The half-width above which a trust region of whole sequences never binds; GSPO's own is 0.0004."""


def doubts_about(algorithm: AlgorithmSpec) -> str:
    """Return what is unlikely to be meant, in words; empty if there is nothing.

    Objects that an API server stored under an earlier version hold clips of 0.2 that nobody wrote.
    """
    low, high = algorithm.clip_bounds
    if algorithm.policy_loss == "GSPO" and min(low, high) > WIDEST_SEQUENCE_CLIP:
        return (
            f"spec.algorithm.clip is {low:g} below and {high:g} above 1, and ratios of whole sequences "
            "hardly ever leave that: policyLoss GSPO clips nothing; remove clip.low and clip.high for the "
            "paper's 0.0003 and 0.0004"
        )
    if algorithm.policy_loss == "CISPO" and low < 1:
        return (
            f"spec.algorithm.clip.low is {low:g}, so policyLoss CISPO raises weights below {1 - low:g}; the "
            "paper has no lower bound: remove it"
        )
    return ""
