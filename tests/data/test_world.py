"""World's vocabulary: the ids of the package `rwkv`, in every kind of text."""

import inspect
import json
import random

import pytest

from common import one_line
from common_data import stored, write_jsonl
from data.chat import encode_turns, frame
from data.prepare import prepare
from data.tokenizer import END, copy_tokenizer, get_tokenizer, load_tokenizer, opening, save_tokenizer, stops
from data.world import FILE, World, faster, find_vocabulary, read_vocabulary

rwkv = pytest.importorskip("rwkv.rwkv_tokenizer")
LONE_BYTES = [bytes([b]) for b in range(256)]


@pytest.fixture(scope="module")
def world() -> World:
    return get_tokenizer("world")


@pytest.fixture(scope="module")
def mixed(world) -> tuple[str, list[int]]:
    """A megabyte, and its ids: code, Chinese, accents, emoji, control characters,
    spaces, any character.
    """
    rng = random.Random(0)
    texts = [token.decode("utf-8", "ignore") for token in world.tokens[1:]]
    whole = [text for token, text in zip(world.tokens[1:], texts) if text.encode() == token]
    chinese = [text for text in whole if "\u4e00" <= text[0] <= "\u9fff"]
    odd = ["é", "ü", "naïve ", "🙂", "👍🏽", "\x00", "\x1b[0m", "\r\n", "\n\n", "ça ",
           "\u0301", END, "\t"]
    codes = [*range(0xD800), *range(0xE000, 0x110000)]
    parts = [inspect.getsource(random) * 8, "".join(rng.choices(chinese, k=40_000)),
             "".join(rng.choices(odd, k=50_000)), " " * 100_000, "".join(rng.choices(whole, k=20_000)),
             "".join(" " * rng.randrange(200) + rng.choice("-=_\n") * rng.randrange(90) for _ in range(900)),
             "".join(map(chr, rng.choices(codes, k=30_000)))]
    return "".join(parts), world.walk("".join(parts))


def test_ids_are_those_of_the_package_and_so_are_their_bytes(world, mixed):
    official, (text, ids) = rwkv.TRIE_TOKENIZER(str(find_vocabulary())), mixed
    assert len(text.encode()) > 1e6 and ids == official.encode(text) and world.decode(ids) == text
    short = text[:2000]
    assert world.encode_ordinary(short) == world.walk(short) == official.encode(short)
    every = range(1, world.n_vocab)
    assert {i: world.decode_single_token_bytes(i) for i in every} == official.idx2token
    assert world.decode_bytes(every) == official.decodeBytes(every)


def test_the_faster_package_gives_the_same_ids_or_is_not_used(world, mixed, monkeypatch):
    fast = pytest.importorskip("pyrwkv_tokenizer")
    text, ids = mixed
    monkeypatch.setattr("data.world.PAYS", 1000)
    again = World(world.tokens)
    assert again.encode_ordinary("a" * 1000) and again._encode == again.walk     # it would not pay yet
    assert again.encode_ordinary(text) == ids and again._encode != again.walk
    assert again.encode_ordinary("a\ud800") == world.encode_ordinary("a\ufffd")

    class Other:
        def encode(self, text):
            return [*text.encode()]

    monkeypatch.setattr(fast, "RWKVTokenizer", Other)
    assert faster(world) is None


def test_zero_ends_a_text_and_no_text_spells_it(world):
    assert (world.name, world.n_vocab, world.eot_token) == ("world", 65530, 0)
    assert (opening(world), stops(world)) == ([0], (0,))
    assert 0 not in world.encode_ordinary(END) and world.decode([0]) == END
    assert world.encode(f"a{END}", allowed_special="all") == [*world.encode_ordinary("a"), 0]
    assert world.encode(f"a{END}") == world.encode_ordinary(f"a{END}")
    assert world.encode_parts([(END, False), (END, True)]) == [*world.encode_ordinary(END), 0]
    assert world.encode_ordinary("\ud800\ud83d\ude42") == world.encode_ordinary("\ufffd🙂")
    for token in (65530, -1):
        with pytest.raises(KeyError):
            world.decode_single_token_bytes(token)


def vocabulary(rng: random.Random) -> list[bytes]:
    """All bytes, and tokens of a few letters, so that many begin alike."""
    others = [bytes(rng.choices(b"ab \xff", k=rng.randint(1, 9))) for _ in range(99)]
    return list(dict.fromkeys(LONE_BYTES + others))


def write_vocabulary(path, tokens):
    path.write_text("".join(f"{i} {token!r} {len(token)}\n" for i, token in enumerate(tokens, 1)))
    return path


@pytest.mark.parametrize("seed", range(5))
def test_at_each_byte_the_longest_token_that_fits(seed, tmp_path):
    rng = random.Random(seed)
    tokens = vocabulary(rng)
    enc = read_vocabulary(write_vocabulary(tmp_path / "v.txt", tokens))
    data, expected, at = bytes(rng.choices(b"ab \xffc", k=999)), [], 0
    while at < len(data):
        longest = max((token for token in tokens if data.startswith(token, at)), key=len)
        expected.append(1 + tokens.index(longest))
        at += len(longest)
    assert enc.walk(data) == expected and enc.decode_bytes(expected) == data


# ------------------------------------------------------------------------------------------
# In folders

def test_a_folder_keeps_the_vocabulary_and_refuses_another(world, tmp_path):
    for name in ("a", "copy", "found"):
        (tmp_path / name).mkdir()
    save_tokenizer(world, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "meta.json").read_text()) == {"tokenizer": "world"}
    copy_tokenizer(tmp_path / "a", tmp_path / "copy")
    for name in ("copy", "found"):                     # without the file it is found again
        (tmp_path / name / "meta.json").write_text('{"tokenizer": "world"}')
        assert load_tokenizer(tmp_path / name).tokens == world.tokens
    assert get_tokenizer(str(tmp_path / "copy")).spec == world.spec
    other = read_vocabulary(write_vocabulary(tmp_path / "v.txt", vocabulary(random.Random(0))))
    save_tokenizer(other, tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").name == other.name != "world" and other.name.startswith("world-")
    for name in ("world", "world-000000000000"):
        (tmp_path / "copy" / "meta.json").write_text(json.dumps({"tokenizer": name}))
        with pytest.raises(ValueError, match=f"{other.name}.*names {name}: copy it") as e:
            load_tokenizer(tmp_path / "copy")
        one_line(e.value)


def test_the_vocabulary_is_taken_from_beside_a_model_first(world, tmp_path):
    tokens = vocabulary(random.Random(0))
    path = write_vocabulary(tmp_path / FILE, tokens)
    assert get_tokenizer(str(path)).name == get_tokenizer(str(tmp_path)).name != "world"
    with pytest.raises(ValueError, match=f"{FILE} is another vocabulary.*with {len(tokens) + 1}"):
        get_tokenizer("world", tmp_path)
    path.write_bytes(find_vocabulary().read_bytes().replace(b"\n", b"\r\n"))
    assert get_tokenizer("world", tmp_path).name == get_tokenizer(str(path)).name == "world"


def test_conversations_are_read_as_the_official_demo_reads_them(world, tmp_path):
    turns = [("system", "Be brief."), ("user", " What?\r\n\r\n\nAnd:\n\nwhy \n"),
             ("assistant", "So.\n\nIt is.\n"), ("user", "b"), ("assistant", "c")]
    text = ("System: Be brief.\n\nUser: What?\nAnd:\nwhy\n\nAssistant: So.\nIt is.\n\n"
            "User: b\n\nAssistant: c\n\n")
    ids, learnt = encode_turns(world, turns)
    assert ids == world.encode_ordinary(text)          # in one piece, too: no token crosses a border
    parts = [world.decode([i for i, is_learnt in zip(ids, learnt) if is_learnt])]
    assert parts == [" So.\nIt is.\n\n c\n\n"]
    assert frame(world.chat, turns[3:4]) == "User: b\n\nAssistant:"
    assert world.decode(encode_turns(world, turns[3:4], reply=True)[0]) == "User: b\n\nAssistant:"
    records = [{"prompt": f"q{i}", "response": f"r{i}\n\n!"} for i in range(30)]
    meta = prepare(write_jsonl(tmp_path / "a.jsonl", records), tmp_path / "d", tokenizer="world")
    assert (meta["format"], meta["tokenizer"], meta["dtype"]) == ("chat", "world", "uint16")
    for tokens, mask in stored(tmp_path / "d"):
        answer = world.decode([i for i, is_learnt in zip(tokens, mask) if is_learnt])
        assert world.decode(tokens).endswith(f"\n\nAssistant:{answer}") and answer[:2] == " r"
        assert answer.endswith("\n!\n\n")


# ------------------------------------------------------------------------------------------
# Files that are damaged

OFFICIAL = [("missing", lambda lines: lines[:700] + lines[701:], "line 701: the id is 702"),
            ("the last ones missing", lambda lines: lines[:-2], "begins as"),
            ("another token", lambda lines: [*lines[:-2], "65528 'what?!' 6", *lines[-1:]], "begins as"),
            ("empty", lambda lines: [], "line 1"),
            ("cut", lambda lines: [*lines[:900], lines[900][:4]], "line 901"),
            ("other ids", lambda lines: [*lines[:10], *lines[9:]], "line 11: the id is 10"),
            ("no UTF-8", lambda lines: [*lines[:5], "\udcff"], "no UTF-8")]
SMALL = [("256 'ab' 3", "the token has 2 bytes, not 3"), ("256 'ab'", "is not"),
         ("256 b'' 0", "token 256 is empty"), ("256 'a' 1", "token 256 is that of another id, too"),
         ("256 ab 2", "is not"), ("2 'ab' 2", "the id is 2"), ("256 __import__('os').getcwd() 2", "is not"),
         ("256 'a' + open('/etc/passwd').read() 'b' 2", "line 256"),
         ("256 'a' * 9999999999 + 'b' 2", "line 256"), ("256 '" + "\\\\" * 9999 + "' 9999", "is not"),
         ("256 '\\d' 2", "line 256"), ("256 f'{1}' 1", "is not"), ("256 '\\x00\0' 2", "line 256"),
         ("99999999999999999999 'ab' 2", "is not"), ("256 'a'" + "('" * 900 + "') 1", "line 256"),
         ("256 'ab' 2", "the byte 255 is no token")]


@pytest.mark.parametrize("change, words", [case[1:] for case in OFFICIAL], ids=[case[0] for case in OFFICIAL])
def test_a_part_of_the_official_file_is_one_line(change, words, tmp_path):
    lines = find_vocabulary().read_text(encoding="utf-8").split("\n")[:-1]
    path = tmp_path / "v.txt"
    path.write_bytes("".join(line + "\n" for line in change(lines)).encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match="v.txt is no World vocabulary.*pip install rwkv") as e:
        get_tokenizer(str(path))
    assert words in one_line(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize("line, words", SMALL)
def test_a_line_that_is_no_token_is_never_run(line, words, tmp_path):
    path = write_vocabulary(tmp_path / "v.txt", LONE_BYTES[:255])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match="v.txt is no World vocabulary") as e:
        get_tokenizer(str(path))
    assert words in one_line(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize("change", [
    {"tokens": None}, {"tokens": "abc"}, {"tokens": [None, "a"]}, {"tokens": [None, "a" * 70_000]},
    {"tokens": {}}, {"tokens": [None, None]}, {"tokens": [None, "漢"]}, {"kind": "word"},
])
def test_a_damaged_vocabulary_of_a_folder_is_one_line(change, world, tmp_path):
    spec = World([b"", *LONE_BYTES]).spec
    save_tokenizer(World([b"", *LONE_BYTES]), tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | change))
    with pytest.raises(ValueError, match="tokenizer.json is damaged.*copy it") as e:
        load_tokenizer(tmp_path)
    one_line(e.value)


def test_without_a_vocabulary_the_line_says_where_it_comes_from(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install rwkv, which brings {FILE}") as e:
        get_tokenizer("world", tmp_path)
    one_line(e.value)
    with pytest.raises(ValueError, match="can't be read"):
        read_vocabulary(tmp_path / "nothing.txt")
