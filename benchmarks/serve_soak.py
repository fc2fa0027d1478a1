"""Does a server lose, mix up or leak anything, whatever its clients do?

    python benchmarks/serve_soak.py --out benchmarks/results/serve_soak-cpu.json

Clients that ask the bundled model's problems, streamed or not, with n answers, stop strings and settings of
their own; that leave in the middle or right after asking; that send what is no request, or one that is too
long. Every answer that comes must be the problem's own, as ``fastdllm_ext.generate`` gives it; every refusal
the one that is due. At the end the queue is empty, all pages are free, and memory has not grown.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import torch

import fastdllm_ext as fd
from common import Results, parser_for
from fastdllm_ext.demo_tasks import held_out
from serve_client import Connection, Server

CLIENTS = 24
SETTINGS: list[dict[str, Any]] = [
    {},
    {"cache": "prefix"},
    {"threshold": 0.7},
    {"factor": 1.0},
    {"block_length": 16},
]
STOP = "\n"
MALFORMED = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"prompt": 3}', b'{"prompt": "a", "n": 0}', b"[" * 5000,
    b'{"model": "demo", "prompt": "a", "temperature": NaN}', b'{"model": "demo", "prompt": "a", "what": 1}',
    b'{"model": "demo", "prompt": "a", "threshold": 2}', b'{"model": "demo", "prompt": ["a", 3]}',
    b'{"model": "demo", "prompt": "\\ud800"}', b'{"model": "demo", "prompt": "a", "max_tokens": -1}',
]  # fmt: skip


class Wrong(Exception):
    """Something that must not happen."""


class Soak:
    """Requests of every kind, and what they must come to.

    Args:
        server: to be asked.
        problems: how many problems to ask.
        seed: of everything that is drawn.
    """

    def __init__(self, server: Server, problems: int, seed: int) -> None:
        self.server, self.rng = server, random.Random(seed)
        model, tokenizer = fd.load(fd.demo_model_path(), device="cpu")
        self.prompts = [problem.prompt for problem in held_out(problems, seed=seed)]
        ids = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in self.prompts]
        self.wanted = {}
        for number, settings in enumerate(SETTINGS):
            output = fd.generate(model, ids, **settings)
            for i, answer in enumerate(output.answers()):
                self.wanted[i, number] = tokenizer.decode(answer, skip_special_tokens=True)
        self.done: Counter[str] = Counter()

    def draw(self) -> tuple[dict[str, Any], str]:
        """A request, and its answer."""
        i, number = self.rng.randrange(len(self.prompts)), self.rng.randrange(len(SETTINGS))
        return {"model": "demo", "prompt": self.prompts[i], **SETTINGS[number]}, self.wanted[i, number]

    async def whole(self, connection: Connection) -> None:
        """Not streamed, perhaps several answers, which are the same: nothing is sampled."""
        body, answer = self.draw()
        n = self.rng.choice([1, 1, 2, 3])
        reply = await connection.complete(**body, n=n)
        self.expect(reply.status == 200, reply.body)
        self.expect([c["text"] for c in reply.json["choices"]] == [answer] * n, (body, answer, reply.body))

    async def streamed(self, connection: Connection) -> None:
        """To the end, perhaps up to a stop string."""
        body, answer = self.draw()
        if self.rng.random() < 0.3:
            body, answer = body | {"stop": STOP}, answer.split(STOP)[0]
        mode = self.rng.choice([{}, {"stream_mode": "denoise"}])
        reply = await connection.complete(**body, stream=True, **mode)
        self.expect(reply.status == 200, reply.body)
        self.expect(reply.text == answer, (body, answer, reply.text))

    async def left(self, connection: Connection) -> None:
        """A stream that is left after its first events."""
        body, _ = self.draw()
        await connection.complete(leave_after=self.rng.randint(1, 3), **body, stream=True)
        connection.close()

    async def gone(self, connection: Connection) -> None:
        """A request whose client is gone at once."""
        body, _ = self.draw()
        await connection.send_and_leave(**body, n=self.rng.choice([1, 4]), stream=self.rng.random() < 0.5)

    async def malformed(self, connection: Connection) -> None:
        """What is no request: the connection stays usable, or is closed in order."""
        reply = await connection.post(self.rng.choice(MALFORMED))
        self.expect(reply.status == 400, reply.body)
        self.expect(set(reply.json["error"]) == {"message", "type", "param", "code"}, reply.body)

    async def oversized(self, connection: Connection) -> None:
        """A prompt that is longer than the model."""
        body, _ = self.draw()
        reply = await connection.complete(**body | {"prompt": body["prompt"] * 100})
        self.expect(reply.status == 413, reply.body)

    def expect(self, holds: bool, what: object) -> None:
        """Wrong, unless it holds."""
        if not holds:
            raise Wrong(str(what)[:2000])

    async def run(self, requests: int, watch: Callable[[int], None]) -> None:
        """All requests, by clients side by side."""
        kinds: list[tuple[Callable[[Connection], Coroutine[Any, Any, None]], int]] = [
            (self.whole, 30), (self.streamed, 40), (self.left, 10), (self.gone, 8), (self.malformed, 8),
            (self.oversized, 4),
        ]  # fmt: skip
        drawn = self.rng.choices([k for k, _ in kinds], [share for _, share in kinds], k=requests)
        left = iter(enumerate(drawn))

        async def client() -> None:
            async with Connection(self.server.port) as connection:
                for number, kind in left:
                    await kind(connection)
                    self.done[kind.__name__] += 1
                    watch(number)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    async def settled(self) -> dict[str, Any]:
        """What /health says once nobody waits any more."""
        end = time.monotonic() + 30
        while True:
            health = await self.server.health()
            if (health["queued"], health["running"]) == (0, 0) or time.monotonic() > end:
                return health
            await asyncio.sleep(0.05)


def soak(requests: int, problems: int, seed: int, folder: Path) -> dict[str, Any]:
    """A server, and its soak. Wrong where anything is."""
    with Server(["--max-rows", "16", "--num-pages", "60"], folder / "log") as server:
        work = Soak(server, problems, seed)
        resident: list[tuple[int, int]] = []

        def watch(number: int) -> None:
            if number % max(1, requests // 20) == 0:
                resident.append((number, server.resident))

        begin = time.perf_counter()
        asyncio.run(work.run(requests, watch))
        seconds = time.perf_counter() - begin
        health = asyncio.run(work.settled())
    log = (folder / "log").read_text()
    found = {
        "requests": requests,
        "seconds": seconds,
        "kinds": dict(work.done),
        "health": health,
        "resident_bytes": resident,
        "growth_of_last_half": resident[-1][1] / resident[len(resident) // 2][1],
        "exit_status": server.status,
    }
    work.expect((health["queued"], health["running"]) == (0, 0), health)
    work.expect(health["free_pages"] == health["num_pages"], health)
    work.expect(server.status == 0, log)
    work.expect("Traceback" not in log, log)
    return found


def main() -> None:
    """The command line."""
    parser = parser_for(__doc__, repeats=1)
    parser.add_argument("--requests", type=int, default=5000, help="in all (5,000)")
    parser.add_argument("--seed", type=int, default=0, help="of what is asked (0)")
    args = parser.parse_args()
    requests = 80 if args.quick else args.requests
    results = Results(
        args, "Does a server lose, mix up or leak anything?", clients=CLIENTS, settings=SETTINGS
    )
    with tempfile.TemporaryDirectory() as folder:
        found = soak(requests, min(200, requests), args.seed, Path(folder))
    results.add(found)
    print(json.dumps({k: v for k, v in found.items() if k != "resident_bytes"}))


if __name__ == "__main__":
    main()
