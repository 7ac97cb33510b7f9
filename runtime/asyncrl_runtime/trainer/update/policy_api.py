"""What steps, ranks and their assembly ask of the policy that is trained; DeepSpeed's is in policy.py.

Every data-parallel rank has one, and where a call is collective all ranks make it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from asyncrl_runtime.trainer.update.packing import MicroBatch
from asyncrl_runtime.weights.adapter_publisher import Adapter
from asyncrl_runtime.weights.bucket import Bucket

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Update:
    """What one optimizer update was like."""

    sums: Tensor
    """Diagnostics of the minibatch, summed over all ranks (diagnostics.report_tokens)."""
    gradient_norm: float
    """Before clipping; not finite if the gradient was not, in which case the weights stayed as they were."""
    logprobs: list[Tensor]
    """[R] of each micro-batch of this rank, under the weights before the update; detached."""


class StepPolicy(Protocol):
    """What a training step asks."""

    @property
    def world_size(self) -> int: ...

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Return [R] float32 of each micro-batch under the weights as they are."""
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
            micro_batches: this rank's; every rank has as many.
            proximal_logprobs: [R] of each, from `logprobs` before the step's first update; None in the first,
                whose proximal policy is the policy itself, and where the loss needs none (loss.py).
            num_tokens: sampled tokens of the minibatch over all ranks, at least 1.
        """
        ...

    def reduce(self, sums: Tensor) -> Tensor:
        """Return `sums` summed over ranks, on the CPU; collective."""
        ...


class TrainedPolicy(StepPolicy, Protocol):
    """The policy of one rank."""

    trains_adapters: bool
    """Whether adapters are trained, and the model stays; asked of the policy by whoever must know."""

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds only its share of every weight (ZeRO 3)."""
        ...

    @property
    def num_bytes(self) -> int:
        """Size of all weights that are trained, tied ones once."""
        ...

    def buckets(self, max_bytes: int) -> list[tuple[str, ...]]:
        """Return the names of the weights in buckets, always in the same order; tied ones once.

        Args:
            max_bytes: of a bucket; a tensor larger than that comes alone.
        """
        ...

    def bucket(self, names: Sequence[str]) -> Bucket | None:
        """Return weights as engines are sent them, good until the next bucket; collective where sharded.

        Returns:
            None on the other ranks.
        """
        ...

    def adapter(self) -> Adapter:
        """Return the adapters as an engine loads them; of a policy that trains such, on any rank alone."""
        ...

    def export(self, folder: Path, tokenizer: "PreTrainedTokenizerBase | None") -> None:
        """Write a folder that `from_pretrained` loads, in the model's dtype. Rank 0 writes, nobody waits.

        Of a policy that trains adapters it holds these alone, as PEFT loads them. Collective where sharded.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write weights, optimizer and random state into `folder`; collective, and complete on return."""
        ...

    def load(self, folder: Path, scratch: Path) -> None:
        """Take up what `save` wrote, to the bit, be it by another number of ranks; collective.

        Args:
            scratch: folder that all ranks see, made and deleted here where the shares of the optimizer's
                state have to be cut anew.

        Raises:
            ValueError: it was written under another ZeRO stage or dtype.
        """
        ...
