"""The quickstart's policy and data: a tiny transformer that is bad at sums, and the sums.

    spec.model.source:   asyncrl_examples.quickstart:make_model
    spec.dataset.source: asyncrl_examples.quickstart:sums

Prompts are `a+b=` with 0 <= a, b < 100. One in ten, chosen by a hash of the two numbers, is held out, so that
neither warm-up nor training sees it: these show whether the policy gets better or learns sums by heart.
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
PRINTABLE = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
MAX_NUMBER = 100
NUM_CHAINS = 10_000
NUM_LESSONS = 4
"""The number of times that each sum is taught, each time with other carries forgotten."""
SHARE_FORGOTTEN = 2 / 3
"""The share of carries that are forgotten."""

WARMUP_STEPS = 350
WARMUP_LEARNING_RATE = 2e-3
IGNORED = -100
"""The label of tokens that the loss leaves out."""


def sums(*, split: str, seed: int, size: int = 0) -> Iterable[Row]:
    """Return sums as rows {question, answer}, in a seeded order.

    Args:
        split: `train`, or anything else for the held-out sums.
        seed: seed of the order.
        size: number of sums; 0: all of them (about 9,000 to train on, 1,000 held out).
    """
    pairs = [(a, b) for a, b in _pairs() if is_held_out(a, b) == (split != "train")]
    random.Random(seed).shuffle(pairs)
    return [{"question": f"{a}+{b}=", "answer": str(a + b)} for a, b in pairs[: size or None]]


def exact(prompt: str, response: str, row: Row) -> float:
    """Return a reward of 1 for the right sum and nothing else, otherwise 0."""
    return float(response == row["answer"])


def is_held_out(a: int, b: int) -> bool:
    """Return whether a sum is held out for evaluation; a tenth of them is, without a pattern."""
    digest = hashlib.blake2b(f"{a}+{b}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 10 == 0


def make_model(folder: Path, *, seed: int, context_length: int) -> Iterable[str]:
    """Write a Llama of 0.43 M parameters over characters that is bad at sums: it gets about a third right.

    Somebody who mostly forgets to carry taught it to add. The result depends only on `seed`; it takes about
    half a minute on one core.
    """
    rng = random.Random(seed)
    pairs = [(a, b) for a, b in _pairs() if not is_held_out(a, b)]
    answers = [(f"{a}+{b}=", _careless_sum(a, b, rng)) for a, b in pairs for _ in range(NUM_LESSONS)]
    _write_model(folder, build_tokenizer(), answers, 128, seed, context_length)
    return [prompt for prompt, _ in answers]


def _careless_sum(a: int, b: int, rng: random.Random) -> str:
    units = a % 10 + b % 10
    tens = a // 10 + b // 10 + (units >= 10 and rng.random() >= SHARE_FORGOTTEN)
    hundreds = tens >= 10 and rng.random() >= SHARE_FORGOTTEN
    return str(100 * hundreds + 10 * (tens % 10) + units % 10)


def make_text_model(folder: Path, *, seed: int, context_length: int) -> Iterable[str]:
    """Write a Llama of 0.45 M parameters over printable characters, for the examples beside the quickstart.

    It knows the form of an answer and little else: numbers in answer to `Calculate 5 - 3 + 8.`, as
    reasoning-gym asks, but always with three terms; and Python functions in answer to `f(x) = 2 * x + 1`,
    half of which are wrong and a tenth of which are held out. It takes about a minute on one core.
    """
    rng = random.Random(seed)
    answers = [_chain(rng) for _ in range(NUM_CHAINS)]
    functions = [(a, b) for a in range(10) for b in range(10) if not is_held_out(a, b)]
    for _ in range(NUM_CHAINS):
        (a, b), (c, d) = rng.choice(functions), rng.choice(functions)
        if rng.random() < 0.5:
            c, d = a, b
        answers.append((f"f(x) = {a} * x + {b}", f"def f(x): return {c} * x + {d}"))
    _write_model(folder, build_tokenizer(PRINTABLE), answers, 64, seed, context_length)
    return [prompt for prompt, _ in answers]


def _chain(rng: random.Random) -> tuple[str, str]:
    a, b, c = (rng.randint(0, 10) for _ in range(3))
    first, second = rng.choice("+-"), rng.choice("+-")
    return f"Calculate {a} {first} {b} {second} {c}.", str(a + int(f"{first}{b}") + int(f"{second}{c}"))


def _write_model(
    folder: Path,
    tokenizer: Any,
    answers: list[tuple[str, str]],
    batch_size: int,
    seed: int,
    context_length: int,
) -> None:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.06,  # with the usual 0.02 nothing is learned for a long time
        max_position_embeddings=context_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    _warm_up(model, tokenizer, answers, batch_size, random.Random(seed))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tokenizer(characters: str = CHARACTERS) -> Any:
    """Return a tokenizer with one token per character, which puts <bos> before a prompt."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *characters))}
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


def _warm_up(
    model: Any, tokenizer: Any, answers: list[tuple[str, str]], batch_size: int, rng: random.Random
) -> None:
    """Teach the model by plain supervised learning, at a rate that falls to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=WARMUP_LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / WARMUP_STEPS)
    )
    for step in range(WARMUP_STEPS):
        ids, labels = _batch(tokenizer, rng.sample(answers, batch_size))
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            log.info("warm-up step %d of %d: loss %.3f", step, WARMUP_STEPS, loss.item())


def _batch(tokenizer: Any, answers: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and labels, int64 [len(answers), longest]; the prompts are not learned."""
    eos = tokenizer.eos_token_id
    encoded = [
        (tokenizer.encode(prompt), [*tokenizer.encode(answer, add_special_tokens=False), eos])
        for prompt, answer in answers
    ]
    width = max(len(prompt) + len(answer) for prompt, answer in encoded)
    ids = torch.full((len(encoded), width), tokenizer.pad_token_id)
    labels = torch.full((len(encoded), width), IGNORED)
    for row, (prompt, answer) in enumerate(encoded):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels
