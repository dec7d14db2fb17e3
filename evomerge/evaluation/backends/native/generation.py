"""Generates the same text that lm-eval's HFLM generates, with fewer forward passes.

HFLM decodes a batch until its last row has stopped. Here the next prompt follows where a row has stopped, and what all
prompts begin with is read once. Whatever is not plain greedy decoding goes to transformers' own `generate`.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation.backends.native.forward import Forward, forward_pass
from evomerge.evaluation.tasks.requests import MOST_KEPT, Encoder, Written
from evomerge.system.quiet import torch_seeded

if TYPE_CHECKING:
    from evomerge.evaluation.backends.native.decoding import Stem

BATCH_TOKENS = 4096
"""Tokens of prompts in a batch where nobody says how many."""
CPU_READ_TOKENS = 512
"""The same for a pass of our own over prompts on a CPU: what it computes stays in a core's cache."""
KEPT_TOKENS = 2**16
"""Tokens whose keys and values all threads keep at most, unless a single row has more."""
MAX_ROWS = 128
"""Rows decoded together at most."""
MIN_SHARED_TOKENS = 32
"""Tokens that the prompts of a batch must start with for these to be read on their own."""
MIN_ROWS = 8
"""Rows decoded together at least, if there are as many: every step reads all the weights, however few the rows."""
SAMPLING_SEED = 1234
"""Where a task samples: the same draw for every candidate."""

_CHANGES_GREEDY = {
    "repetition_penalty": (None, 1.0),
    "encoder_repetition_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "num_beams": (None, 1),
    "bad_words_ids": (None,),
    "sequence_bias": (None,),
    "suppress_tokens": (None,),
    "begin_suppress_tokens": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "exponential_decay_length_penalty": (None,),
    "guidance_scale": (None, 1.0),
    "watermarking_config": (None,),
    "max_new_tokens": (None,),
    "max_time": (None,),
    "stop_strings": (None,),
    "penalty_alpha": (None, 0.0),
    "dola_layers": (None,),
    "token_healing": (None, False),
}
"""Settings of a model's generation_config that change greedy decoding, with the values that do not."""


@dataclass(frozen=True)
class Prompt:
    """One text to continue.

    Attributes:
        tokens: The prompt, cut on its left to leave room for what is generated.
        until: Stop strings, the end-of-text string among them.
        limit: Tokens to generate at most.
        options: Whatever else the task asks of `generate`.
    """

    tokens: tuple[int, ...]
    until: tuple[str, ...]
    limit: int
    options: tuple[tuple[str, str], ...]

    @property
    def greedy(self) -> bool:
        """Whether plain greedy decoding is asked for."""
        options = {name: json.loads(value) for name, value in self.options}
        return not options.pop("do_sample", False) and not set(options) - {"temperature"}


class Generator:
    """Answers generate_until requests.

    Args:
        encoder: Turns texts into tokens.
        batch_tokens: Tokens of prompts in a batch, padding counted; None for a number that suits.
        threads: How many threads of a CPU to cut batches for, whatever decodes them; None for all that torch has.
        think_end_token: What ends the thinking of a model, as text or as a token's number.
    """

    def __init__(
        self,
        encoder: Encoder,
        batch_tokens: int | None,
        threads: int | None = None,
        think_end_token: str | int | None = None,
    ) -> None:
        self.encoder = encoder
        self.batch_tokens = batch_tokens
        self._threads = threads
        self._think_end = think_end_token
        self._prompts: dict[str, Prompt] = {}
        self._paddable: bool | None = None
        self._in_parts: bool | None = None

    def respond(self, model: Any, instances: Sequence[Any], *, own_loop: bool) -> list[list[str]]:
        """Generates for every instance, once per repeat.

        Args:
            model: The model.
            instances: lm-eval instances.
            own_loop: Whether the model takes part in our own greedy loop: an ordinary decoder with a KV cache.

        Raises:
            CandidateError: The model's logits are not finite.
            TaskError: A prompt leaves no room for what should be generated.
        """
        prompts = [self._prompt(instance) for instance in instances]
        plain = _is_plain(model.generation_config)
        greedy = [k for k, prompt in enumerate(prompts) if prompt.greedy and own_loop and plain]
        answers: list[list[str]] = [[] for _ in instances]
        if greedy:
            for k, text in zip(greedy, self._decode_all(model, [prompts[k] for k in greedy]), strict=True):
                answers[k] = [text] * instances[k].repeats
        others = [k for k in range(len(prompts)) if k not in set(greedy)]
        lengths = {len(prompts[k].tokens) for k in others}
        alike = not plain or (len(lengths) > 1 and not self._is_paddable(model))
        for batch in self._batches(prompts, others, MAX_ROWS, alike=alike):
            # A greedy answer is the same every time; a sampled one is drawn for each repeat.
            again = {k: 1 if prompts[k].greedy else instances[k].repeats for k in batch}
            rows = [k for k in batch for _ in range(again[k])]
            try:
                written_here = self._generate(model, [prompts[k] for k in rows])
            except (ValueError, TypeError) as error:  # of settings that transformers does not know, or take
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                raise TaskError(
                    f"task {instances[batch[0]].task_name!r}: its text cannot be generated: {reason}"
                ) from error
            for k, text in zip(rows, written_here, strict=True):
                answers[k] += [text] * (instances[k].repeats // again[k])
        return answers

    @property
    def threads(self) -> int:
        """The threads that batches are cut for."""
        return self._threads or torch.get_num_threads()

    def _is_paddable(self, model: Any) -> bool:
        """Whether transformers generates the same behind padding; asked once: some layers with a state count it."""
        if self._paddable is None:
            device, pad, text = next(model.parameters()).device, self._pad_token(model), [*range(3, 9)]
            steps = []
            for padding in (0, 3):
                output = model.generate(
                    input_ids=torch.tensor([[pad] * padding + text], device=device),
                    attention_mask=torch.tensor([[0] * padding + [1] * len(text)], device=device),
                    min_new_tokens=2,
                    max_new_tokens=2,
                    do_sample=False,
                    pad_token_id=pad,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
                steps.append(output.logits[-1])
            plain, padded = steps
            if not bool(torch.isfinite(plain).all()):
                return True  # no score comes of it, and the next candidate answers
            tolerance = torch.finfo(plain.dtype).eps ** 0.5 * (plain.max() - plain.min())
            self._paddable = bool((plain - padded).abs().max() <= tolerance)
        return self._paddable

    def _prompt(self, instance: Any) -> Prompt:
        text, given = instance.args[0], instance.args[1]
        key = json.dumps([text, given], sort_keys=True, default=str)
        if key not in self._prompts:
            if len(self._prompts) >= MOST_KEPT:
                self._prompts.clear()
            self._prompts[key] = self._encode(instance, text, given)
        return self._prompts[key]

    def _encode(self, instance: Any, text: str, given: dict[str, Any]) -> Prompt:
        tokenizer, encoder = self.encoder.tokenizer, self.encoder
        options = dict(normalize_gen_kwargs(copy.deepcopy(given), 256))
        eos = tokenizer.decode(encoder.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(options.pop("until", None), eos=eos)
        limit = int(options.pop("max_gen_toks"))
        room = encoder.max_length - limit
        if room <= 0:
            raise TaskError(
                f"task {instance.task_name!r} generates up to {limit} tokens, which leaves no room for a prompt in the"
                f" model's context of {encoder.max_length}"
            )
        special = {"add_special_tokens": False} if has_bos_prefix(text, tokenizer.bos_token) else {}
        tokens = tuple(tokenizer.encode(text, **special))[-room:]
        if not tokens:
            raise TaskError(f"task {instance.task_name!r}, item {instance.doc_id}: the prompt is empty")
        if (together := options.pop("max_length", None)) is not None:  # of the prompt and what follows, as in HFLM
            limit = int(together) - len(tokens)
        if limit <= 0:
            raise TaskError(
                f"task {instance.task_name!r}, item {instance.doc_id}: max_length is {together}, and the prompt alone "
                f"has {len(tokens)} tokens; say max_gen_toks in its place"
            )
        frozen = tuple(sorted((name, json.dumps(value, default=str)) for name, value in options.items()))
        return Prompt(tokens, tuple(until), limit, frozen)

    def _batches(
        self, prompts: Sequence[Prompt], chosen: Sequence[int], most: int, *, alike: bool = False
    ) -> list[list[int]]:
        """Chosen prompts of equal settings together, longest first, at most so many rows.

        `alike` keeps to prompts of one length: what counts the tokens of a prompt would count padding, too.
        """
        groups: dict[Any, list[int]] = {}
        for k in chosen:
            prompt = prompts[k]
            length = len(prompt.tokens) if alike else 0
            groups.setdefault((prompt.until, prompt.limit, prompt.options, length), []).append(k)
        batches = []
        for group in groups.values():
            group.sort(key=lambda k: (-len(prompts[k].tokens), k))
            while group:
                tokens = self.batch_tokens or BATCH_TOKENS
                rows = max(1, min(most, tokens // len(prompts[group[0]].tokens)))
                batches.append(group[:rows])
                group = group[rows:]
        return batches

    def _finish(self, tokens: Sequence[int], until: Sequence[str]) -> Written:
        end = self._think_end
        if isinstance(end, int):
            after = max((k + 1 for k, token in enumerate(tokens) if token == end), default=0)
            text = self.encoder.tokenizer.decode(tokens[after:], skip_special_tokens=True).lstrip()
        else:
            text = self.encoder.tokenizer.decode(tokens, skip_special_tokens=True)
        answer = postprocess_generated_text(text, list(until), end if isinstance(end, str) else None)
        return Written(str(answer), len(tokens))

    def _decode_all(self, model: Any, prompts: Sequence[Prompt]) -> list[str]:
        """Greedy decoding, on a CPU in every thread by itself; which prompts are together depends on no clock."""
        from evomerge.evaluation.backends.native.decoding import attention_in_parts, read_stem, supports_parts

        groups = _groups(prompts)
        shared = [_shared_prefix([prompts[k] for k in group]) for group in groups]
        with forward_pass(model) as forward:
            if self._in_parts is None:
                (self._in_parts,) = forward.run_all([partial(supports_parts, forward)])
            beginnings = [prompts[group[0]].tokens[:size] for group, size in zip(groups, shared, strict=True)]
            stems = forward.run_all([partial(read_stem, forward, tokens) for tokens in beginnings])
            threads = self.threads if forward.device.type == "cpu" else 1
            dealt, jobs = [], []
            for group, size, stem in zip(groups, shared, stems, strict=True):
                group.sort(key=lambda k: (-len(prompts[k].tokens), k))
                hands = min(threads, -(-len(group) // MIN_ROWS))
                for hand in (group[first::hands] for first in range(hands)):
                    dealt.append(hand)
                    jobs.append(partial(self._decode, forward, [prompts[k] for k in hand], size, stem))
            with attention_in_parts(model, on=bool(self._in_parts)):
                written = forward.run_all(jobs)
        texts = [""] * len(prompts)
        for hand, rows in zip(dealt, written, strict=True):
            for k, tokens in zip(hand, rows, strict=True):
                texts[k] = self._finish(tokens, prompts[k].until)
        return texts

    def _decode(self, forward: Forward, prompts: Sequence[Prompt], shared: int, stem: Stem) -> list[list[int]]:
        """Greedy decoding in one thread: the tokens written after every prompt, of which all begin with the stem."""
        from evomerge.evaluation.backends.native.decoding import Rows

        capacity = max(len(prompt.tokens) - shared + prompt.limit for prompt in prompts)
        most = min(len(prompts), MAX_ROWS, max(1, KEPT_TOKENS // self.threads // capacity))
        rows = Rows(forward, stem, most, in_parts=bool(self._in_parts))
        stop = self._stops(forward.model, prompts[0].until)
        read_tokens = self.batch_tokens or (CPU_READ_TOKENS if forward.device.type == "cpu" else BATCH_TOKENS)
        written: list[list[int]] = [[] for _ in prompts]
        waiting, active = list(range(len(prompts))), list[int]()
        while waiting or active:
            if waiting and len(active) < most:
                count = max(1, min(most - len(active), read_tokens // (len(prompts[waiting[0]].tokens) - shared)))
                asked, waiting = waiting[:count], waiting[count:]
                active += asked
                logits = rows.add([prompts[k].tokens[shared:] for k in asked])
            else:
                asked = active
                logits = rows.step([written[k][-1] for k in asked])
            best = logits.max(dim=-1)
            if not bool(torch.isfinite(best.values).all()):
                raise CandidateError("the model's logits are not finite, so it has no score")
            for k, token in zip(asked, best.indices.tolist(), strict=True):
                written[k].append(token)
            stopped = {k for k in asked if len(written[k]) == prompts[k].limit or stop.after(written[k])}
            if stopped:
                order = rows.keep([row for row, k in enumerate(active) if k not in stopped])
                active = [active[row] for row in order]
        return written

    def _pad_token(self, model: Any) -> int:
        """What fills rows up: the pad token, or one that the model has a row for; nothing attends to it."""
        rows = model.get_input_embeddings().weight.shape[0]
        pad = self.encoder.tokenizer.pad_token_id
        return int(pad) if pad is not None and pad < rows else self.encoder.prefix_token_id

    def _pad(self, prompts: Sequence[Prompt], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded prompts [B, L] and their attention mask."""
        length = max(len(prompt.tokens) for prompt in prompts)
        ids = torch.full((len(prompts), length), pad, dtype=torch.long)
        mask = torch.zeros((len(prompts), length), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, length - len(prompt.tokens) :] = torch.tensor(prompt.tokens)
            mask[row, length - len(prompt.tokens) :] = 1
        return ids, mask

    def _stops(self, model: Any, until: Sequence[str]) -> _StopCondition:
        eos = model.generation_config.eos_token_id
        ends = {self.encoder.eot_token_id, *(eos if isinstance(eos, list) else [] if eos is None else [eos])}
        return _StopCondition(self.encoder.tokenizer, until, ends)

    def _generate(self, model: Any, prompts: Sequence[Prompt]) -> list[str]:
        """Transformers' own `generate`, called as HFLM calls it."""
        from lm_eval.models.utils_hf import stop_sequences_criteria

        first = prompts[0]
        options = {name: json.loads(value) for name, value in first.options}
        if not options.get("do_sample") and not options.get("temperature"):
            options["do_sample"] = False
            options.pop("temperature", None)
        device = next(model.parameters()).device
        pad = self._pad_token(model)
        ids, mask = (part.to(device) for part in self._pad(prompts, pad))
        tokenizer = self.encoder.tokenizer
        with torch.inference_mode(), torch_seeded(SAMPLING_SEED):
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_length=ids.shape[1] + first.limit,
                stopping_criteria=stop_sequences_criteria(tokenizer, list(first.until), ids.shape[1], ids.shape[0]),
                pad_token_id=pad,
                use_cache=True,
                **options,
            )
        stop = self._stops(model, first.until)
        return [self._finish(stop.cut(row), first.until) for row in output[:, ids.shape[1] :].tolist()]


def _groups(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Prompts that are decoded together: with the same stop strings; those that begin alike apart from a few others."""
    groups: list[list[int]] = []
    for until in dict.fromkeys(prompt.until for prompt in prompts):
        group = [k for k, prompt in enumerate(prompts) if prompt.until == until]
        beginnings = Counter(prompts[k].tokens[:MIN_SHARED_TOKENS] for k in group)
        commonest, count = beginnings.most_common(1)[0]
        alike = [k for k in group if prompts[k].tokens[:MIN_SHARED_TOKENS] == commonest]
        if MIN_ROWS <= count < len(group):
            groups += [alike, [k for k in group if k not in set(alike)]]
        else:
            groups.append(group)
    return groups


def _shared_prefix(prompts: Sequence[Prompt]) -> int:
    """Tokens that all prompts start with, where they are worth a pass of their own; a prompt keeps its last token."""
    first, last = min(prompt.tokens for prompt in prompts), max(prompt.tokens for prompt in prompts)
    shortest = min(len(prompt.tokens) for prompt in prompts)
    shared = next((k for k in range(shortest - 1) if first[k] != last[k]), shortest - 1)
    return shared if len(prompts) > 1 and shared >= MIN_SHARED_TOKENS else 0


def _is_plain(config: Any) -> bool:
    """Whether a model's generation_config leaves greedy decoding alone."""
    return all(getattr(config, name, None) in neutral for name, neutral in _CHANGES_GREEDY.items())


class _StopCondition:
    """Whether a row has stopped: at an end token, or a stop string, special tokens counted, as HFLM looks for it.

    Two tokens more are looked at than a stop string needs: it may have been written in other tokens.
    """

    def __init__(self, tokenizer: Any, until: Sequence[str], ends: set[int]) -> None:
        self.tokenizer = tokenizer
        self.ends = ends
        self.terms: dict[int, list[str]] = {}
        for term in filter(None, until):
            self.terms.setdefault(len(tokenizer.encode(term, add_special_tokens=False)) + 2, []).append(term)

    def after(self, tokens: Sequence[int]) -> bool:
        """Checks whether the row ends with its last token."""
        if tokens[-1] in self.ends:
            return True
        return any(
            any(term in tail for term in terms)
            for size, terms in self.terms.items()
            for tail in (self.tokenizer.decode(tokens[-size:]),)
        )

    def cut(self, tokens: Sequence[int]) -> Sequence[int]:
        """Cuts a row where it stopped: in a batch, rows are written on until all have."""
        return next((tokens[:k] for k in range(1, len(tokens) + 1) if self.after(tokens[:k])), tokens)
