"""The quickstart's policy and data: a tiny transformer that is poor at sums, and sums.

    spec.model.source:   asyncrl_runtime.quickstart:make_model
    spec.dataset.source: asyncrl_runtime.quickstart:sums

Prompts are `a+b=` with 0 <= a, b < 100. One in ten is held out, by a hash of the two numbers, so that neither
warm-up nor training sees it: whether the policy gets better at sums, or knows some by heart, shows there.
"""

import hashlib
import logging
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from asyncrl_api.protocols import Row

log = logging.getLogger(__name__)

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")
CHARACTERS = "0123456789+="
MAX_NUMBER = 100

WARMUP_STEPS = 380
WARMUP_BATCH = 128
WARMUP_LEARNING_RATE = 2e-3


def sums(*, split: str, seed: int, size: int = 0) -> Iterable[Row]:
    """Return sums as rows {question, answer}, in a seeded order.

    Args:
        split: `train`, or anything else for the held-out ones.
        seed: of the order.
        size: how many; 0 = all there are (about 9,000 to train on, 1,000 held out).
    """
    pairs = [(a, b) for a, b in _pairs() if is_held_out(a, b) == (split != "train")]
    random.Random(seed).shuffle(pairs)
    return [{"question": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs[: size or None]]


def exact(prompt: str, response: str, row: Row) -> float:
    """Reward 1 for the right sum and nothing else."""
    return float(response == row["answer"])


def is_held_out(a: int, b: int) -> bool:
    """Whether a sum is kept for evaluation: a tenth of them, in no pattern."""
    digest = hashlib.blake2b(f"{a}+{b}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 10 == 0


def make_model(folder: Path, *, seed: int, context_length: int) -> Iterable[str]:
    """Write a Llama of 0.86 M parameters over characters, warmed up until it gets about a third right.

    Deterministic in `seed`; takes about half a minute on one core.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=context_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    pairs = [(a, b) for a, b in _pairs() if not is_held_out(a, b)]
    _warm_up(model, tokenizer, pairs, random.Random(seed))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [f"{a}+{b}=" for a, b in pairs]


def build_tokenizer() -> Any:
    """Return a tokenizer of one token per character; it puts <bos> before a prompt."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def _pairs() -> Iterator[tuple[int, int]]:
    return ((a, b) for a in range(MAX_NUMBER) for b in range(MAX_NUMBER))


def _warm_up(model: Any, tokenizer: Any, pairs: list[tuple[int, int]], rng: random.Random) -> None:
    """Teach the form of an answer and some of its content, by plain supervised learning."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARMUP_LEARNING_RATE, weight_decay=0.01)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    for step in range(WARMUP_STEPS):
        batch = rng.sample(pairs, WARMUP_BATCH)
        prompts = [tokenizer.encode(f"{a}+{b}=") for a, b in batch]
        answers = [[*tokenizer.encode(str(a + b), add_special_tokens=False), eos] for a, b in batch]
        width = max(len(p) + len(r) for p, r in zip(prompts, answers, strict=True))
        ids = torch.full((WARMUP_BATCH, width), pad)
        labels = torch.full((WARMUP_BATCH, width), -100)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            log.info("warm-up step %d of %d: loss %.3f", step, WARMUP_STEPS, loss.item())
