"""What is published is what was copied, whatever the next step does to the original meanwhile."""

import torch
from torch import Tensor

from asyncrl_runtime.weights.adapter_publisher import Adapter
from asyncrl_runtime.weights.bucket import BucketBuffer, PublishedWeights, describe
from asyncrl_runtime.weights.copies import AdapterCopy, HostCopy


async def test_weights_are_those_of_the_copy_in_every_bucket() -> None:
    weights = {name: torch.full((3,), float(number)) for number, name in enumerate("abc")}
    buffer = BucketBuffer()

    async def gather(names: tuple[str, ...]) -> Tensor:
        chosen = [(name, weights[name]) for name in names]
        return buffer.fill(chosen, sum(each.nbytes for _, each in chosen), torch.device("cpu"))

    buckets = (("a", "b"), ("c",))
    layout = tuple(describe((name, torch.float32, (3,)) for name in names) for names in buckets)
    copy = HostCopy(PublishedWeights(layout, gather))
    for _ in range(2):
        await copy.take()
        before = {name: each.clone() for name, each in weights.items()}
        for each in weights.values():
            each.add_(1)
        for names in buckets:
            sent = (await copy.published.gather(names)).view(torch.float32)
            assert torch.equal(sent, torch.cat([before[name] for name in names]))


async def test_adapters_are_those_of_the_copy() -> None:
    trained = Adapter("{}", b"0")

    async def load() -> Adapter:
        return trained

    copy = AdapterCopy(load)
    await copy.take()
    trained = Adapter("{}", b"1")
    assert (await copy.load()).weights == b"0"
    await copy.take()
    assert (await copy.load()).weights == b"1"
