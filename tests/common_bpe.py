"""What the tests of tokenizers share: small BPEs of the library, and hard texts."""

import json
import pydoc_data.topics
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from data.bpe import ByteLevelBPE
from data.foreign import LLAMA3, QWEN2, read_tokenizer_json
from data.tokenizer import write_tokenizer

MANUAL = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
PAGE = """def f(x: int) -> str:\n\tif x >= 10:\n\t\treturn f"{x!r:>5}"   # comment\n\n\n    else: pass\r\n\r\n
Ich weiß, naïve café — “quotes” … 3.14159 12345678 ½ ² Ⅷ ٣٤ 1st
漢字かな交じり文。한국어 텍스트 ไทย עברית العربية हिन्दी
👩‍👩‍👧‍👦🇩🇪🙂🙃 e\u0301 n\u0303o\u0308 \u212b \u1e9b\u0323 ﬁ
I'm you'RE we'LL 'S 'ſ it's'd  K \u00a0nbsp\u2003em\u200bzero\u0085nel \u180e \u2028x\u2029
<|endoftext|> <|im_start|>user <|x| <|im_end|
a    b     c\t\t d \n \n  \n\n   e    \x00\x01\x04\x7f end   """
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


# ------------------------------------------------------------------------------------------
# Chat templates, conversations

CHATML = ("{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
          "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
          "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA = ("{{ bos_token }}{% for m in messages %}"
         "{{ '<|im_start|>' + m['role'] + '<|sep|>\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|sep|>\n\n' }}{% endif %}")
MISTRAL = ("{{ bos_token }}{% for m in messages %}"
           "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
           "{{ raise_exception('must alternate') }}{% endif %}"
           "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
           "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}")
EMPTY_THOUGHT = "('<think>\n\n</think>\n\n' if loop.last and m['role'] == 'assistant' else '')"
QWEN3 = CHATML.replace("m['content'] +", EMPTY_THOUGHT + " + m['content'] +")
TALKS = [
    [("user", "What is 12+30?")],
    [("user", "  Hi\n\n"), ("assistant", "Yes 🙂."), ("user", "\nWhy?")],
    [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"),
     ("user", "e")],
]


# ------------------------------------------------------------------------------------------
# The library's tokenizers

def whole(**options):
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def split(*patterns: str):
    return [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]


def sequence(*parts):
    return pre_tokenizers.Sequence([*parts])


def digits(individual: bool):
    return pre_tokenizers.Digits(individual_digits=individual)


DEEPSEEK = split(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")
PRE = {
    "GPT-2": whole(),
    "SmolLM2": sequence(digits(True), whole()),
    "runs of digits": sequence(digits(False), whole()),
    "Llama 3": sequence(*split(LLAMA3), whole(use_regex=False)),
    "Qwen2": sequence(*split(QWEN2), whole(use_regex=False)),
    "DeepSeek": sequence(*DEEPSEEK, digits(True), whole(use_regex=False)),
    "gaps": sequence(*split("[a-m]+"), whole(use_regex=False)),
    "a string": sequence(pre_tokenizers.Split(" ", "isolated"), whole()),
}


def train(pre="GPT-2", text: str = MANUAL[:100_000], alphabet: bool = True, added: tuple = (),
          normalizer=None, **options) -> Tokenizer:
    """A small byte-level BPE of the library, trained on the manual."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = PRE[pre] if isinstance(pre, str) else pre
    if normalizer:
        tokenizer.normalizer = normalizer
    letters = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=SPECIAL, initial_alphabet=letters,
                                  show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_tokens([*added])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **config) -> Path:
    """A Hugging Face folder."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", **config}))
    return folder


def imported(tokenizer: Tokenizer, folder: Path, **config) -> ByteLevelBPE:
    """The library's tokenizer as one of ours."""
    return ByteLevelBPE(read_tokenizer_json(save(tokenizer, folder, **config)))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def scraps(letters: str | list[str], n: int, longest: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice(letters) for _ in range(rng.randrange(1, longest))) for _ in range(n)]


MIXED = [PAGE, MANUAL[100_000:150_000], "", " ",
         *scraps("ab  \n\t\r'sStTrReEvVmMlLdD123.!-_é漢🙂\u0301\u00a0ſ½<|>", 300, 40)]


def gguf_fields(original: Tokenizer, **changes) -> dict:
    """What gguf.GGUFReader(...).fields has for this tokenizer."""
    file = json.loads(original.to_str())
    tokens = [token for token, _ in sorted(original.get_vocab().items(), key=lambda item: item[1])]
    kinds = {token["content"]: 3 if token["special"] else 4 for token in file["added_tokens"]}
    values = {
        "ggml.model": "gpt2",
        "ggml.pre": "smollm",
        "ggml.tokens": tokens,
        "ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "ggml.merges": [" ".join(merge) for merge in file["model"]["merges"]],
        "ggml.eos_token_id": 2,
        "chat_template": CHATML,
    } | changes
    return {f"tokenizer.{key}": SimpleNamespace(contents=lambda value=value: value)
            for key, value in values.items() if value is not None}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A model folder without a model, but with its tokenizer."""
    folder = tmp_path_factory.mktemp("teacher")
    spec = read_tokenizer_json(save(train("SmolLM2"), folder / "hf", chat_template=CHATML))
    write_tokenizer(spec, folder)
    return folder
