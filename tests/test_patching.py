from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import fastdllm_ext as fd
from fastdllm_ext.models import LLaDAConfig, LLaDAModelLM
from tiny import MASK, tiny_llada

ROW = torch.tensor([[4, 5, 6]])


def attributes(model: nn.Module) -> list[dict]:
    return [dict(module.__dict__) for module in model.modules()]


def test_a_patched_model_called_as_before_returns_the_same_bits() -> None:
    model = fd.unpatch(tiny_llada())
    ids, mask = torch.randint(0, MASK, (2, 30)), torch.ones(2, 30)
    mask[0, :4] = 0
    before = [model(ids).logits, model(ids, attention_mask=mask).logits]
    assert fd.patch(model) is model
    fd.generate(model, ROW, gen_length=9)
    after = [model(ids).logits, model(ids, attention_mask=mask).logits]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_unpatch_restores_exactly() -> None:
    model = LLaDAModelLM(tiny_llada().config)  # never patched before
    before = attributes(model)
    fd.patch(model)
    assert attributes(model) != before
    assert fd.unpatch(model) is model
    assert attributes(model) == before
    assert fd.unpatch(model) is model, "not patched: nothing to do"
    model.generate = "the user's own"
    fd.unpatch(fd.patch(model))
    assert model.__dict__["generate"] == "the user's own"


def test_patch_is_idempotent() -> None:
    model = tiny_llada()
    before = attributes(model)
    fd.patch(model)
    assert attributes(model) == before


def test_a_copy_is_patched_on_its_own() -> None:
    model = tiny_llada()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(1.1)
    alone = fd.generate(twin, ROW, gen_length=20).sequences
    assert torch.equal(twin.generate(ROW, gen_length=20).sequences, alone)
    assert twin.generate.__self__ is twin
    fd.unpatch(twin)
    assert fd.generate(model, ROW, gen_length=20).sequences.shape == (1, 23)


def test_saving_writes_the_original_class_and_weights(tmp_path) -> None:
    model = tiny_llada()
    model.save_pretrained(tmp_path)
    again = LLaDAModelLM.from_pretrained(tmp_path)
    assert type(again) is LLaDAModelLM
    assert {k: v.sum() for k, v in again.state_dict().items()} == {
        k: v.sum() for k, v in model.state_dict().items()
    }
    pickle.loads(pickle.dumps(model.state_dict()))


def test_gradients_still_flow() -> None:
    model = tiny_llada()
    fd.generate(model, ROW, gen_length=5)
    model.train()(ROW).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_generation_in_one_thread_leaves_calls_in_another_alone() -> None:
    model, ids = tiny_llada(), torch.randint(0, MASK, (1, 20))
    wanted = model(ids).logits
    found = []

    class Meanwhile:
        def on_commit(self, commit: fd.Commit) -> None:
            thread = threading.Thread(target=lambda: found.append(model(ids).logits))
            thread.start()
            thread.join()

        def end(self) -> None:
            pass

    fd.generate(model, ROW, gen_length=6, steps=2, streamer=Meanwhile())
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
