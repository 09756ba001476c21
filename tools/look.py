"""See what the student learned: attention beside what stands in its place, as one page.

    python -m tools.look --teacher out/teacher --student out/rwkv --text "To be or" \\
        --out look.html

One HTML file that needs no network: per layer and head the teacher's attention map
beside the student's implied attention (`implied.py`), their correlation, what the
head's memory does over the text; per token both losses, KL, and the five likeliest
tokens of each. A layer that stayed attention shows its own map and has no memory.

The page is look.html beside this file, with the numbers in it as JSON. Maps are small
integers q, a triangle of each, behind one another, deflated:
    value = sign(q) (q / levels)^2 * largest of the map
with as many levels as keep the page below a megabyte.
"""

import base64
import json
import unicodedata
import zlib
from pathlib import Path

from config import cli, run, settings
import tiktoken
import torch
from torch import Tensor

from data.tokenizer import load_tokenizer, opening, read_prompt
from lib.folders import load_model, open_model, write_text
from lib.owned import check_place
from lib.processes import pick_device
from lib.scores import token_scores
from model import LM
from tools.implied import Mixing, correlations, read

LONGEST, LARGEST, BEST = 128, 1_000_000, 5          # tokens of text, bytes of the page, choices per token
LEVELS = {32767: torch.int16, 127: torch.int8, 15: torch.int8}
TEMPLATE = Path(__file__).with_name("look.html")
MARK = "<!doctype html><!-- written by python -m tools.look -->"
VISIBLE = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}


@settings
class LookConfig:
    teacher: str = "out/teacher"
    student: str = "out/rwkv"
    text: str = ""                       # at most 128 tokens; FILE:path reads a file
    layers: str | None = None            # numbers with commas, from 0; None = all
    out: str = "look.html"
    device: str = "auto"


# ------------------------------------------------------------------------------------------
# Text

def encode(enc: tiktoken.Encoding, text: str) -> list[int]:
    """The text's tokens behind a document's opening."""
    tokens = enc.encode_ordinary(text)
    if not tokens:
        raise ValueError('--text is empty: give a text of up to 128 tokens, --text "To be or not"')
    if len(tokens) > LONGEST:
        raise ValueError(f"--text has {len(tokens):,} tokens, a page shows at most {LONGEST}: shorten it")
    return opening(enc) + tokens


def piece(enc: tiktoken.Encoding, token: int) -> bytes:
    """A token's bytes; a vocabulary may be larger than its tokenizer."""
    try:
        return enc.decode_single_token_bytes(token)
    except KeyError:
        return f"#{token}".encode()


def label(data: bytes) -> str:
    """A token as one sees it: blanks have signs, and bytes of a part of a character, as
    characters that are not visible, numbers.
    """
    text = "".join(map(visible, data.decode("utf-8", "surrogateescape")))
    text = text if len(text) <= 40 else text[:39] + "…"
    return "◌" + text if unicodedata.category(text[:1] or "a").startswith("M") else text


def visible(c: str) -> str:
    if "\udc80" <= c <= "\udcff":
        return f"‹{ord(c) - 0xDC00:02X}›"
    hidden = unicodedata.category(c)[0] in "CZ"
    return VISIBLE.get(c, f"‹U+{ord(c):04X}›" if hidden else c)


def characters(pieces: list[bytes]) -> list[str]:
    """The characters of the text that each token has at least a byte of."""
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    owner = [n for n, c in enumerate(text) for _ in c.encode("utf-8", "surrogateescape")]
    ends = torch.tensor([len(data) for data in pieces]).cumsum(0).tolist()
    spans = (owner[end - len(data) : end] for data, end in zip(pieces, ends))
    return [text[span[0] : span[-1] + 1] if span else "" for span in spans]


# ------------------------------------------------------------------------------------------
# Numbers

def short(x: Tensor | float | None):
    """Numbers with four digits, in lists as the tensor has them."""
    if isinstance(x, Tensor):
        x = x.tolist()
    if isinstance(x, list):
        return [short(value) for value in x]
    return None if x is None else float(f"{x:.4g}")


def predictions(t: Tensor, s: Tensor, tokens: list[int]) -> list[dict]:
    """What both expect after each token, from logits (T, V): the likeliest tokens with
    their probabilities, KL, and of what came the losses.
    """
    V = min(t.shape[-1], s.shape[-1])
    t, s = t[:, :V], s[:, :V]
    scores = token_scores(t[None], s[None], torch.tensor([tokens[1:] + [0]]))[:, 0].T      # (T, 5)
    best = [logits.softmax(-1).topk(min(BEST, V), -1) for logits in (t, s)]
    rows = []
    for i, (loss_t, loss_s, kl, same, _) in enumerate(scores.tolist()):
        choices = [list(zip(b.indices[i].tolist(), short(b.values[i]))) for b in best]
        losses = [short(loss_t), short(loss_s)] if i + 1 < len(tokens) else None
        rows.append({"best": choices, "losses": losses, "kl": short(max(0.0, kl)), "same": bool(same)})
    return rows


def layer_rows(layers: list[int], teacher: list[Mixing], student: list[Mixing]) -> list[dict]:
    """Everything of the chosen layers but the maps."""
    rows = []
    for i in layers:
        t, s = teacher[i], student[i]
        memory = {name: getattr(s, name) for name in ("half_lives", "rate", "share", "norm")}
        heads = [{name: short(x if x is None else x[h]) for name, x in memory.items()}
                 | {"correlation": short(c)} for h, c in enumerate(correlations(t.map, s.map))]
        rows.append({"layer": i, "kinds": t.letter + s.letter, "heads": heads})
    return rows


def packed(maps: list[Tensor], levels: int) -> dict:
    """Maps (H, T, T) as the page reads them: head by head, of each in turn."""
    whole = torch.stack(maps, 1).flatten(0, 1)                           # (heads * maps, T, T)
    i, j = torch.tril_indices(*whole.shape[1:])
    whole = whole[:, i, j]
    largest = whole.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    q = (whole.sign() * (whole.abs() / largest).sqrt() * levels).round().to(LEVELS[levels])
    return {"largest": [float(f"{x:.6g}") for x in largest[:, 0].tolist()], "q": q.numpy().tobytes()}


# ------------------------------------------------------------------------------------------
# The page

def page(payload: dict, maps: list[list[Tensor]]) -> str:
    """The HTML, with maps as exact as there is room for.

    Raises ValueError where there is none.
    """
    template = TEMPLATE.read_text(encoding="utf-8").replace("<!doctype html>", MARK, 1)
    for levels in LEVELS:
        parts = [packed(pair, levels) for pair in maps]
        deflated = zlib.compress(b"".join(part["q"] for part in parts), 9)
        values = payload | {"levels": levels, "largest": [part["largest"] for part in parts],
                            "maps": base64.b64encode(deflated).decode()}
        html = template.replace("PAYLOAD", as_script(values), 1)
        if (size := len(html.encode())) < LARGEST:
            return html
    room = LARGEST - (size - len(values["maps"]))
    raise ValueError(f"the page would have {size:,} bytes, of {LARGEST:,} at most: "
                     + fewer([row["layer"] for row in payload["layers"]], 0.95 * room / len(values["maps"])))


def fewer(layers: list[int], share: float) -> str:
    """What to do where only this share of the layers fits."""
    n = max(0, int(len(layers) * share))
    spread = ",".join(str(layers[i * len(layers) // n]) for i in range(n))
    return f"choose fewer layers (--layers {spread}), or shorten the text" if n else "shorten the text"


def as_script(values: dict) -> str:
    """JSON that no HTML parser takes for the end of its script."""
    return json.dumps(values, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def chosen(layers: str | None, n: int) -> list[int]:
    """The numbers in --layers, in ascending order."""
    if layers is None:
        return list(range(n))
    try:
        numbers = sorted({int(word) for word in layers.split(",")})
    except ValueError:
        numbers = [-1]
    if not 0 <= numbers[0] <= numbers[-1] < n:
        raise ValueError(f"--layers {layers}: write numbers of 0 to {n - 1} with commas")
    return numbers


def check_pair(cfg: LookConfig, teacher: LM, student: LM, tokens: list[int]) -> None:
    """Raises ValueError for models that cannot be laid side by side on this text."""
    names = [load_tokenizer(folder).name for folder in (cfg.teacher, cfg.student)]
    if names[0] != names[1] or max(tokens) >= student.cfg.vocab_size:
        raise ValueError(f"{cfg.student} reads other tokens than {cfg.teacher}: name a student of it")
    shapes = [[(b.att.n_head if m == "a" else b.att.H) for b, m in zip(model.blocks, model.cfg.mixers)]
              for model in (teacher, student)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{cfg.student} has other layers or heads than {cfg.teacher}: name a student of it")
    for folder, model in ((cfg.teacher, teacher), (cfg.student, student)):
        if max(tokens) >= model.cfg.vocab_size:
            raise ValueError(f"the text has token {max(tokens)}, {folder} {model.cfg.vocab_size} tokens: "
                             "write another text")
        if model.cfg.longest and len(tokens) > model.cfg.longest:
            raise ValueError(f"the text has {len(tokens)} tokens with its opening, {folder} reads at most "
                             f"{model.cfg.longest}: shorten it")


def look(cfg: LookConfig) -> tuple[dict, list[list[Tensor]]]:
    """The numbers of the page, and for each chosen layer both maps."""
    text, device, folders = read_prompt(cfg.text), pick_device(cfg.device), (cfg.teacher, cfg.student)
    shapes, enc = [open_model(folder)[0] for folder in folders], load_tokenizer(cfg.teacher)
    tokens = encode(enc, text)
    check_pair(cfg, *shapes, tokens)
    layers = chosen(cfg.layers, len(shapes[0].blocks))
    teacher, student = (load_model(folder, device).eval() for folder in folders)
    (t, of_teacher), (s, of_student) = (read(model, tokens) for model in (teacher, student))
    rows, pieces = predictions(t, s, tokens), [piece(enc, token) for token in tokens]
    ids = set(tokens) | {token for row in rows for choices in row["best"] for token, _ in choices}
    labels = {token: label(piece(enc, token)) for token in sorted(ids)}
    whole = ["".join(map(visible, text)) for text in characters(pieces)]
    payload = {"teacher": cfg.teacher, "student": cfg.student, "tokens": tokens, "labels": labels,
               "parts": [text if "‹" in labels[token] and text != labels[token] else None
                         for token, text in zip(tokens, whole)],
               "predictions": rows, "layers": layer_rows(layers, of_teacher, of_student)}
    return payload, [[of_teacher[i].map, of_student[i].map] for i in layers]


def is_page(file: Path) -> bool:
    with open(file, "rb") as f:
        return f.read(len(MARK)) == MARK.encode()


def main(argv: list[str] | None = None) -> None:
    cfg = cli(LookConfig, argv)
    out = Path(cfg.out)
    check_place([out], is_page, "--out")
    payload, maps = look(cfg)
    html = page(payload, maps)
    write_text(out, html)
    found = [head["correlation"] for row in payload["layers"] for head in row["heads"]]
    known = [c for c in found if c is not None]
    mean = f"mean correlation {sum(known) / len(known):.3f}, " if known else ""
    print(f"{out}: {len(payload['tokens'])} tokens, {len(maps)} layers of {len(maps[0][0])} heads, {mean}"
          f"{len(html.encode()):,} bytes; open it in a browser")


if __name__ == "__main__":
    run(main)
