"""``chat_template:`` of a recipe: ``auto``, a format by name, or a template in Jinja."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from evomerge.checkpoints.tokenizer import Tokenizer
from evomerge.errors import RecipeError, suggest

_SYSTEM_FIRST = (
    "{%- if messages and messages[0].role == 'system' -%}"
    "{%- set system, turns = messages[0].content, messages[1:] -%}"
    "{%- else -%}{%- set system, turns = '', messages -%}{%- endif -%}"
)

# As the makers of each format publish it, to the last line break.
FORMATS: Mapping[str, str] = {
    "alpaca": _SYSTEM_FIRST
    + (
        "{{- system | trim + '\\n\\n' if system -}}"
        "{%- for turn in turns -%}"
        "{%- set title = {'user': 'Instruction', 'user_context': 'Input', 'assistant': 'Response'}[turn.role] -%}"
        "{{- '### ' + title + ':\\n' + turn.content | trim + ('' if loop.last else '\\n\\n') -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt and turns and turns[-1].role != 'assistant' -%}"
        "{{- '\\n\\n### Response:\\n' -}}{%- endif -%}"
    ),
    "chatml": (
        "{%- for turn in messages -%}"
        "{{- '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
    ),
    "exaone": _SYSTEM_FIRST
    + (
        "{{- '[|system|]' + system + '[|endofturn|]\\n' -}}"
        "{%- for turn in turns -%}"
        "{{- '[|' + turn.role + '|]' + turn.content + ('\\n' if turn.role == 'user' else '[|endofturn|]\\n') -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '[|assistant|]' -}}{%- endif -%}"
    ),
    "llama3": (
        "{{- bos_token -}}"
        "{%- for turn in messages -%}"
        "{{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\\n\\n' + turn.content | trim + '<|eot_id|>' -}}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"
    ),
    "mistral": _SYSTEM_FIRST
    + (
        "{{- bos_token -}}"
        "{%- for turn in turns -%}"
        "{%- if turn.role != ('assistant' if loop.index0 % 2 else 'user') -%}"
        "{{- raise_exception('user and assistant take turns, after at most one system message') -}}"
        "{%- elif turn.role == 'user' -%}"
        "{{- ' [INST] ' + (system + '\\n\\n' if system and loop.first else '') + turn.content + ' [/INST]' -}}"
        "{%- else -%}{{- ' ' + turn.content + eos_token -}}{%- endif -%}"
        "{%- endfor -%}"
    ),
}


def chosen_template(chat_template: str, tokenizers: Iterable[Tokenizer]) -> str | None:
    """Chooses the template that a recipe asks for.

    Args:
        chat_template: ``auto`` for the one that most models have (of equally many the first), a format's name, or
            Jinja.
        tokenizers: The models' tokenizers in the order of the recipe.

    Returns:
        The template; None under ``auto`` when no model has one.

    Raises:
        RecipeError: There is no format of that name, or the template is no Jinja.
    """
    if chat_template == "auto":
        templates = Counter(t.chat_template for t in tokenizers if t.chat_template)
        return templates.most_common(1)[0][0] if templates else None
    if "{" in chat_template:
        _refuse_broken(chat_template)
        return chat_template
    if chat_template not in FORMATS:
        hint = suggest(chat_template, FORMATS) or f": known are {', '.join(FORMATS)}"
        raise RecipeError(f"chat_template: no format is called '{chat_template}', and it is no Jinja template{hint}")
    return FORMATS[chat_template]


def _refuse_broken(template: str) -> None:
    """Parses a template as transformers will; `generation` is a tag of theirs."""
    from jinja2 import Environment, TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        Environment(extensions=[loopcontrols, Generation]).parse(template)
    except TemplateSyntaxError as error:
        raise RecipeError(f"chat_template: line {error.lineno} of the Jinja template: {error.message}") from None
