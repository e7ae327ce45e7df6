"""The models of a chat request: what may be in one and, by the configured bounds, how much.

OpenAI's fields, those of vLLM's that only steer sampling, and what benchmark tools send: those that are honoured. No
value changes its type.
"""

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

from pydantic import BeforeValidator, Field, Tag

from borg_serve.api import fields
from borg_serve.api.request import Dropped, Request, Strict, by_type

__all__ = ["ChatRequest", "joined"]

T = TypeVar("T")
# fail_fast: one bad item is enough, and a body of a megabyte can hold a hundred thousand.
Parts = Annotated[list[T], Field(min_length=1, max_length=1024, fail_fast=True)]
Id = Annotated[str, Field(max_length=256)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
ToolName = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,128}$")]


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
"""For integers as JSON Schema has them: 5.0 is one."""

# -------------------------------------------------------------------------------------------------- messages


class Texted(Protocol):
    """A part that has a text."""

    @property
    def text(self) -> str: ...


class Text(Strict):
    text: str


class TextPart(Text):
    type: Literal["text"]


class RefusalPart(Strict):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class ThoughtPart(Dropped):
    type: Literal["thinking", "redacted_thinking", "reasoning"]


Texts = str | Parts[TextPart]
Result = str | Annotated[list[T], Field(max_length=1024, fail_fast=True)]
"""What a tool gave back, which may be nothing."""
AssistantPart = Annotated[TextPart | RefusalPart | ThoughtPart, Field(discriminator="type")]


class Function(Strict):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str
    """JSON, as the model wrote it; what is no JSON object reaches the model as `{}`, so that the talk can go on."""


class ToolCall(Strict):
    id: Id
    type: Literal["function"] | None = None
    function: Function


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Texts


class UserMessage(Strict):
    role: Literal["user"]
    content: Texts


class AssistantMessage(Strict):
    role: Literal["assistant"]
    content: Result[AssistantPart] | None = None
    refusal: str | None = None
    """Stands for the content where that is absent."""
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None


class ToolMessage(Strict):
    role: Literal["tool"]
    content: Result[TextPart] | None = None
    tool_call_id: Id


def joined(content: str | Iterable[Texted | Dropped] | None) -> str:
    """Return the text of parts, joined by line ends as vLLM joins them."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content if not isinstance(part, Dropped))


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


# ----------------------------------------------------------------------------------------- tools and formats


class ToolFunction(Strict):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON Schema; its cost is bounded when the answer must follow it (`strict`, or a `tool_choice` that forces it)."""
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: ToolFunction


class OtherTool(Dropped):
    """A tool that the server would have to run, or whose calls are no JSON."""

    type: Annotated[str, Field(json_schema_extra={"not": {"const": "function"}})]


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


AnyTool = Annotated[Annotated[Tool, Tag("kept")] | Annotated[OtherTool, Tag("dropped")], by_type(kept=("function",))]
ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


# -------------------------------------------------------------------------------------------------- requests


class Sampling(Strict):
    """Fields that chat and Responses share, and that vLLM gets as they are sent."""

    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=1_000_000), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    # Logits are divided by it in float32, where a tiny one is zero.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WHOLE] | None = None
    stop: StopString | list[StopString] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0), WHOLE]], Field(max_length=16, fail_fast=True)] | None = (
        None
    )
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    parallel_tool_calls: bool | None = None


class ChatRequest(Sampling, Request):
    """Body of POST /v1/chat/completions. `null` anywhere in it, schemas apart, means absent."""

    LIMITS: ClassVar = {
        "n": ("maximum", "max_n"),
        "messages": ("maxItems", "max_messages"),
        "tools": ("maxItems", "max_tools"),
        "stop": ("maxItems", "max_stop"),
    }
    REFUSED: ClassVar = fields.CHAT
    NULLS_KEPT: ClassVar = ("parameters", "schema")

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    model: str | None = None
    stream_options: StreamOptions | None = None
    """Means nothing without `stream`: a whole answer has its usage."""
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    """More than the server's limit, or than the context has left, ends with the finish reason `length`."""
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    """Goes before `max_tokens`."""
    min_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None
    n: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    tools: Annotated[list[AnyTool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    response_format: ResponseFormat | None = None

    @property
    def known_tools(self) -> dict[int, Tool]:
        """The tools that are not dropped, by their places."""
        return {index: tool for index, tool in enumerate(self.tools or ()) if isinstance(tool, Tool)}
