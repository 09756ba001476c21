"""Teacher and student answer the same prompts, and how far they say the same.

    python -m tools.side_by_side --teacher out/smollm2 --student out/smollm2-rwkv \\
        --prompts config/chat-prompts.txt

Greedy answers of both to every line, as messages where the teacher has a chat template
that frames them, else as the beginning of a text. `agrees` is on how many of the
teacher's tokens the student would choose the same, reading the teacher's answer;
`first` how many tokens they say before they part. --out: FOLDER/answers.json and .md.
"""

from pathlib import Path

from config import at_least, cli, run, settings
import tiktoken
import torch

from data.chat import encode_turns, texts_that_end
from data.tokenizer import TextStream, load_tokenizer, opening, stops
from lib.decode import Decoder
from lib.folders import load_model, write_json, write_text
from lib.owned import check_place, contents
from lib.processes import pick_device
from lib.scores import readable
from model import LM
from sample import generate
from tools.batch import read_prompts


@settings
class SideBySideConfig:
    teacher: str = "out/teacher"
    student: str = "out/rwkv"
    prompts: str = ""                                    # a text file with one prompt per line
    max_tokens: int = at_least(1, 64, below=2**31)       # per answer
    device: str = "auto"
    out: str | None = None                               # None = print only


def question(enc: tiktoken.Encoding, text: str) -> list[int]:
    """The tokens that both models read before they answer."""
    if getattr(enc, "chat", None):
        return encode_turns(enc, [("user", text)], reply=True)[0]
    return opening(enc) + enc.encode_ordinary(text)


def answer(decoder: Decoder, enc: tiktoken.Encoding, prompt: list[int], n: int) -> tuple[list[int], str]:
    """The n likeliest tokens after the prompt, one by one, up to what ends an answer;
    and their text, without that.
    """
    tokens, stop = torch.tensor([prompt], device=decoder.device), stops(enc)
    stream, said, text = TextStream(enc, stop, texts_that_end(enc, stop)), [], ""
    for token, _ in generate(decoder, tokens, n, stop=stop, temperature=0.0):
        said.append(token.item())
        text += stream(said[-1])
        if stream.ended:
            break
    return said, text + stream(None)


@torch.no_grad()
def agreement(student: LM, prompt: list[int], said: list[int]) -> int:
    """How many tokens of what was `said` the student would choose in their places."""
    tokens = torch.tensor([prompt + said], device=next(student.parameters()).device)
    best = student(tokens[:, :-1])[0][0, len(prompt) - 1 :].argmax(-1)
    return int((best == tokens[0, len(prompt) :]).sum())


def side_by_side(cfg: SideBySideConfig, prompts: list[str]) -> dict:
    """The answers, and over all of them the shares of `agrees` and `first`."""
    device = pick_device(cfg.device)
    teacher, student = (load_model(folder, device).eval() for folder in (cfg.teacher, cfg.student))
    enc, rows = load_tokenizer(cfg.teacher), []
    if student.cfg.vocab_size < teacher.cfg.vocab_size or load_tokenizer(cfg.student).name != enc.name:
        raise ValueError(f"{cfg.student} reads other tokens than {cfg.teacher}, or fewer: name a student of "
                         "it")
    questions = [question(enc, text) for text in prompts]
    longest = max(map(len, questions)) + cfg.max_tokens - 1
    for folder, model in ((cfg.teacher, teacher), (cfg.student, student)):
        if readable(model, longest) < longest:
            raise ValueError(f"prompts and max_tokens need {longest} positions, {folder} has learned "
                             f"{model.cfg.longest}: shorten one of them")
    decoders = Decoder(teacher), Decoder(student)
    for text, prompt in zip(prompts, questions):
        (t, said), (s, said_too) = (answer(decoder, enc, prompt, cfg.max_tokens) for decoder in decoders)
        first = next((i for i, (a, b) in enumerate(zip(t, s)) if a != b), min(len(t), len(s)))
        row = {"prompt": text, "tokens": len(t), "agrees": agreement(student, prompt, t), "first": first}
        rows.append(row | {"teacher": said, "student": said_too})
    n = sum(row["tokens"] for row in rows)
    shares = {key: sum(row[key] for row in rows) / n for key in ("agrees", "first")}
    return shares | {"tokens": n, "rows": rows}


def as_markdown(report: dict) -> str:
    """The answers for people."""
    line = ("Reading the teacher's {tokens:,} tokens, the student would choose {agrees:.1%} of them; "
            "{first:.1%} both say before they part.")
    lines = [line.format(**report)]
    for row in report["rows"]:
        lines += [f"**{row['prompt']}**"]
        lines += [f"{who}:\n\n" + quoted(row[who]) for who in ("teacher", "student")]
    return "\n\n".join(lines) + "\n"


def quoted(text: str) -> str:
    return "\n".join("> " + line for line in text.strip().split("\n"))


def main(argv: list[str] | None = None) -> None:
    cfg = cli(SideBySideConfig, argv)
    prompts = read_prompts(cfg.prompts)
    out = Path(cfg.out) if cfg.out else None
    if out:
        files = [out / "answers.json", out / "answers.md"]
        check_place(files, lambda file: "agrees" in contents(file), "--out")
    report = side_by_side(cfg, prompts)
    text = as_markdown(report)
    if out:
        write_json(files[0], report)
        write_text(files[1], text)
    print(text, end="")


if __name__ == "__main__":
    run(main)
