from __future__ import annotations

import copy
import pickle
import random
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import fastdllm_ext as fd
from fastdllm_ext.models import LLaDAConfig
from fastdllm_ext.patching import registry
from kinds import Kind, kinds
from slow_reference import slow_generate
from tiny import MASK, random_prompt, random_rule, random_shape, tiny_llada

ROW = torch.tensor([[4, 5, 6]])


@pytest.fixture(params=kinds(), ids=str)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


def attributes(model: nn.Module) -> list[dict]:
    return [dict(module.__dict__) for module in model.modules()]


def generate_name(model: nn.Module) -> str:
    return registry.find_family(model).generate_name


@pytest.mark.parametrize("seed", range(36))
def test_tokens_are_the_specifications(kind: Kind, seed: int) -> None:
    """The modules of every kind of model, run from outside. (The loop is tested in test_generate.py.)"""
    rng = random.Random(seed)
    model = kind.patched(seed, **random_shape(rng, kind.model_type))
    prompts = [random_prompt(rng) for _ in range(rng.choice([1, 1, 2, 4]))]
    gen_lengths = [rng.randint(1, 60) for _ in prompts]
    settings = {
        "block_length": rng.choice([1, 3, 8, 16, 32]),
        "cache": ("none", "prefix", "dual")[seed % 3],
        "stop_on_eos": rng.random() < 0.7,
        **random_rule(rng, max(gen_lengths)),
    }
    output = fd.generate(model, prompts, gen_length=gen_lengths, **settings)
    for b, (prompt, length) in enumerate(zip(prompts, gen_lengths, strict=True)):
        truth = slow_generate(model, prompt, gen_length=length, **settings)
        assert output.sequences[b, : len(prompt) + length].tolist() == prompt.tolist() + truth.tokens
        assert output.step_map[b, :length].tolist() == truth.step_map
        assert (int(output.nfe[b]), int(output.lengths[b])) == (truth.nfe, len(prompt) + truth.length)


@pytest.mark.parametrize("padded", [False, True])
def test_a_patched_model_called_as_before_returns_the_same_bits(kind: Kind, padded: bool) -> None:
    model = kind.unpatched()
    ids, mask = torch.randint(0, MASK, (2, 30)), None
    if padded:
        mask = torch.ones(2, 30, dtype=torch.bool)
        mask[0, :4] = False
    before = kind.call_unpatched(model, ids, mask)
    assert fd.patch(model) is model
    fd.generate(model, ROW, gen_length=9)
    assert torch.equal(kind.call(model, ids, mask), before)


def test_unpatch_restores_exactly(kind: Kind) -> None:
    model = kind.unpatched()
    before = attributes(model)
    fd.patch(model)
    assert attributes(model) != before
    fd.generate(model, ROW, gen_length=5)
    assert fd.unpatch(model) is model
    assert attributes(model) == before
    assert fd.unpatch(model) is model, "not patched: nothing to do"
    model.__dict__[generate_name(model)] = "the user's own"
    fd.unpatch(fd.patch(model))
    assert model.__dict__[generate_name(model)] == "the user's own"


def test_patch_is_idempotent(kind: Kind) -> None:
    model = kind.patched()
    before = attributes(model)
    fd.patch(model)
    assert attributes(model) == before


def test_a_copy_is_patched_on_its_own(kind: Kind) -> None:
    model = kind.patched()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    fresh = kind.unpatched()
    fresh.load_state_dict(twin.state_dict())
    wanted = fd.generate(fd.patch(fresh), ROW, gen_length=20)
    found = fd.generate(twin, ROW, gen_length=20)
    assert torch.equal(found.confidence, wanted.confidence)
    assert not torch.equal(found.confidence, fd.generate(model, ROW, gen_length=20).confidence)
    assert getattr(twin, generate_name(twin)).__self__ is twin
    fd.unpatch(twin)
    assert fd.generate(model, ROW, gen_length=20).sequences.shape == (1, 23)


def test_saving_writes_the_original_class_and_weights(kind: Kind, tmp_path: Path) -> None:
    model = kind.unpatched()
    with kind.skipping_what_files_cannot("save_pretrained and from_pretrained"):
        model.save_pretrained(tmp_path / "unpatched")
        type(model).from_pretrained(tmp_path / "unpatched")
    fd.generate(fd.patch(model), ROW, gen_length=5)
    model.save_pretrained(tmp_path / "patched")
    names = {p.name for p in (tmp_path / "unpatched").iterdir()}
    assert {p.name for p in (tmp_path / "patched").iterdir()} == names
    for name in names:
        assert (tmp_path / "patched" / name).read_bytes() == (tmp_path / "unpatched" / name).read_bytes()
    again = type(model).from_pretrained(tmp_path / "patched")
    assert type(again) is type(model)
    assert not registry.is_patched(again)
    wanted = model.state_dict()
    assert set(again.state_dict()) == set(wanted)
    assert all(torch.equal(p, wanted[name]) for name, p in again.state_dict().items())
    pickle.loads(pickle.dumps(wanted))


def test_gradients_still_flow(kind: Kind) -> None:
    model = kind.unpatched()
    kind.call_unpatched(model, ROW)
    fd.generate(fd.patch(model), ROW, gen_length=5)
    kind.call(model.train(), ROW).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_generation_in_one_thread_leaves_calls_in_another_alone(kind: Kind) -> None:
    model, ids = kind.unpatched(), torch.randint(0, MASK, (1, 20))
    wanted = kind.call_unpatched(model, ids)
    found = []

    class Meanwhile:
        def on_commit(self, commit: fd.Commit) -> None:
            thread = threading.Thread(target=lambda: found.append(kind.call(model, ids)))
            thread.start()
            thread.join()

        def end(self) -> None:
            pass

    fd.generate(fd.patch(model), ROW, gen_length=6, steps=2, streamer=Meanwhile())
    assert found
    assert all(torch.equal(x, wanted) for x in found)


def test_unsupported_models_are_named() -> None:
    supported = r"Supported: llada \(GSAI-ML/LLaDA-8B-Base, GSAI-ML/LLaDA-8B-Instruct, GSAI-ML/LLaDA-1.5\)"
    with pytest.raises(ValueError, match="model=Linear with model_type=None is not supported. " + supported):
        fd.patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model=str; takes a torch.nn.Module"):
        fd.patch("llada")
    model = fd.unpatch(tiny_llada())
    with pytest.raises(ValueError, match=r"is not patched; call fastdllm_ext.patch\(model\) first"):
        fd.generate(model, ROW)
    model.model.transformer["blocks"][1].up_proj = None
    del model.model.transformer["blocks"][1].up_proj  # as LLaDA-MoE, which also says "llada"
    with pytest.raises(ValueError, match="model=LLaDAModelLM with model_type='llada' is not supported"):
        fd.patch(model)


@pytest.mark.parametrize(
    "key, value", [("alibi", True), ("attention_layer_norm", True), ("scale_logits", True)]
)
def test_unsupported_configurations_are_named(key: str, value: object) -> None:
    model = fd.unpatch(tiny_llada())
    setattr(model.config, key, value)
    before = attributes(model)
    with pytest.raises(ValueError, match=f"model: {key}={value} is not supported for llada"):
        fd.patch(model)
    assert attributes(model) == before
    with pytest.raises(ValueError, match=f"LLaDAConfig: {key}={value}"):
        LLaDAConfig(**{key: value})


def test_supported_models() -> None:
    assert "GSAI-ML/LLaDA-8B-Instruct" in fd.supported_models()["llada"]
