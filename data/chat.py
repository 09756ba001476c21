"""Chat templates: what stands around each message of a conversation.

Nearly all templates only frame each message, ChatML for example:

    <|im_start|>user\\n       message  <|im_end|>\\n
    <|im_start|>assistant\\n  answer   <|im_end|>    \\n

The frames are kept as plain strings, a dict with these keys (`foreign.read_template`
makes it when a model is imported; a template that is more than frames is left out):

    default     what opens a conversation that has no system message (often a system
                message of the model's own)
    system      [before, after], the first message only; null if the template has no
                place for one
    user        [before, after]
    assistant   [before, stop, after]: the model is to write the answer and `stop`,
                which ends in a special token
    trim        whether space around a message is cut off

and, where a template needs them,

    lead        what an answer begins with: learnt, and not shown
    dense       whether the empty lines of a message are left out

`stop` may also be a plain text, such as the empty line of RWKV's World models (`WORLD`,
as their own demos have it): then generating looks for it in what is said.

What it is not: tools, documents, hidden reasoning.
"""

import re
from collections.abc import Collection
from itertools import groupby

Turns = list[tuple[str, str]]  # (role, text) of each message

WORLD = {"default": "", "system": ["System: ", "\n\n"], "user": ["User: ", "\n\n"],
         "assistant": ["Assistant:", "\n\n", ""], "lead": " ", "trim": True, "dense": True}


def frame(chat: dict, turns: Turns) -> str:
    """The conversation as one text that the assistant is to go on with."""
    return "".join(text for text, _, _ in _parts(chat, turns, opens=True)) + chat["assistant"][0]


def encode_turns(enc, turns: Turns, opens: bool = True, reply: bool = False) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and which of them the model is to learn.

    It learns its answers, each with the token that stops it. Special tokens come from
    the template alone, never from a message. An answer begins with a token of its own,
    as when it is generated; elsewhere template and message are read as one text.

    `opens`: this is the beginning, not a later part. `reply`: end with what comes
    before an answer. Raises ValueError for a role that has no frame here.
    """
    parts = _parts(enc.chat, turns, opens)
    if reply:
        parts.append((enc.chat["assistant"][0], True, False))
    ids, learnt = [], []
    for to_learn, group in groupby(parts, key=lambda part: part[2]):
        new = enc.encode_parts([(text, template) for text, template, _ in group])
        ids, learnt = ids + new, learnt + [to_learn] * len(new)
    return ids, learnt


def texts_that_end(enc, ends: Collection[int]) -> tuple[str, ...]:
    """The template's end of an answer, to look for where it has no token of `ends`."""
    if not getattr(enc, "chat", None):
        return ()
    _, end, between = enc.chat["assistant"]
    return () if {*enc.encode(end + between, allowed_special="all")} & {*ends} else (end,)


def _parts(chat: dict, turns: Turns, opens: bool) -> list[tuple[str, bool, bool]]:
    """(text, is it the template's?, is it to be learnt?), in order."""
    parts = []
    for i, (role, text) in enumerate(turns):
        first = opens and i == 0
        if role not in ("system", "user", "assistant") or role == "system" and not (first and chat["system"]):
            system = ", and system for the first" if chat["system"] else ""
            raise ValueError(f"the chat template has no frame for message {i + 1}, of the role {role!r}: "
                             f"there are user, assistant{system}")
        before, *after = chat[role]
        opening = chat["default"] if first and role != "system" else ""
        learnt = role == "assistant"
        parts.append((opening + before, True, False))
        parts.append((chat.get("lead", "") if learnt else "", True, learnt))
        parts.append((_tidied(chat, text), False, learnt))
        parts.append((after[0], True, learnt))
        parts += [(rest, True, False) for rest in after[1:]]
    return parts


def _tidied(chat: dict, text: str) -> str:
    """A message as the template has it."""
    if chat.get("dense"):
        text = re.sub(r"\n+", "\n", text.replace("\r\n", "\n"))
    return text.strip() if chat["trim"] else text
