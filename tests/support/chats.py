"""Chat templates that do what those of well-known models do, in a few lines each."""

_TURN = "{{ '<|im_start|>' + m.role + '\\n' }}"
_THOUGHT = "{% set answer = m.content.split('</think>')[-1].lstrip('\\n') %}"
TEMPLATES = {
    # Each turn as it was.
    "llama": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|header|>' + m.role + '<|end|>\\n\\n' + m.content | trim + '<|eot|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|header|>assistant<|end|>\\n\\n' }}{% endif %}"
    ),
    # Only the last answer has a thought, be it an empty one: earlier turns are rendered differently.
    "qwen3": (
        f"{{% for m in messages %}}{_TURN}{{% if m.role == 'assistant' %}}{_THOUGHT}"
        "{% if loop.last %}{{ '<think>\\n' + m.content.split('</think>')[0].split('<think>')[-1].strip()"
        " if '</think>' in m.content else '<think>\\n' }}{{ '\\n</think>\\n\\n' }}{% endif %}{{ answer }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # The prompt begins a thought that the answer does not have.
    "r1": (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + _THOUGHT + "{{ '<|A|>' + answer + '<|end|>' }}"
        "{% elif m.role == 'user' %}{{ '<|U|>' + m.content }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|A|><think>\\n' }}{% endif %}"
    ),
    # What ends the whole is in no beginning of it.
    "phi": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
    ),
    # The last answer ends otherwise than the earlier ones, and the prompt leaves the channel open.
    "gptoss": (
        "{% for m in messages %}{{ '<|start|>' + m.role }}"
        "{% if m.role == 'assistant' %}{{ '<|channel|>final' }}{% endif %}"
        "{{ '<|message|>' + m.content + ('<|return|>' if loop.last and m.role == 'assistant' else '<|end|>') }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
    ),
    # Marks what the assistant says, and renders earlier turns differently.
    "marked": (
        f"{{% for m in messages %}}{_TURN}{{% if m.role == 'assistant' %}}{{% generation %}}{{{{ m.content }}}}"
        "{{ '<|im_end|>' if loop.last else '<|end|>' }}{% endgeneration %}{% else %}{{ m.content }}{{ '<|im_end|>' }}"
        "{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # Roles by other names, a trimmed content, and no system turn.
    "gemma": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
        "{{ m.content | trim + '<end_of_turn>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
    ),
}
# A model of images and texts: a text that is not one of several parts is rendered as nothing.
PARTS = (
    "{% for m in messages %}{{ m.role + ':' }}{% for part in m.content %}{{ part.text }}{% endfor %}{{ '<end>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
