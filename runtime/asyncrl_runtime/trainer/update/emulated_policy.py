"""A policy that takes the time of a device model and learns nothing: everything around it is what trains."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asyncrl_runtime.contract.messages import BucketLayout
from asyncrl_runtime.emulation.device import DeviceModel
from asyncrl_runtime.emulation.emulated_copy import EmulatedCopy
from asyncrl_runtime.trainer.sealing import seal
from asyncrl_runtime.trainer.update import diagnostics
from asyncrl_runtime.trainer.update.packing import MicroBatch
from asyncrl_runtime.trainer.update.policy_api import StepSettings, Update
from asyncrl_runtime.trainer.update.together import DiskWork
from asyncrl_runtime.weights.adapter_publisher import Adapter


class EmulatedPolicy:
    """Implements TrainedPolicy.

    Args:
        spend: lets model seconds pass.
        gpus: the GPUs for which this rank stands.
        world_size: the number of ranks.
        token_scale: tokens of the model that one token of a micro-batch stands for.
    """

    trains_adapters = False
    is_sharded = False

    def __init__(
        self,
        model: DeviceModel,
        spend: Callable[[float], None],
        *,
        gpus: int,
        world_size: int = 1,
        token_scale: int = 1,
    ) -> None:
        self.world_size = world_size
        self._trainer = model.trainer
        self.num_bytes = model.weights.num_bytes
        self._spend = spend
        self._gpus = gpus
        self._token_scale = token_scale

    def use(self, settings: StepSettings) -> None:
        pass

    def logprobs(self, micro_batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Return the log-probs under which the tokens were sampled."""
        return [self._pass(batch, self._trainer.forward_tokens_per_second) for batch in micro_batches]

    def update(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        proximal_logprobs: Sequence[Tensor] | None,
        num_tokens: int,
        learning_rate: float,
    ) -> Update:
        rate, num_sampled, num_live, logprobs = self._trainer.update_tokens_per_second, 0, 0, []
        for batch in micro_batches:
            logprobs.append(self._pass(batch, rate))
            num_sampled += batch.num_sampled_tokens
            num_live += int(batch.loss_mask.sum())
        self._spend(self._trainer.seconds_per_update)
        sums = torch.zeros(len(diagnostics.SCALARS) + 2 * diagnostics.NUM_BINS, dtype=torch.float64)
        sums[diagnostics.SCALARS.index("tokens")] = num_sampled
        sums[diagnostics.SCALARS.index("live")] = num_live
        return Update(self.reduce(sums), 0.0, logprobs)

    def _pass(self, batch: MicroBatch, tokens_per_second: float) -> Tensor:
        num_tokens = len(batch.input_ids) * self._token_scale
        self._spend(num_tokens / tokens_per_second / self._gpus)
        return batch.behavior_logprobs

    def reduce(self, sums: Tensor) -> Tensor:
        if self.world_size > 1:
            sums = sums.clone()
            dist.all_reduce(sums)
        return sums

    def buckets(self, max_bytes: int) -> list[tuple[str, ...]]:
        starts = range(0, self.num_bytes, max_bytes)
        return [(f"{start}-{min(start + max_bytes, self.num_bytes)}",) for start in starts]

    def layout(self, names: Sequence[str]) -> BucketLayout:
        return BucketLayout(tuple(names), ("uint8",), ((_size(names),),))

    def shares(self, names: Sequence[str]) -> Iterator[Tensor]:
        raise NotImplementedError("there are no weights: `make_copy` makes a copy that has none")

    def make_copy(self, layout: Sequence[BucketLayout]) -> EmulatedCopy:
        """Return a copy of these weights that takes its time."""
        return EmulatedCopy(layout, self._spend, self._gpus * self.world_size)

    def adapter(self) -> Adapter:
        raise NotImplementedError("emulated trainers have no adapters; a rule of the manifest says so")

    def export(self, folder: Path, tokenizer: Any) -> DiskWork:
        return self._write(folder)

    def save(self, folder: Path) -> DiskWork:
        return self._write(folder)

    def _write(self, folder: Path) -> DiskWork:
        def work(sealed: Callable[[int], None]) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"emulated-{self._rank()}"
            path.write_text("The trainer was emulated: there are no weights.\n")
            seal(path, sealed)
            self._spend(self._trainer.checkpoint_seconds)

        return work

    def _rank(self) -> int:
        return dist.get_rank() if self.world_size > 1 else 0

    def convert(self, folder: Path, scratch: Path) -> DiskWork:
        return lambda sealed: None

    def load(self, folder: Path, scratch: Path) -> None:
        pass


def _size(names: Sequence[str]) -> int:
    start, end = map(int, names[0].split("-"))
    return end - start
