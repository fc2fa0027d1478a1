"""The fused runtime: what it does to the weights, when it is taken, and that it computes the same."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdllm_ext as fd
from fastdllm_ext import forward
from fastdllm_ext.demo_tasks import held_out
from fastdllm_ext.forward import Runs, library_attention
from fastdllm_ext.patching.registry import Options, find_family, patched_family
from fastdllm_ext.runtime import Fused, Modules, choose_runtime, fused
from fastdllm_ext.runtime.weights import join, part
from kinds import Kind, kinds
from tiny import MASK, random_prompt, tiny_dream, tiny_llada

FAMILIES: dict[str, Callable[..., Any]] = {"llada": tiny_llada, "dream": tiny_dream}
ROW = torch.tensor([[4, 5, 6]])


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return FAMILIES[request.param]


def runtime_of(model: nn.Module, choice: str = "auto") -> type:
    found = patched_family(model)
    return choose_runtime(Options(runtime=choice), found, found.parts(model))


def tokens_of(model: nn.Module, runtime: str, **settings: Any) -> Tensor:
    prompts = [random_prompt(random.Random(b), 5, 40) for b in range(3)]
    return fd.generate(fd.patch(model, runtime=runtime), prompts, gen_length=40, **settings).sequences


def storages(model: nn.Module) -> int:
    """Bytes of all that the model's state refers to."""
    return sum(
        {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()
        }.values()
    )


def groups(model: nn.Module) -> list[list[Tensor]]:
    """The parameters that lie behind one another, layer by layer."""
    layers = patched_family(model).parts(model).layers
    modules: list[tuple[Any, ...]] = [
        g for layer in layers for g in ((layer.q, layer.k, layer.v), (layer.gate, layer.up))
    ]
    found = [[m.weight for m in g] for g in modules] + [[m.bias for m in g] for g in modules]
    return [g for g in found if g[0] is not None]


def are_joined(parameters: list[Tensor]) -> bool:
    ends = [p.data_ptr() + p.nbytes for p in parameters]
    return all(end == p.data_ptr() for end, p in zip(ends, parameters[1:], strict=False)) and (
        len({p.untyped_storage().data_ptr() for p in parameters}) == 1
    )


# --- The weights -----------------------------------------------------------------------------------


def test_the_parameters_become_slices_and_stay_what_they_are(family: Callable[..., Any]) -> None:
    model = family()
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    size, keys = storages(model), list(model.state_dict())
    logits = model(ROW).logits
    fd.generate(model, ROW, gen_length=9)
    assert groups(model)
    assert all(map(are_joined, groups(model)))
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.is_leaf
        assert p.requires_grad
    assert storages(model) == size, "no second copy"
    assert list(model.state_dict()) == keys
    assert torch.equal(model(ROW).logits, logits)
    addresses = [p.data_ptr() for p in model.parameters()]
    fd.generate(model, ROW, gen_length=9)
    assert [p.data_ptr() for p in model.parameters()] == addresses, "joined once"


def test_unpatch_gives_each_parameter_its_own_memory_back(family: Callable[..., Any]) -> None:
    model = family()
    fd.generate(model, ROW, gen_length=9)
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    fd.unpatch(model)
    for name, p in model.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.untyped_storage().nbytes() == p.nbytes


def test_unpatch_leaves_slices_of_ones_own(family: Callable[..., Any]) -> None:
    model = fd.patch(family(), runtime="modules")
    layer = patched_family(model).parts(model).layers[0]
    layer.down.weight.data = torch.cat((layer.down.weight.detach(),) * 2)[: len(layer.down.weight)]
    addresses = [p.data_ptr() for p in model.parameters()]
    fd.generate(model, ROW, gen_length=5)
    fd.unpatch(model)
    assert [p.data_ptr() for p in model.parameters()] == addresses


@pytest.mark.parametrize(
    "moved",
    [
        lambda model, _: model.to(torch.float64).float(),
        lambda model, _: copy.deepcopy(model),
        lambda model, _: pickle.loads(pickle.dumps(model)),
        lambda model, _: model.load_state_dict(model.state_dict()) and model,
        lambda model, path: (model.save_pretrained(path), fd.load(path)[0])[1],
    ],
    ids=["to", "deepcopy", "pickle", "load_state_dict", "save_pretrained"],
)
def test_a_model_that_was_moved_is_joined_again(
    family: Callable[..., Any], moved: Callable[..., Any], tmp_path: Path
) -> None:
    model = family()
    wanted = tokens_of(model, "fused", steps=20)
    state = {name: p.clone() for name, p in model.state_dict().items()}
    model = moved(model, tmp_path)
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items())
    assert torch.equal(tokens_of(model, "fused", steps=20), wanted)
    assert all(map(are_joined, groups(model)))


def test_a_training_step_changes_what_is_generated_from(family: Callable[..., Any]) -> None:
    model = family()
    tokens_of(model, "fused", steps=20)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randint(0, MASK, (2, 30))).logits.logsumexp(-1).mean().backward()
        optimizer.step()
    assert all(map(are_joined, groups(model)))
    assert torch.equal(tokens_of(model, "fused", steps=20), tokens_of(model, "modules", steps=20))


def test_joining_and_parting() -> None:
    a, b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(2, 4))
    wanted = torch.cat((a, b)).detach()
    c = nn.Parameter(torch.randn(5))
    whole, last = join([[a, b], [c]])
    assert torch.equal(whole, wanted)
    assert torch.equal(last, c)
    assert whole.data_ptr() == a.data_ptr()
    assert last.data_ptr() == c.data_ptr() == whole.data_ptr() + whole.nbytes
    assert [x.data_ptr() for x in join([[a, b], [c]])] == [whole.data_ptr(), last.data_ptr()]
    assert not whole.requires_grad
    part([[b, a]])
    assert a.data_ptr() == whole.data_ptr(), "not joined in this order"
    part([[a, b], [c]])
    assert torch.equal(torch.cat((a, b)), wanted)
    assert b.untyped_storage().nbytes() == b.nbytes
    # Neighbours in another order are no neighbours here.
    join([[b, a]])
    assert torch.equal(join([[a, b]])[0], wanted)


# --- Which runtime ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", kinds(), ids=str)
def test_every_kind_of_model_is_fused(kind: Kind) -> None:
    assert runtime_of(kind.patched()) is Fused


class Adapter(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


class Scaled(nn.Linear): ...


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts a module in the place of another."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if child is old:
                setattr(module, name, new)


def turn_bias(linear: Any) -> None:
    linear.bias = nn.Parameter(torch.zeros(linear.out_features)) if linear.bias is None else None


def stride(linear: Any) -> None:
    linear.weight = nn.Parameter(linear.weight.T.contiguous().T)


# What is done to a model with the modules of one layer; and what `runtime="fused"` says to it.
OBSTACLES: dict[str, tuple[Callable[[nn.Module, Any], object], str]] = {
    "adapter": (
        lambda m, at: replace(m, at.q, Adapter(at.q)),
        "Adapter stands in the place of torch.nn.Linear",
    ),
    "subclass": (
        lambda m, at: setattr(at.o, "__class__", Scaled),
        "Scaled stands in the place of torch.nn.Linear",
    ),
    "hook": (lambda m, at: at.v.register_forward_hook(lambda *_: None), "Linear has a hook"),
    "pre-hook": (lambda m, at: at.up.register_forward_pre_hook(lambda *_: None), "Linear has a hook"),
    "norm's hook": (lambda m, at: at.mlp_norm.register_forward_hook(lambda *_: None), "RMSNorm has a hook"),
    "forward": (lambda m, at: setattr(at.k, "forward", at.k.forward), "or a forward of its own"),
    "bias": (lambda m, at: turn_bias(at.k), "of q, k, v some have a bias and some have none"),
    "strides": (lambda m, at: stride(at.q), "not a plain contiguous tensor"),
    "tied": (lambda m, at: setattr(at.up, "weight", at.gate.weight), "a weight serves in two places"),
    "dtypes": (lambda m, at: at.down.to(torch.float64), "several dtypes or devices"),
    "shared": (lambda m, at: at.down.share_memory(), "shared between processes"),
    "layer norm": (
        lambda m, at: replace(m, at.attn_norm, nn.LayerNorm(32)),
        "LayerNorm is not one of the norms",
    ),
    "torch's norm": (
        lambda m, at: replace(m, at.mlp_norm, nn.RMSNorm(32)),
        "RMSNorm is not one of the norms",
    ),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_the_fused_runtime_does_not_know_is_left_to_the_modules(
    family: Callable[..., Any], obstacle: str
) -> None:
    """And ``runtime="fused"`` says what stands in the way; the model is then as it was."""
    change, message = OBSTACLES[obstacle]
    model = family(patched=False)
    change(model, find_family(model).parts(model).layers[1])
    before = [dict(module.__dict__) for module in model.modules()]
    with pytest.raises(ValueError, match=f"runtime='fused': .*{message}"):
        fd.patch(model, runtime="fused")
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert runtime_of(fd.patch(model)) is Modules
    if obstacle != "dtypes":  # which no runtime takes
        addresses = [p.data_ptr() for p in model.parameters()]
        fd.generate(model, ROW, gen_length=5)
        assert [p.data_ptr() for p in model.parameters()] == addresses


def test_global_hooks_and_hooks_on_the_embedding_and_the_head(family: Callable[..., Any]) -> None:
    model = family()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert runtime_of(model) is Modules
    handle.remove()
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert runtime_of(model) is Fused
        handle = module.register_forward_hook(lambda *_: None)
        assert runtime_of(model) is Modules
        handle.remove()


def test_a_hook_that_comes_later_runs(family: Callable[..., Any]) -> None:
    model = family()
    fd.generate(model, ROW, gen_length=5)
    seen: list[int] = []
    handle = patched_family(model).parts(model).layers[0].q.register_forward_hook(lambda *_: seen.append(1))
    nfe = int(fd.generate(model, ROW, gen_length=5).nfe)
    assert len(seen) == nfe
    handle.remove()
    fd.generate(model, ROW, gen_length=5)
    assert len(seen) == nfe
    assert all(map(are_joined, groups(model)))


def test_the_choice_is_kept_until_another_is_made(family: Callable[..., Any]) -> None:
    model = fd.patch(family(), runtime="modules")
    assert fd.patch(model) is model
    addresses = [p.data_ptr() for p in model.parameters()]
    fd.generate(model, ROW, gen_length=5)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    fd.patch(model, runtime="auto")
    fd.generate(model, ROW, gen_length=5)
    assert all(map(are_joined, groups(model)))
    with pytest.raises(ValueError, match="runtime='fast'; takes one of auto, fused, modules"):
        fd.patch(model, runtime="fast")  # type: ignore[arg-type]


# --- What it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_long_rows_in_chunks(
    family: Callable[..., Any], cache: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family()
    wanted = tokens_of(model, "modules", steps=20, cache=cache)
    monkeypatch.setattr(fused, "CHUNK", chunk)
    assert torch.equal(tokens_of(model, "fused", steps=20, cache=cache), wanted)


@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_the_last_layer_attends_for_the_blocks_alone(
    family: Callable[..., Any], cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, queries = family(), []
    read = forward.Attention.read

    def spy(self: Any, layer: int, q: Tensor, wanted: bool = False) -> Tensor:
        queries.append((layer, len(q)))
        return read(self, layer, q, wanted)

    monkeypatch.setattr(forward.Attention, "read", spy)
    fd.generate(model, torch.randint(0, MASK, (1, 50)), gen_length=32, block_length=8, cache=cache, steps=8)
    assert max(n for layer, n in queries if layer == 0) == 82
    assert max(n for layer, n in queries if layer == 1) == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("wanted", [False, True])
def test_the_librarys_attention_is_that_of_the_pages(kv_heads: int, wanted: bool, dtype: torch.dtype) -> None:
    """As a refresh on a GPU takes it: ragged sequences, all queries or a few of each."""
    torch.manual_seed(0)
    lengths, page = [5, 64, 33], 32
    cache = fd.PagedKVCache(1, kv_heads, 16, num_pages=8, page_size=page, dtype=dtype)
    table = cache.block_table(cache.add(lengths))
    k_pages, v_pages = cache.layer(0)
    scales = [] if dtype == torch.float32 else [x.uniform_(0.5, 2) for x in cache.scale_storage[0][0]]
    for pages in (k_pages, v_pages):
        pages.copy_(torch.randn(pages.shape))
    keys, queries = Runs.of(lengths), Runs.of([2, 9, 1] if wanted else lengths)
    q = torch.randn(queries.offsets[-1], 4, 16)
    found = library_attention(q, k_pages, v_pages, table, keys, queries, 0.3, *scales)
    kv_lens = torch.tensor(lengths, dtype=torch.int32)
    truth = fd.ops.paged_attention(
        q, k_pages, v_pages, table, kv_lens, queries.cu, queries.longest, 0.3, *scales
    )
    torch.testing.assert_close(found, truth)


def test_bfloat16_agrees_nearly_always() -> None:
    """On the bundled model. Sums of another order change what lies within a rounding of another choice."""
    model, tokenizer = fd.load(fd.demo_model_path(), dtype=torch.bfloat16)
    prompts = [tokenizer(p.prompt, return_tensors="pt").input_ids[0] for p in held_out(54)]
    answers = [
        fd.generate(fd.patch(model, runtime=runtime), prompts, gen_length=96, block_length=16).sequences
        for runtime in ("fused", "modules")
    ]
    assert (answers[0] == answers[1]).all(1).float().mean() >= 0.95


def test_a_context_of_32768_positions() -> None:
    """A row of that length runs; test_memory.py has what long rows need."""
    model = tiny_llada(max_sequence_length=32768, n_layers=1)
    prompt = torch.randint(2, MASK, (1, 32768 - 32))
    output = fd.generate(model, prompt, gen_length=32, steps=2, stop_on_eos=False)
    assert output.sequences.shape == (1, 32768)
    assert not bool((output.sequences == MASK).any())
