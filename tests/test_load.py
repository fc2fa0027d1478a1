from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import fastdllm_ext as fd
from fastdllm_ext.models import LLaDAConfig, LLaDAModelLM
from tiny import tiny_llada

ROW = torch.tensor([[4, 5, 6]])

# config.json of GSAI-ML/LLaDA-8B-Instruct: its keys, with smaller sizes.
OFFICIAL_KEYS = {
    "activation_type": "silu", "alibi": False, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": False, "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False, "block_group_size": 1, "block_type": "llama", "d_model": 32,
    "embedding_dropout": 0.0, "embedding_size": 64, "eos_token_id": 1, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_cutoff_factor": None, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.02, "input_emb_norm": False, "layer_norm_type": "rms",
    "layer_norm_with_affine": True, "mask_token_id": 63, "max_sequence_length": 256, "mlp_hidden_size": 48,
    "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": None, "n_heads": 4, "n_kv_heads": 4,
    "n_layers": 2, "pad_token_id": 1, "precision": "amp_bf16", "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05, "rope": True, "rope_full_precision": True, "rope_theta": 500000.0,
    "scale_logits": False, "transformers_version": "4.46.3", "use_cache": False, "vocab_size": 64,
    "weight_tying": False, "torch_dtype": "bfloat16",
}  # fmt: skip

# State-dict names of the official checkpoints, for one block.
OFFICIAL_NAMES = {
    "model.transformer.wte.weight", "model.transformer.ln_f.weight", "model.transformer.ff_out.weight",
    *(f"model.transformer.blocks.{i}.{part}.weight" for i in range(2) for part in (
        "attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")),
}  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A folder laid out as the official ones: config.json with their keys, sharded safetensors, an index."""
    weights = {name: p.to(torch.bfloat16) for name, p in tiny_llada(rope_theta=500000.0).state_dict().items()}
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({n: weights[n] for n in part}, tmp_path / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(w.numel() * 2 for w in weights.values())},
        "weight_map": {n: file for file, part in shards.items() for n in part},
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL_KEYS))
    return tmp_path


def test_loads_a_folder_like_the_official_ones(checkpoint: Path) -> None:
    model, tokenizer = fd.load(checkpoint)
    assert tokenizer is None
    assert type(model) is LLaDAModelLM
    assert set(model.state_dict()) == OFFICIAL_NAMES
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 32)
    wanted = tiny_llada(rope_theta=500000.0, dtype=torch.bfloat16)
    assert all(torch.equal(p, wanted.state_dict()[name]) for name, p in model.state_dict().items())
    output = model.generate(ROW, gen_length=16)
    assert torch.equal(output.sequences, fd.generate(wanted, ROW, gen_length=16).sequences)


def test_dtype_can_be_chosen(checkpoint: Path) -> None:
    model, _ = fd.load(str(checkpoint), dtype=torch.float32, device="cpu")
    assert model.dtype == torch.float32


def test_auto_classes_find_ours_without_remote_code(checkpoint: Path) -> None:
    assert isinstance(AutoConfig.from_pretrained(checkpoint), LLaDAConfig)
    for auto in (AutoModel, AutoModelForCausalLM):
        assert type(auto.from_pretrained(checkpoint)) is LLaDAModelLM


def test_configuration_round_trip(tmp_path: Path) -> None:
    config = LLaDAConfig(d_model=64, n_heads=4, n_layers=3, mlp_hidden_size=100, eos_token_id=[1, 2])
    config.save_pretrained(tmp_path)
    again = LLaDAConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.n_kv_heads == 4


@pytest.mark.parametrize(
    "key, message", [("ln_f", "missing keys"), (None, "unexpected keys"), ("wte", "mismatch")]
)
def test_weights_that_do_not_fit_are_an_error(checkpoint: Path, key: str | None, message: str) -> None:
    """Never random numbers in place of a missing tensor."""
    for file in checkpoint.glob("*.safetensors"):
        weights = load_file(file)
        if key is None:
            weights["model.transformer.wpe.weight"] = torch.zeros(3)
        for name in [n for n in weights if key and key in n]:
            weights[name] = weights[name][:5].clone()
            if message == "missing keys":
                del weights[name]
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
        index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
        index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != file.name or n in weights}
        if key is None:
            index["weight_map"]["model.transformer.wpe.weight"] = file.name
        save_file(weights, file, metadata={"format": "pt"})
        (checkpoint / "model.safetensors").unlink()
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, RuntimeError), match=message):
        fd.load(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LLaDAMoEModelLM"]},
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        {"architectures": None},
    ],
)
def test_other_models_are_named(checkpoint: Path, changes: dict) -> None:
    (checkpoint / "config.json").write_text(json.dumps(OFFICIAL_KEYS | changes))
    with pytest.raises(ValueError, match=r"is not supported. Supported: llada \(GSAI-ML"):
        fd.load(checkpoint)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        fd.load(tmp_path / "nothing")
