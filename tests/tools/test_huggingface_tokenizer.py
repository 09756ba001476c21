"""Our tokenizer.json: transformers gives our ids with it, and it comes back equal."""

import json

import pytest
import tokenizers

from common_bpe import CHATML, LLAMA, MANUAL, MIXED, PRE, TALKS, imported, train
from data.bpe import ByteLevelBPE
from data.chat import encode_turns, frame
from data.foreign import read_tokenizer_json
from data.template import render
from data.tokenizer import get_tokenizer
from tools.from_huggingface import read_tokenizer
from tools.huggingface_tokenizer import spec_of, tokenizer_config, tokenizer_json
from tools.tokenizer_parts import jinja, merges_of

hf = pytest.importorskip("transformers")

SHORT = MANUAL[:20_000]
HARD = [MIXED[0], MIXED[1][:9000], *MIXED[2:], "a\r\nb\rc\n\n", "\x00\x01\x7f\x80\u0085\u200b",
        "🙂" * 9, " " * 3000 + "x", "\u1e9b\u0323 \ufb01", "nai\u0308ve <b> <b>\u0338"]


def written(spec: dict, folder):
    """The files, as transformers reads them."""
    for name, content in (("tokenizer", tokenizer_json(spec)), ("tokenizer_config", tokenizer_config(spec))):
        (folder / f"{name}.json").write_text(json.dumps(content))
    return hf.AutoTokenizer.from_pretrained(folder)


def require_equal(theirs, enc) -> None:
    for text in HARD:
        assert theirs(text, add_special_tokens=False).input_ids == enc.encode(text, allowed_special="all")


@pytest.mark.parametrize("options", [
    *({"pre": pre} for pre in PRE),
    dict(added=("<tool>", "  ")),
    dict(normalizer=tokenizers.normalizers.NFC()),
    dict(normalizer=tokenizers.normalizers.NFC(), added=("na\u00efve", "<b>")),
    dict(alphabet=False, text="abc abcd \n" * 99, unk_token="<|im_end|>"),
    dict(alphabet=False, text="abc abcd \n" * 99),
], ids=str)
def test_transformers_gives_our_ids_and_the_tokenizer_comes_back(options, tmp_path):
    enc = imported(train(**{"text": SHORT} | options), tmp_path / "original", chat_template=CHATML)
    theirs = written(enc.spec, tmp_path)
    require_equal(theirs, enc)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (enc.eot_token, enc.eot_token)
    again = read_tokenizer_json(tmp_path)
    assert again | {"stop": 0} == enc.spec | {"stop": 0}     # other ends stand in config.json
    assert ByteLevelBPE(again).name == enc.name


def test_the_bytes_are_a_byte_level_bpe_without_merges(tmp_path):
    enc = get_tokenizer("bytes")
    theirs = written(spec_of(enc), tmp_path)
    require_equal(theirs, enc)
    everything = "".join(map(chr, range(0xD800))) + "\U0001f642"
    assert theirs(everything).input_ids == list(everything.encode()) and len(theirs) == 257
    assert theirs.decode(list(everything.encode())) == everything
    assert theirs.bos_token_id == theirs.eos_token_id == theirs.pad_token_id == 256
    assert read_tokenizer(tmp_path) is not None and read_tokenizer(tmp_path).name == "bytes"


def test_a_token_that_opens_texts_is_put_before_them(tmp_path):
    original = train(text=SHORT)
    start = tokenizers.processors.TemplateProcessing(single="<|im_start|> $A",
                                                     special_tokens=[("<|im_start|>", 1)])
    original.post_processor = start
    enc = imported(original, tmp_path / "original")
    theirs = written(enc.spec, tmp_path)
    assert enc.spec["start"] == theirs.bos_token_id == 1
    assert theirs("some text").input_ids == [1, *enc.encode_ordinary("some text")]
    assert read_tokenizer_json(tmp_path)["start"] == 1


def test_tokens_for_whole_pieces_alone_stay_what_they_are(tmp_path):
    """Llama 3 has tokens that no merges give: a piece that is one becomes it."""
    original = train(text=SHORT, ignore_merges=True)
    whole = json.loads(original.to_str())
    last = max(whole["model"]["vocab"].values())
    whole["model"]["vocab"] |= {"ĠqxzqxzĠ".replace("Ġ", "") * 3: last + 1}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    enc = ByteLevelBPE(read_tokenizer_json(tmp_path))
    assert enc.encode_ordinary("qxz" * 6) == [last + 1]
    theirs = written(enc.spec, tmp_path)
    require_equal(theirs, enc)
    for text in ("qxz" * 6, "qxz" * 7, "a" + "qxz" * 6):
        assert theirs(text).input_ids == enc.encode_ordinary(text)


@pytest.mark.parametrize("template", [CHATML.replace("Be kind.", r"\'\"\\ {{ x }} {% y %} é🙂"), LLAMA])
def test_the_frames_as_jinja_are_the_frames(template, tmp_path):
    names = {"bos_token": "<|im_start|>"}
    enc = imported(train(text=SHORT), tmp_path / "original", chat_template=template, **names)
    theirs = written(enc.spec, tmp_path)
    for turns in TALKS:
        messages = [{"role": role, "content": text} for role, text in turns]
        texts = [theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
                 for reply in (True, False)]
        assert texts[0] == frame(enc.chat, turns) == texts[1] + enc.chat["assistant"][0]
        if len(turns) == 1:
            prompt = theirs.apply_chat_template(messages, add_generation_prompt=True).input_ids
            assert prompt == encode_turns(enc, turns, reply=True)[0]
    for wrong in ([("tool", "x")], [("user", "x"), ("system", "y")]):
        with pytest.raises(Exception, match="no frame"):
            theirs.apply_chat_template([{"role": role, "content": text} for role, text in wrong])
    assert read_tokenizer_json(tmp_path)["chat"] == enc.chat


def test_a_template_without_a_place_for_the_system_has_none_here(tmp_path):
    template = ("{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
                "{{ '<|im_start|>' + m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
                "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}")
    enc = imported(train(text=SHORT), tmp_path / "original", chat_template=template)
    theirs = written(enc.spec, tmp_path)
    assert enc.chat["system"] is None
    with pytest.raises(Exception, match="no frame"):
        theirs.apply_chat_template([{"role": "system", "content": "x"}])
    assert read_tokenizer_json(tmp_path)["chat"] == enc.chat


def test_the_frames_of_world_as_jinja():
    """What an answer begins with is not in the prompt; empty lines are left out."""
    chat = {"default": "", "system": ["System: ", "\n\n"], "user": ["User: ", "\n\n"],
            "assistant": ["Assistant:", "\n\n", ""], "lead": " ", "trim": True, "dense": True}
    turns = [("user", "\n a\r\n\r\nb\n\n\n c \n"), ("assistant", "d")]
    talk = {"messages": [{"role": role, "content": text} for role, text in turns],
            "add_generation_prompt": True}
    assert render(jinja(chat), {}, [talk]) == ["User: a\nb\n c\n\nAssistant: d\n\nAssistant:"]


def test_the_pair_of_a_token_is_its_last_merge():
    """ab and bc could both begin abc: the earlier token does."""
    vocab = {"a": 0, "b": 1, "c": 2, "bc": 3, "ab": 4, "abc": 5, "cabc": 6, "xyz": 7}
    assert merges_of(vocab) == (["b c", "a b", "a bc", "c abc"], ["xyz"])
