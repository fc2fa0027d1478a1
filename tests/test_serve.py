"""What the server answers."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import torch

import fastdllm_ext as fd
from fastdllm_ext.engine import Update
from fastdllm_ext.serve.answers import Answer, Piece
from fastdllm_ext.serve.replies import COMPLETIONS, Reply
from fastdllm_ext.serve.service import Service
from serving import (
    PATHS,
    PROMPTS,
    Json,
    alone,
    answer,
    ask,
    body,
    client,
    demo,
    events,
    for_steps,
    post,
    reference,
    served,
    streamed,
    texts,
    until,
)
from stepped import Stepped
from tiny import tiny_dream

VAGUE = "Add 4821 and 99."  # to which sampled answers differ


@pytest.fixture(scope="module")
def engine() -> Iterator[fd.Engine]:
    with fd.Engine(*demo(), max_rows=16) as engine:
        yield engine


@pytest.fixture
def service(engine: fd.Engine) -> Service:
    return served(engine)


@pytest.fixture
def stepped() -> Iterator[Stepped]:
    with Stepped(*for_steps(), max_rows=2, max_queue=3) as engine:
        yield engine


@pytest.mark.parametrize("path", PATHS)
def test_an_answer_is_what_generate_gives(service: Service, path: str) -> None:
    for prompt in PROMPTS[:3]:
        (tokens,), (text,), output = alone((prompt,))
        found = answer(service, path, prompt=prompt)
        assert texts(found) == [text]
        assert found["choices"][0]["finish_reason"] == "stop"
        assert found["choices"][0]["logprobs"] is None
        prompt_tokens = int(output.prompt_lengths[0])
        assert found["usage"] == {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": len(tokens),
            "total_tokens": prompt_tokens + len(tokens),
        }
        assert found["fastdllm"]["nfe"] == int(output.nfe[0])
        assert found["fastdllm"]["tokens"] == len(tokens)
        assert found["fastdllm"]["tokens_per_forward"] == round(len(tokens) / int(output.nfe[0]), 3)
        speed = found["fastdllm"]
        assert 0 <= speed["queue_seconds"] <= speed["first_block_seconds"] <= speed["seconds"]
        assert found["model"] == "demo"


def test_ids_and_objects_are_those_of_each_endpoint(service: Service) -> None:
    for path, prefix, whole, part in (
        (PATHS[0], "cmpl-", "text_completion", "text_completion"),
        (PATHS[1], "chatcmpl-", "chat.completion", "chat.completion.chunk"),
    ):
        response = post(service, path)
        found = response.json()
        assert found["object"] == whole
        assert found["id"] == prefix + response.headers["x-request-id"]
        chunks = events(post(service, path, stream=True))
        assert {chunk["object"] for chunk in chunks} == {part}
        assert len({chunk["id"] for chunk in chunks} | {found["id"]}) == 2


@pytest.mark.parametrize("path", PATHS)
def test_a_stream_has_a_chunk_for_each_block(service: Service, path: str) -> None:
    (tokens,), (text,), _ = alone((PROMPTS[0],))
    assert len(tokens) > 32
    chunks = events(post(service, path, stream=True, stream_options={"include_usage": True}))
    opening, *blocks, last, usage = chunks
    assert streamed(chunks) == {0: text}
    assert len(blocks) == math.ceil(len(tokens) / 32)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(blocks) + 1) + [
        "stop"
    ]
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(tokens)
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(blocks) + 2)
    assert last["fastdllm"]["tokens"] == len(tokens)
    if path == PATHS[1]:
        assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert last["choices"][0]["delta"] == {}
    without = events(post(service, path, stream=True))
    assert len(without) == len(chunks) - 1
    assert not any("usage" in chunk for chunk in without)


def test_prompts_in_all_four_forms(service: Service) -> None:
    prompts = tuple(PROMPTS[:2])
    _, wanted, _ = alone(prompts)
    ids = [reference()[1](prompt)["input_ids"] for prompt in prompts]
    for prompt, count in ((prompts[0], 1), (list(prompts), 2), (ids[0], 1), (ids, 2)):
        found = ask(service, "POST", PATHS[0], json={"model": "demo", "prompt": prompt}).json()
        assert texts(found) == wanted[:count]
        assert [choice["index"] for choice in found["choices"]] == list(range(count))
        assert found["usage"]["prompt_tokens"] == sum(map(len, ids[:count]))


def test_echo_puts_the_prompt_before_the_answer(service: Service) -> None:
    _, (text,), _ = alone((PROMPTS[0],))
    assert texts(answer(service, PATHS[0], echo=True)) == [PROMPTS[0] + text]
    assert streamed(events(post(service, PATHS[0], echo=True, stream=True))) == {0: PROMPTS[0] + text}
    ids = reference()[1](PROMPTS[0])["input_ids"]
    found = ask(service, "POST", PATHS[0], json={"model": "demo", "prompt": ids, "echo": True}).json()
    assert texts(found) == [PROMPTS[0] + text]


@pytest.mark.parametrize("path", PATHS)
def test_choice_i_samples_from_stream_i_of_the_seed(service: Service, path: str) -> None:
    _, wanted, _ = alone((VAGUE,) * 3, temperature=1.0, seed=7)
    assert len(set(wanted)) > 1, "the test needs answers that differ"
    fields: Json = {"prompt": VAGUE, "n": 3, "temperature": 1.0, "seed": 7}
    assert texts(answer(service, path, **fields)) == wanted
    assert streamed(events(post(service, path, stream=True, **fields))) == dict(enumerate(wanted))


def test_several_prompts_with_several_answers_each(service: Service) -> None:
    prompts = (PROMPTS[0], VAGUE)
    _, wanted, _ = alone((prompts[0], prompts[0], prompts[1], prompts[1]), temperature=1.0, seed=3)
    found = answer(service, PATHS[0], prompt=list(prompts), n=2, temperature=1.0, seed=3)
    assert texts(found) == wanted
    lengths = [len(reference()[1](prompt)["input_ids"]) for prompt in prompts]
    assert found["usage"]["prompt_tokens"] == sum(lengths), "each prompt counts once"


def test_without_a_seed_answers_differ(service: Service) -> None:
    found = [texts(answer(service, PATHS[0], prompt=VAGUE, temperature=2))[0] for _ in range(6)]
    assert len(set(found)) > 1


@pytest.mark.parametrize("path", PATHS)
def test_a_stop_string_ends_the_answer_across_blocks_too(service: Service, path: str) -> None:
    (tokens,), (text,), _ = alone((PROMPTS[0],))
    tokenizer = reference()[1]
    border = len(tokenizer.decode(tokens[:32]))
    stop = text[border - 3 : border + 3]
    assert text.index(stop) == border - 3, "the test needs a string that stands there alone"
    whole = answer(service, path, stop=stop)
    assert texts(whole) == [text[: border - 3]]
    assert whole["choices"][0]["finish_reason"] == "stop"
    counted = whole["usage"]["completion_tokens"]
    assert stop in tokenizer.decode(tokens[:counted])
    assert stop not in tokenizer.decode(tokens[: counted - 1])
    chunks = events(post(service, path, stop=["no such", stop], stream=True))
    assert streamed(chunks) == {0: text[: border - 3]}
    assert texts(answer(service, path, stop=[])) == [text]
    assert texts(answer(service, path, stop="no such")) == [text]


def test_what_might_have_become_a_stop_string_is_given_out_at_the_end(service: Service) -> None:
    _, (text,), _ = alone((PROMPTS[0],))
    stop = text[-2:] + "!"
    assert texts(answer(service, PATHS[0], stop=stop)) == [text]
    assert streamed(events(post(service, PATHS[0], stop=stop, stream=True))) == {0: text}


def test_a_stop_string_ends_the_work_on_its_answer_alone(stepped: Stepped) -> None:
    prompts = (PROMPTS[0], VAGUE)
    _, wanted, _ = alone(prompts, steps=64)
    stop = wanted[0][:3]
    assert stop not in wanted[1], "the test needs a string of the first answer alone"

    async def run() -> Json:
        async with client(served(stepped)) as http:
            asked = asyncio.create_task(
                http.post(PATHS[0], json=body(PATHS[0], prompt=list(prompts), steps=64, stop=stop))
            )
            await until(lambda: stepped.stats.queued == 2)
            while stepped.stats.cancelled == 0:
                assert not asked.done()
                stepped.turn()
                for _ in range(20):  # the update's way to the answer, and the cancellation's way back
                    await asyncio.sleep(0)
            assert (stepped.stats.running, stepped.stats.finished) == (1, 0)
            while not asked.done():
                stepped.turn()
                await asyncio.sleep(0)
            found: Json = (await asked).json()
            return found

    found = asyncio.run(run())
    assert texts(found) == ["", wanted[1]]
    assert found["fastdllm"]["queue_seconds"] is None
    assert stepped.stats.free_pages == stepped.stats.num_pages


def test_the_length_of_an_answer(service: Service) -> None:
    _, (text,), _ = alone((PROMPTS[0],), gen_length=8)
    for path, fields in (
        (PATHS[0], {"max_tokens": 8}),
        (PATHS[1], {"max_tokens": 8}),
        (PATHS[1], {"max_completion_tokens": 8}),
    ):
        found = answer(service, path, **fields)
        assert texts(found) == [text]
        assert found["choices"][0]["finish_reason"] == "length"
        assert found["usage"]["completion_tokens"] == 8


def test_the_default_length_is_cut_to_what_fits(service: Service, engine: fd.Engine) -> None:
    ids = reference()[1](PROMPTS[0])["input_ids"] * 60
    prompt = ids[: engine.longest - 10]
    found = ask(service, "POST", PATHS[0], json={"model": "demo", "prompt": prompt, "threshold": 0.01})
    assert found.json()["usage"]["completion_tokens"] <= 10
    for length, status in ((10, 200), (11, 413)):
        asked = {"model": "demo", "prompt": prompt, "max_tokens": length, "threshold": 0.01}
        found = ask(service, "POST", PATHS[0], json=asked)
        assert found.status_code == status
    assert found.json()["error"] == {
        "message": f"prompt of {len(prompt)} tokens and max_tokens=11; takes {engine.longest} together",
        "type": "invalid_request_error",
        "param": "max_tokens",
        "code": "context_length_exceeded",
    }
    found = ask(service, "POST", PATHS[0], json={"model": "demo", "prompt": ids[: engine.longest]})
    assert (found.status_code, found.json()["error"]["param"]) == (413, "prompt")


def test_decoding_fields_are_those_of_the_configuration(service: Service) -> None:
    for fields in (
        {"steps": 16, "block_length": 16, "cache": "none"},
        {"threshold": 0.99, "cache": "prefix", "refresh": 2},
        {"factor": 2.0},
        {"rule": "klass"},
        {"rule": {"name": "klass", "kl": 0.02, "history": 3}},
        {"steps": 8, "remasking": "margin"},
        {"cfg_scale": 0.5},
        {"threshold": -0.3, "remasking": "entropy"},
    ):
        _, (text,), output = alone.__wrapped__((PROMPTS[1],), **fields)
        found = answer(service, PATHS[1], prompt=PROMPTS[1], **fields)
        assert texts(found) == [text], fields
        assert found["fastdllm"]["nfe"] == int(output.nfe[0]), fields


def test_the_engine_s_configuration_is_the_default() -> None:
    config = fd.GenerationConfig(gen_length=24, steps=12, block_length=8)
    with fd.Engine(*demo(), config=config, max_rows=1) as engine:
        service = served(engine)
        card = ask(service, "GET", "/v1/models").json()["data"][0]["fastdllm"]
        assert card["settings"] == {"gen_length": 24, "block_length": 8, "steps": 12}
        assert card["max_tokens_default"] == 24
        assert answer(service, PATHS[0])["fastdllm"]["nfe"] == 12
        assert answer(service, PATHS[0], steps=None, threshold=None)["fastdllm"]["nfe"] == 12
        assert answer(service, PATHS[0], threshold=0.9)["fastdllm"]["nfe"] < 12


@pytest.mark.parametrize("path", PATHS)
def test_logprobs_are_the_logarithms_of_the_confidences(service: Service, path: str) -> None:
    (tokens,), (text,), output = alone((PROMPTS[0],))
    wanted = output.confidence[0, : len(tokens)].log().clamp(max=0).tolist()
    names = [reference()[1].decode([token]) for token in tokens[:-1]] + [""]  # the end of text is no text
    fields: Json = {"logprobs": 1} if path == PATHS[0] else {"logprobs": True, "top_logprobs": 0}
    whole = answer(service, path, **fields)
    chunks = events(post(service, path, stream=True, **fields))
    parts = [choice["logprobs"] for chunk in chunks for choice in chunk["choices"] if choice["logprobs"]]
    for found in ([whole["choices"][0]["logprobs"]], parts):
        if path == PATHS[0]:
            assert [name for part in found for name in part["tokens"]] == names
            logprobs = [value for part in found for value in part["token_logprobs"]]
            offsets = [value for part in found for value in part["text_offset"]]
            assert offsets == [len("".join(names[:i])) for i in range(len(names))]
            assert all(part["top_logprobs"] is None for part in found)
        else:
            entries = [entry for part in found for entry in part["content"]]
            assert [entry["token"] for entry in entries] == names
            assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == text
            assert all(entry["top_logprobs"] == [] for entry in entries)
            logprobs = [entry["logprob"] for entry in entries]
        assert logprobs == pytest.approx(wanted, abs=1e-4)


def test_a_stream_of_commits(service: Service) -> None:
    fields: Json = {"threshold": 0.99, "stream": True, "stream_mode": "denoise"}
    (tokens,), (text,), output = alone((PROMPTS[0],), threshold=0.99)
    for path in PATHS:
        first, *steps, last = events(post(service, path, **fields))
        assert first["fastdllm"] == {
            "prompt_tokens": int(output.prompt_lengths[0]),
            "gen_length": 128,
            "block_length": 32,
            "settings": {"threshold": 0.99},
        }
        if path == PATHS[1]:
            assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        commits = [commit for chunk in steps for commit in chunk["choices"][0]["commits"]]
        found = {commit["position"]: commit for commit in commits}
        assert len(found) == len(commits), "each position once"
        assert [found[i]["token_id"] for i in range(len(tokens))] == tokens
        assert [found[i]["step"] for i in range(len(tokens))] == output.step_map[0, : len(tokens)].tolist()
        confidence = output.confidence[0, : len(tokens)].tolist()
        assert [found[i]["confidence"] for i in range(len(tokens))] == pytest.approx(confidence, abs=1e-4)
        assert [found[i]["token"] for i in range(len(tokens))] == [reference()[1].decode([t]) for t in tokens]
        assert [chunk["fastdllm"]["nfe"] for chunk in steps] == list(range(1, int(output.nfe[0]) + 1))
        assert texts({"choices": [{"message": c.get("delta"), **c} for c in last["choices"]]}) == [text]
        assert last["choices"][0]["finish_reason"] == "stop"
        assert last["fastdllm"]["tokens"] == len(tokens)
    stopped = events(post(service, PATHS[0], stop="=", **fields))
    assert stopped[-1]["choices"][0]["text"] == text[: text.index("=")]


def chunks_of(pieces: list[Piece], settings: Json | None) -> list[Json]:
    """What a stream makes of an answer's pieces, its first chunk apart."""

    async def run() -> list[Json]:
        async def iterated() -> AsyncIterator[Piece]:
            for piece in pieces:
                yield piece

        reply = Reply(COMPLETIONS, "x", "demo", [pieces[0].answer], 1, settings=settings)
        return [chunk async for chunk in reply.chunks(iterated())][1:]

    return asyncio.run(run())


def an_answer() -> Answer:
    class Speech:
        def name(self, token: int) -> str:
            return f"<{token}>"

    unused: Any = None
    return Answer(0, unused, Speech())  # type: ignore[arg-type]


def test_void_commits_are_said_to_be() -> None:
    one = an_answer()
    commit = fd.Commit(0, 3, [5], [7], [0.123456789])
    updates = Update(nfe=4, seconds=0.5, commits=(commit,)), Update(nfe=2, seconds=0.6, restarted_at=2)
    commits, void = chunks_of([Piece(one, "", [], update) for update in updates], settings={})
    assert commits["choices"][0]["commits"] == [
        {"position": 5, "token_id": 7, "token": "<7>", "confidence": 0.123457, "step": 3}
    ]
    assert "restarted_at" not in commits["choices"][0]
    assert (void["choices"][0]["commits"], void["choices"][0]["restarted_at"]) == ([], 2)
    assert void["fastdllm"] == {"nfe": 2, "seconds": 0.6}


def test_an_answer_that_is_further_than_its_piece_has_not_ended_yet() -> None:
    one = an_answer()
    one.finish_reason, one.tokens, one.nfe, one.seconds = "stop", 3, 2, 0.5
    before, last = chunks_of([Piece(one, "a", [], Update(nfe=1)), Piece(one, "", [], None)], settings=None)
    assert (before["choices"][0]["finish_reason"], "fastdllm" in before) == (None, False)
    assert (last["choices"][0]["finish_reason"], last["fastdllm"]["tokens"]) == ("stop", 3)


def test_messages_go_through_the_chat_template(service: Service) -> None:
    _, (text,), _ = alone((PROMPTS[0],))
    half = len(PROMPTS[0]) // 2
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": PROMPTS[1], "name": "ada"},
        {"role": "assistant", "content": "7", "refusal": None, "tool_calls": [], "annotations": []},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": PROMPTS[0][:half]},
                {"type": "text", "text": PROMPTS[0][half:]},
            ],
        },
    ]
    found = ask(service, "POST", PATHS[1], json={"model": "demo", "messages": messages}).json()
    assert texts(found) == [text]
    refused = ask(service, "POST", PATHS[1], json={"model": "demo", "messages": messages[:1]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
    assert refused.json()["error"]["message"] == "messages: takes a message of the user"


def test_a_template_gets_roles_and_texts(service: Service) -> None:
    seen = []
    service.speech.chat = lambda messages: seen.extend(messages) or PROMPTS[0]  # type: ignore[method-assign]
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": "b", "name": "ada"}]
    assert ask(service, "POST", PATHS[1], json={"model": "demo", "messages": messages}).status_code == 200
    assert seen == [{"role": "system", "content": "a"}, {"role": "user", "content": "b", "name": "ada"}]


def test_a_model_without_a_chat_template_has_no_chat() -> None:
    model, tokenizer = demo()
    tokenizer.chat_template = None
    with fd.Engine(model, tokenizer, max_rows=1) as engine:
        service = served(engine)
        assert ask(service, "GET", "/v1/models").json()["data"][0]["fastdllm"]["has_chat"] is False
        refused = post(service, PATHS[1])
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "messages"
        assert "has no chat template" in refused.json()["error"]["message"]
        assert post(service, PATHS[0]).status_code == 200


def test_top_p_and_top_k_where_a_family_has_them(service: Service) -> None:
    for fields in ({"top_p": 1}, {"top_p": 1.0}, {"top_p": None, "top_k": None}):
        assert post(service, PATHS[0], **fields).status_code == 200
    for field, value in (("top_p", 0.5), ("top_k", 3)):
        refused = post(service, PATHS[0], **{field: value})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
        assert f"{field}={value}" in refused.json()["error"]["message"]
    model = tiny_dream(vocab_size=188, mask_token_id=0, pad_token_id=1)
    prompt = reference()[1](PROMPTS[0])["input_ids"]
    sampling: Json = {"gen_length": 16, "temperature": 1.0, "top_p": 0.5, "top_k": 3, "seed": 5}
    (wanted,) = fd.generate(model, [torch.tensor(prompt)], **sampling).answers()
    with fd.Engine(model, reference()[1], max_rows=1) as engine:
        assert ask(served(engine), "GET", "/v1/models").json()["data"][0]["fastdllm"]["takes_top_p"] is True
        asked = {"max_tokens" if name == "gen_length" else name: value for name, value in sampling.items()}
        found = answer(served(engine), PATHS[0], **asked)
    assert texts(found) == [reference()[1].decode(wanted, skip_special_tokens=True)]


def test_special_tokens_are_the_tokenizer_s_or_the_template_s(service: Service) -> None:
    encode, special = service.speech.encode, []
    service.speech.encode = lambda text, wanted: special.append(wanted) or encode(text, wanted)  # type: ignore
    for path in PATHS:
        assert post(service, path).status_code == 200
    assert special == [True, False]


def test_long_requests_are_read_beside_the_event_loop(service: Service) -> None:
    encode, threads = service.speech.encode, []

    def noting(text: str, special: bool) -> list[int]:
        threads.append(threading.current_thread() is threading.main_thread())
        return encode(text, special)

    service.speech.encode = noting  # type: ignore[method-assign]
    assert post(service, PATHS[0]).status_code == 200
    assert post(service, PATHS[0], prompt="a " * 10000).status_code == 413
    assert post(service, PATHS[0], n=9, threshold=0.01).status_code == 200
    assert threads == [True, False, False]
