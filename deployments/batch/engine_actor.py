"""The pool's workers: an engine with its front, in a placement group, behind a Ray Data UDF."""

import asyncio
import time
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.batch.job_args import BatchArgs
from deployments.batch.job_file import JOB_FILE
from deployments.batch.parts import Part, find_format
from deployments.batch.rows import answer, row_seed
from deployments.batch.storage import Location
from deployments.front.front import Front
from deployments.shards.shard import group_bundles
from deployments.shards.shard_group import ShardGroup

# The UDF and the front wait for the engine most of the time.
_LIGHT_CPUS = 0.1
# How often a front whose process died is started anew.
_MAX_RESTARTS = 3


@dataclass(frozen=True)
class PartReport:
    """What a finished part adds to the job's progress."""

    rows: int
    errors: int
    prompt_tokens: int
    completion_tokens: int
    ready_at: float  # when the replica's engine was ready, in seconds since the epoch


class AnswerParts:
    """The UDF: {a Part's fields} in, {a PartReport's fields} out.

    Ray Data places it; its engine needs a placement group of its own, so that stands beside it. Per
    part, not per token, one Ray call goes there.
    """

    def __init__(self, args: BatchArgs) -> None:
        bundles = _placement_group(args)
        self._replica = BatchReplica.options(  # type: ignore[attr-defined]
            num_cpus=_LIGHT_CPUS,
            max_restarts=_MAX_RESTARTS,
            max_task_retries=-1,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                bundles, placement_group_bundle_index=0
            ),
        ).remote(args)
        ray.get(self._replica.start.remote())

    async def __call__(self, part: dict[str, Any]) -> dict[str, Any]:
        return asdict(await self._replica.answer.remote(Part(**part)))


def _placement_group(args: BatchArgs) -> PlacementGroup:
    """This UDF actor's own; if Ray has restarted the actor, the one it made before."""
    name = f"manta-batch-{ray.get_runtime_context().get_actor_id()}"
    try:
        return ray.util.get_placement_group(name)
    except ValueError:
        return ray.util.placement_group(group_bundles(args, _LIGHT_CPUS), "PACK", name)


@ray.remote
class BatchReplica:
    """Sits in bundle 0 of its placement group, with rank 0 of its engine."""

    def __init__(self, args: BatchArgs) -> None:
        self._args = args
        self._defaults = args.sampling.model_dump(exclude_unset=True)
        self._source, self._output = Location.of(args.input), Location.of(args.output)
        if JOB_FILE not in self._output.names():
            raise ValueError(
                f"output: {args.output} is not the same directory on all nodes; use a shared file "
                "system or a URI such as s3://bucket/directory, likewise for input"
            )
        self._format = find_format([path for path, _ in self._source.files()])
        self._starting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns once the engine serves; raises EngineUnavailableError when it never will."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        bundles = get_current_placement_group()
        assert bundles is not None, "AnswerParts gives every replica a placement group"
        self._front = await asyncio.to_thread(Front, self._args)
        self._shards = ShardGroup(self._args, self._front.client, bundles)
        await self._shards.start()
        self._ready_at = time.time()

    async def answer(self, part: Part) -> PartReport:
        """Read, answer and write a part. Many parts at a time keep the engine's rows full."""
        await self.start()  # a restarted process has no engine yet
        source = Location(self._source.filesystem, part.path)
        raw = await asyncio.to_thread(self._format.read, source, part.start, part.num_rows)
        rows = self._format.parse(raw)
        answers = await asyncio.gather(
            *(
                answer(self._front, row, self._defaults, row_seed(self._args.seed, index))
                for index, row in enumerate(rows, start=part.first_row)
            )
        )
        content = self._format.encode(raw, rows, answers)
        await asyncio.to_thread(self._output.write, part.name, content)
        return PartReport(
            rows=len(rows),
            errors=sum(a.error is not None for a in answers),
            prompt_tokens=sum(a.usage.get("prompt_tokens", 0) for a in answers),
            completion_tokens=sum(a.usage.get("completion_tokens", 0) for a in answers),
            ready_at=self._ready_at,
        )
