"""What GGUFs and Hugging Face folders both say of a tokenizer: merges, chat template.

tiktoken merges any pair whose bytes are a token, those programs the pairs that are
listed: the last merges of each token's own bytes (`data/foreign.py` has the argument),
in the order of the tokens.
"""

import math


def merges_of(ranks: dict[str, int]) -> tuple[list[str], list[str]]:
    """The last merge of each token, "left right", lowest id first; and the tokens that
    no merge makes, which stand for whole pieces of text alone.
    """
    merges, whole = [], []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = list(token)
        while len(parts) > 2:
            pairs = [ranks.get(left + right, math.inf) for left, right in zip(parts, parts[1:])]
            at = pairs.index(min(pairs))
            if pairs[at] >= rank:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2 and ranks.keys() >= {*parts}:
            merges.append(" ".join(parts))
        elif len(parts) > 1:
            whole.append(token)
    return merges, whole


def jinja(chat: dict) -> str:
    """The Jinja template that makes what `chat.frame` does, in one line."""
    content = "message['content']"
    if chat.get("dense"):                              # without its empty lines
        content = f"{content}.replace('\\r\\n', '\\n').split('\\n') | select('ne', '') | join('\\n')"
    if chat["trim"]:
        content += " | trim"

    def framed(role: str) -> str:
        before, *after = chat[role]
        before += chat.get("lead", "") * (role == "assistant")
        return f"{{{{ {quoted(before)} + ({content}) + {quoted(''.join(after))} }}}}"

    roles = [("message['role'] == 'user'", framed("user")),
             ("message['role'] == 'assistant'", framed("assistant"))]
    if chat["system"]:
        roles.append(("message['role'] == 'system' and loop.first", framed("system")))
    cases = "{% el".join(f"if {test} %}}{text}" for test, text in roles)
    return ("{% if messages[0]['role'] != 'system' %}{{ " + quoted(chat["default"]) + " }}{% endif %}"
            "{% for message in messages %}{% " + cases
            + "{% else %}{{ raise_exception('no frame for this role here') }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ " + quoted(chat["assistant"][0]) + " }}{% endif %}")


def quoted(text: str) -> str:
    """A Jinja string, with the escapes that every reader of Jinja knows."""
    for character, escape in {"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"}.items():
        text = text.replace(character, escape)
    return f"'{text}'"
