"""How much faster is a server that decodes requests side by side than one that takes them one at a time?

    python benchmarks/serve_load.py --out benchmarks/results/serve_load-cpu.json

The bundled model's held-out problems, of unequal prompts and answers, over HTTP on loopback, streamed. Two
servers, alike but for ``--max-rows``, take turns under the same load. Closed loop: so many clients, each of
which asks anew when it has its answer. Open loop: requests come at random times, at shares of the highest
rate that one at a time has reached. The clients run on the same machine, in this process.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common import Results, parser_for
from fastdllm_ext.demo_tasks import Problem, held_out
from serve_client import Connection, Reply, Server

SERVERS = {"one at a time": 1, "side by side": 16}


async def closed_loop(port: int, problems: Sequence[Problem], clients: int) -> tuple[float, list[Reply]]:
    """Seconds, and the replies, in the order of the problems."""
    replies: list[Reply | None] = [None] * len(problems)
    left = iter(range(len(problems)))

    async def client() -> None:
        async with Connection(port) as connection:
            for i in left:
                replies[i] = await ask(connection, problems[i])

    begin = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - begin, [reply for reply in replies if reply is not None]


async def open_loop(
    port: int, problems: Sequence[Problem], rate: float, seed: int
) -> tuple[float, list[Reply]]:
    """The same; each request is sent when its time has come, whatever has become of the others."""
    rng = random.Random(seed)
    idle: list[Connection] = []

    async def client(problem: Problem, delay: float) -> Reply:
        await asyncio.sleep(delay)
        connection = idle.pop() if idle else Connection(port)
        reply = await ask(connection, problem)
        idle.append(connection)
        return reply

    delay, tasks = 0.0, []
    begin = time.perf_counter()
    for problem in problems:
        tasks.append(asyncio.create_task(client(problem, delay)))
        delay += rng.expovariate(rate)
    replies = list(await asyncio.gather(*tasks))
    for connection in idle:
        connection.close()
    return time.perf_counter() - begin, replies


async def ask(connection: Connection, problem: Problem) -> Reply:
    """One answer, streamed. RuntimeError where there is none."""
    reply = await connection.complete(model="demo", prompt=problem.prompt, stream=True)
    if reply.status != 200:
        raise RuntimeError(f"status {reply.status}: {reply.body.decode()}")
    return reply


def measures(seconds: float, replies: Sequence[Reply], problems: Sequence[Problem]) -> dict[str, Any]:
    """What a load came to."""
    tokens = [reply.speed["tokens"] for reply in replies]
    per_token = [reply.seconds / count for reply, count in zip(replies, tokens, strict=True)]
    return {
        "requests": len(replies),
        "seconds": seconds,
        "requests_per_second": len(replies) / seconds,
        "tokens_per_second": sum(tokens) / seconds,
        "right": sum(r.text == p.answer for r, p in zip(replies, problems, strict=True)),
        "first_block_seconds": percentiles([reply.first_block for reply in replies]),
        "request_seconds": percentiles([reply.seconds for reply in replies]),
        "seconds_per_token": percentiles(per_token),
        "texts": hash(tuple(reply.text for reply in replies)),
    }


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """Half of the samples, and 99 of 100, are at most this."""
    ordered = torch.tensor(sorted(samples), dtype=torch.float64)
    return {f"p{p}": float(torch.quantile(ordered, p / 100)) for p in (50, 99)}


def main() -> None:
    """The command line."""
    parser = parser_for(__doc__, repeats=5)
    parser.add_argument("--requests", type=int, default=400, help="of a load (400)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64], help="of closed loops")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.9, 1.2], help="of open loops")
    args = parser.parse_args()
    count = 16 if args.quick else args.requests
    problems = held_out(count, seed=11)
    results = Results(args, "Requests side by side, or one at a time?", model="demo", requests=count,
                      servers={name: f"--max-rows {rows}" for name, rows in SERVERS.items()})  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        servers = {
            name: Server(["--max-rows", str(rows), "--max-queue", "100000"], Path(folder, f"{rows}.log"))
            for name, rows in SERVERS.items()
        }
        for server in servers.values():
            server.__enter__()
        try:
            run(args, results, servers, problems)
        finally:
            for server in servers.values():
                server.__exit__()


def run(args: Any, results: Results, servers: dict[str, Server], problems: list[Problem]) -> None:
    """All loads, the servers in turns."""
    for server in servers.values():
        asyncio.run(closed_loop(server.port, problems[:32], 4))  # warm
    highest = 0.0
    loads: list[tuple[str, float]] = [("closed", clients) for clients in args.clients]
    loads += [("open", share) for share in args.shares]
    for kind, load in loads:
        for repeat in range(args.repeats):
            for name, server in servers.items():
                if kind == "closed":
                    seconds, replies = asyncio.run(closed_loop(server.port, problems, int(load)))
                else:
                    seconds, replies = asyncio.run(open_loop(server.port, problems, load * highest, repeat))
                row = {"load": kind, "server": name, "repeat": repeat} | measures(seconds, replies, problems)
                row |= {"clients": int(load)} if kind == "closed" else {"share": load, "rate": load * highest}
                if name == "one at a time" and kind == "closed":
                    highest = max(highest, row["requests_per_second"])
                results.add(row)
                print(
                    f"{kind} {load}, {name}: {row['requests_per_second']:.1f} requests/s, first block "
                    f"{1e3 * row['first_block_seconds']['p50']:.0f} ms (p99 "
                    f"{1e3 * row['first_block_seconds']['p99']:.0f})",
                    flush=True,
                )


if __name__ == "__main__":
    main()
