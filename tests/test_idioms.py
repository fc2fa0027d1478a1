"""What users of transformers and torch do with a model works on a patched one.

Settings in files, streamers, tokenizers, modes, torch.compile, copies, accelerate, quantised and wrapped
layers.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import TextIteratorStreamer, TextStreamer

import fastdllm_ext as fd
from fastdllm_ext.generate import defaults_of
from fastdllm_ext.patching import registry
from test_load import OFFICIAL, official_weights, write_checkpoint, write_tokenizer
from tiny import EOS, MASK, VOCAB, tiny_dream, tiny_llada

Tiny = Callable[..., Any]

ROW = torch.tensor([[4, 5, 6, 9]])
SETTINGS: dict[str, Any] = {"gen_length": 24, "block_length": 8, "threshold": 0.2}


@pytest.fixture(params=[tiny_llada, tiny_dream], ids=["llada", "dream"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return request.param


def generated(model: Any, row: torch.Tensor = ROW, **settings: Any) -> fd.GenerationOutput:
    return fd.generate(model, row, **(SETTINGS | settings))


def assert_same(found: fd.GenerationOutput, wanted: fd.GenerationOutput, error: float = 1e-5) -> None:
    """Same tokens in the same steps; confidences as close as float32 in another order of summing."""
    for name in ("sequences", "lengths", "nfe", "step_map"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    torch.testing.assert_close(found.confidence, wanted.confidence, rtol=10 * error, atol=error)


def is_dream(model: Any) -> bool:
    return registry.find_family(model).shift


# --- Settings in files -----------------------------------------------------------------------------

EVERY_FIELD: list[dict[str, Any]] = [
    {"gen_length": 24, "steps": 6, "schedule": "linear", "eps": 0.01, "alg_temp": 0.5, "top_p": 0.9,
     "top_k": 5, "eos_token_id": 3, "seed": 7, "suffix": 4},
    {"gen_length": [24, 3], "block_length": 8, "threshold": 0.5, "remasking": "margin", "temperature": 0.7,
     "cache": "prefix", "refresh": 2, "window": (1, 2), "stop_on_eos": False, "mask_token_id": 2,
     "eos_token_id": [3, 4], "pad_token_id": 5, "seed": [1, 2]},
    {"factor": 1.5, "cfg_scale": 0.5, "infill": True},
    {"rule": {"name": "klass", "kl": 0.1}},
    {},
]  # fmt: skip


def test_settings_survive_dictionaries_and_files(tmp_path: Path) -> None:
    assert set().union(*EVERY_FIELD) == {f.name for f in dataclasses.fields(fd.GenerationConfig)}
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [1, 7], "alg": "origin"}))
    for values in EVERY_FIELD:
        config = fd.GenerationConfig(**values)
        assert fd.GenerationConfig.from_dict(config.to_dict()) == config
        assert set(config.to_dict()) == set(values)
        config.save_pretrained(tmp_path)
        assert fd.GenerationConfig.from_pretrained(tmp_path) == config
        held = json.loads(path.read_text())
        assert (held.pop("fastdllm"), held) == (config.to_dict(), {"eos_token_id": [1, 7], "alg": "origin"})
    fd.GenerationConfig(gen_length=9).save_pretrained(tmp_path / "a new folder")
    assert fd.GenerationConfig.from_pretrained(str(tmp_path / "a new folder")).gen_length == 9


def test_unknown_keys_are_named(tmp_path: Path) -> None:
    unknown = {"fastdllm": {"treshold": 0.9, "gen_length": 4, "blocks": 2}}
    (tmp_path / "generation_config.json").write_text(json.dumps(unknown))
    with pytest.raises(TypeError, match="GenerationConfig: unknown 'blocks', 'treshold'; takes alg_temp"):
        fd.GenerationConfig.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="unknown 'max_new_tokens'"):
        fd.GenerationConfig.from_dict({"max_new_tokens": 4})
    with pytest.raises(OSError):
        fd.GenerationConfig.from_pretrained(tmp_path / "nothing")


def test_settings_of_a_folder_are_the_defaults(tiny: Tiny, tmp_path: Path) -> None:
    """Keyword arguments win, and a rule among them replaces the folder's; all of it survives saving again."""
    tiny().save_pretrained(tmp_path / "first")
    plain = tiny()
    settings = {"gen_length": 20, "block_length": 8, "steps": 10, "schedule": "linear", "cache": "prefix"}
    fd.GenerationConfig(**settings).save_pretrained(tmp_path / "first")
    fd.load(tmp_path / "first")[0].save_pretrained(tmp_path / "second")
    rule = {"gen_length": 20, "block_length": 8, "threshold": 0.2, "cache": "prefix"}
    for folder in ("first", "second"):
        model, _ = fd.load(tmp_path / folder, device="cpu")
        assert_same(fd.generate(model, ROW), fd.generate(plain, ROW, **settings))
        assert_same(
            fd.generate(model, ROW, block_length=5), fd.generate(plain, ROW, **settings | {"block_length": 5})
        )
        assert_same(fd.generate(model, ROW, threshold=0.2), fd.generate(plain, ROW, **rule))
        other = fd.GenerationConfig(gen_length=7)
        assert_same(fd.generate(model, ROW, config=other), fd.generate(plain, ROW, gen_length=7))


# What a checkpoint's file says, and what of it a generation takes up: LLaDA's has no top_p and top_k.
THEIRS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"max_new_tokens": 20}, {"gen_length": 20}),
    ({"temperature": 0.8, "top_p": 0.5, "top_k": 3}, {}),
    ({"do_sample": False, "temperature": 0.8, "max_new_tokens": 9}, {"gen_length": 9}),
    ({"do_sample": True}, {"temperature": 1.0}),
    ({"do_sample": True, "temperature": 0.5}, {"temperature": 0.5}),
    ({"do_sample": True, "temperature": 0.0}, {"temperature": 0.0}),
    ({"do_sample": True, "top_p": 0.9}, {"temperature": 1.0, "top_p": 0.9}),
    ({"do_sample": True, "top_k": 50}, {"temperature": 1.0, "top_k": 50}),
    ({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}, {"temperature": 0.7, "top_p": 0.9}),
]


@pytest.mark.parametrize("theirs, ours", THEIRS, ids=[", ".join(theirs) for theirs, _ in THEIRS])
def test_a_checkpoints_generation_config(tiny: Tiny, theirs: dict, ours: dict, tmp_path: Path) -> None:
    """What it leaves out is not set, though transformers before 5.0 has defaults for it."""
    model = tiny()
    model.save_pretrained(tmp_path / "first")
    (tmp_path / "first" / "generation_config.json").write_text(json.dumps(theirs))
    fd.load(tmp_path / "first")[0].save_pretrained(tmp_path / "second")
    if not is_dream(model):
        ours = {name: value for name, value in ours.items() if name not in ("top_p", "top_k")}
    short = {"seed": 3} | ({} if "gen_length" in ours else {"gen_length": 20})
    for folder in ("first", "second"):
        loaded, _ = fd.load(tmp_path / folder, device="cpu")
        assert defaults_of(loaded) == fd.GenerationConfig(**ours)
        assert_same(fd.generate(loaded, ROW, **short), fd.generate(model, ROW, **ours | short))


@pytest.mark.parametrize("where", ["file", "config"])
def test_a_checkpoints_token_ids(tiny: Tiny, where: str, tmp_path: Path) -> None:
    """The text ends at any of several EOS, wherever they are listed, and padding follows."""
    settings = {"gen_length": 24, "block_length": 8, "steps": 24, "stop_on_eos": True}
    model = tiny(eos_token_id=None)
    plain = fd.generate(model, ROW, **settings)
    assert int(plain.lengths) == 28, "without an EOS nothing ends"
    answer = plain.answers()[0].tolist()
    wanted = next(i for i, token in enumerate(answer) if i >= 2 and token not in answer[:i] and token != 3)
    ids = {"eos_token_id": [VOCAB - 2, answer[wanted]], "pad_token_id": 3}
    assert VOCAB - 2 not in answer
    if where == "config":
        model = tiny(**ids)
    model.save_pretrained(tmp_path)
    if where == "file":
        (tmp_path / "generation_config.json").write_text(json.dumps(ids))
    output = fd.generate(fd.load(tmp_path, device="cpu")[0], ROW, **settings)
    assert output.answers()[0].tolist() == answer[: wanted + 1]
    assert (output.sequences[0, int(output.lengths[0]) :] == 3).all()
    assert int(output.lengths[0]) < 28


def test_padding_is_the_first_eos_where_there_is_no_pad_token(tiny: Tiny) -> None:
    model = tiny(pad_token_id=None, eos_token_id=[11, EOS])
    assert model.generation_config is None
    output = fd.generate(model, [ROW[0], ROW[0, :2]], gen_length=[9, 2])
    assert (output.sequences[1, 4:] == 11).all()


# --- Streamers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Any]:
    return fd.load(fd.demo_model_path(), device="cpu")


TEXT = "Sort 31 12 77 25."
ANSWERING: dict[str, Any] = {"gen_length": 32, "block_length": 4, "threshold": 0.9}


@pytest.mark.parametrize("skip_prompt", [False, True])
def test_text_streamer(demo: tuple, skip_prompt: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = demo
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    wanted = fd.generate(model, ids, **ANSWERING)
    pieces: list[str] = []

    class Recording(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            super().on_finalized_text(text, stream_end)

    streamer = Recording(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
    assert_same(model.generate(ids, streamer=streamer, **ANSWERING), wanted)
    answer = tokenizer.decode(wanted.answers()[0], skip_special_tokens=True)
    assert len(answer) > 8
    whole = answer if skip_prompt else tokenizer.decode(wanted.sequences[0], skip_special_tokens=True)
    assert "".join(pieces) == whole
    assert capsys.readouterr().out == whole + "\n"
    assert len([piece for piece in pieces if piece]) > 2, "as the blocks are finished, not all at the end"


def test_text_iterator_streamer_in_a_thread(demo: tuple) -> None:
    model, tokenizer = demo
    inputs = tokenizer(TEXT, return_tensors="pt")
    wanted = fd.generate(model, inputs, **ANSWERING)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    arguments = dict(inputs) | {"streamer": streamer} | ANSWERING
    thread = threading.Thread(target=model.generate, kwargs=arguments)
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(wanted.answers()[0], skip_special_tokens=True)


class Commits:
    """A denoising streamer."""

    def __init__(self, rows: torch.Tensor, first: list[int]) -> None:
        self.rows, self.first, self.ended = rows.clone(), first, 0

    def on_commit(self, commit: fd.Commit) -> None:
        where = torch.tensor(commit.positions) + self.first[commit.row]
        assert (self.rows[commit.row, where] == MASK).all(), "each position is committed once"
        self.rows[commit.row, where] = torch.tensor(commit.tokens)

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("infill", [False, True])
def test_a_denoising_streamer_sees_all_rows(tiny: Tiny, infill: bool) -> None:
    torch.manual_seed(2)
    rows = torch.randint(2, MASK, (3, 30))
    masks = torch.rand(3, 30) < 0.5 if infill else torch.arange(30).repeat(3, 1) >= 9
    masks[:, 0] = False
    rows[masks] = MASK
    first = [int(row.nonzero()[0, 0]) for row in masks]
    streamer = Commits(rows, first)
    settings = {"infill": True} if infill else {"gen_length": 21, "stop_on_eos": False}
    given = rows if infill else rows[:, :9]
    output = fd.generate(tiny(), given, block_length=8, threshold=0.2, streamer=streamer, **settings)
    assert torch.equal(streamer.rows, output.sequences)
    assert streamer.ended == 1


@pytest.mark.parametrize("method", ["put", "on_commit", "end"])
def test_an_error_in_a_streamer_leaves_all_as_it_was(tiny: Tiny, method: str) -> None:
    class Broken:
        def end(self) -> None:
            pass

    def fail(self: Broken, value: Any = None) -> None:
        if not isinstance(value, torch.Tensor) or len(value) < 4:  # the prompt has four: not yet
            raise RuntimeError("stop")

    setattr(Broken, "put", lambda self, value: None)  # noqa: B010
    setattr(Broken, method, fail)
    model = tiny().train()
    config = model.config
    cache = fd.PagedKVCache(2, config.num_key_value_heads, 8, num_pages=9)
    before = [(dict(m.__dict__), m.training) for m in model.modules()]
    wanted = generated(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(RuntimeError, match="stop"):
            generated(model, streamer=Broken(), kv_cache=cache, block_length=2)
        assert torch.is_autocast_enabled("cpu")
    assert cache.stats.num_used == 0
    assert [(dict(m.__dict__), m.training) for m in model.modules()] == before
    assert_same(generated(model, kv_cache=cache), wanted)


# --- What a call takes and returns -----------------------------------------------------------------


def test_return_dict_in_generate(tiny: Tiny) -> None:
    model = tiny()
    whole = generated(model, return_dict_in_generate=True)
    assert isinstance(whole, fd.GenerationOutput)
    tokens = generated(model, return_dict_in_generate=False)
    assert isinstance(tokens, torch.Tensor)
    assert torch.equal(tokens, whole.sequences)
    with pytest.raises(TypeError, match="return_dict_in_generate=1; takes True or False"):
        generated(model, return_dict_in_generate=1)


QUESTIONS = ["Add 4821 and 99.", TEXT, "Reverse abc."]


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_tokenizer_returns_is_taken_whole_or_unpacked(demo: tuple, side: str) -> None:
    """Unpacked too, with the token_type_ids that some tokenizers of these models make."""
    model, tokenizer = demo
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in QUESTIONS]
    wanted = fd.generate(model, rows, **ANSWERING)
    inputs = tokenizer(QUESTIONS, return_tensors="pt", padding=True)
    assert (inputs["attention_mask"] == 0).any()
    assert_same(fd.generate(model, inputs, **ANSWERING), wanted)
    assert_same(fd.generate(model, dict(inputs), **ANSWERING), wanted)
    types = {"token_type_ids": torch.zeros_like(inputs["input_ids"])}
    assert_same(model.generate(**(dict(inputs) | types), **ANSWERING), wanted)
    with pytest.raises(TypeError, match="unknown argument 'pixel_values'"):
        model.generate(**inputs, pixel_values=ROW)


@pytest.mark.parametrize("official", OFFICIAL, ids=str)
@pytest.mark.parametrize("layout", ["bpe", "json"])
def test_chat_templates(official: Any, layout: str, tmp_path: Path) -> None:
    """A tensor, or what a tokenizer returns: which of them is the default depends on the version."""
    sizes = {"vocab_size": 300} | ({"embedding_size": 300} if official is OFFICIAL[0] else {})
    tokens = write_tokenizer(tmp_path, layout)
    sizes |= {"mask_token_id": tokens.token_to_id("<|mask|>")}
    write_checkpoint(tmp_path, official, official_weights(official, **sizes), **sizes)
    model, tokenizer = fd.load(tmp_path, dtype=torch.float32, device="cpu")
    chats = [[{"role": "user", "content": text}] for text in ("the cat", "hi")]
    texts = [f"<|im_start|>user\n{c[0]['content']}<|im_end|>\n<|im_start|>assistant\n" for c in chats]
    rows = [torch.tensor(tokens.encode(text).ids) for text in texts]
    wanted = fd.generate(model, rows[:1], gen_length=9)
    for choice in ({"return_dict": True}, {"return_dict": False}, {}):
        inputs = tokenizer.apply_chat_template(
            chats[0], add_generation_prompt=True, return_tensors="pt", tokenize=True, **choice
        )
        assert_same(fd.generate(model, inputs, gen_length=9), wanted)
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    assert_same(fd.generate(model, batch, gen_length=9), fd.generate(model, rows, gen_length=9))


# --- Modes -----------------------------------------------------------------------------------------


class Dropping(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.dropout = inner, nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.inner(x))


def replace_linears(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert len(found) == 2 * 7 + 1, "the linear ones of two layers, and the head"
    for name, module in found:
        model.set_submodule(name, make(module))
    return model


def test_modes_and_gradients_are_left_alone(tiny: Tiny) -> None:
    wanted = generated(tiny())
    model = replace_linears(tiny(), Dropping)
    for i, module in enumerate(model.modules()):
        module.training = i % 3 != 0
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 2 == 0)
        p.grad = torch.full_like(p, i) if i % 2 == 0 else None

    def state() -> list:
        grads = [(p.requires_grad, p.grad, p._version) for p in model.parameters()]
        return [[module.training for module in model.modules()], grads]

    assert any(m.training for m in model.modules() if isinstance(m, nn.Dropout))
    before, graphs = state(), []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, logits: graphs.append(logits.requires_grad))
    output = generated(model)
    hook.remove()
    assert_same(output, wanted)
    assert graphs
    assert not any(graphs)
    assert str(state()) == str(before)
    next(m for m in model.modules() if isinstance(m, nn.Linear)).weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        generated(model)
    assert [module.training for module in model.modules()] == before[0]


def test_inference_mode_and_no_grad(tiny: Tiny) -> None:
    model = tiny()
    wanted = generated(model)
    cache = fd.PagedKVCache(2, model.config.num_key_value_heads, 8, num_pages=9)
    with torch.no_grad():
        assert_same(generated(model, kv_cache=cache), wanted)
    with torch.inference_mode():
        assert_same(generated(model, kv_cache=cache), wanted)
        other = fd.PagedKVCache(2, model.config.num_key_value_heads, 8, num_pages=9)
        assert_same(generated(tiny(), kv_cache=other), wanted)
    assert_same(generated(model, kv_cache=other), wanted)
    model(ROW).logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_autocast_changes_nothing(tiny: Tiny) -> None:
    """It is off within a generation, which keeps the model's dtype, and on again behind it."""
    model = tiny()
    wanted = generated(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = generated(model)
        assert torch.is_autocast_enabled("cpu")
        if is_dream(model):
            model.diffusion_generate(ROW, max_new_tokens=9, steps=3)
        assert torch.nn.functional.linear(ROW.float(), ROW.float()).dtype == torch.bfloat16
    assert_same(found, wanted)
    assert not torch.is_autocast_enabled("cpu")


# --- torch.compile, copies -------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["patch a compiled model", "compile a patched model", "compile in place"])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled_models(tiny: Tiny, how: str) -> None:
    """Their own call stays compiled, and equals the plain one up to the order in which float32 sums."""
    plain = tiny()
    wanted, logits = generated(plain), plain(ROW).logits
    inner = tiny(patched=False)
    if how == "patch a compiled model":
        model = torch.compile(inner, backend="eager")
        assert fd.patch(model) is model
    elif how == "compile a patched model":
        model = torch.compile(fd.patch(inner), backend="eager")
    else:
        model = fd.patch(inner)
        model.compile(backend="eager")
    torch.testing.assert_close(model(ROW).logits, logits, rtol=1e-4, atol=1e-5)
    assert_same(generated(model), wanted)
    assert_same(generated(inner), wanted)
    if not is_dream(inner):
        assert_same(model.generate(ROW, **SETTINGS), wanted)
    torch.testing.assert_close(model(ROW).logits, logits, rtol=1e-4, atol=1e-5)
    for unpatched in (model, inner):
        fd.patch(inner)
        assert fd.unpatch(unpatched) is unpatched
        assert not registry.is_patched(model)
        assert not registry.is_patched(inner)
    torch.testing.assert_close(model(ROW).logits, logits, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_a_copy_is_a_model_of_its_own(tiny: Tiny, way: str) -> None:
    model = tiny()
    wanted = generated(model)
    name = registry.find_family(model).generate_name
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        held = io.BytesIO()
        torch.save(model if way == "pickle" else model.state_dict(), held)
        held.seek(0)
        found = torch.load(held, weights_only=way == "state_dict")
        twin = found if way == "pickle" else tiny(1)
        if way == "state_dict":
            twin.load_state_dict(found)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_same(generated(twin), wanted)
    method = getattr(twin, name)
    arguments = {"max_new_tokens": 24, "cache": "dual"} if is_dream(twin) else {"gen_length": 24}
    tokens = method(ROW, block_length=8, threshold=0.2, return_dict_in_generate=False, **arguments)
    assert torch.equal(tokens, wanted.sequences)
    assert not registry.is_patched(fd.unpatch(twin))
    assert registry.is_patched(model)


# --- accelerate ------------------------------------------------------------------------------------


def accelerate() -> Any:
    return pytest.importorskip("accelerate")


def names(model: Any) -> tuple[str, str, list[str]]:
    """Of the embedding, the final norm and the head; of the layers' list."""
    if is_dream(model):
        return "model.layers", "model.embed_tokens", ["model.norm", "lm_head"]
    t = "model.transformer"
    return f"{t}.blocks", f"{t}.wte", [f"{t}.ln_f", f"{t}.ff_out"]


def placed(model: Any, first: Any, second: Any) -> dict[str, Any]:
    """A device map: embedding and first layer at ``first``, second layer and head at ``second``."""
    layers, embedding, last = names(model)
    end = dict.fromkeys(last, second)
    return {embedding: first, f"{layers}.0": first, f"{layers}.1": second} | end


OFFLOADS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu_offload": lambda model, folder: accelerate().cpu_offload(model, execution_device="cpu"),
    "disk_offload": lambda model, folder: accelerate().disk_offload(
        model, str(folder), execution_device="cpu"
    ),
    "dispatch_model": lambda model, folder: accelerate().dispatch_model(
        model, placed(model, "cpu", "disk"), main_device="cpu", offload_dir=str(folder)
    ),
    "first on disk": lambda model, folder: accelerate().dispatch_model(
        model, placed(model, "disk", "cpu"), main_device="cpu", offload_dir=str(folder)
    ),
}


@pytest.mark.parametrize("before", [False, True], ids=["patched after", "patched before"])
@pytest.mark.parametrize("how", OFFLOADS)
def test_dispatched_models(tiny: Tiny, how: str, before: bool, tmp_path: Path) -> None:
    plain = tiny()
    wanted, logits = generated(plain), plain(ROW).logits
    model = OFFLOADS[how](tiny(patched=before), tmp_path)
    assert any(p.is_meta for p in model.parameters())
    fd.patch(model)
    assert_same(generated(model), wanted)
    assert torch.equal(model(ROW).logits, logits)
    assert_same(generated(model), wanted)
    assert any(p.is_meta for p in model.parameters()), "still offloaded"
    assert not registry.is_patched(fd.unpatch(model))
    assert torch.equal(model(ROW).logits, logits)


def test_device_map(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny()
    wanted = generated(model)
    model.save_pretrained(tmp_path / "saved")
    whole, _ = fd.load(tmp_path / "saved", device_map={"": "cpu"})
    assert_same(generated(whole), wanted)
    found = type(model).from_pretrained(
        tmp_path / "saved", device_map=placed(model, "cpu", "disk"), offload_folder=tmp_path / "offload"
    )
    assert {str(p.device) for p in found.parameters()} == {"cpu", "meta"}
    assert_same(generated(fd.patch(found)), wanted)
    split, _ = fd.load(tmp_path / "saved", device_map=placed(model, "cpu", "disk"))
    assert {str(p.device) for p in split.parameters()} == {"cpu", "meta"}
    assert_same(generated(split), wanted)


def test_an_offloaded_tied_embedding(tmp_path: Path) -> None:
    """Dream's head is a module, which has the weight while it runs. LLaDA's is not: wrong numbers."""
    dream = tiny_dream(tie_word_embeddings=True)
    wanted = generated(dream)
    assert_same(
        generated(accelerate().disk_offload(dream, str(tmp_path / "dream"), execution_device="cpu")), wanted
    )
    llada = accelerate().disk_offload(
        tiny_llada(weight_tying=True), str(tmp_path / "llada"), execution_device="cpu"
    )
    with pytest.raises(ValueError, match=r"model: a tied embedding \(weight_tying\) is offloaded"):
        generated(llada)
    with pytest.raises(ValueError, match="its tied embedding is on meta and serves as the head on cpu"):
        llada(ROW)


@pytest.mark.cuda
@pytest.mark.parametrize("main_device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("first, second", [("cpu", "cuda:0"), ("cuda:0", "cpu")])
def test_layers_on_two_devices(tiny: Tiny, first: str, second: str, main_device: str) -> None:
    """Each layer's pages lie where it computes: at ``main_device`` too where "cpu" then means offloaded."""
    wanted = generated(tiny())
    model = accelerate().dispatch_model(tiny(), placed(tiny(), first, second), main_device=main_device)
    computes = "cuda:0" if main_device == "cuda:0" else first
    found = generated(model, ROW.to(computes))
    assert str(found.sequences.device) == computes
    for field in dataclasses.fields(found):
        if isinstance(value := getattr(found, field.name), torch.Tensor):
            setattr(found, field.name, value.cpu())
    assert_same(found, wanted, 1e-4)


# --- Quantised and wrapped layers ------------------------------------------------------------------


class Int8Linear(nn.Module):
    """As the modules of bitsandbytes and GPTQ: no weight and no sizes, but integers and scales in buffers."""

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("offset", None if bias is None else bias.detach())

    @classmethod
    def of(cls, linear: nn.Linear) -> Int8Linear:
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1) / 127
        codes = (weight / scale[:, None]).round().to(torch.int8)
        return cls(codes, scale.to(linear.weight.dtype), linear.bias)

    @classmethod
    def of_torchao(cls, linear: nn.Linear) -> Int8Linear:
        return cls(linear.weight.qdata, linear.weight.scale.flatten(), linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (x.flatten(0, -2) @ self.codes.to(x.dtype).T) * self.scale.to(x.dtype)
        y = y if self.offset is None else y + self.offset
        return y.view(*x.shape[:-1], -1)

    def dequantised(self) -> nn.Linear:
        plain = nn.Linear(self.codes.shape[1], self.codes.shape[0], bias=self.offset is not None)
        with torch.no_grad():
            plain.weight.copy_(self.codes * self.scale[:, None])
            if self.offset is not None:
                plain.bias.copy_(self.offset)
        return plain


@pytest.mark.parametrize("before", [False, True], ids=["patched after", "patched before"])
def test_linear_modules_without_a_weight(tiny: Tiny, before: bool) -> None:
    """The sizes of pages come from the configuration, their dtype from the norms."""
    model = fd.patch(replace_linears(tiny(patched=before), Int8Linear.of))
    assert not any(hasattr(module, "out_features") for module in model.modules())
    plain = replace_linears(tiny(), lambda linear: Int8Linear.of(linear).dequantised())
    for settings in ({"cache": "dual"}, {"cache": "prefix", "cfg_scale": 0.5}, {"cache": "none", "steps": 9}):
        settings = {"threshold": None} | settings if "steps" in settings else settings
        assert_same(generated(model, **settings), generated(plain, **settings))
    assert not torch.equal(generated(model).confidence, generated(tiny()).confidence)


def test_linear_modules_without_a_weight_in_bfloat16(tiny: Tiny) -> None:
    assert_own_call(replace_linears(tiny(dtype=torch.bfloat16), Int8Linear.of), 0.05)


def assert_own_call(model: Any, error: float) -> None:
    """A generation in one step has the tokens and confidences of the model's own call."""
    ids = torch.cat((ROW, torch.full((1, 12), MASK)), 1)
    with torch.no_grad():
        logits = model(ids).logits.float()[0]
    logits = logits[3:-1] if is_dream(model) else logits[4:]
    allowed = logits.clone()
    allowed[:, MASK] = -torch.inf
    best = allowed.argmax(-1)
    output = fd.generate(model, ROW, gen_length=12, steps=1, cache="none", stop_on_eos=False)
    confidence = logits.softmax(-1).gather(1, best[:, None])[:, 0]
    close = allowed.topk(2).values.softmax(-1)[:, 0] < 0.5 + error  # a tie but for rounding
    assert close.sum() <= 6
    assert torch.equal(output.sequences[0, 4:][~close], best[~close])
    torch.testing.assert_close(output.confidence[0][~close], confidence[~close], rtol=0, atol=error)


INT8 = {"weights": "Int8WeightOnlyConfig", "activations too": "Int8DynamicActivationInt8WeightConfig"}


@pytest.mark.parametrize("before", [False, True], ids=["patched after", "patched before"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", INT8)
def test_torchao(tiny: Tiny, kind: str, dtype: torch.dtype, before: bool) -> None:
    """As its own call, and with int8 weights alone as the same integers and scales written out.

    In bfloat16 logits of size 8 are rounded by 2^-6, some of which may change a confidence of 0.5 by 0.02.
    And rounding activations is not continuous: what float32 sums in another order may move one by 1 / 127.
    """
    quantization = pytest.importorskip(
        "torchao.quantization", reason="make test has it, in a place of its own"
    )
    model = tiny(dtype=dtype, patched=before)
    quantization.quantize_(model, getattr(quantization, INT8[kind])())
    fd.patch(model)
    error = 1e-5 if (kind, dtype) == ("weights", torch.float32) else 0.05
    output = generated(model)
    assert not (output.sequences == MASK).any()
    assert_own_call(model, error)
    if kind == "weights":
        for written_out in (
            Int8Linear.of_torchao,
            lambda linear: Int8Linear.of_torchao(linear).dequantised(),
        ):
            twin = replace_linears(copy.deepcopy(model), written_out)
            if dtype == torch.float32 or written_out == Int8Linear.of_torchao:
                assert_same(output, generated(twin), error)


class Lora(nn.Module):
    """An adapter beside a linear module, in its own dtype."""

    def __init__(self, base: nn.Linear, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 3, bias=False, dtype=dtype)
        self.b = nn.Linear(3, base.out_features, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x.to(self.a.weight.dtype))).to(x.dtype)

    def merged(self) -> nn.Linear:
        plain = copy.deepcopy(self.base)
        with torch.no_grad():
            plain.weight += self.b.weight @ self.a.weight
        return plain


def test_adapters(tiny: Tiny) -> None:
    model = replace_linears(tiny(), Lora)
    plain = tiny()
    for name, module in model.named_modules():
        if isinstance(module, Lora):
            plain.set_submodule(name, module.merged())
    assert_same(generated(model), generated(plain))
    assert not torch.equal(generated(model).confidence, generated(tiny()).confidence)


def test_adapters_in_float32_beside_bfloat16(tiny: Tiny) -> None:
    """As peft keeps them. Adapters that add nothing change nothing."""
    model = replace_linears(tiny(dtype=torch.bfloat16), Lora)
    assert_own_call(model, 0.05)
    for module in model.modules():
        if isinstance(module, Lora):
            nn.init.zeros_(module.b.weight)
    assert_same(generated(model), generated(tiny(dtype=torch.bfloat16)))
    model.get_input_embeddings().float()
    with pytest.raises(ValueError, match="model: parameters of mixed dtypes"):
        generated(model)


# --- Peculiar but real -----------------------------------------------------------------------------


def test_resized_embeddings(tiny: Tiny, tmp_path: Path) -> None:
    """New tokens may be generated, given, and saved."""
    model = tiny(eos_token_id=None)
    model.resize_token_embeddings(VOCAB + 16, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB:] = 2 * torch.randn(16, 32)
    row = torch.tensor([[4, VOCAB + 15, 5]])
    wanted = generated(model, row)
    assert (wanted.sequences[0, 3:] >= VOCAB).any()
    assert_own_call(model, 1e-5)
    model.save_pretrained(tmp_path)
    assert_same(generated(fd.load(tmp_path, device="cpu")[0], row), wanted)
    with pytest.raises(ValueError, match=rf"holds token {VOCAB + 16}; takes 0 to {VOCAB + 15}"):
        generated(model, row + 1)


def test_float16_on_the_cpu_is_refused(tiny: Tiny) -> None:
    model = tiny(dtype=torch.float16).train()
    cache = fd.PagedKVCache(2, model.config.num_key_value_heads, 8, num_pages=9, dtype=torch.float16)
    with pytest.raises(RuntimeError, match=r"\w+ is float16, .* do not take; use float32 or bfloat16"):
        generated(model, kv_cache=cache)
    assert cache.stats.num_used == 0
    assert all(module.training for module in model.modules())
    rounded = tiny(dtype=torch.float16).float()
    assert_same(generated(model.float()), generated(rounded))


@pytest.mark.parametrize("found", [None, transformers.GenerationConfig()], ids=["none", "theirs"])
def test_a_generation_config_that_says_nothing(tiny: Tiny, found: Any) -> None:
    model = tiny()
    wanted = generated(model)
    model.generation_config = found
    assert_same(generated(model), wanted)
    assert defaults_of(model) == fd.GenerationConfig()
