"""OpenAI's Responses as a dialect: what a request may hold, and the chat request that means the same.

Nothing is stored: the conversation comes whole in `input`. It does not know how chat requests are checked or cleaned.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from borg_serve.chat import (
    WHOLE,
    Bounds,
    Id,
    JsonObjectFormat,
    Label,
    RefusalPart,
    StopString,
    Strict,
    TextFormat,
    ToolName,
)
from borg_serve.dialect import Dialect, Limit, as_chat, read
from borg_serve.refusal import REFUSED, RefusedField, RequestError
from borg_serve.reply import ResponsesReply
from borg_serve.schema import Neutralise

__all__ = ["REFUSED_HERE", "RESPONSES", "ResponsesRequest", "limits"]


class InputText(Strict):
    type: Literal["input_text"]
    text: str


class OutputText(Strict):
    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    """Comes back from clients that send answers on; ignored, as `logprobs` is."""
    logprobs: list[Any] | None = None


InputTexts = str | Annotated[list[InputText], Field(min_length=1, max_length=1024, fail_fast=True)]
OutputPart = Annotated[OutputText | RefusalPart, Field(discriminator="type")]


class Item(Strict):
    id: Id | None = None
    """Ignored, as `status` is: nothing is stored or continued here."""
    status: Literal["in_progress", "completed", "incomplete"] | None = None


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
    content: str | Annotated[list[OutputPart], Field(min_length=1, max_length=1024, fail_fast=True)]
    phase: Literal["commentary", "final_answer"] | None = None


class FunctionCallItem(Item):
    type: Literal["function_call"]
    call_id: Id
    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str
    """JSON, as the model wrote it; what is no JSON object reaches the model as `{}`."""


class FunctionOutputItem(Item):
    type: Literal["function_call_output"]
    call_id: Id
    output: InputTexts


MessageItem = Annotated[SystemItem | UserItem | AssistantItem, Field(discriminator="role")]
InputItem = Annotated[MessageItem | FunctionCallItem | FunctionOutputItem, Field(discriminator="type")]


class FunctionTool(Strict):
    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON Schema; its cost is bounded when the answer must follow it (`strict`, or a `tool_choice` that forces it)."""
    strict: bool | None = None


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


class ResponsesRequest(Strict):
    """Body of POST /v1/responses. `null` anywhere in it, schemas apart, means absent."""

    input: str | Annotated[list[InputItem], Field(min_length=1, fail_fast=True)]
    """A user's message, or the conversation; items without `type` are messages."""
    instructions: str | None = None
    model: str | None = None
    stream: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    """There is no reasoning, so the latter adds nothing."""
    text: TextConfig | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenTool | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], Label], Field(max_length=16)] | None = None
    """Comes back with the answer, and goes nowhere else."""

    # vLLM's additions that only steer sampling.
    top_k: Annotated[int, Field(ge=-1, le=1_000_000), WHOLE] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), WHOLE] | None = None
    stop: StopString | list[StopString] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None

    # Accepted because clients send them; they change nothing here.
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    service_tier: Literal["auto", "default"] | None = None
    session_id: Label | None = None


STORED = "nothing is stored here; send the whole conversation as input"
OPENAI = "it belongs to a service that this server does not have"
REFUSED_HERE = {
    **{name: field for name, field in REFUSED.items() if name not in ResponsesRequest.model_fields},
    "background": RefusedField(STORED, (False,)),
    "background_options": RefusedField(STORED),
    "conversation": RefusedField(STORED),
    "previous_response_id": RefusedField(STORED),
    "previous_input_messages": RefusedField("send the conversation as input", ([],)),
    "prompt": RefusedField("prompts of clients are not stored here, and every prompt begins with the identity"),
    "truncation": RefusedField("it cuts the prompt, and every prompt begins with the identity", ("disabled",)),
    "enable_response_messages": RefusedField("it prints the prompt", (False,)),
    "max_tool_calls": RefusedField("it counts calls of built-in tools, and there are none"),
    "reasoning": RefusedField("this is not a reasoning model", ({},)),
    "stream_options": RefusedField("nothing in a stream is obfuscated", ({}, {"include_obfuscation": False})),
    "access_programs": RefusedField(OPENAI),
    "context_management": RefusedField(OPENAI, ([],)),
    "image": RefusedField("this model reads text only"),
}
"""Fields of OpenAI's and vLLM's Responses requests that are not in the model."""

SAMPLING = (
    "model",
    "stream",
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "top_k",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "include_stop_str_in_output",
    "ignore_eos",
)
"""Fields that are chat's as they are."""


OPAQUE = ("metadata", "parameters", "text")


def limits(bounds: Bounds) -> Iterable[Limit]:
    """Yield (field, JSON Schema keyword, limit), for the check and for the OpenAPI document alike."""
    yield "input", "maxItems", bounds.max_messages
    yield "max_output_tokens", "maximum", bounds.max_tokens
    yield "tools", "maxItems", bounds.max_tools
    yield "stop", "maxItems", bounds.max_stop


def _parse(raw: bytes, bounds: Bounds, neutralise: Neutralise) -> tuple[dict[str, Any], ResponsesReply]:
    request = read(raw, ResponsesRequest, REFUSED_HERE, limits(bounds), OPAQUE, _name_messages)
    if request.top_logprobs and not _wants_logprobs(request):
        what = "top_logprobs: is allowed only when include has message.output_text.logprobs."
        raise RequestError(400, what, param="top_logprobs", code="invalid_value")
    return as_chat(_chat(request), bounds, neutralise, RESPONSES), ResponsesReply(_echo(request))


RESPONSES = Dialect(
    path="/v1/responses",
    parse=_parse,
    error_body=lambda _status, error, _request_id: {"error": error},
    names=(
        (r"^messages\b.*", "input"),
        (r"^max_(completion_)?tokens$", "max_output_tokens"),
        (r"^response_format(\.json_schema)?", "text.format"),
        (r"\.function\b", ""),
    ),
)


def _name_messages(body: dict[str, Any]) -> None:
    """Items with a role need not say that they are messages."""
    if isinstance(body.get("input"), list):
        for item in body["input"]:
            if isinstance(item, dict) and "role" in item:
                item.setdefault("type", "message")


def _wants_logprobs(request: ResponsesRequest) -> bool:
    return "message.output_text.logprobs" in (request.include or ())


# ------------------------------------------------------------------------------------------------------- chat


def _chat(request: ResponsesRequest) -> dict[str, Any]:
    tools, choice = request.tools or None, request.tool_choice
    if tools is None and choice == "auto":
        choice = None
    return {
        **{name: getattr(request, name) for name in SAMPLING},
        "messages": _messages(request),
        "max_completion_tokens": request.max_output_tokens,
        "logprobs": True if _wants_logprobs(request) else None,
        "top_logprobs": (request.top_logprobs or 0) if _wants_logprobs(request) else None,
        "stream_options": {"include_usage": True} if request.stream else None,
        "tools": tools and [_nested(tool.model_dump(exclude_none=True)) for tool in tools],
        "tool_choice": _nested(choice.model_dump()) if isinstance(choice, ChosenTool) else choice,
        "response_format": _format(request.text),
    }


def _nested(sent: dict[str, Any]) -> dict[str, Any]:
    return {"type": sent.pop("type"), "function": sent}


def _format(text: TextConfig | None) -> dict[str, Any] | None:
    if text is None or text.format is None:
        return None
    sent = text.format.model_dump(by_alias=True, exclude_none=True)
    kind = sent.pop("type")
    return {"type": kind, **({kind: sent} if sent else {})}


def _messages(request: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if request.instructions is not None:
        messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        return [*messages, {"role": "user", "content": request.input}]
    for item in request.input:
        if isinstance(item, FunctionCallItem):
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            # Calls belong to one turn with the text before them.
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant"})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif isinstance(item, FunctionOutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
        else:
            messages.append({"role": item.role, "content": _text(item.content)})
    return messages


def _text(content: str | list[InputText] | list[OutputPart]) -> str:
    """Parts joined by line ends, as chat joins them."""
    if isinstance(content, str):
        return content
    return "\n".join(part.refusal if isinstance(part, RefusalPart) else part.text for part in content)


def _echo(request: ResponsesRequest) -> dict[str, Any]:
    """What of a request comes back with its answer, as the client wrote it."""
    sent = request.model_dump(by_alias=True, exclude_none=True)
    default: dict[str, Any] = {
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": None,
    }
    return {name: sent.get(name, value) for name, value in default.items()}
