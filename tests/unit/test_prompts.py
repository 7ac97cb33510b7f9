"""How rows become token ids, and ids text, with the chat template and without one."""

from typing import Any

import pytest

from asyncrl_examples.quickstart import build_tokenizer as build_character_tokenizer
from asyncrl_runtime.contract.rows import PromptError
from asyncrl_runtime.rollout.prompts import PromptRenderer
from support.engines.tiny_models import BOS, EOS, build_tokenizer

ENDS_WITH_EOS = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat(template: str | None = ENDS_WITH_EOS, system_prompt: str = "") -> PromptRenderer:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    return PromptRenderer(tokenizer, "question", system_prompt)


def text_of(renderer: PromptRenderer, ids: list[int]) -> str:
    return str(renderer.tokenizer.decode(ids))


@pytest.mark.parametrize(
    ("value", "system_prompt", "rendered"),
    [
        ("1 + 1 =", "", "<|user|>1 + 1 =<|eos|>\n<|assistant|>"),
        ("1 + 1 =", "Add.", "<|system|>Add.<|eos|>\n<|user|>1 + 1 =<|eos|>\n<|assistant|>"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "",
            "<|user|>a<|eos|>\n<|assistant|>b<|eos|>\n<|assistant|>",
        ),
        (
            [{"role": "user", "content": "a"}],
            "Add.",
            "<|system|>Add.<|eos|>\n<|user|>a<|eos|>\n<|assistant|>",
        ),
    ],
)
def test_a_prompt_goes_through_the_chat_template(value: Any, system_prompt: str, rendered: str) -> None:
    renderer = chat(system_prompt=system_prompt)
    assert text_of(renderer, renderer.prompt_ids({"question": value})) == rendered


def test_without_a_template_a_prompt_is_its_text_behind_what_the_tokenizer_puts_first() -> None:
    renderer = PromptRenderer(build_character_tokenizer(), "question", "9=")
    ids = renderer.prompt_ids({"question": "1+1="})
    assert ids[0] == BOS and text_of(renderer, ids[1:]) == "9=1+1="


def test_of_a_conversation_without_a_template_the_last_message_is_the_prompt() -> None:
    renderer = chat(template=None)
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 1 ="}]
    assert text_of(renderer, renderer.prompt_ids({"question": messages})) == "1 + 1 ="
    assert renderer.text({"question": messages}) == "1 + 1 ="


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "answer": 1}, "field 'question' is missing; the row has answer, prompt"),
        ({}, "the row has no fields"),
        ({"question": 5}, "field 'question' is int; must be text or a list of messages"),
        ({"question": []}, "field 'question' is list"),
        ({"question": ["a"]}, "field 'question' is list"),
        ({"question": ""}, "field 'question' is empty"),
    ],
)
def test_a_row_that_makes_no_prompt_names_the_field(row: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        chat(template=None).prompt_ids(row)


@pytest.mark.parametrize(
    ("last_token", "rendered"),
    [
        (EOS, "\n<|user|>No.<|eos|>\n<|assistant|>"),  # the policy has ended its answer itself
        (77, "<|eos|>\n<|user|>No.<|eos|>\n<|assistant|>"),  # cut by length: the template ends it
    ],
)
def test_the_end_of_an_answer_stands_between_turns_once(last_token: int, rendered: str) -> None:
    renderer = chat()
    assert text_of(renderer, renderer.next_turn_ids("No.", last_token)) == rendered


def test_only_an_end_of_sequence_token_is_not_repeated() -> None:
    """Here a template whose turns end with a newline, and an answer that happens to end with one."""
    renderer = chat("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    [newline] = renderer.tokenizer.encode("\n")
    expected = "\nuser: No.\n"
    assert text_of(renderer, renderer.next_turn_ids("No.", newline)) == expected
    assert text_of(renderer, renderer.next_turn_ids("No.", EOS)) == expected


def test_a_conversation_told_turn_by_turn_is_the_one_rendered_at_once() -> None:
    renderer = chat()
    answer = [*renderer.tokenizer.encode("It is 3."), EOS]
    ids = [*renderer.prompt_ids({"question": "1 + 1 ="}), *answer]
    ids += renderer.next_turn_ids("No.", ids[-1])
    whole = [
        {"role": "user", "content": "1 + 1 ="},
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "No."},
    ]
    assert ids == renderer.prompt_ids({"question": whole})


def test_without_a_template_the_next_turn_is_the_message_alone() -> None:
    renderer = PromptRenderer(build_character_tokenizer(), "question")
    ids = renderer.next_turn_ids("1+1=", EOS)
    assert ids == renderer.tokenizer.encode("1+1=", add_special_tokens=False) and BOS not in ids


@pytest.mark.parametrize("template", [None, ENDS_WITH_EOS])
def test_an_answer_is_decoded_without_its_end(template: str | None) -> None:
    renderer = chat(template)
    ids = renderer.tokenizer.encode("It is 3.", add_special_tokens=False)
    assert renderer.decode([*ids, EOS]) == renderer.decode(ids) == "It is 3."
    assert renderer.decode([EOS]) == renderer.decode([]) == ""


def test_the_vocabulary_counts_added_tokens() -> None:
    renderer = chat()
    before = renderer.vocab_size
    renderer.tokenizer.add_tokens(["<|tool|>"])
    assert renderer.vocab_size == before + 1
