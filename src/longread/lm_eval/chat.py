"""Chats as the texts that a model's own template makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from longread.config import UserError
from longread.extras import install_command
from longread.lm_eval.prompts import facts_of

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
DEFAULT = "default"


def find_template(directory: Path, name: str | None = None) -> str:
    """The chat template beside a tokenizer, as Transformers saves it: a file of its own, or in the configuration.

    Args:
        name: which, where there are several; None: the default one.

    Raises:
        UserError: there is none, or none of that name.
    """
    config = facts_of(directory / CONFIG_FILE)
    found = config.get("chat_template")
    if isinstance(found, list):  # of several, [{"name": …, "template": …}]
        named = {str(one.get("name")): str(one.get("template")) for one in found}
    else:
        named = {DEFAULT: found} if isinstance(found, str) else {}
    if (directory / TEMPLATE_FILE).is_file():
        named[DEFAULT] = (directory / TEMPLATE_FILE).read_text(encoding="utf-8")
    if not named:
        raise UserError(f"{directory} has no chat template; leave out apply_chat_template, or copy one there")
    if name is not None and name not in named:
        raise UserError(f"{directory} has no chat template {name!r}; it has {', '.join(named)}")
    if name is None and DEFAULT not in named:
        raise UserError(f"{directory} has several chat templates; name one of {', '.join(named)}")
    return named[name or DEFAULT]


def rendered(
    template: str, messages: Sequence[Mapping[str, Any]], directory: Path, *, add_generation_prompt: bool
) -> str:
    """The text of a chat.

    Args:
        add_generation_prompt: True ends where the assistant's answer begins; False inside of the last message, which
            is to be continued.

    Raises:
        UserError: the template refuses these messages, or is none.
    """
    try:
        import jinja2
        import jinja2.sandbox
    except ImportError:
        raise UserError(f"chat templates need jinja2; run {install_command('lm-eval')}") from None
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=lambda form: datetime.now().strftime(form))
    special = {
        name: _content(token) for name, token in facts_of(directory / CONFIG_FILE).items() if name.endswith("_token")
    }
    facts = special | {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
    try:
        text = environment.from_string(template).render(facts)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template of {directory} refuses this chat: {error}") from None
    if add_generation_prompt or not messages:
        return text
    last = str(messages[-1]["content"]).strip()
    place = text.rfind(last)
    if place < 0:
        raise UserError(f"the chat template of {directory} changes the last message, which is to be continued")
    return text[: place + len(last)]


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
