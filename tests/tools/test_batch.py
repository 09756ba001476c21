"""Prompts side by side: each goes on as it would alone, whatever the others do."""

import pytest
import torch

from common import one_line, tiny_model
from common_models import constant_model, rwkv_folder  # noqa: F401
from common_sample import drawn, tokens
from lib.states import process, repeat
from tools.batch import BatchConfig, generate_rows, main


def rows_drawn(model, prompts, n, **options) -> torch.Tensor:
    """(B, up to n) tokens."""
    return torch.stack([t for t, _ in generate_rows(model, prompts, n, **options)], 1)


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(n)]


SAMPLINGS = ({"top_k": 20}, {"top_p": 0.9, "temperature": 0.7}, {"presence": 0.5, "frequency": 0.2})


@pytest.mark.parametrize("options", SAMPLINGS)
def test_each_prompt_draws_what_it_would_draw_alone(options):
    """Also where penalties count what it has generated, and after a common text."""
    model = tiny_model(mixer="r", ffn="channelmix").eval()
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (7, 1, 12)]
    _, book = process(model, tokens(1, 9))
    new = rows_drawn(model, prompts, 12, state=repeat(book, 3), generators=generators(3), **options)
    for row, prompt, generator in zip(new, prompts, generators(3)):
        alone = drawn(model, torch.tensor([prompt]), 12, state=book, generator=generator, **options)
        assert row.tolist() == alone[0].tolist()


def test_a_row_that_has_stopped_repeats_its_stop_and_the_end_is_when_all_have():
    model, prompts = constant_model([1.0, 1.0, 1.0, 1.0]), [[0] * n for n in (1, 3, 2, 1, 5, 2)]
    rows = rows_drawn(model, prompts, 500, stop=(2, 3), generators=generators(6)).tolist()
    ends = [next(i for i, token in enumerate(row) if token > 1) for row in rows]
    assert len(set(ends)) > 1 and max(ends) == len(rows[0]) - 1 < 400
    assert all(set(row[i + 1 :]) <= {2} for row, i in zip(rows, ends))


def test_a_row_at_the_last_learned_position_yields_minus_one_and_the_others_go_on():
    """The last token drawn is not read: a prompt of n tokens has room for 17 - n."""
    model = tiny_model(positions="learned").eval()
    rows = rows_drawn(model, [[1] * 10, [2] * 16, [3]], 99, temperature=0).tolist()
    assert [sum(token >= 0 for token in row) for row in rows] == [7, 1, 16] and len(rows[0]) == 16
    assert all(set(row[n:]) <= {-1} for row, n in zip(rows, (7, 1, 16)))
    alone = drawn(model, torch.tensor([[1] * 10]), 7, temperature=0)[0].tolist()
    assert rows[0][:7] == alone


def test_without_generators_the_rows_draw_by_one_after_the_other():
    """Then they are different samples, as generate's rows are."""
    model = tiny_model(mixer="r").eval()
    torch.manual_seed(0)
    rows = rows_drawn(model, [[1, 2], [1, 2], [1, 2]], 20)
    assert len({tuple(row) for row in rows.tolist()}) == 3


def test_what_cannot_be_generated_is_one_line():
    model = tiny_model().eval()
    for options, word in (({"n": 0}, "max_tokens = 0"), ({"temperature": -1.0}, "temperature"),
                          ({"top_k": 0}, "top_k"), ({"top_p": 2.0}, "top_p"),
                          ({"prompts": []}, "at least one text"), ({"prompts": [[1], []]}, "0 tokens"),
                          ({"prompts": [[257]]}, "vocabulary"), ({"prompts": [[1], [-1]]}, "vocabulary")):
        with pytest.raises(ValueError, match=word) as e:
            next(generate_rows(model, **{"prompts": [[1]], "n": 5} | options))
        one_line(e.value)
    with pytest.raises(ValueError, match="ends at position 17, the model has learned 16"):
        next(generate_rows(tiny_model(positions="learned").eval(), [[1], [1] * 17], 5))


def test_the_script_refuses_what_many_prompts_do_not_have(rwkv_folder, tmp_path):  # noqa: F811
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "p.txt").write_text("a\nb\n")
    file, base = ["--prompts", str(tmp_path / "p.txt")], ["--ckpt", str(rwkv_folder)]
    for args, word in (([], "--prompts is empty: name a file"), (["--prompts", ""], "--prompts is empty"),
                       (["--prompts", str(tmp_path / "empty.txt")], "has no line: write one prompt on each"),
                       ([*file, "--save_state", "s"], "--save_state writes the state of one text"),
                       ([*file, "--state_dtype", "int8"], "--state_dtype int8 is for the --save_state of"),
                       ([*file, "--prompt", "a"], "prompt"), ([*file, "--num_samples", "2"], "num_samples"),
                       ([*file, "--max_tokens", "0"], "max_tokens = 0")):
        with pytest.raises(ValueError, match=word) as e:
            main([*base, *args])
        one_line(e.value)
    with pytest.raises(ValueError, match="--prompts is empty"):  # before the model, which may be large
        main(["--ckpt", "no-such-model"])
    assert BatchConfig().how.temperature == 0.8  # as sample.py's


def test_the_end_is_not_shown_and_each_text_is_decoded_by_itself(rwkv_folder, tmp_path, capsys,  # noqa: F811
                                                                 monkeypatch):
    """Two rows amid a character each; the first ends, and the second goes on."""
    def two_texts(decoder, prompts, n, *, stop, **options):
        assert prompts == [[256, *b"a"], [256, *b"bc"]] and stop == (256,)
        for first, second in zip((0xc3, 0xa9, 256, 256), (0xe6, 0xbc, 0xa2, -1)):
            yield torch.tensor([first, second]), [([0, 1], process(decoder.model, tokens(2, 6))[1])]

    monkeypatch.setattr("tools.batch.generate_rows", two_texts)
    (tmp_path / "p.txt").write_text("a\nbc\n")
    main(["--ckpt", str(rwkv_folder), "--prompts", str(tmp_path / "p.txt")])
    out, err = capsys.readouterr()
    assert out == "aé\n---------------\nbc漢\n"
    assert "prefill 5 tokens" in err and "decode 2 x 3 tokens" in err and "memory of 6 tokens" in err
