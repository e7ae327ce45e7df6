"""The models of a chat request: what may be in one and, by the configured bounds, how much.

OpenAI's fields, those of vLLM's that only steer sampling, and what benchmark tools send. Strict: no value changes type.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

__all__ = [
    "AssistantMessage",
    "Bounds",
    "ChatRequest",
    "JsonSchemaFormat",
    "Message",
    "RefusalPart",
    "ResponseFormat",
    "SystemMessage",
    "TextPart",
    "Tool",
    "ToolChoice",
    "ToolMessage",
    "UserMessage",
]


@dataclass(frozen=True)
class Bounds:
    """What the configuration sets of a chat request's limits."""

    model: str = "borg-merge-v1"
    """The served name."""
    max_tokens: int = 8192
    max_n: int = 4
    max_messages: int = 2048
    max_tools: int = 128
    max_stop: int = 4
    """vLLM's own cap is 4 (VLLM_MAX_STOP_STRINGS)."""
    max_schema_bytes: int = 32_768
    """Size of one JSON Schema: of `response_format`, or of a tool's parameters."""
    vocab_size: int = 2**31
    """Token ids in `stop_token_ids` are below it."""

    def limits(self) -> Iterable[tuple[str, str, int]]:
        """Yield (field, JSON Schema keyword, limit), for the check and for the OpenAPI document alike."""
        yield "max_tokens", "maximum", self.max_tokens
        yield "max_completion_tokens", "maximum", self.max_tokens
        yield "min_tokens", "maximum", self.max_tokens
        yield "n", "maximum", self.max_n
        yield "messages", "maxItems", self.max_messages
        yield "tools", "maxItems", self.max_tools
        yield "stop", "maxItems", self.max_stop


# ---------------------------------------------------------------------------------------------------- models


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
"""For integers as JSON Schema has them: 5.0 is one."""

# fail_fast: one bad item is enough, and a body of a megabyte can hold a hundred thousand.
Texts = str | Annotated[list[TextPart], Field(min_length=1, max_length=1024, fail_fast=True)]
AssistantPart = Annotated[TextPart | RefusalPart, Field(discriminator="type")]
Id = Annotated[str, Field(max_length=256)]


class Function(Strict):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str
    """JSON, as the model wrote it; what is no JSON object reaches the model as `{}`, so that the talk can go on."""


class ToolCall(Strict):
    id: Id
    type: Literal["function"]
    function: Function


class Named(Strict):
    name: Annotated[str, Field(max_length=256)] | None = None
    """Accepted and not shown to the model: a template may write it where a role stands."""


class SystemMessage(Named):
    role: Literal["system", "developer"]
    content: Texts


class UserMessage(Named):
    role: Literal["user"]
    content: Texts


class AssistantMessage(Named):
    role: Literal["assistant"]
    content: str | Annotated[list[AssistantPart], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    refusal: str | None = None
    """Stands for the content where that is absent."""
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None


class ToolMessage(Named):
    role: Literal["tool"]
    content: Texts
    tool_call_id: Id


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
ToolName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class ToolFunction(Strict):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON Schema; its cost is bounded when the answer must follow it (`strict`, or a `tool_choice` that forces it)."""
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: ToolFunction


class ChosenFunction(Strict):
    name: ToolName


class ToolChoice(Strict):
    type: Literal["function"]
    function: ChosenFunction


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(Strict):
    name: ToolName
    description: Annotated[str, Field(max_length=4096)] | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextFormat(Strict):
    type: Literal["text"]


class JsonObjectFormat(Strict):
    type: Literal["json_object"]


class JsonSchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
Label = Annotated[str, Field(max_length=512)]


class ChatRequest(Strict):
    """Body of POST /v1/chat/completions. `null` anywhere in it, schemas apart, means absent."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    """Means nothing without `stream`: a whole answer has its usage."""
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    """Goes before `max_tokens`."""
    min_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    # Logits are divided by it in float32, where a tiny one is zero.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WHOLE] | None = None
    n: Annotated[int, Field(ge=1), WHOLE] | None = None
    stop: StopString | list[StopString] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0), WHOLE]], Field(max_length=16, fail_fast=True)] | None = (
        None
    )
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    tools: Annotated[list[Tool], Field(min_length=1, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None

    # Accepted because clients send them; they change nothing here.
    user: Label | None = None
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], Label], Field(max_length=16)] | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    service_tier: Literal["auto", "default"] | None = None
    session_id: Label | None = None
