"""What a Responses request may hold: the models, the refused fields and the limits.

Nothing is stored: the conversation comes whole in `input`.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, Tag, model_validator

from borg_serve.api import fields
from borg_serve.api.chat_models import (
    WHOLE,
    Id,
    JsonObjectFormat,
    Parts,
    RefusalPart,
    Result,
    Sampling,
    Text,
    TextFormat,
    ToolName,
)
from borg_serve.api.request import Dropped, Request, Strict, by_type

__all__ = ["ResponsesRequest"]


class InputText(Text):
    type: Literal["input_text"]


class OutputText(Text):
    type: Literal["output_text", "input_text"]


InputTexts = str | Parts[InputText]
OutputPart = Annotated[OutputText | RefusalPart, Field(discriminator="type")]


class Item(Strict):
    id: Any = None
    """Means nothing here, as `status` does: nothing is stored or continued."""
    status: Any = None


class SystemItem(Item):
    type: Literal["message"]
    role: Literal["system", "developer"]
    content: InputTexts


class UserItem(Item):
    type: Literal["message"]
    role: Literal["user"]
    content: InputTexts


class AssistantItem(Item):
    type: Literal["message"]
    role: Literal["assistant"]
    content: Result[OutputPart]


class FunctionCallItem(Item):
    type: Literal["function_call"]
    call_id: Id
    name: Annotated[str, Field(min_length=1, max_length=256)]
    namespace: Annotated[str, Field(max_length=256)] | None = None
    arguments: str
    """JSON, as the model wrote it; what is no JSON object reaches the model as `{}`."""


class FunctionOutputItem(Item):
    type: Literal["function_call_output"]
    call_id: Id
    output: Result[InputText] | None = None


class OtherItem(Dropped):
    """Thoughts, and what other servers did by tools of their own."""

    type: Literal["reasoning", "compaction", "web_search_call", "file_search_call", "code_interpreter_call", "mcp_call"]


MessageItem = Annotated[SystemItem | UserItem | AssistantItem, Field(discriminator="role")]
InputItem = Annotated[MessageItem | FunctionCallItem | FunctionOutputItem | OtherItem, Field(discriminator="type")]


class FunctionTool(Strict):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON Schema; its cost is bounded when the answer must follow it (`strict`, or a `tool_choice` that forces it)."""
    strict: bool | None = None


class OtherTool(Dropped):
    """A tool that the server would have to run, or whose calls are no JSON."""

    type: Annotated[str, Field(json_schema_extra={"not": {"enum": ["function", "namespace"]}})]


class OtherFunction(Dropped):
    """What a namespace holds beside functions."""

    type: Annotated[str, Field(json_schema_extra={"not": {"enum": ["function"]}})]


AnyFunction = Annotated[
    Annotated[FunctionTool, Tag("kept")] | Annotated[OtherFunction, Tag("dropped")], by_type(kept=("function",))
]


class NamespaceTool(Strict):
    """Functions that belong together; the model knows each as `<namespace>__<function>`."""

    type: Literal["namespace"]
    name: ToolName
    description: str | None = None
    """Not shown to the model: each function has its own."""
    tools: Annotated[list[AnyFunction], Field(max_length=128, fail_fast=True)]


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("kept")]
    | Annotated[NamespaceTool, Tag("space")]
    | Annotated[OtherTool, Tag("dropped")],
    by_type(kept=("function",), space=("namespace",)),
]


class ChosenTool(Strict):
    type: Literal["function"]
    name: ToolName


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    name: ToolName
    description: Annotated[str, Field(max_length=4096)] | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class TextConfig(Strict):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None = None


Label = Annotated[str, Field(max_length=512)]
Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Label | None], Field(max_length=16)]


class ResponsesRequest(Sampling, Request):
    """Body of POST /v1/responses. `null` anywhere in it, schemas apart, means absent."""

    LIMITS: ClassVar = {
        "input": ("maxItems", "max_messages"),
        "tools": ("maxItems", "max_tools"),
        "stop": ("maxItems", "max_stop"),
    }
    REFUSED: ClassVar = fields.RESPONSES
    NULLS_KEPT: ClassVar = ("parameters", "schema")

    input: str | Annotated[list[InputItem], Field(min_length=1, fail_fast=True)]
    """A user's message, or the conversation; items without `type` are messages."""
    instructions: str | None = None
    model: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    """More than the server's limit, or than the context has left, ends as `incomplete`."""
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    include: list[str] | None = None
    """`message.output_text.logprobs` is honoured; others are ignored."""
    text: TextConfig | None = None
    tools: Annotated[list[AnyTool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    metadata: Metadata | None = None
    """Comes back with the answer, and goes nowhere else."""

    @model_validator(mode="before")
    @classmethod
    def _name_messages(cls, body: dict[str, Any]) -> dict[str, Any]:
        """Items with a role need not say that they are messages."""
        if isinstance(items := body.get("input"), list):
            named = [
                {"type": "message", **item} if isinstance(item, dict) and "role" in item else item for item in items
            ]
            return {**body, "input": named}
        return body
