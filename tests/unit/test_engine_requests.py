"""Bodies of `/generate`: what is taken, what is refused, and how lists are spread over requests."""

import json
from typing import Any

import pytest
import torch

from asyncrl_runtime.engine.fields import BadRequest, parse_sampling
from asyncrl_runtime.engine.model import CausalModel
from asyncrl_runtime.engine.requests import Call, RequestParser
from support.engines.tiny_models import EOS, tiny_model


@pytest.fixture(scope="module")
def parser() -> RequestParser:
    return RequestParser(CausalModel(tiny_model(), torch.float32), context_length=64, max_total_tokens=1000)


def parse(parser: RequestParser, **body: Any) -> Call:
    return parser.parse(json.dumps(body).encode())


def test_one_prompt_makes_one_request(parser: RequestParser) -> None:
    call = parse(parser, input_ids=[1, 2, 3], rid="a", sampling_params={"max_new_tokens": 5})
    (request,) = call.requests
    assert call.is_single and not call.stream
    assert (request.rid, request.prompt.tolist(), request.max_new_tokens) == ("a", [1, 2, 3], 5)


def test_text_is_tokenized(parser: RequestParser) -> None:
    ids = CausalModel(tiny_model(), torch.float32).tokenizer("1 + 2").input_ids
    assert parse(parser, text="1 + 2").requests[0].prompt.tolist() == ids
    assert [len(r.prompt) for r in parse(parser, text=["1 + 2", "1"]).requests] == [len(ids), 1]


def test_lists_have_one_entry_per_prompt(parser: RequestParser) -> None:
    call = parse(
        parser,
        input_ids=[[1], [2, 3]],
        rid=["a", "b"],
        sampling_params=[{"temperature": 0.5, "sampling_seed": 1}, {"temperature": 0.7}],
        return_logprob=[True, False],
        logprob_start_len=[0, -1],
        cache_salt=["x", "y"],
    )
    first, second = call.requests
    assert not call.is_single
    assert (first.rid, first.params.temperature, first.logprob_start) == ("a", 0.5, 0)
    assert (second.rid, second.return_logprob, second.logprob_start) == ("b", False, -1)
    assert first.salt != second.salt


def test_one_rid_for_a_list_is_numbered(parser: RequestParser) -> None:
    assert [r.rid for r in parse(parser, input_ids=[[1], [2]], rid="a").requests] == ["a_0", "a_1"]


def test_parallel_samples_stand_side_by_side_with_fresh_ids(parser: RequestParser) -> None:
    call = parse(parser, input_ids=[[1], [2]], rid=["a", "b"], sampling_params={"n": 3})
    assert [r.prompt.tolist() for r in call.requests] == [[1]] * 3 + [[2]] * 3
    assert len({r.rid for r in call.requests} | {"a", "b"}) == 8
    assert not parse(parser, input_ids=[1], sampling_params={"n": 2}).is_single


def test_salt_and_extra_key_cannot_be_mistaken_for_each_other(parser: RequestParser) -> None:
    salts = {
        parse(parser, input_ids=[1], cache_salt=salt, extra_key=key).requests[0].salt
        for salt, key in (("a", "b"), ("ab", ""), ("", "ab"), ("b", "a"))
    }
    assert len(salts) == 4


@pytest.mark.parametrize(
    ("wanted", "fitted"), [({}, 54), ({"max_new_tokens": 54}, 54), ({"max_new_tokens": 7}, 7)]
)
def test_output_is_cut_at_the_context(parser: RequestParser, wanted: dict[str, int], fitted: int) -> None:
    assert parse(parser, input_ids=[1] * 10, sampling_params=wanted).requests[0].max_new_tokens == fitted


def test_output_is_cut_at_the_token_budget() -> None:
    parser = RequestParser(CausalModel(tiny_model(), torch.float32), 1024, max_total_tokens=50)
    assert (
        parse(parser, input_ids=[1] * 10, sampling_params={"max_new_tokens": 100}).requests[0].max_new_tokens
        == 40
    )
    with pytest.raises(BadRequest, match=r"Input length \(50 tokens\) exceeds the maximum allowed length"):
        parse(parser, input_ids=[1] * 50)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "Either text, input_ids or input_embeds should be provided"),
        ({"input_ids": []}, "input_ids cannot be empty"),
        ({"input_ids": [[1], []]}, "not empty"),
        ({"input_ids": [1, [2]]}, "list of lists"),
        ({"input_ids": [1.5]}, "Expected `int"),
        ({"input_ids": [True]}, "Expected `int"),
        ({"input_ids": [1], "temperature": 1}, "unknown field `temperature`, expected one of `text`"),
        ({"input_ids": [1], "top_logprobs_num": 2}, "`top_logprobs_num` is not implemented here"),
        (
            {"input_ids": [1], "sampling_params": {"seed": 1}},
            "unknown field `seed`, expected one of",
        ),
        ({"input_ids": [1], "sampling_params": {"min_p": 0.1}}, "`min_p` is not implemented here.*0.0.*0.1"),
        ({"input_ids": [1], "sampling_params": {"repetition_penalty": 0}}, "`repetition_penalty`"),
        ({"input_ids": [1], "sampling_params": {"temperature": "hot"}}, "Expected `float`, got `str`"),
        ({"input_ids": [1], "sampling_params": {"temperature": -1}}, "temperature must be non-negative"),
        ({"input_ids": [1], "sampling_params": {"top_p": 0}}, r"top_p must be in \(0, 1\]"),
        ({"input_ids": [1], "sampling_params": {"top_k": 0}}, "top_k must be -1"),
        ({"input_ids": [1], "sampling_params": {"max_new_tokens": 3, "min_new_tokens": 4}}, "min_new_tokens"),
        ({"input_ids": [[1], [2]], "sampling_params": [{"n": 1}, {"n": 2}]}, "should be the same for all"),
        ({"input_ids": [[1], [2]], "sampling_params": [{}]}, "sampling_params has 1 entries for 2 prompts"),
        ({"input_ids": [[1], [2]], "rid": ["a"]}, "rids length mismatch"),
        ({"input_ids": [[1], [2]], "rid": ["a", "a"]}, r"within the request: \['a'\]"),
        ({"input_ids": [1, 2], "return_logprob": True, "logprob_start_len": 2}, "logprob_start_len"),
        (
            {"input_ids": [1] * 64},
            r"\(64 tokens\) is longer than the model's context length \(64 tok",
        ),
        (
            {"input_ids": [1] * 60, "sampling_params": {"max_new_tokens": 5}},
            "requested a total of 65 tokens",
        ),
    ],
)
def test_what_is_refused(parser: RequestParser, body: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        parse(parser, **body)


@pytest.mark.parametrize("data", [b"", b"[1]", b"{"])
def test_a_body_must_be_a_json_object(parser: RequestParser, data: bytes) -> None:
    with pytest.raises(BadRequest, match="JSON"):
        parser.parse(data)


def test_defaults_may_be_spelled_out() -> None:
    spelled = {"min_p": 0.0, "repetition_penalty": 1, "regex": None, "stop": None, "temperature": None}
    assert parse_sampling(spelled) == parse_sampling({})


def test_the_vocabulary_is_not_checked(parser: RequestParser) -> None:
    """SGLang does not either: such a token ends the server."""
    assert parse(parser, input_ids=[10**6, EOS]).requests
