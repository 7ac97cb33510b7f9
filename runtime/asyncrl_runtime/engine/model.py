"""A Hugging Face causal language model, loaded for sampling and checked before it serves."""

from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from asyncrl_api.exits import ExitCode, ExitError
from asyncrl_runtime.engine.cache import KvCache
from asyncrl_runtime.engine.lora import AdaptedLayers, Share, add_deltas
from asyncrl_runtime.engine.slot_attention import ATTENTION, Segment, Window

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CausalModel:
    """A decoder and its head, which run over windows of the slot cache.

    Decoder and head are called separately, so that a prefill computes logits only where they are needed.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        """Load config, weights and tokenizer.

        Raises:
            ExitError: the folder lacks something, or the model computes something that this engine does not.
        """
        self.folder = folder
        self.dtype = dtype
        self.tokenizer = _load_tokenizer(folder)
        self.module = load_weights(folder, dtype)
        self.config = self.module.config
        self.decoder: nn.Module = self.module.get_decoder()
        self.head: nn.Module = self.module.get_output_embeddings()
        self.linear_layers = {
            name: part for name, part in self.module.named_modules() if isinstance(part, nn.Linear)
        }
        self._head_name = next((n for n, layer in self.linear_layers.items() if layer is self.head), "")
        self._adapted = AdaptedLayers({n: p for n, p in self.linear_layers.items() if p is not self.head})
        self.vocabulary_size = int(self.config.vocab_size)
        self.eos_ids = _eos_ids(self.module, self.tokenizer)
        if dtype == torch.float32:
            _store_transposed(self.module)
            _fuse_norms(self.module)
        _check(self)

    def new_cache(self) -> KvCache:
        config = self.config
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return KvCache(config.num_hidden_layers, config.num_key_value_heads, head_size, self.dtype)

    def hidden(self, token_ids: Tensor, window: Window, shares: Sequence[Share] = ()) -> Tensor:
        """Run a window's tokens, [N] int64, and store their keys and values; return [N, hidden].

        Args:
            shares: the shares of the adapters in these tokens.

        Raises:
            IndexError: a token id is outside the vocabulary.
        """
        self._adapted.apply(shares)
        output = self.decoder(
            input_ids=token_ids[None],
            position_ids=window.positions,
            use_cache=False,
            window=window,
            return_dict=True,
        )
        result: Tensor = output.last_hidden_state[0]
        return result

    def logits(self, hidden: Tensor, shares: Sequence[Share] = ()) -> Tensor:
        """Return the logits, [n, vocabulary] float32, of [n, hidden], of which adapters have `shares`."""
        result: Tensor = self.head(hidden)
        add_deltas(shares, self._head_name, hidden, result)
        return result.float()

    def parameters(self) -> dict[str, Tensor]:
        """Return the parameters by name; tied weights appear under each of their names."""
        named = self.module.named_parameters(remove_duplicate=False)
        return {name: parameter.data for name, parameter in named}

    def decode_text(self, token_ids: list[int], *, skip_special_tokens: bool, spaces: bool) -> str:
        text: str = self.tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, spaces_between_special_tokens=spaces
        )
        return text


def load_weights(folder: Path, dtype: torch.dtype) -> Any:
    """Return the model in `folder` with attention over the slot cache, in evaluation mode.

    Raises:
        ExitError: there is no config, or it is not that of a causal language model with readable weights.
    """
    if not (folder / "config.json").is_file():
        raise ExitError(
            ExitCode.REFUSED,
            f"model folder {folder} has no config.json: name a folder that `save_pretrained` has written",
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=ATTENTION,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ExitError(ExitCode.REFUSED, f"model folder {folder} cannot be loaded: {error}") from error
    module, loading = loaded  # as output_loading_info has it, which its types do not say
    if loading["missing_keys"]:  # transformers would initialize them at random
        missing = ", ".join(sorted(loading["missing_keys"]))
        raise ExitError(ExitCode.REFUSED, f"model folder {folder} lacks weights: {missing}")
    return module.eval().requires_grad_(False)


def context_length_of(folder: Path) -> int:
    """Return the longest sequence that the model's position embedding is made for."""
    return int(AutoConfig.from_pretrained(folder, local_files_only=True).max_position_embeddings)


def _load_tokenizer(folder: Path) -> Any:
    remedy = "save its tokenizer there (`tokenizer.save_pretrained`)"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ExitError(ExitCode.REFUSED, f"model folder {folder} has no tokenizer: {remedy}")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ExitError(
            ExitCode.REFUSED, f"tokenizer in {folder} cannot be loaded: {error}; {remedy}"
        ) from error


def _eos_ids(module: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a response: as in SGLang, from config, generation config and tokenizer."""
    ids: set[int] = set()
    for value in (
        module.config.eos_token_id,
        module.generation_config.eos_token_id,
        tokenizer.eos_token_id,
    ):
        ids.update(value if isinstance(value, Iterable) else () if value is None else (value,))
    return frozenset(ids)


@torch.inference_mode()
def _check(model: CausalModel) -> None:
    """Refuse a model whose own forward disagrees with ours on a short sequence.

    This finds what no list of architectures would: scaled or capped logits, attention sinks, other kinds of
    caches. A sliding window shows only in long sequences, so it is looked up in the config.
    """
    config = model.config
    name = type(model.module).__name__
    layers = set(getattr(config, "layer_types", None) or ())
    if layers - {"full_attention"} or (not layers and getattr(config, "sliding_window", None)):
        raise ExitError(
            ExitCode.REFUSED,
            f"{name} is not served: it has layers of kind {sorted(layers) or 'sliding_window'}",
        )
    ids = torch.arange(8) % model.vocabulary_size
    cache = model.new_cache()
    cache.reserve(1, 8, 0, 0)
    windows = [  # a prompt, its continuation, and two decode steps
        (ids[:4], torch.empty(0, dtype=torch.int64), [Segment(0, 0, 4)]),
        (ids[4:6], torch.empty(0, dtype=torch.int64), [Segment(0, 4, 6)]),
        (ids[6:7], torch.tensor([6]), []),
        (ids[7:], torch.tensor([7]), []),
    ]
    parts = [model.hidden(tokens, Window(cache, last, segments)) for tokens, last, segments in windows]
    ours = model.logits(torch.cat(parts)).log_softmax(-1)
    model.module.set_attn_implementation("eager")
    theirs = model.module(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
    model.module.set_attn_implementation(ATTENTION)
    difference = float((ours - theirs).abs().max())
    if not difference < (1e-2 if model.dtype == torch.float32 else 0.5):
        raise ExitError(
            ExitCode.REFUSED,
            f"{name} is not served: its forward differs from this engine's by {difference:.3g} in log-prob",
        )


def _store_transposed(module: nn.Module) -> None:
    """Store linear weights as [in, out] in memory, while their shape stays [out, in].

    For the few rows of a decode step MKL's float32 product is up to twice as fast that way. Weights that are
    also an embedding stay as they are, since rows are looked up in them.
    """
    embedded = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for part in module.modules():
        if isinstance(part, nn.Linear) and id(part.weight) not in embedded:
            part.weight.data = part.weight.data.t().contiguous().t()


@torch.inference_mode()
def _fuse_norms(module: nn.Module) -> None:
    """Make RMS norms, six operations each in transformers, run as one operation if the result is the same."""
    for part in module.modules():
        weight, eps = getattr(part, "weight", None), getattr(part, "variance_epsilon", None)
        if isinstance(weight, Tensor) and weight.dim() == 1 and isinstance(eps, float):
            fused = partial(F.rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)
            probe = torch.linspace(-1, 1, len(weight))[None]
            if torch.allclose(part(probe), fused(probe), rtol=1e-5):
                part.forward = fused
