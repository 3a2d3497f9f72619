"""Prefix hits and latency of routing policies: multi-turn chats of several tenants on 4 replicas.

Each tenant has a long system prompt; each conversation goes on for some turns with the answers it
got. The oracle is one cache as large as all replicas' together, fed the same prompts in the order
in which they were sent. Needs HAProxy, whose routers see the prompts. With --isolate every tenant
has a key, and cached prefixes of its own; the routers do not see keys.

    python -m benchmarks.routing --tenants 12 --conversations 96

Ray's variables set the scene: RAY_SERVE_INGRESS_ROUTER_REPLICAS_PER_NODE=2 makes two routers, and
RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE is how much of a body they see, in bytes.
"""

import argparse
import asyncio
import json
import logging
import os
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from deployments import local_ray

os.environ.update(local_ray.prepare(haproxy=True))

import httpx
import ray
from ray import serve

# Its public alias, in ray.serve.llm, needs vLLM to be installed.
from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import (
    PrefixCacheAffinityRouter,
)
from ray.serve.config import RequestRouterConfig
from ray.serve.experimental.round_robin_router import RoundRobinRouter

from deployments.args import AppArgs
from deployments.builder import build
from deployments.routing.balancer import RoutedPrompt
from deployments.routing.request_router import PrefixRequestRouter, router_config
from engine.checkpoint.source import resolve
from engine.schedule.block_pool import BlockHasher, BlockPool
from engine.text.tokenizer import Tokenizer

_PORT = 18456
_BLOCK_SIZE = 16


class LeastLoadedRouter(PrefixRequestRouter):
    """Manta's balance of load, blind to prompts."""

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        if pending_request is not None and pending_request.args:
            balancer, prompt = pending_request.args
            blind = RoutedPrompt((), prompt.num_tokens, prompt.tokens_per_block)
            pending_request.args = [balancer, blind]
        return await super().choose_replicas(candidate_replicas, pending_request)


class RayPrefixRouter(PrefixCacheAffinityRouter):
    """Ray's own policy. It compares texts by their prefix: here, a text of the blocks' hashes."""

    def _extract_text_from_request(self, pending_request: Any) -> str:
        return b"".join(pending_request.args[1].hashes).hex()


def policies() -> dict[str, RequestRouterConfig]:
    return {
        "manta": router_config(),
        "least-loaded": router_config(LeastLoadedRouter),
        "round-robin": router_config(RoundRobinRouter),
        "ray-prefix": router_config(RayPrefixRouter),
    }


Usage = tuple[int, int, int]  # tokens of the prompt, found cached, of the output


@dataclass
class Conversation:
    """One chat to be had: the tenant's instructions, then a question per turn."""

    tenant: str
    system: str
    questions: list[str]


@dataclass
class Outcome:
    """What the clients of one policy saw, in the order in which prompts were sent."""

    sent: list[tuple[str, list[dict[str, str]]]] = field(default_factory=list)  # by whom, what
    cached: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: list[float] = field(default_factory=list)
    seconds: float = 0.0


def make_conversations(arguments: argparse.Namespace, seed: int) -> list[Conversation]:
    """Tenants are equally common, or by a power law with --skew."""
    draw = random.Random(seed)
    words = [f"{a}{b}" for a in "bcdfgklmnprst" for b in ("ack", "ell", "ink", "oot", "um", "ay")]

    def text(count: int) -> str:
        return " ".join(draw.choice(words) for _ in range(count))

    systems = [text(arguments.system_words) for _ in range(arguments.tenants)]
    weights = [1 / (i + 1) ** arguments.skew for i in range(arguments.tenants)]
    conversations = []
    for _ in range(arguments.conversations):
        (tenant,) = draw.choices(range(arguments.tenants), weights)
        questions = [text(12) for _ in range(arguments.turns)]
        conversations.append(Conversation(f"tenant-{tenant}", systems[tenant], questions))
    return conversations


class ChatProtocol:
    path = "/v1/chat/completions"

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        options = {"stream_options": {"include_usage": True}, "ignore_eos": True}
        return {"messages": messages, "max_tokens": 24} | options

    def read(self, event: dict[str, Any]) -> tuple[str, Usage | None]:
        if event["choices"]:
            return event["choices"][0]["delta"].get("content") or "", None
        usage = event["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return "", (usage["prompt_tokens"], cached, usage["completion_tokens"])


class ResponsesProtocol:
    path = "/v1/responses"

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        return {"input": messages, "max_output_tokens": 24}

    def read(self, event: dict[str, Any]) -> tuple[str, Usage | None]:
        if event["type"] == "response.output_text.delta":
            return event["delta"], None
        usage = event.get("response", {}).get("usage")
        if usage is None:
            return "", None
        cached = usage["input_tokens_details"]["cached_tokens"]
        return "", (usage["input_tokens"], cached, usage["output_tokens"])


class MessagesProtocol:
    path = "/v1/messages"

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        said = [message for message in messages if message["role"] != "system"]
        system = "".join(m["content"] for m in messages if m["role"] == "system")
        return {"model": "manta-demo", "system": system, "messages": said, "max_tokens": 24}

    def read(self, event: dict[str, Any]) -> tuple[str, Usage | None]:
        if event["type"] == "content_block_delta":
            return event["delta"].get("text", ""), None
        if event["type"] != "message_delta":
            return "", None
        usage = event["usage"]
        cached = usage["cache_read_input_tokens"]
        return "", (usage["input_tokens"] + cached, cached, usage["output_tokens"])


Protocol = ChatProtocol | ResponsesProtocol | MessagesProtocol
PROTOCOLS: dict[str, Protocol] = {
    "chat": ChatProtocol(),
    "responses": ResponsesProtocol(),
    "messages": MessagesProtocol(),
}


async def have(
    conversation: Conversation,
    protocol: Protocol,
    http: httpx.AsyncClient,
    outcome: Outcome,
    body_bytes: int,
) -> None:
    messages = []
    if conversation.system:
        messages.append({"role": "system", "content": conversation.system})
    for question in conversation.questions:
        messages.append({"role": "user", "content": question})
        outcome.sent.append((conversation.tenant, list(messages)))
        asked = {"temperature": 0, "stream": True} | protocol.body(messages)
        body = json.dumps(asked)[:-1].ljust(body_bytes) + "}"
        start, answer, first = time.perf_counter(), "", 0.0
        url = f"http://127.0.0.1:{_PORT}{protocol.path}"
        headers = {"Authorization": f"Bearer key-of-{conversation.tenant}"}
        headers |= {"content-type": "application/json"}
        async with http.stream("POST", url, content=body, headers=headers) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                text, usage = protocol.read(json.loads(line.removeprefix("data: ")))
                if text and not first:
                    first = time.perf_counter() - start
                answer += text
                if usage is not None:
                    outcome.prompt_tokens += usage[0]
                    outcome.cached += usage[1]
                    outcome.output_tokens += usage[2]
        outcome.ttft.append(first)
        messages.append({"role": "assistant", "content": answer})


async def run_clients(conversations: list[Conversation], arguments: argparse.Namespace) -> Outcome:
    protocol = PROTOCOLS[arguments.protocol]
    outcome, todo = Outcome(), iter(conversations)

    async def client() -> None:
        async with httpx.AsyncClient(timeout=300) as http:
            for conversation in todo:
                await have(conversation, protocol, http, outcome, arguments.body_bytes)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(arguments.clients)))
    outcome.seconds = time.perf_counter() - start
    return outcome


def oracle_hits(outcome: Outcome, model: str, num_blocks: int, isolate: bool) -> int:
    """Tokens that one cache of `num_blocks` would have found, prompt after prompt."""
    tokenizer = Tokenizer(resolve(model))
    hasher = BlockHasher(_BLOCK_SIZE, b"")
    pool, hits = BlockPool(num_blocks), 0
    for tenant, messages in outcome.sent:
        tokens = tokenizer.encode_chat(messages)
        hashes: list[bytes] = []
        hasher.extend(hashes, tokens, owner=tenant if isolate else "")
        table = pool.lookup(hashes[: (len(tokens) - 1) // _BLOCK_SIZE])
        hits += len(table) * _BLOCK_SIZE
        pool.hold(table)
        new = pool.allocate(len(hashes) - len(table))
        for block, block_hash in zip(new, hashes[len(table) :], strict=True):
            pool.publish(block, block_hash)
        pool.free(table + new)
    return hits


def measure(name: str, seed: int, arguments: argparse.Namespace) -> Outcome:
    """Fresh replicas, the same conversations for every policy."""
    args = AppArgs(
        model=arguments.model,
        num_replicas=arguments.replicas,
        num_blocks=arguments.num_blocks,
        block_size=_BLOCK_SIZE,
        max_model_len=2048,
        num_threads=1,
        num_cpus_per_shard=1,
    )
    serve.run(build(args, policies()[name]), name="app", route_prefix="/")
    asyncio.run(run_clients(make_conversations(arguments, seed=1000)[:8], arguments))
    time.sleep(3)  # so that the warm-up is in everybody's reports
    outcome = asyncio.run(run_clients(make_conversations(arguments, seed), arguments))
    serve.delete("app")
    return outcome


def report(name: str, outcome: Outcome, arguments: argparse.Namespace) -> None:
    num_blocks = arguments.num_blocks * arguments.replicas
    oracle = oracle_hits(outcome, arguments.model, num_blocks, arguments.isolate)
    cuts = statistics.quantiles(outcome.ttft, n=100)
    print(
        f"{name:14} hits {outcome.cached / outcome.prompt_tokens:6.1%} of prompt tokens, "
        f"{outcome.cached / max(oracle, 1):6.1%} of the oracle's; TTFT p50 "
        f"{cuts[49] * 1e3:5.0f} ms, p99 {cuts[98] * 1e3:5.0f} ms; "
        f"{outcome.output_tokens / outcome.seconds:5.0f} output tok/s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="manta-demo")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--num-blocks", type=int, default=400, help="of 16 tokens, per replica")
    parser.add_argument("--tenants", type=int, default=12)
    parser.add_argument("--skew", type=float, default=0.0, help="power law of tenants, 0 is even")
    parser.add_argument("--system-words", type=int, default=150, help="0: nothing to share")
    parser.add_argument("--conversations", type=int, default=96)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--protocol", default="chat", choices=PROTOCOLS)
    parser.add_argument("--body-bytes", type=int, default=0, help="fill bodies up with spaces")
    parser.add_argument("--isolate", action="store_true", help="a key for every tenant")
    parser.add_argument("--rounds", type=int, default=1, help="of all policies, in turn")
    parser.add_argument("--policies", nargs="+", default=list(policies()), choices=policies())
    arguments = parser.parse_args()
    if arguments.isolate:
        names = [f"tenant-{i}" for i in range(arguments.tenants)]
        os.environ["MANTA_API_KEYS"] = ",".join(f"{name}:key-of-{name}" for name in names)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # Ray's logging would have each request
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": _PORT})
    if arguments.rounds > 1:  # whoever comes first in a cluster is slower, whatever the policy
        measure(arguments.policies[0], arguments.rounds, arguments)
    speeds: dict[str, list[float]] = {name: [] for name in arguments.policies}
    for seed in range(arguments.rounds):
        for name in arguments.policies[:: -1 if seed % 2 else 1]:
            outcome = measure(name, seed, arguments)
            speeds[name].append(outcome.output_tokens / outcome.seconds)
            report(name, outcome, arguments)
    first, *others = speeds
    for name in others if arguments.rounds > 1 else ():
        ratios = [a / b for a, b in zip(speeds[first], speeds[name], strict=True)]
        print(
            f"tokens/s of {first} against {name}, by round: median "
            f"{statistics.median(ratios):.3f}, {min(ratios):.2f} to {max(ratios):.2f}"
        )
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
