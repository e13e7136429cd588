"""Chat templates by name, for tokenizers without one and for published templates that cannot be trained on."""

from __future__ import annotations

PRESETS = {
    # The format of Qwen and many others.
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # For tokenizers without chat tokens: needs only a beginning- and an end-of-text token.
    "plain": (
        "{{ bos_token or '' }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ m.content }}\n\n"
        "{% elif m.role == 'user' %}Question: {{ m.content }}\n"
        "{% elif m.role == 'assistant' %}Answer: {{ m.content }}{{ eos_token }}"
        "{% else %}{{ raise_exception('the plain template knows the roles system, user and assistant') }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
    ),
    # DeepSeek-R1 and its distillations. The templates published with them render no reasoning and cut an answer at </think>. This
    # one gives the same generation prompts (earlier answers are cut at the same place), and the last answer with its reasoning.
    "deepseek-r1": (
        "{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}"
        "{% if not loop.first %}{{ raise_exception('the deepseek-r1 template takes one system turn: the published one shows the last') }}"
        "{% endif %}{% endfor %}"
        "{% for m in messages %}"
        "{% if m.role == 'user' %}<｜User｜>{{ m.content }}"
        "{% elif m.role == 'assistant' %}<｜Assistant｜>"
        "{% if loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{{ m.content }}"
        "{% elif '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{{ eos_token }}"
        "{% elif m.role != 'system' %}"
        "{{ raise_exception('the deepseek-r1 template knows the roles system, user and assistant') }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
    ),
}
