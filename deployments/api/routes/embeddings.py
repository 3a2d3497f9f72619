"""POST /v1/embeddings, /v1/score and /v1/rerank: texts as vectors, and how near they are."""

import asyncio
import base64
import secrets
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field, ValidationError
from pydantic_core import to_json

from deployments.api.admission import (
    check_model,
    check_prompt,
    check_queue,
    prompt_error,
    request_options,
)
from deployments.api.bodies import BodyRoute
from deployments.api.errors import ApiError, validation_error
from deployments.api.schema import answers
from deployments.api.schema.answers import documented
from deployments.api.schema.completion_request import Prompt, listed
from deployments.api.schema.protocol import ServedRequest
from deployments.api.scope import scope
from deployments.api.streaming import cancel_all, start_all
from deployments.front.front import Front
from deployments.off_loop import off_loop
from engine.sampling_params import Pooling, SamplingParams
from engine.strict import explain
from engine.text.request_model import RequestModel, Unserved

# What Qwen's rerankers are trained on.
_JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
)
_INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
Vector = np.ndarray[Any, np.dtype[np.float32]]
Texts = str | Annotated[list[str], Field(min_length=1, max_length=4096)]


class PooledRequest(ServedRequest):
    stream: Unserved = None  # type: ignore[assignment]
    truncate_prompt_tokens: int | None = Field(
        None, ge=-1, lt=2**31, description="Only so many last tokens of each text; -1: what fits."
    )

    def params(self, pooling: Pooling) -> SamplingParams:
        """Raises ApiError for what no sampling parameter can be."""
        try:
            return SamplingParams(
                max_tokens=1,
                temperature=0,
                pooling=pooling,
                truncate_prompt_tokens=self.truncate_prompt_tokens,
            )
        except ValidationError as error:
            raise validation_error(explain(error.errors())) from error


class EmbeddingRequest(PooledRequest):
    input: Prompt
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(
        None, ge=1, description="So many first ones, for models that are trained for it."
    )


class ScoreRequest(PooledRequest):
    text_1: Texts = Field(description="One, or as many as text_2 has.")
    text_2: Texts
    instruction: str = Field(_INSTRUCTION, description="Of models that judge.")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        first, second = listed(self.text_1), listed(self.text_2)
        first = first * len(second) if len(first) == 1 else first
        if len(first) != len(second):
            raise ApiError(
                400, f"text_1: {len(first)} texts, but text_2 has {len(second)}", "text_1"
            )
        return list(zip(first, second, strict=True))


class _Document(RequestModel):
    text: str


class RerankRequest(PooledRequest):
    query: str
    documents: list[str | _Document] = Field(min_length=1, max_length=4096)
    top_n: int | None = Field(None, ge=1, description="Default: all.")
    return_documents: bool = False
    instruction: str = Field(_INSTRUCTION, description="Of models that judge.")


def routes(front: Front) -> APIRouter:
    router = APIRouter(route_class=BodyRoute)

    @router.post("/v1/embeddings", response_model=None, responses=documented(answers.EmbeddingList))
    async def create_embeddings(request: EmbeddingRequest) -> Response:
        check_model(front, request)
        texts = listed(request.input)
        vectors, usage = await _embed(front, texts, request, ["input"] * len(texts))
        if request.dimensions is not None and request.dimensions > len(vectors[0]):
            message = f"dimensions: {request.dimensions}, but the model's vectors have "
            raise ApiError(400, f"{message}{len(vectors[0])}", "dimensions")

        def body() -> bytes:
            cut = [_finish(front, vector[: request.dimensions]) for vector in vectors]
            as_text = request.encoding_format == "base64"
            data = [
                {
                    "object": "embedding",
                    "index": i,
                    "embedding": base64.b64encode(v.tobytes()).decode() if as_text else v.tolist(),
                }
                for i, v in enumerate(cut)
            ]
            head = {"object": "list", "model": front.model_name, "usage": usage}
            return to_json(head | {"data": data})

        size = sum(map(len, vectors)) * 10
        return Response(await off_loop(size, body), media_type="application/json")

    @router.post("/v1/score", response_model=None, responses=documented(answers.ScoreList))
    async def score(request: ScoreRequest) -> Response:
        """How near text_2 is to text_1: by a model that judges, or by the angle of embeddings."""
        check_model(front, request)
        fields = "text_1", "text_2"
        scores, usage = await _score(front, request.pairs, request, request.instruction, fields)
        data = [{"object": "score", "index": i, "score": score} for i, score in enumerate(scores)]
        head = {"id": f"score-{secrets.token_hex(12)}", "created": int(time.time())}
        head |= {"object": "list", "model": front.model_name, "usage": usage}
        return JSONResponse(head | {"data": data})

    @router.post("/v1/rerank", response_model=None, responses=documented(answers.Ranking))
    @router.post("/rerank", response_model=None, responses=documented(answers.Ranking))
    async def rerank(request: RerankRequest) -> Response:
        """The documents by how near they are to the query, as Jina and Cohere have it."""
        check_model(front, request)
        texts = [d if isinstance(d, str) else d.text for d in request.documents]
        pairs = [(request.query, text) for text in texts]
        fields = "query", "documents"
        scores, usage = await _score(front, pairs, request, request.instruction, fields)
        order = sorted(range(len(scores)), key=lambda i: -scores[i])[: request.top_n]
        results: list[dict[str, Any]] = [{"index": i, "relevance_score": scores[i]} for i in order]
        if request.return_documents:
            results = [r | {"document": {"text": texts[r["index"]]}} for r in results]
        head = {"id": f"rerank-{secrets.token_hex(12)}", "model": front.model_name}
        return JSONResponse(head | {"usage": usage, "results": results})

    return router


async def encode(
    front: Front,
    prompts: Sequence[str | list[int]],
    request: PooledRequest,
    fields: Sequence[str],
) -> list[list[int]]:
    """Texts among the prompts in tokens; raises ApiError.

    Args:
        fields: of the request, in which the prompts are.
    """
    fits = request.truncate_prompt_tokens is None
    max_len = front.client.limits.max_len if front.client.limits and fits else None
    encoded = []
    for prompt, field in zip(prompts, fields, strict=True):
        try:
            if isinstance(prompt, str):
                prompt = await front.encode(prompt, max_len=max_len)
        except ValueError as error:
            raise prompt_error(error, field) from error
        encoded.append(prompt)
    return encoded


async def _embed(
    front: Front,
    texts: Sequence[str | list[int]],
    request: PooledRequest,
    fields: Sequence[str],
) -> tuple[list[Vector], dict[str, int]]:
    """(vectors as the model has them, usage)"""
    if front.embedding is None:
        raise ApiError(
            400,
            f"{front.model_name!r} is not made for embeddings: its checkpoint has no config of "
            "sentence-transformers (modules.json); deploy it with pooling=last, mean or cls to "
            "have them all the same",
            "model",
            "unsupported_value",
        )
    prompts = await encode(front, texts, request, fields)
    return await pool(front, prompts, request, fields, Pooling(kind=front.embedding.kind))


async def pool(
    front: Front,
    prompts: Sequence[list[int]],
    request: PooledRequest,
    fields: Sequence[str],
    pooling: Pooling,
) -> tuple[list[Vector], dict[str, int]]:
    """(a vector of each prompt, usage); fields are as for `encode`.

    Raises ApiError for what cannot be served.
    """
    options, params = request_options(front, request), request.params(pooling)
    kept = [front.truncate(prompt, params) for prompt in prompts]
    for prompt, field in zip(kept, fields, strict=True):
        check_prompt(front, prompt, params, field)
    num_tokens = sum(map(len, kept))
    check_queue(front, len(kept), num_tokens)
    scope().end_reading()
    tasks = await start_all(front.embed(prompt, params, options) for prompt in kept)
    try:
        vectors = await asyncio.gather(*tasks)
    finally:
        await cancel_all(tasks)
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return [np.asarray(vector, np.float32) for vector in vectors], usage


def _finish(front: Front, vector: Vector) -> Vector:
    """The vector as clients get it: of length 1, if the model's are."""
    if front.embedding is None or not front.embedding.normalizes:
        return vector
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


async def _score(
    front: Front,
    pairs: Sequence[tuple[str, str]],
    request: PooledRequest,
    instruction: str,
    fields: tuple[str, str],
) -> tuple[list[float], dict[str, int]]:
    """
    Args:
        fields: of the request, in which the pairs' first texts are, and their second ones.
    """
    if front.judges:
        return await _judge(front, pairs, request, instruction, fields)
    field_of = {text: field for pair in pairs for text, field in zip(pair, fields, strict=True)}
    vectors, usage = await _embed(front, [*field_of], request, [*field_of.values()])
    units = {
        text: vector / max(float(np.linalg.norm(vector)), 1e-12)
        for text, vector in zip(field_of, vectors, strict=True)
    }
    return [float(units[first] @ units[second]) for first, second in pairs], usage


async def _judge(
    front: Front,
    pairs: Sequence[tuple[str, str]],
    request: PooledRequest,
    instruction: str,
    fields: tuple[str, str],
) -> tuple[list[float], dict[str, int]]:
    """The probability of yes, where no is the alternative."""
    # What is wrong with a prompt of both texts is the longer one's.
    longer = [fields[len(query) < len(document)] for query, document in pairs]
    prompts = []
    for (query, document), field in zip(pairs, longer, strict=True):
        asked = f"<Instruct>: {instruction}\n\n<Query>: {query}\n\n<Document>: {document}"
        messages = [{"role": "system", "content": _JUDGE}, {"role": "user", "content": asked}]
        try:
            prompts.append(await front.encode_chat(messages, enable_thinking=False))
        except ValueError as error:
            raise prompt_error(error, field) from error
    yes, no = (front.tokenizer.encode(word, add_special_tokens=False)[0] for word in ("yes", "no"))
    logits, usage = await pool(front, prompts, request, longer, Pooling(logits=[yes, no]))
    return [float(1 / (1 + np.exp(-np.float64(own[0] - own[1])))) for own in logits], usage
