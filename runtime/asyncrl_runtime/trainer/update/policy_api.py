"""What steps, ranks and their assembly need from the trained policy. The one with DeepSpeed is in policy.py.

Every data-parallel rank has a policy; a collective call must be made by all ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from asyncrl_api.job import AlgorithmSpec
from asyncrl_runtime.contract.messages import BucketLayout
from asyncrl_runtime.trainer.update.packing import MicroBatch
from asyncrl_runtime.trainer.update.together import DiskWork
from asyncrl_runtime.weights.adapter_publisher import Adapter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Update:
    """The results of one optimizer update."""

    sums: Tensor
    """The minibatch's diagnostics, summed over all ranks (diagnostics.report_tokens)."""
    gradient_norm: float
    """The norm before clipping. If it is not finite, nor was the gradient, and the weights are unchanged."""
    logprobs: list[Tensor]
    """[R] for each micro-batch of this rank, under the weights before the update; detached."""


@dataclass(frozen=True)
class StepSettings:
    """What decides a step's updates beside its samples, minibatches and learning rate."""

    algorithm: AlgorithmSpec
    weight_decay: float
    """AdamW's, of matrices and embeddings."""
    gradient_clipping: float
    """The norm to which gradients are clipped; 0: they are not."""
    betas: tuple[float, float]
    epsilon: float


class StepPolicy(Protocol):
    """What a training step needs from a policy."""

    @property
    def world_size(self) -> int: ...

    def use(self, settings: StepSettings) -> None:
        """Put settings into force for the updates that follow; collective.

        They belong to a step, not to the process: a checkpoint brings the optimizer's constants with it, and
        a step that is repeated has those of the attempt that recorded it.
        """
        ...

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Return the log-probs of each micro-batch under the present weights, [R] float32 each."""
        ...

    def update(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        proximal_logprobs: Sequence[Tensor] | None,
        num_tokens: int,
        learning_rate: float,
    ) -> Update:
        """Make one optimizer update from one minibatch; collective.

        Args:
            micro_batches: this rank's micro-batches; every rank has the same number.
            proximal_logprobs: [R] for each, from `logprobs` before the step's first update; None for the
                first update, whose proximal policy is the policy itself, and if the loss needs none.
            num_tokens: the sampled tokens of the minibatch over all ranks, at least 1.
        """
        ...

    def reduce(self, sums: Tensor) -> Tensor:
        """Return `sums` summed over ranks, on the CPU; collective."""
        ...


class TrainedPolicy(StepPolicy, Protocol):
    """The policy of one rank."""

    trains_adapters: bool
    """Whether adapters are trained while the model stays as it is. Whoever must know this asks the policy."""

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only its share of every weight (ZeRO 3)."""
        ...

    @property
    def num_bytes(self) -> int:
        """The size of all weights that are trained; tied ones count once."""
        ...

    def buckets(self, max_bytes: int) -> list[tuple[str, ...]]:
        """Return the names of the weights by bucket, always in the same order; tied ones appear once.

        Args:
            max_bytes: the size limit of a bucket; a larger tensor gets a bucket of its own.
        """
        ...

    def layout(self, names: Sequence[str]) -> BucketLayout:
        """Return how a bucket of these weights is laid out, which never changes; not collective."""
        ...

    def shares(self, names: Sequence[str]) -> Iterator[Tensor]:
        """Yield this rank's share of each of these weights (`weights.copies.share_of`), flat.

        All ranks must exhaust it, with the same names. A tensor is valid until the next one is asked for.
        """
        ...

    def adapter(self) -> Adapter:
        """Return the adapters as an engine loads them; not collective. The policy must train adapters."""
        ...

    def export(self, folder: Path, tokenizer: "PreTrainedTokenizerBase | None") -> DiskWork:
        """Prepare a folder that `from_pretrained` loads, in the model's dtype; collective if it is sharded.

        If the policy trains adapters, the folder has only these, as PEFT loads them.

        Returns:
            What rank 0 still has to write and to flush; the weights must not change before. Other ranks have
            nothing to do.
        """
        ...

    def save(self, folder: Path) -> DiskWork:
        """Prepare a checkpoint of weights, optimizer and random state; collective. Nothing is written yet.

        Returns:
            What this rank still has to write into `folder` and to flush; the weights must not change before.
        """
        ...

    def convert(self, folder: Path, scratch: Path) -> DiskWork:
        """Prepare the load of a checkpoint that other ranks, or another ZeRO stage, wrote; not collective.

        Args:
            scratch: a folder that all ranks see; it is created here if the optimizer's state has to be
                divided anew.

        Returns:
            What this rank has to do before any rank may `load`.

        Raises:
            ValueError: it was written with another dtype, with other adapters, or with a ZeRO stage from
                which there is no way to this one's.
        """
        ...

    def load(self, folder: Path, scratch: Path) -> None:
        """Restore exactly what `save` wrote, even if another number of ranks wrote it; collective.

        Args:
            scratch: what `convert` has made, if anything; it is deleted.

        Raises:
            ValueError: as `convert`.
        """
        ...
