from datetime import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from cluster.api.chat_template import ChatTemplate, ChatTemplateError
from cluster.api.errors import ApiError
from cluster.api.schemas import Message
from workers.card import load_card

CHATS = [
    [("user", "hello")],
    [
        ("system", "be brief"),
        ("user", "a <b> & 'c' \"d\" 日本 🎉\n"),
        ("assistant", "yes"),
        ("user", "{{ x }}"),
    ],
    [("user", "  spaces  "), ("user", "")],
]
EACH = "{% for m in messages %}"
TEMPLATES = {
    "json": EACH + "{{ m | tojson }}{{ m.content | tojson(indent=2) }}{% endfor %}",
    "loop controls": EACH + "{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": EACH + "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "whitespace": EACH + "\n    {% if m.role %}\n  {{ m.role }}\n    {% endif %}\n{% endfor %}\n",
    "special tokens": "{{ bos_token }}{% if add_generation_prompt %}{{ messages[-1]['content'] }}{% endif %}",
    "nothing given": "{{ tools is none }} {{ documents is none }} {{ custom is defined }}",
    "namespace": "{% set s = namespace(n=0) %}" + EACH + "{% set s.n = s.n + 1 %}{% endfor %}{{ s.n }}",
}


def messages_of(chat):
    return [Message(role=role, content=content) for role, content in chat]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", [*TEMPLATES, "smollm2"])
def test_templates_render_as_transformers_renders_them(name, chat):
    source = load_card("smollm2-135m").chat_template if name == "smollm2" else TEMPLATES[name]
    rendered, _ = render_jinja_template(
        [[{"role": role, "content": content} for role, content in chat]],
        chat_template=source,
        add_generation_prompt=True,
        bos_token="<s>",
    )
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(messages_of(chat)) == rendered[0]


def test_the_date_is_the_clocks():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, now=lambda: datetime(2026, 11, 24))
    assert template.render(messages_of(CHATS[0])) == "24 Nov 2026"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "no element"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "recursion"),
        ("{% for i in range(99999999) %}x{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_refuses_or_fails_is_a_400_about_the_messages(source, reason):
    with pytest.raises(ApiError) as caught:
        ChatTemplate(source, {}).render(messages_of(CHATS[0]))
    assert (caught.value.status, caught.value.param) == (400, "messages")
    assert reason in caught.value.message


def test_a_template_that_writes_on_and_on_is_stopped_by_the_clock():
    ticks = iter(range(1_000_000))
    template = ChatTemplate(
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        {},
        clock=lambda: float(next(ticks)),
    )
    with pytest.raises(ApiError, match="too long"):
        template.render(messages_of(CHATS[0]))


def test_a_template_that_does_not_compile_is_named_at_start():
    with pytest.raises(ChatTemplateError, match="does not compile"):
        ChatTemplate("{% for %}", {})
