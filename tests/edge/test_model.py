"""The model at its edges: precision, other people's checkpoints, the last learned
position, and what a user can get wrong.

The oracle for GPT-2, Llama and Qwen2 is transformers.
"""

import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

from common import T, random_batch, tiny_model
from common_model import GPT, RWKV, VARIANTS, every_variant, in_pieces, lively, one_line_error, relative, text
from lib.states import nbytes, process, tensors
from model import LM, ModelConfig

# ------------------------------------------------------------------------------------------
# Gradients and memory


@pytest.mark.parametrize(
    "cfg",
    [VARIANTS["llama"], RWKV, VARIANTS["rwkv in llama's clothes"]],
    ids=["llama", "rwkv", "rwkv in llama's clothes"],
)
def test_gradients_are_those_of_finite_differences(cfg):
    """One random direction per parameter.

    In float64, but decay and removal key are float32 inside, hence the wide step.
    """
    model, tokens, h = lively(replace(cfg, n_layer=2)).double(), text(20), 1e-3
    loss = lambda: F.cross_entropy(
        model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten()
    )  # noqa: E731
    loss().backward()
    for name, p in model.named_parameters():
        with torch.no_grad():
            direction = p.grad / p.grad.norm() + torch.randn_like(p) / p.numel() ** 0.5
            slope = (p.grad * direction).sum().item()
            p.add_(h * direction)
            up = loss().item()
            p.sub_(2 * h * direction)
            down = loss().item()
            p.add_(h * direction)
        assert abs((up - down) / (2 * h) - slope) < 1e-3 * abs(slope) + 1e-5, name


def test_the_memory_that_an_rwkv_state_holds_is_what_it_says():
    """A view of the last token would keep, and save, all of the text's activations."""
    _, state = lively(RWKV)(text(60, B=1))
    assert sum(t.untyped_storage().nbytes() for t in tensors(state)) == nbytes(state)


@pytest.mark.parametrize("letters", ["r", "rraa", "aaar", "arar", "aara", "raar"])
def test_a_hybrid_with_its_first_rwkv_layer_anywhere_reads_tokens_singly_as_at_once(letters):
    model = tiny_model(n_layer=4, mixer=letters).double()
    x = random_batch(2, 11).x
    whole, _ = model(x)
    state, parts = None, []
    for piece in (x[:, :5], *x[:, 5:].split(1, 1)):
        y, state = model(piece, state)
        parts.append(y)
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5 * whole.abs().max()  # the state is float32


@pytest.mark.parametrize("cfg", [RWKV, GPT, VARIANTS["hybrid ar"]], ids=["rwkv", "gpt", "hybrid"])
def test_a_batch_of_no_texts_gives_no_logits(cfg):
    model = lively(cfg)
    _, state = model(text(5)[:0])
    assert model(text(5)[:0], state)[0].shape == (0, 5, cfg.vocab_size)


def test_v_first_is_the_value_of_the_first_rwkv_layer_wherever_it_is():
    """Layers 1 and 3 are RWKV-7: what layer 3 takes as v_first is W_value x of layer 1.

    Attention in between hands it on.
    """
    model, seen = tiny_model(n_layer=4, mixer="arar"), {}
    hooks = [
        block.att.register_forward_hook(lambda _, args, result, i=i: seen.update({i: (args, result)}))
        for i, block in enumerate(model.blocks)
    ]
    model(random_batch().x)
    for hook in hooks:
        hook.remove()
    att, x = model.blocks[1].att, seen[1][0][0]
    last = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), 1)
    value = att.value(x + (last - x) * att.x_v)
    assert seen[0][1][1] is None and seen[1][0][1] is None and torch.allclose(seen[1][1][1], value, atol=1e-6)
    assert seen[2][1][1] is seen[1][1][1] and seen[3][0][1] is seen[1][1][1]
    assert not hasattr(att, "v0") and hasattr(model.blocks[3].att, "v0")


# ------------------------------------------------------------------------------------------
# GPT-2, Llama, Qwen2


def test_logits_are_gpt2_s():
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3)
    ).eval()
    for p in theirs.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    source = {name.removeprefix("transformer."): p for name, p in theirs.state_dict().items()}
    weights = {
        "emb.weight": source["wte.weight"],
        "head.weight": source["wte.weight"],
        "pos.weight": source["wpe.weight"],
        "ln_out.weight": source["ln_f.weight"],
        "ln_out.bias": source["ln_f.bias"],
    }
    turn = lambda z: z.T if z.ndim == 2 else z  # noqa: E731   Conv1D keeps its weight as (in, out)
    for i in range(3):
        for p in ("weight", "bias"):
            for ours, name in (
                ("ln1", "ln_1"),
                ("ln2", "ln_2"),
                ("att.o_proj", "attn.c_proj"),
                ("ffn.key", "mlp.c_fc"),
                ("ffn.value", "mlp.c_proj"),
            ):
                weights[f"blocks.{i}.{ours}.{p}"] = turn(source[f"h.{i}.{name}.{p}"])
            for ours, part in zip("qkv", turn(source[f"h.{i}.attn.c_attn.{p}"]).chunk(3)):
                weights[f"blocks.{i}.att.{ours}_proj.{p}"] = part
    model = LM(VARIANTS["gpt2"])
    model.load_state_dict(weights)
    with torch.no_grad():
        assert relative(model(text(64))[0], theirs(text(64)).logits) < 1e-5


@pytest.mark.parametrize("kind, kv, tied", [("Llama", 4, False), ("Llama", 2, True), ("Qwen2", 1, True)])
def test_logits_are_llama_s_and_qwen2_s(kind, kv, tied):
    hf = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = getattr(hf, kind + "ForCausalLM")(
        getattr(hf, kind + "Config")(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=kv,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            tie_word_embeddings=tied,
        )
    ).eval()
    for p in theirs.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    names = {
        "model.embed_tokens": "emb",
        "lm_head": "head",
        "model.norm": "ln_out",
        "model.layers": "blocks",
        "input_layernorm": "ln1",
        "post_attention_layernorm": "ln2",
        "self_attn": "att",
        "mlp.gate_proj": "ffn.gate",
        "mlp.up_proj": "ffn.key",
        "mlp.down_proj": "ffn.value",
    }
    weights = {}
    for name, p in theirs.state_dict().items():
        for hf_name, ours in names.items():
            name = name.replace(hf_name, ours)
        weights[name] = p
    model = LM(
        replace(
            GPT,
            ffn="swiglu",
            ffn_size=96,
            norm="rmsnorm",
            norm_eps=1e-6,
            rope_theta=5000.0,
            n_kv_head=kv,
            qkv_bias=kind == "Qwen2",
            tied=tied,
        )
    )
    model.load_state_dict(weights)
    with torch.no_grad():
        assert relative(model(text(60))[0], theirs(text(60)).logits) < 1e-5


@torch.no_grad()
def test_norms_divide_by_the_root_of_the_variance_plus_eps():
    x = 0.01 * torch.randn(5, 32) + 0.02
    layer, rms = (
        LM(replace(GPT, norm_eps=1e-3)).ln_out,
        LM(replace(GPT, norm="rmsnorm", norm_eps=1e-3)).ln_out,
    )
    layer.weight.fill_(2)
    layer.bias.fill_(3)
    rms.weight.fill_(2)
    torch.testing.assert_close(
        layer(x),
        2 * (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-3).sqrt() + 3,
    )
    torch.testing.assert_close(rms(x), 2 * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt())
    assert LM(RWKV).blocks[0].att.ln_x.eps == 64e-5 and LM(RWKV).ln_out.eps == 1e-5


# ------------------------------------------------------------------------------------------
# Initial values


def test_the_decay_of_a_new_model_lies_within_the_official_bound():
    w = -math.exp(-0.5) * torch.sigmoid(LM(RWKV).blocks[0].att.w0)
    assert w.max() < 0 and w.exp().min() > 0.5452


def test_initial_values_of_a_gpt_are_gpt2_s():
    """Deviation 0.02, into the stream smaller by sqrt(2 layers), biases 0, norms 1."""
    model = LM(
        replace(
            GPT,
            n_embd=128,
            n_layer=2,
            vocab_size=500,
            positions="learned",
            ffn="gelu",
            bias=True,
            qkv_bias=True,
        )
    )
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(
                p,
                (
                    torch.ones_like(p)
                    if ".ln" in "." + name and name.endswith("weight")
                    else torch.zeros_like(p)
                ),
            ), name
        else:
            std = 0.02 / 2 if name.endswith(("o_proj.weight", "ffn.value.weight")) else 0.02
            assert abs(p.std() / std - 1) < 0.05 and abs(p.mean()) < 4 * std / p.numel() ** 0.5, name


@every_variant
def test_every_bias_begins_at_zero_and_every_norm_at_one(cfg):
    for name, p in LM(cfg).named_parameters():
        if name.endswith(".bias"):
            assert not p.any(), name
        elif p.ndim == 1 and "ln_x" not in name:
            assert (p == 1).all(), name


# ------------------------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize(
    "cfg",
    [VARIANTS["llama"], RWKV, VARIANTS["rwkv with rope"], VARIANTS["hybrid ar"]],
    ids=["llama", "rwkv", "rope", "hybrid"],
)
def test_bfloat16_weights_and_autocast_give_nearly_the_same_logits_and_keep_the_state_in_float32(cfg):
    model, tokens = lively(cfg), text(40)
    with torch.no_grad():
        ref, _ = model(tokens)
        with torch.autocast("cpu", torch.bfloat16):
            mixed, state = model(tokens)
            again, _ = in_pieces(model, tokens, (33, 1, 6))
        low, low_state = model.bfloat16()(tokens)
    assert relative(mixed, ref) < 0.05 and relative(again, ref) < 0.05 and relative(low, ref) < 0.1
    for layers in (state.layers, low_state.layers):
        assert all(att[1].dtype == torch.float32 for att, _ in layers if len(att) == 3)


def test_training_under_autocast_has_nearly_the_same_gradients():
    model, tokens = lively(RWKV), text(40)

    def gradients(enabled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(model(tokens[:, :-1])[0].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    assert relative(gradients(True), gradients(False)) < 0.05


# ------------------------------------------------------------------------------------------
# What a user can get wrong


@pytest.mark.parametrize(
    "says, changes",
    [
        ("n_embd = 30 is not divisible by n_head = 4", dict(n_embd=30)),
        ("n_head = 4 is not a multiple of n_kv_head = 3", dict(n_kv_head=3)),
        ("n_head = 4 is not a multiple of n_kv_head = 8", dict(n_kv_head=8)),
        ("mixer = ''", dict(mixer="")),
        ("mixer = 'ax'", dict(mixer="ax")),
        ("mixer = 'aaaa'", dict(mixer="aaaa")),
        ("mixer = 'R'", dict(mixer="R")),
        ("head size 3 must be even", dict(n_embd=12)),
        ("head size 7 must be even", dict(head_size=7)),
        ("must be even", dict(mixer="r", rwkv_rope=True, n_embd=30, rwkv_head_size=15)),
        ("32 is not divisible by rwkv_head_size = 24", dict(mixer="r", rwkv_head_size=24)),
        ("40 is not divisible by rwkv_head_size = 16", dict(mixer="ar", rwkv_size=40)),
        ("positions = 'alibi': choose one of rope, learned, none", dict(positions="alibi")),
        ("norm = 'batchnorm': choose one of", dict(norm="batchnorm")),
        ("ffn = 'relu': choose one of", dict(ffn="relu")),
        ("rope_scaling = 'yarn': choose one of default, linear, llama3", dict(rope_scaling="yarn")),
        ("rope_factor = 0", dict(rope_factor=0.0)),
        ("rope_theta = -1", dict(rope_theta=-1.0)),
        ("rope_high = 4.0 above rope_low = 4.0", dict(rope_low=4.0)),
    ],
)
def test_a_config_that_cannot_be_gives_one_line(says, changes):
    one_line_error(lambda: replace(GPT, **changes), says)


@pytest.mark.parametrize("pattern", ["all", "alternate", "first:2", "last:1", "every:2", "0,2", "auto:64"])
def test_a_pattern_is_no_mixer_of_a_config(pattern):
    """--mixer and StudentConfig.mixer take patterns and turn them into letters."""
    one_line_error(lambda: replace(GPT, mixer=pattern), f"mixer = {pattern!r}", "one letter per layer")


def test_every_size_must_be_positive():
    sizes = [f.name for f in fields(ModelConfig) if "int" in str(f.type)]
    assert {
        "vocab_size",
        "block_size",
        "n_layer",
        "n_embd",
        "n_head",
        "n_kv_head",
        "head_size",
        "rwkv_head_size",
        "rwkv_size",
        "rank_g",
        "ffn_size",
    } <= set(sizes)
    for name in sizes:
        for value in (0, -1, -64):
            one_line_error(
                lambda: replace(GPT, **{name: value}), f"{name} = {value}: it must be a number of at least 1"
            )


def test_attention_s_rules_do_not_bind_a_model_without_attention():
    replace(RWKV, n_head=5, n_kv_head=3)
    replace(GPT, rwkv_head_size=24)


@pytest.mark.parametrize("cfg", [GPT, RWKV], ids=["gpt", "rwkv"])
@pytest.mark.parametrize("bad", [50, 999, -1, -50])
def test_a_token_outside_the_vocabulary_is_named(cfg, bad):
    tokens = text(10)
    tokens[1, 4] = bad
    one_line_error(
        lambda: process(LM(cfg), tokens), f"token {bad} is outside the vocabulary of 50", "tokenizer"
    )


def test_attention_refuses_text_beyond_its_learned_positions_at_once_and_step_by_step():
    for mixer in ("a", "ra"):
        model = LM(replace(GPT, positions="learned", mixer=mixer))
        _, state = model(text(64))
        one_line_error(lambda: model(text(65)), "65", "64 learned positions")
        one_line_error(lambda: model(text(1), state), "65", "64 learned positions")


@pytest.mark.parametrize(
    "positions, mixer, longest",
    [
        ("learned", "a", T),
        ("learned", "ra", T),
        ("learned", "r", None),
        ("rope", "a", None),
        ("none", "ra", None),
    ],
)
def test_only_attention_with_learned_positions_has_a_longest_text(positions, mixer, longest):
    model = tiny_model(positions=positions, mixer=mixer)
    assert model.cfg.longest == longest
    _, state = model(random_batch(length=longest or 2 * T).x)
    if longest:
        with pytest.raises(ValueError, match=f"position {T + 1} is beyond the {T} learned"):
            model(random_batch(length=1).x, state)


@torch.no_grad()
def test_a_pure_rnn_with_learned_positions_reads_on_beyond_them():
    model, tokens = lively(VARIANTS["rwkv in gpt2's clothes"]), text(150)
    whole, state = model(tokens)
    assert whole.isfinite().all() and state.position == 150
    assert relative(in_pieces(model, tokens, (60, 1, 1, 1, 1, 1, 1, 84))[0], whole) < 2e-5


@torch.no_grad()
def test_rope_and_no_positions_have_no_limit():
    for cfg in (GPT, RWKV):
        assert lively(cfg)(text(100))[0].isfinite().all()  # block_size is 64
