"""Renders a chat into the model's own prompt format, in the sandbox of `workers.chat_environment`, within
bounds of output and time. Called in the API process's prompt threads.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import jinja2

from cluster.api.errors import ApiError, bad_request
from cluster.api.schemas import Message
from workers.chat_environment import chat_environment

MAX_RENDERED_CHARS = 64 * 1024 * 1024
RENDER_TIMEOUT_S = 10.0
_MAX_REASON_CHARS = 200


class ChatTemplateError(Exception):
    """The model's chat template is not one jinja2 can compile."""


class ChatTemplate:
    """One compiled template; threads share it. `special_tokens`: names it may use (bos_token, eos_token)."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        now: Callable[[], datetime] = datetime.now,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        try:
            self._template = chat_environment(now).from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the model's chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)
        self._clock = clock

    def render(self, messages: Sequence[Message]) -> str:
        """Return the prompt, ending where the assistant's answer begins.

        Raises ApiError (400) naming `messages` when the template refuses or fails on them.
        """
        deadline_s = self._clock() + RENDER_TIMEOUT_S
        parts: list[str] = []
        num_chars = 0
        try:
            for part in self._template.generate(
                messages=[_as_template_sees(message) for message in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
                **self._special_tokens,
            ):
                num_chars += len(part)
                if num_chars > MAX_RENDERED_CHARS or self._clock() > deadline_s:
                    raise _refused("it renders to too long a prompt, or takes too long")
                parts.append(part)
        except ApiError:
            raise
        # A template is a program: on some messages it may raise anything (TypeError, ZeroDivisionError, ...).
        except Exception as error:
            raise _refused(str(error)) from error
        return "".join(parts)


def _as_template_sees(message: Message) -> dict[str, str]:
    # Templates know `system`; `developer` is OpenAI's newer name for it.
    role = "system" if message.role == "developer" else message.role
    seen = {"role": role, "content": message.content}
    return seen if message.name is None else {**seen, "name": message.name}


def _refused(reason: str) -> ApiError:
    return bad_request(
        f"'messages': the model's chat template refused them: {reason[:_MAX_REASON_CHARS]}", "messages"
    )
