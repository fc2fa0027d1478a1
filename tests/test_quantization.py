"""``fd.patch(model, quantization=...)``: linear layers of 8 bits."""

from __future__ import annotations

import copy
import gc
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdllm_ext as fd
from fastdllm_ext import _C, ops
from fastdllm_ext.patching.registry import patched_family
from fastdllm_ext.runtime import products
from fastdllm_ext.runtime.products import CHUNK, QUANTIZATIONS, quantized
from tiny import random_prompt, tiny_dream, tiny_llada

FAMILIES: dict[str, Callable[..., Any]] = {"llada": tiny_llada, "dream": tiny_dream}
PROMPTS = [random_prompt(random.Random(b), 5, 40) for b in range(3)]
# torch has had products of rows of e4m3 with a scale each on the CPU since 2.13.
needs_fp8 = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="torch before 2.13: no product of fp8 on the CPU"
)
each_name = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_fp8 if name == "fp8" else ()) for name in QUANTIZATIONS]
)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return FAMILIES[request.param]


def model_for(family: Callable[..., Any], name: str) -> Any:
    """A model that a quantisation takes: fp8 wants bfloat16."""
    return family().bfloat16() if name == "fp8" else family()


def tokens_of(model: nn.Module, name: str | None, **settings: Any) -> Tensor:
    model = fd.patch(model, quantization=name)  # type: ignore[arg-type]
    return fd.generate(model, PROMPTS, gen_length=40, steps=20, **settings).sequences


def linears(model: nn.Module) -> list[nn.Linear]:
    """All that are quantised."""
    parts = patched_family(model).parts(model)
    names = ("q", "k", "v", "o", "gate", "up", "down")
    every = [getattr(layer, name) for layer in parts.layers for name in names] + [parts.head]
    return [m for m in every if isinstance(m, nn.Linear)]


def rounded(weight: Tensor, name: str) -> Tensor:
    """What a rounded weight stands for, by torch alone."""
    w = weight.float()
    most = {"int8": 127.0, "fp8": 448.0}[name]
    scale = w.abs().amax(dim=1, keepdim=True) / most
    numbers = w / scale
    numbers = numbers.round() if name == "int8" else numbers.to(torch.float8_e4m3fn).float()
    return (numbers * scale).to(weight.dtype)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_int8_generates_what_the_rounded_weights_do(family: Callable[..., Any], cache: str) -> None:
    """In float32, where x is not rounded: the tile unit's 16 bits are enough to turn a near tie."""
    _C.set_cpu_isa("portable")
    changed = False
    for seed in range(4):
        model, twin = family(seed), fd.patch(family(seed), runtime="modules")
        with torch.no_grad():
            for linear in linears(twin):
                linear.weight.copy_(rounded(linear.weight, "int8"))
        wanted = fd.generate(twin, PROMPTS, gen_length=40, steps=20, cache=cache).sequences
        assert torch.equal(tokens_of(model, "int8", cache=cache), wanted)
        changed |= not torch.equal(tokens_of(model, "none", cache=cache), wanted)
    assert changed, "else the test shows nothing"


@each_name
@pytest.mark.parametrize("bias", [True, False])
def test_products(name: str, bias: bool) -> None:
    """Of two weights as one; more rows than are rounded at a time."""
    dtype = torch.bfloat16
    weights = [torch.randn(n, 64).to(dtype) for n in (48, CHUNK + 16)]
    biases = [torch.randn(len(w)).to(dtype) for w in weights] if bias else []
    owner = nn.Linear(1, 1)
    made = quantized(owner, name, [[(weights, biases)]])[0][0]
    x = torch.randn(9, 64).to(dtype)
    whole = torch.cat([rounded(w, name) for w in weights]).double()
    seen = x if name == "int8" else rounded(x, "fp8")
    truth = seen.double() @ whole.T + (torch.cat(biases).double() if bias else 0)
    # Rounded to bfloat16 at the end; `rounded` rounds so too, 64 numbers of each sum.
    error = (made(x).double() - truth).abs()
    assert (error <= truth.abs() * 2**-8 + 2**-9 * (seen.double().abs() @ whole.abs().T)).all()
    assert made.weight.dtype == QUANTIZATIONS[name].dtype
    assert made(x[:0]).shape == (0, len(whole))
    gate, up = made(x).chunk(2, dim=1)
    assert torch.equal(made.silu_mul(x), ops.silu_mul(gate, up))


@each_name
def test_zeros_are_zeros(name: str) -> None:
    made = quantized(nn.Linear(1, 1), name, [[([torch.zeros(16, 32).bfloat16()], [])]])[0][0]
    assert torch.equal(made(torch.randn(3, 32).bfloat16()), torch.zeros(3, 16).bfloat16())


@each_name
def test_the_model_stays_what_it_is(family: Callable[..., Any], name: str) -> None:
    model = model_for(family, name)
    before = {key: (value, value.clone()) for key, value in model.state_dict().items()}
    logits = model(PROMPTS[0][None]).logits
    plain = tokens_of(model, "none")
    tokens_of(model, name)
    assert torch.equal(model(PROMPTS[0][None]).logits, logits)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key][1]) for key, value in model.state_dict().items())
    assert torch.equal(tokens_of(model, "none"), plain)


@each_name
def test_same_tokens_alone_and_together(family: Callable[..., Any], name: str) -> None:
    model = model_for(family, name)
    together = tokens_of(model, name)
    for b, prompt in enumerate(PROMPTS):
        alone = fd.generate(model, [prompt], gen_length=40, steps=20).sequences[0]
        assert torch.equal(alone, together[b, : len(alone)])


def test_copies_are_made_once_and_anew_where_weights_change(
    family: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    quantize = products._quantize
    monkeypatch.setattr(products, "_quantize", lambda *args: made.append(0) or quantize(*args))
    model = family()
    first = tokens_of(model, "int8")
    layers = len(made)
    assert layers == len(patched_family(model).parts(model).layers)
    assert torch.equal(tokens_of(model, None), first), "None: as before"
    assert len(made) == layers
    with torch.no_grad():
        linears(model)[0].weight.mul_(-1)
    assert not torch.equal(tokens_of(model, None), first)
    assert len(made) == 2 * layers
    with torch.no_grad():
        linears(model)[0].weight.mul_(-1)
    assert torch.equal(tokens_of(model, None), first)
    linears(model)[0].weight.data.mul_(-1)
    assert torch.equal(tokens_of(model, None), first), "not seen"
    assert not torch.equal(tokens_of(model, "int8"), first), "named again"
    linears(model)[0].weight.data.mul_(-1)
    assert torch.equal(tokens_of(model, "int8"), first)
    for moved in (model.to(torch.float64).float(), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tokens_of(moved, None), first), "the option goes with the model"


@each_name
def test_copies_go_with_the_option_the_patch_and_the_model(family: Callable[..., Any], name: str) -> None:
    def kept() -> int:
        gc.collect()
        return len(products._MADE)

    before = kept()
    model = model_for(family, name)
    tokens_of(model, name)
    assert kept() == before + 1
    tokens_of(model, "none")
    assert kept() == before
    tokens_of(model, name)
    fd.unpatch(model)
    assert kept() == before
    tokens_of(model, name)
    del model
    assert kept() == before


def test_nan_in_a_weight_is_reported(family: Callable[..., Any]) -> None:
    model = family()
    with torch.no_grad():
        linears(model)[3].weight[2, 5] = torch.nan
    with pytest.raises(ValueError, match="logits"):
        tokens_of(model, "int8")


def test_refused(family: Callable[..., Any]) -> None:
    model = family()
    for options, message in (
        ({"quantization": "int4"}, "quantization='int4'; takes one of none, int8, fp8"),
        ({"quantization": "int8", "runtime": "modules"}, "quantization='int8' with runtime='modules'; takes"),
        ({"quantization": "fp8"}, "quantization='fp8': the model is torch.float32; takes bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            fd.patch(model, **options)
    fd.patch(model, quantization="int8")
    handle = linears(model)[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"quantization='int8': a .*Linear has a hook"):
        tokens_of(model, None)
    handle.remove()
    model.double()
    with pytest.raises(ValueError, match=r"the model is torch\.float64; takes float32"):
        tokens_of(model, None)
    width = "mlp_hidden_size" if family is tiny_llada else "intermediate_size"
    narrow = family(**{width: 40}).bfloat16()
    with pytest.raises(ValueError, match="multiples of 16"):
        fd.patch(narrow, quantization="fp8")
