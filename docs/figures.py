"""The tutorial's pictures: plain Python that writes SVG, for light and dark screens.

    python docs/figures.py        writes docs/figures/*.svg, the same bytes every time

What they show is computed here. An animation rests where a reader wishes less motion:
every cell also says its step in figures.
"""

from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "figures"

STYLE = """
svg { --ink: #1f2328; --soft: #656d76; --line: #8c959f; --paper: #ffffff; --box: #f3f5f7;
      --blue: #0969da; --pale: #ddf4ff; --warm: #bc4c00; --glow: #fff1e5; --hot: #ffb77c;
      --green: #1a7f37; --leaf: #dafbe1;
      background: var(--paper); font-family: system-ui, sans-serif; font-size: 14px }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6edf3; --soft: #9da7b3; --line: #7d8590; --paper: #0d1117; --box: #21262d;
        --blue: #58a6ff; --pale: #0c2d6b; --warm: #f0883e; --glow: #4a2507; --hot: #a34c0c;
        --green: #3fb950; --leaf: #0f3a1c } }
text { fill: var(--ink); text-anchor: middle; dominant-baseline: central }
.left { text-anchor: start } .end { text-anchor: end }
.soft { fill: var(--soft) } .small { font-size: 12px } .tiny { font-size: 10px }
.bold { font-weight: 600 } .mono { font-family: ui-monospace, monospace }
.box { fill: var(--box); stroke: var(--line) } .frame { fill: none; stroke: var(--line) }
.blue { fill: var(--pale); stroke: var(--blue) } .warm { fill: var(--glow); stroke: var(--warm) }
.green { fill: var(--leaf); stroke: var(--green) }
.arrow { fill: none; stroke: var(--ink); stroke-width: 1.4; marker-end: url(#tip) }
.back { fill: none; stroke: var(--warm); stroke-width: 1.4; stroke-dasharray: 5 4; marker-end: url(#warmtip) }
#tip path { fill: var(--ink) } #warmtip path { fill: var(--warm) }
"""

TIPS = "".join(
    f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
    'orient="auto-start-reverse"><path d="M0 0.5 L8 4 L0 7.5 z"/></marker>' for name in ("tip", "warmtip"))


# ------------------------------------------------------------------------------------------
# Pieces

def svg(width: int, height: int, title: str, parts: list[str], style: str = "") -> str:
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img">')
    body = "\n".join(parts)
    return (f"{head}\n<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n<defs>{TIPS}</defs>\n"
            f"{body}\n</svg>\n")


def number(x: float) -> str:
    return f"{x:.2f}".rstrip("0").rstrip(".")


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{number(x)}" y="{number(y)}" class="{kind}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, words: str = "", kind: str = "box",
        note: str = "") -> str:
    """A rounded box around one or two lines of words."""
    shape = (f'<rect x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}" '
             f'rx="6" class="{kind}"/>')
    middle, center = y + height / 2, x + width / 2
    lines = [text(center, middle - (9 if note else 0), words)] if words else []
    lines += [text(center, middle + 10, note, "soft small")] if note else []
    return shape + "".join(lines)


def path(points: list[tuple[float, float]], kind: str = "arrow") -> str:
    steps = " L".join(f"{number(x)} {number(y)}" for x, y in points)
    return f'<path d="M{steps}" class="{kind}"/>'


# ------------------------------------------------------------------------------------------
# The black box

def black_box() -> str:
    stations = [("text", "b3 a1 c2 a0 a?"), ("tokens", "7 1 10 0 16"), ("embeddings", "C numbers each"),
                ("layers", "each looks back"), ("probabilities", "0: 0.9   1: 0.04 ..."), ("one token", "0")]
    width, gap, y, parts = 124, 18, 40, []
    for i, (name, note) in enumerate(stations):
        x = 14 + i * (width + gap)
        parts.append(box(x, y, width, 58, name, "blue" if name == "layers" else "box", note))
        if i:
            parts.append(path([(x - gap, y + 29), (x - 1, y + 29)]))
    last, first = 14 + 5 * (width + gap) + width / 2, 14 + width / 2
    parts.append(path([(last, y + 58), (last, y + 104), (first, y + 104), (first, y + 59)]))
    parts.append(text((first + last) / 2, y + 92, "append it, and around again", "soft small"))
    middle = 14 + 3 * (width + gap) + width / 2
    parts.append(path([(middle - 22, y), (middle - 22, y - 22), (middle + 22, y - 22), (middle + 22, y - 1)],
                      "back"))
    parts.append(text(middle + 34, y - 20, "cache or state: what it remembers", "soft small left"))
    return svg(866, 162, "A language model and the loop around it", parts)


# ------------------------------------------------------------------------------------------
# The cascade

def schedule(n_columns: int, n_layers: int, arrow: bool) -> dict[tuple[int, int], int]:
    """The first step at which each cell (layer, column) has all that it needs."""
    step = {}
    for t in range(n_columns):
        for layer in range(n_layers):
            needs = [(layer - 1, t), (layer, t - 1)] + [(n_layers - 1, t - 1)] * (arrow and layer == 0)
            step[layer, t] = 1 + max(step.get(cell, 0) for cell in needs)
    return step


def clock(last: int, seconds: float) -> str:
    """One keyframe rule per step: waiting, working at its step, done until the end."""
    ticks, rules = last + 6, []                            # a pause before it begins again
    for s in range(1, last + 1):
        begin, end = (f"{100 * x / ticks:.2f}%" for x in (s, s + 1))
        rules.append(f"@keyframes s{s} {{ 0% {{ fill: var(--box) }} {begin} {{ fill: var(--hot) }} "
                     f"{end} {{ fill: var(--pale) }} 100% {{ fill: var(--pale) }} }}")
    names = "\n".join(f".s{s} {{ animation-name: s{s} }}" for s in range(1, last + 1))
    moving = (f".cell {{ animation-duration: {number(seconds)}s; animation-iteration-count: infinite; "
              "animation-timing-function: step-end }")
    return ("\n.cell { fill: var(--pale); stroke: var(--line) }\n" + "\n".join(rules)
            + f"\n@media (prefers-reduced-motion: no-preference) {{\n{moving}\n{names}\n}}\n")


def grid(step: dict[tuple[int, int], int], x: float, y: float, width: float, height: float) -> list[str]:
    """Layers upwards, columns to the right; each cell says when it is computed."""
    n_layers, parts = 1 + max(layer for layer, _ in step), []
    for (layer, t), s in step.items():
        left, top = x + t * width, y + (n_layers - 1 - layer) * height
        parts.append(f'<rect x="{number(left)}" y="{number(top)}" width="{number(width - 2)}" '
                     f'height="{number(height - 2)}" rx="3" class="cell s{s}"/>'
                     + text(left + width / 2 - 1, top + height / 2 - 1, str(s), "tiny"))
    parts += [text(x - 8, y + (n_layers - 1 - layer + 0.5) * height, f"layer {layer + 1}",
                   "small soft end") for layer in range(n_layers)]
    return parts


def cascade() -> str:
    slow, fast = schedule(25, 3, True), schedule(25, 3, False)
    last, parts, x, width = max(slow.values()), [], 70, 29
    for y, step, words in ((34, slow, "With the arrow from the last layer back to the first: 25 · 3 = "),
                           (182, fast, "Without it, a diagonal at a time: 25 + 3 − 1 = ")):
        parts.append(text(x, y - 18, f"{words}{max(step.values())} steps", "left bold"))
        parts += grid(step, x, y, width, 32)
        parts += [text(x + (t + 0.5) * width - 1, y + 106, str(t + 1), "tiny soft") for t in range(25)]
    parts.append(text(x - 8, 140, "token", "small soft end"))
    parts.append(text(x - 8, 288, "token", "small soft end"))
    style = clock(last, 18)
    return svg(810, 302, "The cascade: 3 layers, 25 tokens, 75 steps or 27", parts, style)


def cascade_chunks() -> str:
    size, n = 4, -(-25 // 4)
    step, x, y, width = schedule(n, 3, False), 70, 34, 29 * 4
    words = f"Chunks of 4 tokens, each at once within a layer: {n} + 3 − 1 = {max(step.values())} steps"
    parts = [text(x, y - 18, words, "left bold")]
    parts += grid({cell: s for cell, s in step.items() if cell[1] < n - 1}, x, y, width, 32)
    for layer in range(3):                                 # the last chunk has one token
        parts += grid({(0, 0): step[layer, n - 1]}, x + 24 * 29, y + (2 - layer) * 32, 29, 32)[:1]
    for c in range(n):
        first, end = size * c + 1, min(25, size * (c + 1))
        label = f"{first} … {end}" if end > first else str(first)
        parts.append(text(x + c * width + (end - first + 1) * 29 / 2, y + 106, label, "tiny soft"))
    parts.append(text(x - 8, y + 106, "token", "small soft end"))
    style = clock(max(step.values()), 6)
    return svg(810, 154, "The cascade in chunks of 4 tokens: 9 steps", parts, style)


# ------------------------------------------------------------------------------------------
# RWKV-4's block

def rwkv4_block() -> str:
    parts = []
    for x, name, note in ((20, "Time mixing", "long-term, lossy"),
                          (440, "Channel mixing", "short-term, exact, only upwards")):
        parts += [f'<rect x="{x}" y="16" width="400" height="330" rx="10" class="frame"/>',
                  text(x + 16, 38, name, "left bold"), text(x + 16, 58, note, "left soft small"),
                  text(x + 200, 330, "ln(x)", "mono"), path([(x + 200, 320), (x + 200, 304)]),
                  box(x + 70, 268, 260, 36, "token shift, with token t − 1", "green")]
    for x, names in ((20, ("W_r", "W_k", "W_v")), (440, ("W_r", "W_k"))):
        lefts = (x + 30, x + 160, x + 290) if len(names) == 3 else (x + 60, x + 220)
        for left, name in zip(lefts, names):
            parts.append(path([(x + 200, 268), (left + 40, 246)]))
            parts.append(box(left, 212, 80, 34, name, "box"))
    parts += [path([(70 + 20, 212), (90, 130)]), text(98, 172, "receptance", "soft small left"),
              box(60, 96, 60, 34, "σ", "warm"),
              path([(220, 212), (220, 190)]), path([(350, 212), (350, 172), (312, 172)]),
              box(188, 150, 124, 40, "wkv", "blue", "state α, β, p"),
              path([(250, 150), (250, 130)]), box(234, 98, 32, 32, "⊙"), path([(120, 113), (233, 113)]),
              path([(266, 113), (318, 113)]), box(319, 96, 70, 34, "W_o"),
              path([(354, 96), (354, 68)]), text(346, 76, "add to x", "small end")]
    parts += [path([(540, 212), (540, 130)]), text(548, 172, "receptance", "soft small left"),
              box(510, 96, 60, 34, "σ", "warm"),
              path([(700, 212), (700, 196)]), box(640, 160, 120, 36, "max(·, 0)²"),
              path([(700, 160), (700, 132)]), box(660, 96, 80, 34, "W_v"),
              path([(570, 113), (601, 113)]), path([(660, 113), (636, 113)]), box(602, 97, 33, 32, "⊙"),
              path([(618, 97), (618, 72)]), text(628, 78, "add to x", "left small")]
    return svg(860, 362, "RWKV-4's block", parts)


# ------------------------------------------------------------------------------------------
# What stands in the state

def states(rule: str) -> list[list[list[float]]]:
    """S (rows values 0 ... 3, columns keys a ... d) after each token of a1 b3 c2 a0."""
    S, history = [[0.0] * 4 for _ in range(4)], []
    for word in ("a1", "b3", "c2", "a0"):
        key, value = "abcd".index(word[0]), int(word[1])
        if rule == "fading":
            S = [[0.5 * x for x in row] for row in S]
        if rule == "delta rule":
            S = [[0.0 if j == key else x for j, x in enumerate(row)] for row in S]
        S = [[x + (i == value and j == key) for j, x in enumerate(row)] for i, row in enumerate(S)]
        history.append(S)
    return history


def rungs() -> str:
    size, parts = 30, []
    for row, rule in enumerate(("linear attention", "fading", "delta rule")):
        y = 50 + row * 152
        parts.append(text(20, y + 60, rule, "left bold"))
        for column, (word, S) in enumerate(zip(("a1", "b3", "c2", "a0"), states(rule))):
            x = 190 + column * 160
            if row == 0:
                parts.append(text(x + 2 * size, 16, word, "mono bold"))
            parts += [text(x + (j + 0.5) * size, y - 12, name, "small soft") for j, name in enumerate("abcd")]
            for i, values in enumerate(S):
                parts.append(text(x - 10, y + (i + 0.5) * size, str(i), "small soft"))
                for j, value in enumerate(values):
                    parts.append(f'<rect x="{x + j * size}" y="{y + i * size}" width="{size}" '
                                 f'height="{size}" class="frame"/>')
                    if value:
                        parts.append(f'<rect x="{x + j * size}" y="{y + i * size}" width="{size}" '
                                     f'height="{size}" class="{"warm" if j == 0 else "blue"}" '
                                     f'fill-opacity="{number(0.3 + 0.7 * value)}"/>')
                        parts.append(text(x + (j + 0.5) * size, y + (i + 0.5) * size, f"{value:g}", "tiny"))
    return svg(810, 490, "The state after each token, by three rules", parts)


# ------------------------------------------------------------------------------------------
# The three stages

def legend(words: str) -> str:
    return text(20, 24, words, "left bold")


def stage_1() -> str:
    parts = [legend("1 align: only the mixers train"), text(32, 108, "text", "mono")]
    parts.append(path([(56, 108), (83, 108)]))
    for x, layer in ((84, "block 0"), (400, "block 1")):
        parts += [box(x, 84, 150, 48, "attention", "box", f"teacher, {layer}"),
                  box(x, 172, 150, 48, "TimeMixer", "green", f"student, {layer}"),
                  path([(x - 14, 108), (x - 14, 196), (x - 1, 196)]),
                  path([(x + 150, 196), (x + 176, 196), (x + 176, 170)], "back"),
                  path([(x + 150, 108), (x + 176, 108), (x + 176, 138)], "back"),
                  box(x + 146, 139, 112, 30, "‖t − s‖² / ‖t‖²", "warm"),
                  path([(x + 150, 108), (x + 221, 108)]), box(x + 222, 84, 60, 48, "ffn")]
        parts.append(path([(x + 282, 108), (x + 315, 108)]))
    parts += [text(750, 108, "logits", "mono"), text(750, 126, "not used", "soft small"),
              text(470, 64, "the teacher's output flows on: every layer learns at once, from clean inputs",
                   "soft small"),
              path([(234, 208), (399, 208)]),
              text(316, 226, "v_first", "soft small")]
    return svg(810, 246, "Stage 1: align", parts)


def pair(x: float, y: float, i: int, mixer: str, kind: str) -> list[str]:
    """Block i: its mixer and its feed-forward layer, with arrows to the right."""
    right = y + 24
    return [box(x, y, 120, 48, mixer, kind, f"block {i}"), path([(x + 120, right), (x + 139, right)]),
            box(x + 140, y, 76, 48, "ffn", kind), path([(x + 216, right), (x + 235, right)])]


def stage_2() -> str:
    parts = [legend("2 match: the whole student trains"), text(40, 140, "text", "mono")]
    for y, who, mixer, kind in ((60, "teacher, frozen", "attention", "box"),
                                (176, "student", "TimeMixer", "green")):
        parts += [path([(62, 140), (76, 140), (76, y + 24), (99, y + 24)]),
                  text(100, y - 12, who, "left soft small")]
        for i in range(2):
            x = 100 + i * 236
            parts += pair(x, y, i, mixer, kind)
        parts.append(box(572, y, 104, 48, "next token", kind, "probabilities"))
        parts.append(path([(676, y + 24), (722, y + 24), (722, 124 if y < 140 else 160)], "back"))
    parts.append(box(638, 125, 164, 34, "KL(teacher ‖ student)", "warm"))
    words = "the student's own output flows on: errors add up, and are mended"
    parts.append(text(350, 142, words, "soft small"))
    return svg(810, 246, "Stage 2: match", parts)


def stage_3() -> str:
    parts = [legend("3 finish: the teacher is gone"), text(40, 94, "text", "mono")]
    parts.append(path([(62, 94), (99, 94)]))
    for i in range(2):
        x = 100 + i * 236
        parts += pair(x, 70, i, "TimeMixer", "green")
        parts += [path([(x + 34, 118), (x + 34, 142), (x + 86, 142), (x + 86, 119)], "back"),
                  text(x + 60, 154, "state S", "soft small")]
    parts += [box(572, 70, 104, 48, "next token", "green", "probabilities"),
              path([(676, 94), (699, 94)], "back"), box(700, 76, 92, 36, "−log p", "warm"),
              text(746, 128, "of the text, of an", "soft small"),
              text(746, 144, "answer; or DPO", "soft small")]
    return svg(810, 172, "Stage 3: finish", parts)


FIGURES = {"black-box": black_box, "cascade": cascade, "cascade-chunks": cascade_chunks,
           "rwkv4-block": rwkv4_block, "rungs": rungs, "stage-1-align": stage_1, "stage-2-match": stage_2,
           "stage-3-finish": stage_3}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw(), encoding="utf-8", newline="\n")
        print(f"docs/figures/{name}.svg")


if __name__ == "__main__":
    main()
