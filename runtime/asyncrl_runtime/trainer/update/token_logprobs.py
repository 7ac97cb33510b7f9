"""Log-probs and entropies of chosen tokens, in float32, without float32 copies of all logits.

With a vocabulary of 150,000, log-softmax by autograd keeps three float32 tensors of the size of the logits.
Here only the logits are kept, in the model's own dtype. The backward pass computes the softmax again, a block
of rows at a time, and writes the gradient in that dtype.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24
"""The number of logits that are in float32 at one time, in 64 MB."""


def token_logprobs(logits: Tensor, targets: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probs of `targets` and the entropies, both of softmax(logits / temperature).

    Args:
        logits: [R, V] in the model's dtype; carries the gradient.
        targets: [R] int64.
        temperatures: [R] > 0.

    Returns:
        [R] and [R], natural log, float32 (float64 for float64 logits); both are differentiable.
    """
    logprobs, entropies = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        logits, targets, temperatures
    )
    return logprobs, entropies


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        log_normalizers, logprobs, entropies = (
            torch.empty(len(logits), dtype=dtype, device=logits.device) for _ in range(3)
        )
        for rows in _blocks(logits):
            scaled = _scaled(logits[rows], temperatures[rows], dtype)
            log_normalizer = scaled.logsumexp(-1)
            log_normalizers[rows] = log_normalizer
            logprobs[rows] = scaled.gather(1, targets[rows, None]).squeeze(1) - log_normalizer
            probabilities = (scaled - log_normalizer[:, None]).exp_()
            entropies[rows] = log_normalizer - probabilities.mul_(scaled).sum(-1)
        ctx.save_for_backward(logits, targets, temperatures, log_normalizers, entropies)
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        """With z = logits / temperature: dlogprob/dz = onehot - p, dentropy/dz = -p (log p + entropy)."""
        grad_logprobs, grad_entropies = grads
        logits, targets, temperatures, log_normalizers, entropies = ctx.saved_tensors
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(log_normalizers)
        result = torch.empty_like(logits)
        for rows in _blocks(logits):
            log_p = _scaled(logits[rows], temperatures[rows], log_normalizers.dtype)
            log_p.sub_(log_normalizers[rows, None])
            grad = log_p.exp()
            if grad_entropies is None:
                grad.mul_(-grad_logprobs[rows, None])
            else:
                pull = log_p.add_(entropies[rows, None]).mul_(grad_entropies[rows, None])
                grad.mul_(pull.add_(grad_logprobs[rows, None]).neg_())
            grad.scatter_add_(1, targets[rows, None], grad_logprobs[rows, None])
            result[rows] = grad.div_(temperatures[rows, None])
        return result, None, None


def _scaled(logits: Tensor, temperatures: Tensor, dtype: torch.dtype) -> Tensor:
    return logits.to(dtype, copy=True).div_(temperatures[:, None])


def _blocks(logits: Tensor) -> list[slice]:
    size = max(1, BLOCK_ELEMENTS // logits.shape[1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]
