"""Prompts into token ids, checked against a bundle."""

from __future__ import annotations

import collections.abc

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import CapacityError, InvalidInputError
from dspark_edge.runtime.chat_template import ChatTemplate, Message
from dspark_edge.runtime.sampling import SamplingParams
from dspark_edge.runtime.tokenizer import Tokenizer

__all__ = ["Prompt", "PromptEncoder"]

Prompt = str | collections.abc.Sequence[int] | collections.abc.Sequence[Message]
"""Text, token ids, or the messages of a conversation."""


class PromptEncoder:
    """Encodes prompts as a bundle's tokenizer and chat template have it. For any thread.

    Args:
        vocab_size: ids are below it.
        eos_ids: that end an answer.
        tokenizer, chat_template: None where the bundle has none.
    """

    def __init__(
        self,
        vocab_size: int,
        eos_ids: frozenset[int],
        tokenizer: Tokenizer | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self._vocabulary = vocab_size
        self.eos_ids, self.tokenizer, self.chat_template = eos_ids, tokenizer, chat_template

    @classmethod
    def of(cls, bundle: Bundle) -> PromptEncoder:
        """A bundle's own.

        Raises:
            BundleError: its tokenizer or chat template is damaged.
        """
        facts = bundle.manifest.target
        tokenizer = Tokenizer.load(bundle.path)
        template = ChatTemplate.load(bundle.path) if tokenizer else None
        return cls(facts.vocab_size, frozenset(facts.eos_token_ids), tokenizer, template)

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """A prompt's token ids.

        Args:
            prompt: text, messages or ids.
            raw: feed a text as it is, without the chat template.

        Raises:
            InvalidInputError: there is no tokenizer or chat template for it, or an id is out of range.
        """
        if isinstance(prompt, str):
            if self.chat_template is not None and not raw:
                return self._encode_messages([Message("user", prompt)])
            return self._tokenizer("a text prompt").encode(prompt, add_special_tokens=True)
        messages = [part for part in prompt if isinstance(part, Message)]
        if messages and len(messages) == len(prompt):
            return self._encode_messages(messages)
        token_ids: list[int] = []
        for token in prompt:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self._vocabulary:
                raise InvalidInputError(f"token id {token!r} is outside the vocabulary of {self._vocabulary} tokens")
            token_ids.append(token)
        return token_ids

    def checked(self, prompt: Prompt, params: SamplingParams, capacity: int, *, raw: bool) -> list[int]:
        """A prompt's token ids, if it can be answered.

        Args:
            capacity: most tokens of a prompt.

        Raises:
            InvalidInputError: see `encode`; or it is empty, or a stop text is given and there is no tokenizer.
            CapacityError: it is too long.
        """
        token_ids = self.encode(prompt, raw=raw)
        if not token_ids:
            raise InvalidInputError("the prompt is empty; give at least one token")
        if len(token_ids) > capacity:
            raise CapacityError(
                f"the prompt has {len(token_ids)} tokens, the bundle's capacity is {capacity}; "
                "shorten it, or export with a larger --capacity"
            )
        if params.stop:
            self._tokenizer("a stop text")
        return token_ids

    def _encode_messages(self, messages: list[Message]) -> list[int]:
        tokenizer = self._tokenizer("a conversation")
        if self.chat_template is None:
            raise InvalidInputError("the bundle has no chat template; give a text (raw) or token ids")
        # The template writes the special tokens itself.
        return tokenizer.encode(self.chat_template.render(messages), add_special_tokens=False)

    def _tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidInputError(f"the bundle has no tokenizer, which {what} needs; give token ids")
        return self.tokenizer
