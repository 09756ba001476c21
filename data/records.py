"""What a line of .jsonl may be: a text, a prompt and its answer, a choice between two.

    text         {text}
    supervised   {prompt, response}, {prompt, completion}, {messages}, ShareGPT's
                 {conversations}, Alpaca's {instruction, input, output}
    preference   {prompt, chosen, rejected}

A prompt, and what answers it, is a text or a list of messages, {role, content} each (in
ShareGPT {from, value}). Chosen and rejected, where they are lists, may hold the prompt
too, and differ in their last message alone.
"""

from typing import NamedTuple

from data.chat import Turns

FORMS = ({"chosen", "rejected"}, {"messages"}, {"conversations"}, {"prompt", "response"},
         {"prompt", "completion"}, {"instruction", "output"}, {"text"})
CHOICES = ("{text} or {prompt, response} or {prompt, completion} or {prompt, chosen, rejected} or "
           "{instruction, output} or {messages} or {conversations}")
ROLES = ("system", "user", "assistant")
# what others call them
NAMES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
         "model": "assistant", "developer": "system"}


class Example(NamedTuple):
    key: str                        # the same key goes to the same half of the train/val split
    texts: tuple[str, ...]          # one text; prompt and answers; or the messages of a conversation
    roles: tuple[str, ...] = ()     # who says each message; two answers are "chosen" and "rejected"
    origin: str = ""                # of a folder that is read, what in it holds the example

    @property
    def kind(self) -> str:
        if self.roles:
            return "preference" if self.roles[-1] == "rejected" else "supervised"
        return ("text", "supervised", "preference")[len(self.texts) - 1]


def read_names(form: set[str]) -> set[str]:
    """The fields that are read of a record of this form."""
    more = {"prompt"} if "chosen" in form else {"input"} if "instruction" in form else set()
    return form | more


def read_record(fields: dict, place: str) -> tuple[Example, set[str]]:
    """The example that the record at `place` is, and the names of its unread fields.

    Raises ValueError for what is none.
    """
    form = next((names for names in FORMS if fields.keys() >= names), None)
    if form is None or form == FORMS[0] and isinstance(fields["chosen"], str) and "prompt" not in fields:
        raise ValueError(f"{place} has the fields {_short(sorted(fields))}, but needs {CHOICES}")
    unread = fields.keys() - read_names(form)
    if "text" in form:
        text = _text(fields, "text", place)
        return Example(text, (text,)), unread
    if "chosen" in form:
        return _preference(fields, place), unread
    if "messages" in form or "conversations" in form:
        return _conversation(_messages(fields, *form, place), place), unread
    if "instruction" in form:
        prompt, more = _text(fields, "instruction", place), fields.get("input") or ""
        prompt += "\n\n" + _text(fields, "input", place) if more else ""
        return Example(prompt, (prompt, _text(fields, "output", place))), unread
    return _pair(fields, *(form - {"prompt"}), place), unread


def _pair(fields: dict, answer: str, place: str) -> Example:
    """A prompt and its answer, both texts or both lists of messages."""
    if isinstance(fields["prompt"], list) or isinstance(fields[answer], list):
        turns = [*_turns(fields, "prompt", "user", place), *_turns(fields, answer, "assistant", place)]
        return _conversation(turns, place)
    prompt = _text(fields, "prompt", place)
    return Example(prompt, (prompt, _text(fields, answer, place)))


def _preference(fields: dict, place: str) -> Example:
    if not isinstance(fields["chosen"], list) and not isinstance(fields.get("prompt"), list):
        texts = tuple(_text(fields, name, place) for name in ("prompt", "chosen", "rejected"))
        return Example(texts[0], texts)
    chosen, rejected = (_turns(fields, name, "assistant", place) for name in ("chosen", "rejected"))
    prompt = _turns(fields, "prompt", "user", place) if "prompt" in fields else []
    if chosen and chosen[0][0] != "assistant" and all(turn in chosen for turn in prompt):
        prompt = []  # the lists hold it too
    *before, yes = [("", ""), *prompt, *chosen]
    *same, no = [("", ""), *prompt, *rejected]
    roles = [role for role, _ in chosen[:-1]]
    if before != same or len(before) < 2 or {yes[0], no[0]} != {"assistant"} or prompt and "user" in roles:
        raise ValueError(f"{place}: chosen and rejected must be lists of messages that differ in the last "
                         "alone, an assistant's, after a prompt")
    question = _conversation([*before[1:], yes], place)
    return question._replace(texts=(*question.texts, no[1]),
                             roles=(*question.roles[:-1], "chosen", "rejected"))


def _conversation(turns: Turns, place: str) -> Example:
    """An example whose key is the first question.

    So a conversation and a prompt that ask the same are in the same half.
    """
    roles, texts = tuple(role for role, _ in turns), tuple(text for _, text in turns)
    if "assistant" not in roles or "system" in roles[1:]:
        raise ValueError(f"{place} has the roles {_short(', '.join(roles)) or 'of no message'}: at least one "
                         "assistant is needed, and system may only come first")
    return Example(texts[roles.index("user") if "user" in roles else 0], texts, roles)


def _turns(fields: dict, name: str, role: str, place: str) -> Turns:
    """A text, which `role` says, or messages."""
    if isinstance(fields[name], list):
        return _messages(fields, name, place)
    return [(role, _text(fields, name, place))]


def _messages(fields: dict, name: str, place: str) -> Turns:
    """(role, text) of each message in a list. Raises ValueError for a tool's."""
    who, what = ("from", "value") if name == "conversations" else ("role", "content")
    messages = fields[name]
    is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    if not is_list or not all(isinstance(message.get(who), str) for message in messages):
        raise ValueError(f"{place}: {name} must be a list of {{{who}, {what}}} with the roles "
                         f"{', '.join(ROLES)} and strings as {what}")
    turns = []
    for i, message in enumerate(messages, 1):
        role = NAMES.get(message[who], message[who])
        if role not in ROLES:
            raise ValueError(f"{place}: message {i} of {name} has the role {_short(repr(message[who]))}, but "
                             f"there are only {', '.join(ROLES)}: leave such conversations out")
        if not isinstance(message.get(what), str) or message.get("tool_calls"):
            raise ValueError(f"{place}: message {i} of {name} has no {what} that is a string, or calls a "
                             f"tool: {name} must be a list of {{{who}, {what}}}; leave such ones out")
        turns.append((role, message[what]))
    return turns


def _text(fields: dict, name: str, place: str) -> str:
    if name not in fields or not isinstance(fields[name], str):
        kind = type(fields.get(name)).__name__
        raise ValueError(f"{place}: field {name!r} is {kind}, but must be a string")
    return fields[name]


def _short(value: object) -> str:
    return str(value) if len(str(value)) <= 200 else f"{str(value)[:200]}..."
