from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from dspark_edge.engines.errors import BundleError, InvalidInputError
from dspark_edge.runtime.chat_template import ChatTemplate, Message

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if tools is not none %}{{- raise_exception('no tools here') }}{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Unknown role: ' + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
ALTERNATING = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "[{{ message['content'] }}]{% endfor %}"
)
FEATURES = """{%- set ns = namespace(count=0) %}
{% for message in messages %}
    {% if message.content == 'skip' %}
        {% continue %}
    {% endif %}
    {% set ns.count = ns.count + 1 %}
    {% if message.role == 'assistant' %}
        {% generation %}
        <<{{ message.content }}>>
        {% endgeneration %}
    {% else %}
{{ message | tojson }} {{ {'b': 'é<', 'a': [1]} | tojson(indent=2, sort_keys=true) }}
    {% endif %}
{% endfor %}
count={{ ns.count }} eos={{ eos_token }} thinking={{ enable_thinking }} {{ dict(a=1).a }}
"""
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [Message("user", "Héllo <b> 'you'"), Message("assistant", "  Hi\n"), Message("user", "skip")]


def transformers_render(template: str, messages: list[Message], **variables: object) -> str:
    """What transformers makes of the same messages."""
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [{"role": message.role, "content": message.content} for message in messages]
    arguments: dict[str, Any] = {**SPECIAL, **variables}
    rendered: Any = render_jinja_template([chat], chat_template=template, **arguments)
    # Its return type is declared as str, but it is a pair: the texts and the assistant's spans.
    return str(rendered[0][0])


@pytest.mark.parametrize("template", [SMOLLM2, LLAMA3, ALTERNATING, FEATURES], ids=["smol", "llama", "alt", "all"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("enable_thinking", [True, False])
def test_rendering_equals_transformers(template: str, add_generation_prompt: bool, enable_thinking: bool) -> None:
    pytest.importorskip("transformers")
    rendered = ChatTemplate(template, SPECIAL).render(
        CHAT, add_generation_prompt=add_generation_prompt, variables={"enable_thinking": enable_thinking}
    )
    assert rendered == transformers_render(
        template, CHAT, add_generation_prompt=add_generation_prompt, enable_thinking=enable_thinking
    )


def test_smollm2_by_hand() -> None:
    assert ChatTemplate(SMOLLM2).render([Message("user", "Hi")]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    system = ChatTemplate(SMOLLM2).render([Message("system", "Be brief.")], add_generation_prompt=False)
    assert system == "<|im_start|>system\nBe brief.<|im_end|>\n"


def test_llama3_by_hand_gets_the_bos_token() -> None:
    rendered = ChatTemplate(LLAMA3, SPECIAL).render([Message("user", " Hi ")])
    assert rendered == (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_a_template_that_refuses_names_its_reason_in_one_line() -> None:
    with pytest.raises(InvalidInputError, match="roles must alternate") as caught:
        ChatTemplate(ALTERNATING, SPECIAL).render([Message("assistant", "Hi")])
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidInputError, match="Unknown role: critic"):
        ChatTemplate(LLAMA3, SPECIAL).render([Message("critic", "Hi")])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ missing.name }}", "UndefinedError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[0]() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "SecurityError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
    ],
)
def test_a_template_that_fails_is_a_bundle_error(source: str, reason: str) -> None:
    with pytest.raises(BundleError, match=f"the chat template failed with {reason}"):
        ChatTemplate(source).render([Message("user", "Hi")])


@pytest.mark.parametrize("source", ["{% if %}", "{{ 1 +", "{% for a in b %}", "{% generation %}"])
def test_a_template_that_is_no_jinja_is_a_bundle_error(source: str) -> None:
    with pytest.raises(BundleError, match=r"not a valid Jinja template \(line 1\)"):
        ChatTemplate(source)


def test_what_is_set_in_a_generation_block_stays_there() -> None:
    pytest.importorskip("transformers")
    source = "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}"
    assert ChatTemplate(source).render(CHAT) == transformers_render(source, CHAT) == "21"


def test_the_time_is_given() -> None:
    before = datetime.now().year
    rendered = ChatTemplate("{{ strftime_now('%Y') }}").render(CHAT)
    assert before <= int(rendered) <= datetime.now().year


def test_no_messages_and_impossible_messages_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="at least one message"):
        ChatTemplate(SMOLLM2).render([])
    with pytest.raises(InvalidInputError, match="content must be a str, not NoneType"):
        Message("user", None)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="role is empty"):
        Message("", "Hi")


def test_variables_are_plain_data_and_cannot_replace_the_messages() -> None:
    template = ChatTemplate("{{ messages[0].content }} {{ more[0] }}")
    assert template.render(CHAT[:1], variables={"messages": [], "more": (1,)}) == "Héllo <b> 'you' 1"
    with pytest.raises(InvalidInputError, match="plain JSON data"):
        template.render(CHAT, variables={"more": Path("a")})


def write_config(folder: Path, entry: object) -> None:
    config = {"chat_template": entry, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def load(folder: Path) -> ChatTemplate:
    template = ChatTemplate.load(folder)
    assert template is not None
    return template


def test_loading_prefers_the_jinja_file(tmp_path: Path) -> None:
    assert ChatTemplate.load(tmp_path) is None
    write_config(tmp_path, None)
    assert ChatTemplate.load(tmp_path) is None
    write_config(tmp_path, "config {{ bos_token }}")
    assert load(tmp_path).render(CHAT) == "config <s>"
    (tmp_path / "chat_template.jinja").write_text("file é {{ bos_token }}{{ eos_token }}", encoding="utf-8")
    assert load(tmp_path).render(CHAT) == "file é <s></s>"
    assert str(tmp_path / "chat_template.jinja") in load(tmp_path).name


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write_config(tmp_path, named)
    assert load(tmp_path).render(CHAT) == "plain"
    write_config(tmp_path, named[:1])
    with pytest.raises(BundleError, match=r"\['tool_use'\], none of them 'default'"):
        ChatTemplate.load(tmp_path)


@pytest.mark.parametrize("entry", [3, {"default": "a"}, ["a"], [{"name": "default"}]])
def test_a_template_entry_of_another_shape_is_refused(tmp_path: Path, entry: object) -> None:
    write_config(tmp_path, entry)
    with pytest.raises(BundleError, match=r"'chat_template' in .*tokenizer_config\.json must be"):
        ChatTemplate.load(tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match=r"chat_template\.jinja"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(BundleError, match=r"chat_template\.jinja is not a valid"):
        ChatTemplate.load(tmp_path)
