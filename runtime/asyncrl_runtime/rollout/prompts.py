"""Turns rows into token ids, and ids into text: by the chat template if there is one, else as plain text."""

from collections.abc import Mapping, Sequence
from typing import Any

from asyncrl_runtime.contract.rows import PromptError, prompt_text


class PromptRenderer:
    """Renders prompts and later turns with one tokenizer. Responses are never tokenized again."""

    def __init__(self, tokenizer: Any, prompt_field: str, system_prompt: str = "") -> None:
        self.tokenizer = tokenizer
        self._field = prompt_field
        self._system_prompt = system_prompt
        self._stop_ids = {tokenizer.eos_token_id}

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    def text(self, row: Mapping[str, Any]) -> str:
        """Return a row's prompt; raises what `prompt_text` raises."""
        return prompt_text(row, self._field)

    def prompt_ids(self, row: Mapping[str, Any]) -> list[int]:
        """Return the token ids of a row's prompt, up to the point from which the policy continues.

        Raises:
            PromptError: the row has no prompt, or one without any token.
        """
        text, value = self.text(row), row[self._field]
        if self.tokenizer.chat_template is None:
            ids = self.tokenizer.encode(self._system_prompt + text)
        else:
            messages = [{"role": "user", "content": text}] if isinstance(value, str) else list(value)
            if self._system_prompt:
                messages = [{"role": "system", "content": self._system_prompt}, *messages]
            ids = self._encode(self._conversation(messages))
        if not ids:
            raise PromptError(f"field {self._field!r} is empty: there is nothing to go on from")
        return [int(token) for token in ids]

    def _conversation(self, messages: Sequence[Mapping[str, str]]) -> str:
        """Return a row's conversation as text; templates may raise anything for messages of odd shapes."""
        try:
            return self._render(messages, add_generation_prompt=True)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise PromptError(f"field {self._field!r} does not suit the chat template: {why}") from error

    def next_turn_ids(self, message: str, last_token: int) -> list[int]:
        """Return the ids of a user message after an answer, up to the point from which the policy continues.

        What comes between the text of an answer and the next one is found by rendering a conversation with a
        marker for the answer, so that the answer itself is never tokenized.

        Args:
            last_token: last token of the answer; an end-of-sequence token that the policy sampled is not
                repeated.
        """
        if self.tokenizer.chat_template is None:
            return [int(token) for token in self.tokenizer.encode(message, add_special_tokens=False)]
        marker = "\u2063answer\u2063"
        before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": marker}]
        after = [*before, {"role": "user", "content": message}]
        text = self._render(after, add_generation_prompt=True).rsplit(marker, 1)[1]
        ids = self._encode(text)
        return ids[1:] if ids[:1] == [last_token] and last_token in self._stop_ids else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer without its end-of-sequence token."""
        if ids and ids[-1] in self._stop_ids:
            ids = ids[:-1]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False)]
