"""The requests that the server takes and the answers that it gives, as data.

Request fields are checked here, against themselves alone; what depends on the model is checked by
:class:`~fastdllm_ext.serve.service.Service`. The response classes describe; answers are built as plain
dictionaries (``replies.py``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fastdllm_ext.serve.errors import ApiError

__all__ = ["Body", "ChatRequest", "CompletionRequest", "parse"]

INT32 = 2**31 - 1


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: 3.0 is an integer."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _off(value: bool) -> bool:
    if value:
        raise ValueError("takes false")
    return value


Whole = BeforeValidator(_whole)
Count = Annotated[int, Field(ge=1, le=INT32), Whole]
Nothing = Annotated[list[Any], Field(max_length=0)]  # an empty list
Zero = Annotated[float, Field(ge=0, le=0)]
Off = Annotated[bool, Field(json_schema_extra={"const": False}), AfterValidator(_off)]
Text = Annotated[str, Field(max_length=200)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=INT32), Whole]], Field(min_length=1)]


class Strict(BaseModel):
    """No unknown fields, no conversions, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """Of a streamed answer."""

    include_usage: bool | None = Field(None, description="a last chunk with the tokens of all choices")
    include_obfuscation: Off | None = None


class Neutral(Strict):
    """OpenAI's fields that have no effect here: taken at the values at which they have none there."""

    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    metadata: dict[str, str] | None = None
    store: Off | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None


class Decoding(Strict):
    """Fields of :class:`fastdllm_ext.GenerationConfig`; what is null or left out is the server's default."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(
        None, description="0 is greedy, which is the default unless the checkpoint asks otherwise"
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="models that define it; of others 1 alone"
    )
    seed: Annotated[int, Field(ge=0, le=2**63 - 1), Whole] | None = Field(
        None, description="choice i samples from its stream i"
    )
    threshold: Annotated[float, Field(ge=-1000, le=1)] | None = Field(
        None, description="commit every token whose confidence reaches it"
    )
    factor: Annotated[float, Field(gt=0, le=1000)] | None = Field(
        None, description="commit the n most confident tokens while (n + 1)(1 - confidence) <= factor"
    )
    steps: Count | None = Field(None, description="forwards in all")
    rule: Text | Annotated[dict[str, int | float | Text], Field(min_length=1, max_length=16)] | None = Field(
        None, description="another selection rule: 'name:parameter=value:...', or with 'name' as a mapping"
    )
    cache: Literal["none", "prefix", "dual"] | None = Field(None, description="of keys and values")
    refresh: Literal["block"] | Count | None = Field(
        None, description="every how many blocks the whole row is computed"
    )
    block_length: Count | None = Field(None, description="tokens that a block holds")
    remasking: Literal["low_confidence", "random", "margin", "entropy"] | None = Field(
        None, description="what positions are ranked by"
    )
    top_k: Count | None = Field(None, description="models that define it")
    cfg_scale: Annotated[float, Field(ge=0, le=1000)] | None = Field(
        None, description="classifier-free guidance"
    )


class Body(Neutral, Decoding):
    """What both kinds of request take.

    Attributes:
        prompt_name: the field that holds the prompt.
        templated: that is written by a chat template, with its special tokens.
    """

    prompt_name: ClassVar[str]
    templated: ClassVar[bool] = False

    model: str = Field(description="as GET /v1/models lists it")
    n: Annotated[int, Field(ge=1, le=1024), Whole] | None = Field(None, description="answers to each prompt")
    max_tokens: Count | None = Field(None, description="tokens of the answer")
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = Field(
        None, description="the answer ends before the first of these strings"
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stream_mode: Literal["blocks", "denoise"] | None = Field(
        None, description="stream text block by block, or every token as it is committed"
    )

    def sources(self, chat: Callable[[list[dict[str, str]]], str]) -> list[str | list[int]]:
        """The prompts, as text or as token ids; ``chat`` renders messages."""
        raise NotImplementedError

    def check(self) -> None:
        """ApiError unless the fields fit together."""
        if self.denoise and not self.stream:
            raise ApiError(400, "stream_mode='denoise'; takes stream=true", param="stream_mode")

    def decoding(self) -> dict[str, Any]:
        """The fields of :class:`fastdllm_ext.GenerationConfig` that were given."""
        given = {name: getattr(self, name) for name in Decoding.model_fields}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def answer_length(self) -> int | None:
        """Tokens of the answer, where they were given."""
        return self.max_tokens

    @property
    def answer_count(self) -> int:
        """Answers in all."""
        return self.n or 1

    @property
    def echoes(self) -> bool:
        """Answers come with their prompt."""
        return False

    @property
    def scores(self) -> bool:
        """Answers come with their tokens' logarithms."""
        raise NotImplementedError

    @property
    def denoise(self) -> bool:
        """Stream every commit."""
        return self.stream_mode == "denoise"

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(Body):
    """``POST /v1/completions``."""

    prompt_name = "prompt"

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    echo: bool | None = Field(None, description="the prompt before the answer")
    logprobs: Annotated[int, Field(ge=0, le=5), Whole] | None = Field(
        None, description="the confidence's logarithm of each token; no others beside it"
    )
    best_of: Count | None = Field(None, description="1, or n")
    suffix: None = None

    def sources(self, chat: Callable[[list[dict[str, str]]], str]) -> list[str | list[int]]:
        """One prompt or several."""
        prompt: Any = self.prompt
        return [prompt] if self._single else list(prompt)

    @property
    def _single(self) -> bool:
        return isinstance(self.prompt, str) or isinstance(self.prompt[0], int)

    @property
    def answer_count(self) -> int:
        """Prompts times ``n``."""
        return (self.n or 1) * (1 if self._single else len(self.prompt))

    @property
    def echoes(self) -> bool:
        """Where ``echo`` is true."""
        return bool(self.echo)

    @property
    def scores(self) -> bool:
        """Where ``logprobs`` is a number."""
        return self.logprobs is not None

    def check(self) -> None:
        """Fields that exclude one another."""
        super().check()
        if self.best_of not in (None, 1, self.n or 1):
            raise ApiError(400, f"best_of={self.best_of}; takes 1 or n={self.n or 1}", param="best_of")
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "echo=true; takes false with logprobs: a prompt has none", param="echo")


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """A message; what beside its role and content an answer of ours may carry is taken back empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    annotations: Nothing | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing | None = None

    def plain(self) -> dict[str, str]:
        """What a chat template takes. A developer's message is the system's."""
        role = "system" if self.role == "developer" else self.role
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        named = {} if self.name is None else {"name": self.name}
        return {"role": role, "content": content, **named}


class TextFormat(Strict):
    """Of the answer."""

    type: Literal["text"]


class ChatRequest(Body):
    """``POST /v1/chat/completions``."""

    prompt_name = "messages"
    templated = True

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = Field(None, description="another name of max_tokens")
    logprobs: bool | None = Field(None, description="the confidence's logarithm of each token")
    top_logprobs: Zero | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: TextFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    reasoning_effort: None = None

    def sources(self, chat: Callable[[list[dict[str, str]]], str]) -> list[str | list[int]]:
        """One prompt."""
        return [chat([message.plain() for message in self.messages])]

    def check(self) -> None:
        """Fields that exclude one another."""
        super().check()
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            message = f"max_completion_tokens={both[1]}: is another name of max_tokens={both[0]}; takes one"
            raise ApiError(400, message, param="max_completion_tokens")

    @property
    def scores(self) -> bool:
        """Where ``logprobs`` is true."""
        return bool(self.logprobs)

    @property
    def answer_length(self) -> int | None:
        """Under either name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


B = TypeVar("B", bound=Body)


def parse(request: type[B], body: bytes) -> B:
    """A request from the bytes of its body. ApiError that names the field, what came and what is allowed."""
    try:
        found = request.model_validate_json(body)
    except ValidationError as error:
        raise _complaint(request, error) from None
    found.check()
    return found


def _complaint(request: type[Body], error: ValidationError) -> ApiError:
    """The first field that is wrong, in words that hold for all types that it may have."""
    errors = error.errors(include_url=False)
    if not errors[0]["loc"]:
        return ApiError(400, f"body: {errors[0]['msg']}; takes a JSON object")
    name = str(errors[0]["loc"][0])
    fields, parts = schema_of(request)["properties"], schema_of(request).get("$defs", {})
    if name not in fields:
        allowed = ", ".join(sorted(fields))
        return ApiError(400, f"unknown field {shown(name)}; takes {allowed}", param=name[:100])
    # Between indices and names of fields, a place also names the types that were tried.
    inner = {field for part in parts.values() for field in part["properties"]}
    first = max(
        (one for one in errors if one["loc"][0] == name), key=lambda one: sum(p in inner for p in one["loc"])
    )
    missing = first["type"] == "missing"
    inner |= {first["loc"][-1]} if first["type"] == "extra_forbidden" else set()
    path = [p for p in first["loc"][1:] if isinstance(p, int) or p in inner]
    where = name + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)[:200]
    came = f"{where} is missing" if missing else f"{where}={shown(first['input'])}"
    wanted = first["msg"] if path else f"takes {takes(fields[name], parts)}"
    return ApiError(400, came if missing and path else f"{came}; {wanted}", param=name)


@cache
def schema_of(request: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a class, as OpenAPI refers to its parts."""
    return request.model_json_schema(ref_template="#/components/schemas/{model}")


def shown(value: Any) -> str:
    """A value in a message, cut short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}..."


def takes(schema: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """What a JSON schema allows, in words. ``parts``: those that it may refer to, by name."""
    if "$ref" in schema:
        return takes(parts[schema["$ref"].rsplit("/", 1)[1]], parts)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(takes(one, parts) for one in schema["anyOf"]))
    if "const" in schema or "enum" in schema:
        return " or ".join(map(json.dumps, schema.get("enum", [schema.get("const")])))
    kind = schema.get("type")
    if kind in ("integer", "number"):
        if "minimum" in schema and schema["minimum"] == schema.get("maximum"):
            return str(schema["minimum"])
        return f"{'an int' if kind == 'integer' else 'a number'}{_range(schema)}"
    if kind == "array":
        if schema.get("maxItems") == 0:
            return "[]"
        most = f", {schema['maxItems']} at most" if "maxItems" in schema else ""
        return f"[{takes(schema['items'], parts)}, ...{most}]"
    if kind == "object" and "properties" in schema:
        return f"an object of {', '.join(schema['properties'])}"
    if kind == "object":
        return "{}" if schema.get("maxProperties") == 0 else "an object"
    if kind == "string":
        sizes = f" of {schema.get('minLength', 0)} to {schema.get('maxLength')} characters"
        return f"a string{sizes}" if "maxLength" in schema else "a string"
    return {"boolean": "true or false", "null": "null"}[str(kind)]


def _range(schema: Mapping[str, Any]) -> str:
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to"}
    return "".join(f" {word} {schema[key]}" for key, word in words.items() if key in schema)


class Usage(BaseModel):
    """Tokens: of the prompts, and of the answers up to and including the end-of-text token."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Speed(BaseModel):
    """How the answer was decoded. Of several choices the first two are sums, the seconds the largest."""

    nfe: int = Field(description="forwards")
    tokens: int
    tokens_per_forward: float | None
    tokens_per_second: float | None
    seconds: float = Field(description="since the request was taken in")
    queue_seconds: float | None = Field(description="null where a stop string ended the answer")
    first_block_seconds: float | None


class CompletionLogprobs(BaseModel):
    """Of each token of the answer."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: None = None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """An answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Answered(BaseModel):
    """What both kinds of answer hold."""

    id: str
    created: int = Field(description="seconds since 1970")
    model: str
    usage: Usage
    fastdllm: Speed


class CompletionResponse(Answered):
    """Of ``POST /v1/completions``."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class TokenLogprob(BaseModel):
    """Of a token of the answer."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: Nothing


class ChatLogprobs(BaseModel):
    """Of each token of the answer."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(BaseModel):
    """An answer's message."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """An answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class ChatResponse(Answered):
    """Of ``POST /v1/chat/completions``."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ModelFacts(BaseModel):
    """What a client may want to know before it asks."""

    max_positions: int = Field(description="of prompt and answer together")
    max_tokens_default: int
    family: str
    settings: dict[str, Any] = Field(description="defaults of the decoding fields, where they are not usual")
    takes_top_p: bool
    has_chat: bool
    parameters: int


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    fastdllm: ModelFacts


class ModelList(BaseModel):
    """Of ``GET /v1/models``."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """Of ``GET /health``; numbers where the model is loaded."""

    status: Literal["ok", "loading", "draining", "failed"]
    queued: int | None = None
    running: int | None = None
    free_pages: int | None = None
    num_pages: int | None = None
    replicas: int | None = None


class ErrorDetails(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Of every request that fails."""

    error: ErrorDetails
