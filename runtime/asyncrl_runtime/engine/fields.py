"""The fields of `/generate`, checked as strictly as SGLang checks them."""

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

T = TypeVar("T", bound=msgspec.Struct)


class BadRequest(Exception):
    """A request is answered with status 400 and this message."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """The sampling fields that this engine implements, with SGLang's defaults."""

    max_new_tokens: int | None = None
    """The most tokens to sample; None: 128, or fewer if the context ends before that."""
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    n: int = 1
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    stream_interval: int = 0
    """Tokens between chunks of a stream; 0: the server's setting."""
    sampling_seed: int | None = None

    def __post_init__(self) -> None:
        rules = {
            "temperature must be non-negative": 0.0 <= self.temperature < float("inf"),
            "top_p must be in (0, 1]": 0.0 < self.top_p <= 1.0,
            "top_k must be -1 (disable) or at least 1": self.top_k == -1 or self.top_k >= 1,
            "n must be at least 1": self.n >= 1,
            "max_new_tokens must be at least 0": self.num_wanted >= 0,
            "min_new_tokens must be in [0, max_new_tokens]": 0 <= self.min_new_tokens <= self.num_wanted,
            "stream_interval must be at least 0": self.stream_interval >= 0,
        }
        for rule, holds in rules.items():
            if not holds:
                field_name = rule.split(" ", 1)[0]
                raise ValueError(f"{rule}, got {getattr(self, field_name)}.")

    @property
    def num_wanted(self) -> int:
        return 128 if self.max_new_tokens is None else self.max_new_tokens

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-6 or self.top_k == 1

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


OTHER_SAMPLING_FIELDS: Mapping[str, Any] = {
    "stop_regex": None, "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0,
    "repetition_penalty": 1.0, "json_schema": None, "regex": None, "ebnf": None, "structural_tag": None,
    "logit_bias": None, "custom_params": None, "beam_width": 1, "watermark": None, "choice": None,
}  # fmt: skip
"""SGLang's sampling fields that this engine knows but does not implement, with their defaults."""


class GenerateBody(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `/generate` that this engine implements; lists have one entry per prompt."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] = {}
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    return_prompt_token_ids: bool = False
    stream: bool = False
    cache_salt: str | list[str] = ""
    extra_key: str | list[str] = ""
    lora_path: str | list[str | None] | None = None
    """Names of adapters, although the field is called a path."""


OTHER_BODY_FIELDS: Mapping[str, Any] = dict.fromkeys([
    "audio_data", "background", "bootstrap_host", "bootstrap_pair_key", "bootstrap_port", "bootstrap_room",
    "conversation_id", "custom_labels", "custom_logit_processor", "data_parallel_rank", "decode_tp_size",
    "disagg_prefill_dp_rank", "external_trace_header", "image_data", "image_max_dynamic_patch",
    "input_embeds", "lora_id", "max_dynamic_patch", "max_thinking_tokens", "min_dynamic_patch",
    "modalities", "no_logs", "priority", "require_reasoning", "return_bytes", "return_entropy",
    "return_hidden_states", "return_indexer_topk", "return_routed_experts", "return_sampling_mask",
    "return_text_in_logprobs", "routed_dp_rank", "routed_experts_start_len", "routing_key", "session_id",
    "session_params", "token_ids_logprob", "top_logprobs_num", "use_audio_in_video", "video_config",
    "video_data",
]) | {"log_metrics": True}  # fmt: skip
"""The same for the fields beside `sampling_params`; None stands for anything empty or false."""


def parse_sampling(given: Mapping[str, Any]) -> SamplingParams:
    """Return the sampling parameters.

    Raises:
        BadRequest: a field is unknown, not implemented, of the wrong type or out of range.
    """
    return _parse(given, SamplingParams, OTHER_SAMPLING_FIELDS)


def parse_body(data: bytes) -> GenerateBody:
    """Return the body's fields; the sampling parameters are left as they are.

    Raises:
        BadRequest: as for `parse_sampling`.
    """
    try:
        given = msgspec.json.decode(data)
    except msgspec.DecodeError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(given, dict):
        raise BadRequest("the body is not a JSON object")
    return _parse(given, GenerateBody, OTHER_BODY_FIELDS)


def _parse(given: Mapping[str, Any], kind: type[T], others: Mapping[str, Any]) -> T:
    """Convert `given` to `kind`; null stands for the default, and `others` may only have their defaults."""
    known = kind.__struct_fields__
    for name, value in given.items():
        if name in others:
            default = others[name]
            if value is not None and value != default and (value or default):
                raise BadRequest(
                    f"field `{name}` is not implemented here: leave it at {default!r}, got {value!r}"
                )
        elif name not in known:
            expected = ", ".join(f"`{n}`" for n in (*known, *others))
            raise BadRequest(f"unknown field `{name}`, expected one of {expected}")
    try:
        return msgspec.convert({k: v for k, v in given.items() if v is not None}, kind)
    except msgspec.ValidationError as error:
        raise BadRequest(str(error)) from error
