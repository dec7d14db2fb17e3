"""What each module of a recipe decides: module names found among the stacks and the other tensors of a model.

mergekit's names stand in its own table of architectures ("text_decoder", "vision_tower", "multi_modal_projector",
"encoder", "decoder") or are prefixes of stacks; here both are read off the tensors' names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evomerge.checkpoints.layout import Layout, Stack, is_bridge
from evomerge.errors import RecipeError

OTHERS = "default"  # mergekit's name for what lies outside the stacks

_TEXT = frozenset({"language_model", "text_model", "text", "decoder", "llm", "text_decoder", "text_encoder"})
_PICTURES = frozenset({"vision_tower", "vision_model", "vision_encoder", "vision", "visual", "image_encoder"})
_SOUND = frozenset({"audio_tower", "audio_model", "audio_encoder", "audio", "speech_encoder"})
_BRIDGES = frozenset({"multi_modal_projector", "mm_projector", "projector", "connector", "merger", "aligner"})
_ENCODERS = frozenset({"encoder"})


@dataclass(frozen=True)
class Share:
    """What one module decides: the layers of a stack (None for a module without layers) and tensors beside it."""

    module: str
    stack: Stack | None


def find_shares(modules: Sequence[str], layout: Layout) -> tuple[Share, ...]:
    """Finds the stack that each module's name means.

    A name means the stack whose prefix it is a part of ("encoder" in "model.encoder.layers"), or the stack of its role.
    In a model with one stack, the only module is the whole model whatever it is called.

    Raises:
        RecipeError: A name means no part of the model, or several; two names mean the same stack.
    """
    if len(modules) == 1 and len(layout.stacks) == 1:
        return (Share(modules[0], layout.stacks[0]),)
    shares: list[Share] = []
    problems: list[str] = []
    for module in modules:
        fitting = _fitting(module, layout)
        taken = [share.module for share in shares if share.stack in fitting]
        if len(fitting) > 1:
            problems.append(f"modules.{module}: may be any of {stack_list(fitting)}: write out which")
        elif taken:
            problems.append(f"modules.{module}: is {fitting[0].prefix}, which '{taken[0]}' is already")
        elif not fitting and not any(_beside(module, name) for name in layout.outer):
            problems.append(
                f"modules.{module}: the model has no such part; its stacks are {stack_list(layout.stacks)}: "
                f"name one of them by a part of its name, or '{OTHERS}' for the tensors outside"
            )
        shares.append(Share(module, fitting[0] if fitting else None))
    if problems:
        raise RecipeError(problems)
    return tuple(shares)


def owner(tensor: str, layout: Layout, shares: Sequence[Share]) -> Share | None:
    """Finds the share that decides a tensor; None where no module does.

    A tensor outside the stacks belongs to a module of its own name, else to the stack that it stands beside
    ("encoder.final_layer_norm.weight" beside "encoder.block"), else to the text: the shared embedding and the head.
    """
    prefix = layout.locate(tensor).stack
    if prefix is None:
        named = [share for share in shares if share.stack is None and _beside(share.module, tensor)]
        if named:
            return named[0]
        nearest = _nearest(tensor, layout) or text_stack(layout)
        prefix = nearest.prefix if nearest else None
    return next((share for share in shares if share.stack is not None and share.stack.prefix == prefix), None)


def text_stack(layout: Layout) -> Stack | None:
    """Finds the stack that reads or writes text, where one can be told."""
    sure = [stack for stack in layout.stacks if _words(stack.prefix) & _TEXT]
    possible = sure or [s for s in layout.stacks if not _words(s.prefix) & (_PICTURES | _SOUND | _ENCODERS)]
    return possible[0] if len(possible) == 1 else None


def side_of(stack: Stack) -> str:
    """ "vision", "audio", "encoder", "decoder" or "text": the word by which config.json tells a stack's settings."""
    words = _words(stack.prefix)
    if words & _PICTURES:
        return "vision"
    if words & _SOUND:
        return "audio"
    named = [word for word in ("language_model", "text_model", "encoder", "decoder") if word in words]
    return named[0] if named and named[0] in ("encoder", "decoder") else "text"


def stack_list(stacks: Iterable[Stack]) -> str:
    """ "decoder.block (2 layers), encoder.block (2 layers)"."""
    return ", ".join(f"{stack.prefix} ({stack.length} layers)" for stack in stacks) or "none"


def _fitting(module: str, layout: Layout) -> list[Stack]:
    name = module.rstrip(".")
    direct = [stack for stack in layout.stacks if f".{name}." in f".{stack.prefix}."]
    if direct or name == OTHERS:
        return direct
    if name in _TEXT:
        text = text_stack(layout)
        return [text] if text else []
    role = next((words for words in (_PICTURES, _SOUND) if name in words), frozenset())
    return [stack for stack in layout.stacks if _words(stack.prefix) & role]


def _beside(module: str, tensor: str) -> bool:
    """Whether a module without layers is meant by a tensor outside the stacks."""
    if module == OTHERS or f".{module.rstrip('.')}." in f".{tensor}.":
        return True
    return module in _BRIDGES and is_bridge(tensor)


def _nearest(tensor: str, layout: Layout) -> Stack | None:
    """The stack whose prefix has the most first parts in common with the tensor's name; None where several have."""
    common = {stack: _common(tensor, stack.prefix) for stack in layout.stacks}
    most = max(common.values(), default=0)
    nearest = [stack for stack, count in common.items() if count == most]
    return nearest[0] if len(nearest) == 1 else None


def _common(left: str, right: str) -> int:
    count = 0
    for one, other in zip(left.split("."), right.split("."), strict=False):
        if one != other:
            break
        count += 1
    return count


def _words(name: str) -> frozenset[str]:
    return frozenset(name.split("."))
