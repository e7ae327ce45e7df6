"""What a request in Anthropic's Messages protocol may hold: the models, the refused fields and the limits."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag

from borg_serve.api import fields
from borg_serve.api.chat_models import WHOLE, Id, Parts, Result, StopString, Text, ToolName, joined
from borg_serve.api.request import Dropped, Request, Strict, by_type

__all__ = ["MessagesRequest"]


class TextBlock(Text):
    type: Literal["text"]


class SearchResultBlock(Strict):
    type: Literal["search_result"]
    title: str | None = None
    source: str | None = None
    content: list[TextBlock]

    @property
    def text(self) -> str:
        return "\n".join(filter(None, [self.title, self.source, joined(self.content)]))


class TextSource(Strict):
    type: Literal["text"]
    data: str


class DocumentBlock(Strict):
    """A document in plain text."""

    type: Literal["document"]
    title: str | None = None
    source: TextSource

    @property
    def text(self) -> str:
        return "\n".join(filter(None, [self.title, self.source.data]))


class ToolReferenceBlock(Strict):
    """A tool that the client's search for tools has found; the request defines it."""

    type: Literal["tool_reference"]
    tool_name: str

    @property
    def text(self) -> str:
        return self.tool_name


class ToolUseBlock(Strict):
    type: Literal["tool_use"]
    id: Id
    name: Annotated[str, Field(min_length=1, max_length=256)]
    input: dict[str, Any]


class OtherBlock(Dropped):
    """Thoughts, and what other servers found out by tools of their own."""

    type: Literal[
        "thinking",
        "redacted_thinking",
        "server_tool_use",
        "web_search_tool_result",
        "web_fetch_tool_result",
        "code_execution_tool_result",
        "bash_code_execution_tool_result",
        "text_editor_code_execution_tool_result",
        "tool_search_tool_result",
        "mcp_tool_use",
        "mcp_tool_result",
        "compaction",
        "fallback",
    ]


Texts = str | Parts[TextBlock]
ResultBlock = Annotated[TextBlock | SearchResultBlock | DocumentBlock | ToolReferenceBlock, Field(discriminator="type")]


class ToolResultBlock(Strict):
    """`is_error` is ignored: chat templates know no such thing, and the content says what went wrong."""

    type: Literal["tool_result"]
    tool_use_id: Id
    content: Result[ResultBlock] | None = None


UserBlock = Annotated[TextBlock | SearchResultBlock | DocumentBlock | ToolResultBlock, Field(discriminator="type")]
AssistantBlock = Annotated[TextBlock | ToolUseBlock | OtherBlock, Field(discriminator="type")]


class SystemTurn(Strict):
    role: Literal["system"]
    content: Texts


class UserTurn(Strict):
    role: Literal["user"]
    content: str | Parts[UserBlock]


class AssistantTurn(Strict):
    role: Literal["assistant"]
    content: Result[AssistantBlock]


Turn = Annotated[SystemTurn | UserTurn | AssistantTurn, Field(discriminator="role")]


class ClientTool(Strict):
    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    """JSON Schema; its cost is bounded when the answer must follow it (`strict`, or a `tool_choice` that forces it)."""
    strict: bool | None = None


class OtherTool(Dropped):
    """A tool that the server would have to run, or whose calls only Anthropic's models know."""

    type: Annotated[str, Field(json_schema_extra={"not": {"enum": ["custom", "function"]}})]


AnyTool = Annotated[
    Annotated[ClientTool, Tag("kept")] | Annotated[OtherTool, Tag("dropped")], by_type(kept=("custom", "function"))
]


class ToolChoiceAny(Strict):
    type: Literal["auto", "any"]
    disable_parallel_tool_use: bool | None = None


class ToolChoiceNone(Strict):
    type: Literal["none"]


class ToolChoiceTool(Strict):
    type: Literal["tool"]
    name: ToolName
    disable_parallel_tool_use: bool | None = None


class JsonFormat(Strict):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    format: JsonFormat | None = None


class MessagesRequest(Request):
    """Body of POST /v1/messages. `null` anywhere in it, schemas and inputs of tools apart, means absent."""

    LIMITS: ClassVar = {
        "messages": ("maxItems", "max_messages"),
        "stop_sequences": ("maxItems", "max_stop"),
        "tools": ("maxItems", "max_tools"),
    }
    REFUSED: ClassVar = fields.MESSAGES
    NULLS_KEPT: ClassVar = ("input", "input_schema", "schema")

    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    """More than the server's limit, or than the context has left, ends with the stop reason `max_tokens`."""
    messages: Annotated[list[Turn], Field(min_length=1, fail_fast=True)]
    model: str | None = None
    system: Result[TextBlock] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000), WHOLE] | None = None
    stop_sequences: list[StopString] | None = None
    tools: Annotated[list[AnyTool], Field(fail_fast=True)] | None = None
    tool_choice: Annotated[ToolChoiceAny | ToolChoiceNone | ToolChoiceTool, Field(discriminator="type")] | None = None
    output_config: OutputConfig | None = None
