"""Chat templates: what stands around each message of a conversation.

Hugging Face and GGUF keep a template as a Jinja program. Nearly all of them only frame each message, ChatML for example:

    <|im_start|>user\\n  message  <|im_end|>\\n  <|im_start|>assistant\\n  answer  <|im_end|>  \\n

So the program is run once, when a model is imported, in Jinja's sandbox and on messages of a text that is rare. What
stands between them is the frames, kept as plain strings; a template that is more than frames is left out.

    default      what opens a conversation that has no system message (often a system message of the model's own)
    system       [before, after], the first message only; null if the template has no place for one
    user         [before, after]
    assistant    [before, stop, after]: the model is to write the answer and `stop`, which ends in a special token
    trim         whether space around a message is cut off

What it is not: tools, documents, hidden reasoning.
"""

import re
from itertools import groupby

S, U, A, V = (f"\ue000{c}bC" for c in "suav")  # rare text: a system message, a question, an answer, a question
Turns = list[tuple[str, str]]  # (role, text) of each message


def read_template(template: str | list | None, names: dict, special: dict[str, int]) -> dict | None:
    """The frames of a Jinja `template` (or of the one called default), or None where there is none, or more than frames.

    `names` are the other variables it may use: bos_token, eos_token. `special` are the tokenizer's.
    """
    import jinja2.ext  # comes with torch; only an import of a model needs it
    import jinja2.sandbox

    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default")
    if not isinstance(template, str):
        return None

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    known = {name: token or "" for name, token in names.items()} | {"raise_exception": refuse, "tools": None, "documents": None}

    def render(turns: Turns, reply: bool = False) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        return env.from_string(template).render(messages=messages, add_generation_prompt=reply, **known)

    ask, answer, again, system = ("user", U), ("assistant", A), ("user", V), ("system", S)
    try:
        opening, _, before_again, reply = re.split(f"{U}|{A}|{V}", render([ask, answer, again], reply=True))
        after_question, after_answer = render([ask]).partition(U)[2], render([ask, answer]).partition(A)[2]
        trim = render([("user", f"\n {U} \n")]) == render([ask])
        stop = min((token for token in special if token in after_answer), key=after_answer.index)
        before = before_again.removeprefix(after_answer)
        end = after_answer.index(stop) + len(stop)
        chat = {"default": opening.removesuffix(before), "system": None, "user": [before, after_question],
                "assistant": [reply.removeprefix(after_question), after_answer[:end], after_answer[end:]], "trim": trim}
        if frame(chat, [ask, answer, again]) != render([ask, answer, again], reply=True):
            return None
    except Exception:  # no such splits, no token that stops; its own refusal, or whatever else a stranger's program runs into
        return None
    try:
        opening, before_question, _ = re.split(f"{S}|{U}", render([system, ask]))
        with_system = chat | {"system": [opening, before_question.removesuffix(before)]}
        if frame(with_system, [system, ask, answer, again]) == render([system, ask, answer, again], reply=True):
            return with_system
    except Exception:
        pass
    return chat


def frame(chat: dict, turns: Turns) -> str:
    """The conversation as one text that the assistant is to go on with."""
    return "".join(text for text, _, _ in _parts(chat, turns, opens=True)) + chat["assistant"][0]


def encode_turns(enc, turns: Turns, opens: bool = True, reply: bool = False) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and which of them the model is to learn: its answers, each with the token that stops it.

    Special tokens come from the template alone, never from a message. An answer begins with a token of its own, as when it
    is generated; elsewhere template and message are read as one text. `opens`: this is the beginning, not a later part.
    `reply`: end with what comes before an answer.
    """
    parts = _parts(enc.chat, turns, opens) + [(enc.chat["assistant"][0], True, False)] * reply
    ids, learnt = [], []
    for to_learn, group in groupby(parts, key=lambda part: part[2]):
        new = enc.encode_parts([(text, template) for text, template, _ in group])
        ids, learnt = ids + new, learnt + [to_learn] * len(new)
    return ids, learnt


def _parts(chat: dict, turns: Turns, opens: bool) -> list[tuple[str, bool, bool]]:
    """(text, is it the template's?, is it to be learnt?), in order. Raises ValueError for a role that has no frame here."""
    parts = []
    for i, (role, text) in enumerate(turns):
        if role not in ("system", "user", "assistant") or role == "system" and not (opens and i == 0 and chat["system"]):
            raise ValueError(f"the chat template has no frame for message {i + 1}, of the role {role!r}: there are user, assistant"
                             + (", and system for the first" if chat["system"] else ""))
        before, *after = chat[role]
        opening = chat["default"] if opens and i == 0 and role != "system" else ""
        own = role == "assistant"
        parts += [(opening + before, True, False), (text.strip() if chat["trim"] else text, False, own), (after[0], True, own)]
        parts += [(rest, True, False) for rest in after[1:]]
    return parts
