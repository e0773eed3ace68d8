"""Chat: a model's prompts in tokens, and where in them it can be made to write the user's part itself."""

import tokenizers

from workers.card import ModelCard
from workers.chat_environment import Message, as_template_sees, chat_environment
from workers.draft_training.prompts import Conversation
from workers.models.config import ModelError

_PLACEHOLDER = "\u2603user\u2603"
"""Stands for a message that is yet to be written; no template has it."""


class Chat:
    """Renders and encodes by the card's template and tokenizer. A model without template gets plain text."""

    def __init__(self, card: ModelCard) -> None:
        self._encoder = tokenizers.Tokenizer.from_str(card.tokenizer_json)
        self._encoder.no_truncation()
        self._encoder.no_padding()
        self._special_tokens = dict(card.special_tokens)
        self._template = None
        if card.chat_template is not None:
            self._template = chat_environment().from_string(card.chat_template)

    def prompt(self, conversation: Conversation) -> list[int]:
        """Return the tokens up to where the answer begins."""
        return self._encode(self._render(conversation))

    def before_user(self, conversation: Conversation) -> list[int]:
        """Return the tokens up to where the user's next message begins."""
        return self._encode(
            self._render((*conversation, Message("user", _PLACEHOLDER))).partition(_PLACEHOLDER)[0]
        )

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of tokens, without special ones."""
        return str(self._encoder.decode(token_ids, skip_special_tokens=True))

    def _render(self, conversation: Conversation) -> str:
        if self._template is None:
            return "\n".join(message.content for message in conversation)
        try:
            return self._template.render(
                messages=as_template_sees(conversation),
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        # A template is a program: on some messages it may raise anything (TypeError, ZeroDivisionError, ...).
        except Exception as error:
            raise ModelError(f"the model's chat template refuses a prompt: {str(error)[:200]}") from error

    def _encode(self, text: str) -> list[int]:
        # Templates write the special tokens themselves.
        return list(self._encoder.encode(text, add_special_tokens=self._template is None).ids)
