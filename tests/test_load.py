from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

import fastdllm_ext as fd
from fastdllm_ext.compat import dtype_argument
from fastdllm_ext.models import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM
from tiny import tiny_dream, tiny_llada

ROW = torch.tensor([[4, 5, 6]])
LOADING = importlib.import_module("fastdllm_ext.load")  # the package's attribute is the function

# config.json of GSAI-ML/LLaDA-8B-Instruct: its keys, with smaller sizes.
LLADA_KEYS = {
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

# State-dict names of the official checkpoints, for two blocks.
LLADA_NAMES = {
    "model.transformer.wte.weight", "model.transformer.ln_f.weight", "model.transformer.ff_out.weight",
    *(f"model.transformer.blocks.{i}.{part}.weight" for i in range(2) for part in (
        "attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")),
}  # fmt: skip

# config.json of Dream-org/Dream-v0-Instruct-7B: its keys, with smaller sizes.
DREAM_KEYS = {
    "architectures": ["DreamModel"], "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 1, "eos_token_id": 1, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.02,
    "intermediate_size": 48, "mask_token_id": 63, "max_position_embeddings": 256, "max_window_layers": 2,
    "model_type": "Dream", "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2,
    "pad_token_id": 1, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000.0,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2", "use_cache": True, "use_sliding_window": False, "vocab_size": 64,
}  # fmt: skip

DREAM_NAMES = {
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    *(f"model.layers.{i}.{part}" for i in range(2) for part in (
        "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.o_proj.weight",
        "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
        *(f"self_attn.{x}_proj.{kind}" for x in "qkv" for kind in ("weight", "bias")))),
}  # fmt: skip

# generation_config.json of Dream-org/Dream-v0-Instruct-7B, with smaller token ids.
DREAM_GENERATION = {
    "_from_model_config": True, "alg": "origin", "alg_temp": None, "bos_token_id": 1, "eos_token_id": 1,
    "eps": 0.001, "mask_token_id": None, "output_history": False, "pad_token_id": 1, "steps": 512,
    "temperature": 0.0, "top_k": None, "top_p": None, "transformers_version": "4.46.2",
}  # fmt: skip

# Settings of ours beside those of transformers.
OWN_GENERATION = {
    "eos_token_id": [1, 2],
    "pad_token_id": 1,
    "fastdllm": {"block_length": 8, "threshold": 0.9, "cache": "dual", "stop": ["a", "b"]},
}


@dataclass(frozen=True)
class Official:
    """A family's published checkpoints."""

    model: type[PreTrainedModel]
    config: type[PretrainedConfig]
    keys: dict[str, Any]
    names: set[str]
    tiny: Callable[..., Any]
    autos: tuple[Any, ...]
    missing: str  # a tensor's name to leave out
    embedding: str
    head: str
    tie: str
    sizes: dict[str, int]  # of a smaller model
    changes: dict[str, Any] = field(default_factory=dict)  # of the tiny model, as `keys` say

    def __str__(self) -> str:
        return self.model.__name__


OFFICIAL = [
    Official(
        LLaDAModelLM, LLaDAConfig, LLADA_KEYS, LLADA_NAMES, tiny_llada, (AutoModel, AutoModelForCausalLM),
        "model.transformer.ln_f.weight", "model.transformer.wte.weight", "model.transformer.ff_out.weight",
        "weight_tying", {"d_model": 64, "n_heads": 4, "n_layers": 3, "mlp_hidden_size": 100},
        {"rope_theta": 500000.0},
    ),
    Official(
        DreamModel, DreamConfig, DREAM_KEYS, DREAM_NAMES, tiny_dream,
        (AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM),
        "model.layers.1.self_attn.k_proj.bias", "model.embed_tokens.weight", "lm_head.weight",
        "tie_word_embeddings", {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3},
        {"rope_theta": 1000000.0},
    ),
]  # fmt: skip
both = pytest.mark.parametrize("official", OFFICIAL, ids=str)


def write_checkpoint(folder: Path, official: Official, weights: dict[str, torch.Tensor], **keys: Any) -> None:
    """A folder laid out as the official ones: config.json with their keys, sharded safetensors, an index."""
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in shards.items():
        save_file({n: weights[n] for n in part}, folder / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": sum(w.numel() * 2 for w in weights.values())},
        "weight_map": {n: file for file, part in shards.items() for n in part},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(official.keys | keys))


def official_weights(official: Official, **changes: Any) -> dict[str, torch.Tensor]:
    state = official.tiny(**(official.changes | changes)).state_dict()
    return {name: p.to(torch.bfloat16) for name, p in state.items()}


@pytest.fixture
def checkpoint(tmp_path: Path, official: Official) -> Path:
    write_checkpoint(tmp_path, official, official_weights(official))
    return tmp_path


@both
def test_loads_a_folder_like_the_official_ones(checkpoint: Path, official: Official) -> None:
    model, tokenizer = fd.load(checkpoint)
    assert tokenizer is None
    assert model.generation_config is None
    assert type(model) is official.model
    assert set(model.state_dict()) == official.names
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (2, 32)
    wanted = official.tiny(**official.changes, dtype=torch.bfloat16)
    assert all(torch.equal(p, wanted.state_dict()[name]) for name, p in model.state_dict().items())
    assert torch.equal(model(ROW).logits, wanted(ROW).logits)
    output = fd.generate(model, ROW, gen_length=16)
    assert torch.equal(output.sequences, fd.generate(wanted, ROW, gen_length=16).sequences)


@both
def test_dtype_can_be_chosen(checkpoint: Path, official: Official) -> None:
    model, _ = fd.load(str(checkpoint), dtype=torch.float32, device="cpu")
    assert model.dtype == torch.float32


@both
def test_auto_classes_find_ours_without_remote_code(checkpoint: Path, official: Official) -> None:
    assert isinstance(AutoConfig.from_pretrained(checkpoint), official.config)
    for auto in official.autos:
        assert type(auto.from_pretrained(checkpoint)) is official.model


@both
def test_configuration_round_trip(tmp_path: Path, official: Official) -> None:
    config = official.config(**official.sizes, eos_token_id=[1, 2])
    config.save_pretrained(tmp_path)
    again = official.config.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.num_key_value_heads == 4
    assert again.eos_token_id == [1, 2]
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == official.keys["model_type"]


@both
def test_official_configuration_keys_survive(checkpoint: Path, official: Official, tmp_path: Path) -> None:
    """What the Hub's own code reads is there again after saving."""
    official.config.from_pretrained(checkpoint).save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    unread = {"torch_dtype", "transformers_version", "auto_map", "rope_scaling"}
    defaults = official.config().to_dict()
    for key in official.keys.keys() - unread:
        assert saved.get(key, defaults.get(key)) == official.keys[key], key


@both
@pytest.mark.parametrize("fault", ["missing keys", "unexpected keys", "mismatch"])
def test_weights_that_do_not_fit_are_an_error(tmp_path: Path, official: Official, fault: str) -> None:
    """Never random numbers in place of a missing tensor."""
    weights = official_weights(official)
    if fault == "missing keys":
        del weights[official.missing]
    elif fault == "unexpected keys":
        weights["model.wpe.weight"] = torch.zeros(3)
    else:
        weights[official.embedding] = weights[official.embedding][:5].clone()
    write_checkpoint(tmp_path, official, weights)
    with pytest.raises((ValueError, RuntimeError), match=fault):
        fd.load(tmp_path)


@both
@pytest.mark.parametrize("tied", [False, True])
def test_saving_and_loading_again(tmp_path: Path, official: Official, tied: bool) -> None:
    model = official.tiny(**{official.tie: tied})
    model.generation_config = GenerationConfig(eos_token_id=1)
    model.save_pretrained(tmp_path)
    stored = set(load_file(tmp_path / "model.safetensors"))
    assert stored == set(model.state_dict()) - ({official.head} if tied else set())
    again, _ = fd.load(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())
    assert torch.equal(again(ROW).logits, model(ROW).logits)
    head, embedding = again.get_output_embeddings(), again.get_input_embeddings()
    assert (head.weight is embedding.weight) == tied
    assert again.generation_config.eos_token_id == 1


def test_a_tied_checkpoint_may_hold_its_head_too(tmp_path: Path) -> None:
    dream = OFFICIAL[1]
    weights = {n: p.clone() for n, p in official_weights(dream, tie_word_embeddings=True).items()}
    assert "lm_head.weight" in weights
    write_checkpoint(tmp_path, dream, weights, tie_word_embeddings=True)
    model, _ = fd.load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@both
@pytest.mark.parametrize("settings", [DREAM_GENERATION, OWN_GENERATION], ids=["dream", "own"])
def test_generation_config_is_remembered(
    checkpoint: Path, official: Official, settings: dict, tmp_path: Path
) -> None:
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    model, _ = fd.load(checkpoint)
    assert isinstance(model.generation_config, GenerationConfig)
    public = {k: v for k, v in settings.items() if not k.startswith("_")}
    assert {k: getattr(model.generation_config, k) for k in public} == public
    assert not model.generation_config._from_model_config, "transformers would drop its unknown keys"
    model.save_pretrained(tmp_path / "again")
    again, _ = fd.load(tmp_path / "again")
    del public["transformers_version" if "transformers_version" in public else "fastdllm"]
    assert {k: getattr(again.generation_config, k, None) for k in public} == public
    if settings is OWN_GENERATION:
        assert again.generation_config.fastdllm == settings["fastdllm"]


@both
def test_only_the_main_process_writes_the_generation_config(tmp_path: Path, official: Official) -> None:
    model = official.tiny()
    assert model.generation_config is None
    model.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none" / "generation_config.json").exists()
    model.generation_config = GenerationConfig(eos_token_id=1)
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "generation_config.json").exists()


@both
def test_device_map_or_device(checkpoint: Path, official: Official, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device='cpu' and device_map='auto'; takes one of them"):
        fd.load(checkpoint, device="cpu", device_map="auto")
    monkeypatch.setattr(LOADING, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="device_map needs the accelerate package"):
        fd.load(checkpoint, device_map="auto")


@both
def test_device_map_is_from_pretraineds(
    checkpoint: Path, official: Official, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Handed on as it is, and the model is left where that put it."""
    wanted, real, found = official.tiny(), official.model.from_pretrained, []

    def from_pretrained(where: str, **kwargs: Any) -> Any:
        found.append(kwargs.pop("device_map", None))
        return real(where, **kwargs)

    monkeypatch.setattr(LOADING, "find_spec", lambda name: name)
    monkeypatch.setattr(official.model, "from_pretrained", from_pretrained)
    monkeypatch.setattr(official.model, "to", lambda *args: pytest.fail("moved"))
    model, _ = fd.load(checkpoint, device_map={"": "cpu"})
    assert found == [{"": "cpu"}]
    assert model.state_dict().keys() == wanted.state_dict().keys()


@both
def test_device_map_with_accelerate(checkpoint: Path, official: Official, tmp_path: Path) -> None:
    """A layer on disk: hooks move it in for its turn, and its inputs to it."""
    pytest.importorskip("accelerate")
    wanted, _ = fd.load(checkpoint, device="cpu")
    layer = "model.transformer.blocks.1" if official.model is LLaDAModelLM else "model.layers.1"
    parts = {name.rsplit(".", 1)[0] for name in official.names if not name.startswith(layer)}
    device_map = dict.fromkeys(parts, "cpu") | {layer: "disk"}
    model = official.model.from_pretrained(
        checkpoint, device_map=device_map, offload_folder=tmp_path / "offload", **dtype_argument("auto")
    )
    assert {str(p.device) for p in model.parameters()} == {"cpu", "meta"}
    assert torch.equal(model(ROW).logits, wanted(ROW).logits)
    whole, _ = fd.load(checkpoint, device_map="cpu")
    assert torch.equal(whole(ROW).logits, wanted(ROW).logits)


@both
@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["LLaDAMoEModelLM"]},
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        {"architectures": None},
    ],
)
def test_other_models_are_named(checkpoint: Path, official: Official, changes: dict) -> None:
    (checkpoint / "config.json").write_text(json.dumps(official.keys | changes))
    with pytest.raises(
        ValueError, match=r"is not supported. Supported: llada \(GSAI-ML.*; dream \(Dream-org"
    ):
        fd.load(checkpoint)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        fd.load(tmp_path / "nothing")


# ---- tokenizers --------------------------------------------------------------------------------------------

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>"]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
TEXT = "<|im_start|>the cat's 1234 <|mask|>cafe\u0301 <|beginoftext|><|im_end|>\n\n"


def byte_level_bpe() -> Tokenizer:
    """A small tokenizer that splits and normalises as Dream's does; the special tokens are not in it."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(["the cat's mat and the other cats that sat there"] * 3, trainer)
    return bpe


def write_tokenizer(folder: Path, layout: str) -> Tokenizer:
    """Dream's files: vocab.json, merges.txt and the configuration of a class that is remote code.

    ``layout`` "json" has tokenizer.json in place of the first two; "jinja" the chat template in its own file.
    """
    bpe = byte_level_bpe()
    first = bpe.get_vocab_size()
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(first + i): {"content": text, **entry} for i, text in enumerate(SPECIAL)
        },
        "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|beginoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "mask_token": "<|mask|>",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "DreamTokenizer",
        "unk_token": None,
    }
    if layout == "jinja":
        (folder / "chat_template.jinja").write_text(CHATML)
    else:
        settings["chat_template"] = CHATML
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if layout != "json":
        bpe.model.save(str(folder))
        (folder / "added_tokens.json").write_text(
            json.dumps({text: first + i for i, text in enumerate(SPECIAL)})
        )
    bpe.add_special_tokens(SPECIAL)
    if layout == "json":
        bpe.normalizer = normalizers.Sequence([])  # its own, which must be honoured
        bpe.save(str(folder / "tokenizer.json"))
    return bpe


@pytest.mark.parametrize("layout", ["bpe", "json", "jinja"])
def test_dreams_tokenizer_needs_no_remote_code(tmp_path: Path, layout: str) -> None:
    write_checkpoint(tmp_path, OFFICIAL[1], official_weights(OFFICIAL[1]))
    wanted = write_tokenizer(tmp_path, layout)
    _, tokenizer = fd.load(tmp_path)
    assert tokenizer is not None
    assert tokenizer(TEXT)["input_ids"] == wanted.encode(TEXT).ids
    text = TEXT if layout == "json" else TEXT.replace("e\u0301", "é")
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == text
    assert tokenizer.convert_tokens_to_ids(SPECIAL) == [wanted.token_to_id(text) for text in SPECIAL]
    assert len(tokenizer) == wanted.get_vocab_size()
    plain = tokenizer.decode(wanted.encode(TEXT).ids, skip_special_tokens=True)
    assert plain.replace("e\u0301", "é") == "the cat's 1234 café \n\n"
    assert (tokenizer.mask_token, tokenizer.bos_token) == ("<|mask|>", "<|beginoftext|>")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    with_template = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_tensors="pt")
    ids = with_template if isinstance(with_template, torch.Tensor) else with_template["input_ids"]
    assert ids[0].tolist() == wanted.encode("<|im_start|>user\nhi<|im_end|>\n").ids


def test_a_tokenizer_without_its_vocabulary_is_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, OFFICIAL[1], official_weights(OFFICIAL[1]))
    write_tokenizer(tmp_path, "bpe")
    (tmp_path / "merges.txt").unlink()
    with pytest.raises((ValueError, OSError)):
        fd.load(tmp_path)
