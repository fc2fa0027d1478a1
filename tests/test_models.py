"""The own models' forward against transformers' models of the same layers, whose causal mask is replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import fastdllm_ext as fd
from fastdllm_ext.models import DreamConfig, LLaDAConfig
from fastdllm_ext.rope import rope_table
from tiny import EOS, MASK, PAD, VOCAB, tiny_dream, tiny_llada

# Logits are of order 5 and come out of two layers of sums of at most 48 products in float32, whose order
# differs: 1e-4 is a hundred times their rounding (2^-24 * 48 * 5), and a fault in a layer moves them by 0.1.
CLOSE = {"atol": 1e-4, "rtol": 0.0}
FAMILIES = {"dream": tiny_dream, "llada": tiny_llada}


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, MASK, shape, generator=torch.Generator().manual_seed(5))


def counterpart(kind: type, config: type, own: Any, names: Callable[[str], str]) -> PreTrainedModel:
    """transformers' model with the own one's weights, its attention in plain torch."""
    c = own.config
    theta = {"rope_theta": c.rope_theta}
    model = kind(
        config(
            hidden_size=c.hidden_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            intermediate_size=c.intermediate_size,
            vocab_size=VOCAB,
            max_position_embeddings=c.max_position_embeddings,
            rms_norm_eps=c.rms_norm_eps,
            tie_word_embeddings=c.tie_word_embeddings,
            attn_implementation="eager",
            **theta,
        )
    ).eval()
    weights = {names(name): p for name, p in own.state_dict().items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if c.tie_word_embeddings else set())
    return model


def qwen2(own: Any) -> PreTrainedModel:
    return counterpart(Qwen2ForCausalLM, Qwen2Config, own, lambda name: name)


LLAMA_NAMES = {
    "model.transformer.wte": "model.embed_tokens", "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head", "model.transformer.blocks": "model.layers",
    "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm", "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj", "v_proj": "self_attn.v_proj", "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj",
}  # fmt: skip


def llama(own: Any) -> PreTrainedModel:
    def renamed(name: str) -> str:
        for ours, theirs in LLAMA_NAMES.items():
            name = name.replace(ours, theirs)
        return name

    return counterpart(LlamaForCausalLM, LlamaConfig, own, renamed)


COUNTERPARTS = {"dream": qwen2, "llada": llama}


def additive(allowed: Tensor) -> Tensor:
    """A bool mask [B, 1, S, S] as what is added to the scores."""
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


def everywhere(ids: Tensor) -> Tensor:
    return torch.ones(ids.shape[0], 1, ids.shape[1], ids.shape[1], dtype=torch.bool)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_forward_is_the_causal_counterparts_without_its_mask(family: str, tied: bool) -> None:
    tie = {"dream": "tie_word_embeddings", "llada": "weight_tying"}[family]
    own = FAMILIES[family](**{tie: tied})
    other = COUNTERPARTS[family](own)
    ids = tokens(3, 41)
    wanted = other(ids, attention_mask=additive(everywhere(ids)), output_hidden_states=True)
    found = own(ids, output_hidden_states=True)
    torch.testing.assert_close(found.logits, wanted.logits, **CLOSE)
    for a, b in zip(found.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    assert (found.logits - other(ids).logits).abs().max() > 0.1, "a causal mask would be noticed"


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_grouped_queries(family: str) -> None:
    heads = {"dream": "num_key_value_heads", "llada": "n_kv_heads"}[family]
    for kv_heads in (1, 2, 4):
        own = FAMILIES[family](**{heads: kv_heads})
        ids = tokens(2, 17)
        wanted = COUNTERPARTS[family](own)(ids, attention_mask=additive(everywhere(ids))).logits
        torch.testing.assert_close(own(ids).logits, wanted, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@torch.no_grad()
def test_padding_is_not_attended_to(family: str, dtype: torch.dtype) -> None:
    own = FAMILIES[family]()
    ids = tokens(3, 30)
    padding = torch.ones(3, 30, dtype=torch.bool)
    padding[0, :7] = padding[1, 22:] = False
    allowed = everywhere(ids) & padding[:, None, None, :]
    wanted = COUNTERPARTS[family](own)(
        ids, attention_mask=additive(allowed), position_ids=torch.arange(30)[None].expand(3, -1)
    ).logits
    found = own(ids, attention_mask=padding.to(dtype)).logits
    torch.testing.assert_close(found, wanted, **CLOSE)
    ids[~padding] = MASK
    torch.testing.assert_close(own(ids, attention_mask=padding).logits[padding], wanted[padding], **CLOSE)


@torch.no_grad()
def test_dream_takes_a_mask_for_every_pair() -> None:
    own = tiny_dream()
    ids = tokens(2, 25)
    allowed = torch.rand(2, 1, 25, 25, generator=torch.Generator().manual_seed(1)) < 0.5
    allowed |= torch.eye(25, dtype=torch.bool)
    wanted = qwen2(own)(ids, attention_mask=additive(allowed)).logits
    torch.testing.assert_close(own(ids, attention_mask=allowed).logits, wanted, **CLOSE)
    for shape in ((2, 4, 25, 25), (1, 1, 25, 25)):
        same = own(ids, attention_mask=allowed[:1].expand(shape)).logits
        torch.testing.assert_close(same[:1], wanted[:1], **CLOSE)


@torch.no_grad()
def test_dreams_padding_as_its_own_sampler_masks_it() -> None:
    """Pairs of tokens, so that padding attends to nothing: that must not reach the others as NaN."""
    own = tiny_dream()
    ids = tokens(2, 20)
    padding = torch.ones(2, 20, dtype=torch.bool)
    padding[0, :6] = False
    pairs = padding[:, None, None, :] & padding[:, None, :, None]
    found = own(ids, attention_mask=pairs).logits
    torch.testing.assert_close(found[padding], own(ids, attention_mask=padding).logits[padding], **CLOSE)


@torch.no_grad()
def test_dream_honours_position_ids() -> None:
    own = tiny_dream()
    other, ids = qwen2(own), tokens(2, 12)
    hidden = additive(everywhere(ids))
    positions = torch.stack([torch.arange(12) * 3 + 5, torch.arange(12).flip(0) + 5000])
    wanted = other(ids, attention_mask=hidden, position_ids=positions).logits
    # Angles of position 5000 round to 2^-12, those of position 35 to 2^-19: 1e-3 for what depends on them.
    torch.testing.assert_close(own(ids, position_ids=positions).logits, wanted, atol=1e-3, rtol=0.0)
    assert (wanted - own(ids).logits).abs().max() > 0.1
    one = own(ids, position_ids=torch.arange(12)).logits
    assert torch.equal(one, own(ids).logits)
    assert torch.equal(one, own(ids, position_ids=torch.arange(12)[None]).logits)


@torch.no_grad()
def test_dream_past_its_context_keeps_the_same_angles() -> None:
    own = tiny_dream(max_position_embeddings=16)
    ids = tokens(1, 40)
    wanted = tiny_dream()(ids).logits
    assert torch.equal(own(ids).logits, wanted)


@torch.no_grad()
def test_dreams_angles_are_rounded_to_the_activations_dtype() -> None:
    """q * cos + rotated(q) * sin, every operation in bfloat16, written out by hand for one head."""
    own = tiny_dream(dtype=torch.bfloat16, num_hidden_layers=1)
    ids = tokens(1, 33)
    layer = own.model.layers[0]
    x = own.model.embed_tokens(ids)
    n = layer.input_layernorm(x)
    cos, sin = (t[:33].to(torch.bfloat16) for t in rope_table(64, 8, 10000.0, torch.device("cpu")))

    def heads(linear: Any, count: int, rope: bool) -> Tensor:
        y = linear(n).view(1, 33, count, 8).transpose(1, 2)
        if rope:
            a, b = y[..., :4], y[..., 4:]
            y = y * torch.cat((cos, cos), -1) + torch.cat((-b, a), -1) * torch.cat((sin, sin), -1)
        return y.repeat_interleave(4 // count, dim=1)

    attention = layer.self_attn
    q, k, v = (
        heads(attention.q_proj, 4, True),
        heads(attention.k_proj, 2, True),
        heads(attention.v_proj, 2, False),
    )
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 33, 32)
    x = x + attention.o_proj(out)
    wanted = own.lm_head(own.model.norm(x + layer.mlp(layer.post_attention_layernorm(x))))
    found = own(ids).logits
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_ways_to_call_a_forward(family: str) -> None:
    own = FAMILIES[family]()
    ids = tokens(2, 9)
    logits = own(ids).logits
    embedded = own.get_input_embeddings()(ids)
    assert torch.equal(own(inputs_embeds=embedded).logits, logits)
    assert torch.equal(own(ids, attention_mask=torch.ones(2, 9)).logits, logits)
    assert torch.equal(own(ids, return_dict=False)[0], logits)
    assert len(own(ids, return_dict=False, output_hidden_states=True)[1]) == 3
    empty = {"past_key_values": None, "use_cache": False, "labels": None, "output_attentions": None}
    assert torch.equal(own(ids, **empty, num_logits_to_keep=0).logits, logits)
    name = type(own).__name__
    with pytest.raises(ValueError, match=rf"{name}.forward: labels, use_cache not supported"):
        own(ids, labels=ids, use_cache=True)
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embedded}):
        with pytest.raises(ValueError, match=rf"{name}.forward: give either input_ids or inputs_embeds"):
            own(**wrong)


def test_dream_names_masks_and_positions_that_it_cannot_take() -> None:
    own, ids = tiny_dream(), tokens(2, 9)
    assert torch.equal(own(ids, attention_mask="full").logits, own(ids).logits)
    for mask in ("causal", torch.ones(2, 8), torch.ones(2, 9, 9).bool(), torch.zeros(2, 1, 9, 9)):
        with pytest.raises(ValueError, match=r"DreamModel.forward: attention_mask"):
            own(ids, attention_mask=mask)
    for positions in (torch.arange(8), torch.zeros(3, 9).long(), torch.arange(9) - 1):
        with pytest.raises(ValueError, match=r"DreamModel.forward: position_ids"):
            own(ids, position_ids=positions)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_weight(family: str) -> None:
    own = fd.unpatch(FAMILIES[family]()).train()
    own(tokens(1, 6)).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in own.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_a_model_is_left_out_of_its_state(family: str) -> None:
    """No buffer: transformers 5 leaves those that are not in the checkpoint as uninitialised memory."""
    assert not list(FAMILIES[family]().buffers())


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_own_generation_stays_away(family: str) -> None:
    assert not type(FAMILIES[family]()).can_generate()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"attention_bias": False}, "attention_bias=False"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling="),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling="),
        ({"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "rope_parameters="),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types="),
        ({"head_dim": 64}, "head_dim=64"),
        ({"num_attention_heads": 3}, "num_attention_heads=3"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ],
)
def test_dream_configurations_that_compute_something_else_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"DreamConfig: .*{message}"):
        DreamConfig(**changes)


def test_dream_configuration_defaults_and_synonyms() -> None:
    config = DreamConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (3584, 28, 128)
    assert (config.num_key_value_heads, config.intermediate_size, config.vocab_size) == (4, 18944, 152064)
    assert (config.rope_theta, config.rms_norm_eps, config.mask_token_id) == (1e6, 1e-6, 151666)
    assert (config.hidden_act, config.use_sliding_window, config.tie_word_embeddings) == (
        "silu",
        False,
        False,
    )
    assert DreamConfig(num_key_value_heads=None).num_key_value_heads == 28
    later = DreamConfig(
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        layer_types=["full_attention"] * 28,
        head_dim=128,
        attention_bias=True,
        rope_scaling=None,
    )
    assert later.rope_theta == 5e5
    assert later.head_dim == 128


def test_llada_configuration_answers_to_transformers_names() -> None:
    config = LLaDAConfig(init_std=0.5, d_model=64, n_heads=4)
    assert (config.initializer_range, config.hidden_size, config.num_key_value_heads) == (0.5, 64, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_new_models_are_initialised(family: str) -> None:
    own = FAMILIES[family]()
    torch.manual_seed(0)
    new = type(own)(own.config)
    for name, p in new.named_parameters():
        if p.dim() == 1:
            assert torch.equal(p, torch.full_like(p, 0.0 if name.endswith("bias") else 1.0)), name
        else:
            assert 0.015 < p.detach().std().item() < 0.025, name
    assert (own.config.eos_token_id, own.config.pad_token_id) == (EOS, PAD)
