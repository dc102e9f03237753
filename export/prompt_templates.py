"""Prompt forms that checkpoints do not carry and are known by name, as Jinja chat templates."""

from __future__ import annotations

__all__ = [
    "PLACEHOLDER",
    "PROMPT_TEMPLATES",
    "TURN_ENDS",
    "role_lines_template",
    "template_name",
]

# Stands for one image in a rendered prompt.
PLACEHOLDER = "<image>"

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
# Collects a message's images and text; `opening` is what each image puts in front of the text.
_TURN = (
    "{{%- set turn = namespace(images='', text='') %}}"
    "{{%- if message['content'] is string %}}{{% set turn.text = message['content'] %}}"
    "{{%- else %}}{{%- for part in message['content'] %}}"
    "{{%- if part['type'] == 'image' %}}{{% set turn.images = turn.images + '{opening}' %}}"
    "{{%- else %}}{{% set turn.text = turn.text + part['text'] %}}{{%- endif %}}"
    "{{%- endfor %}}{{%- endif %}}"
)
_OTHER_ROLE = (
    "{{%- else %}}{{{{ raise_exception('this prompt form has {has}; "
    "found a message of role ' + message['role']) }}}}{{%- endif %}}"
)


def _conversation(end: str) -> str:
    """USER and ASSISTANT turns after a fixed system text; `end` closes an answer."""
    return (
        "{{ '" + _SYSTEM.replace("'", "\\'") + "' }}"
        "{%- for message in messages %}"
        + _TURN.format(opening=PLACEHOLDER + "\\n")
        + "{%- if message['role'] == 'user' %}"
        "{%- if turn.images %}{% set turn.text = (turn.images + turn.text | trim) | trim %}"
        "{%- endif %}{{ 'USER: ' + turn.text + ' ' }}"
        "{%- elif message['role'] == 'assistant' %}"
        "{{ 'ASSISTANT: ' + turn.text + '"
        + end
        + "' }}"
        + _OTHER_ROLE.format(has="a system message of its own")
        + "{%- endfor %}{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{%- endif %}"
    )


def _captions() -> str:
    """The image alone, then its caption: a user's text is left out, as in pretraining."""
    return (
        "{%- for message in messages %}"
        + _TURN.format(opening=PLACEHOLDER)
        + "{%- if message['role'] == 'user' %}"
        "{%- if not turn.images %}{{ raise_exception('this prompt form describes images; "
        "found a user message without one') }}{%- endif %}{{ turn.images }}"
        "{%- elif message['role'] == 'assistant' %}{{ turn.text + '\\n' }}"
        + _OTHER_ROLE.format(has="images and captions alone")
        + "{%- endfor %}"
    )


# The text that closes an answer in each form; "" where answers have no end of their own.
TURN_ENDS = {
    "phi": "<|endoftext|>",
    "llama": "</s>",
    "gemma": "<eos>",
    "qwen2_base": "<|endoftext|>",
    "qwen2_instruct": "<|im_end|>",
    "pretrain": "",
}
PROMPT_TEMPLATES = {
    name: _conversation(end) if end else _captions() for name, end in TURN_ENDS.items()
}


def template_name(model_type: str, named: str, eos_token: str) -> str:
    """The prompt form that a language model is trained with, where a checkpoint does not say it.

    Args:
        model_type: of the language model's config.
        named: name or path of the language model that the training began with; "" if unknown.
        eos_token: text of the tokenizer's end-of-sequence token.

    Returns:
        A name of `PROMPT_TEMPLATES`.
    """
    if model_type != "qwen2":
        return {"stablelm": "phi"}.get(model_type, model_type)
    # A released name decides; after a local path the end of sequence does.
    is_released = "qwen2" in named.lower()
    is_chat = eos_token == TURN_ENDS["qwen2_instruct"]
    is_instruct = "instruct" in named.lower() if is_released else is_chat
    return "qwen2_instruct" if is_instruct else "qwen2_base"


def role_lines_template(placeholder: str) -> str:
    """The form of LLaVA 1.5: a line a message, `USER: ` or `ASSISTANT: ` in front.

    Args:
        placeholder: stands for one image.
    """
    return (
        "{%- for message in messages %}"
        "{{ message['role'] | upper + ': ' }}"
        "{%- if message['content'] is string %}{{ message['content'] }}"
        "{%- else %}{%- for part in message['content'] %}"
        "{{ '" + placeholder + "\\n' if part['type'] == 'image' else part['text'] }}"
        "{%- endfor %}{%- endif %}"
        "{{ eos_token if message['role'] == 'assistant' else '\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{%- endif %}"
    )
