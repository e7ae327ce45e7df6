"""OpenAI's Responses protocol: a request as the chat request that means the same, and chat's answer as a response.

It does not know how chat requests are checked or cleaned.
"""

import re
from collections.abc import Mapping
from typing import Any

from borg_serve.api.chat import error_body, gathered, translated
from borg_serve.api.chat_models import Sampling, joined
from borg_serve.api.errors import invalid
from borg_serve.api.protocol import Bounds, Neutralise
from borg_serve.api.request import read, renamed
from borg_serve.api.responses_models import (
    ChosenTool,
    FunctionCallItem,
    FunctionOutputItem,
    FunctionTool,
    NamespaceTool,
    OtherItem,
    ResponsesRequest,
    SchemaFormat,
    TextConfig,
)
from borg_serve.api.translated_answer import Json, TranslatedAnswer, cached_tokens

__all__ = ["PATH", "ResponsesAnswer", "error_body", "field_name", "parse"]

PATH = "/v1/responses"
LOGPROBS = "message.output_text.logprobs"
NAMES = (
    (r"^messages\b.*", "input"),
    (r"^max_(completion_)?tokens$", "max_output_tokens"),
    (r"^response_format(\.json_schema)?", "text.format"),
    (r"\.function\b", ""),
)
"""Regular expressions for names of chat's fields, and their names here."""


def parse(raw: bytes, bounds: Bounds, neutralise: Neutralise) -> tuple[dict[str, Any], "ResponsesAnswer"]:
    """Return the chat request for vLLM, and what makes a response of chat's answer. Raises ApiError."""
    request, ignored = read(raw, ResponsesRequest, bounds)
    if request.top_logprobs and not _wants_logprobs(request):
        raise invalid("top_logprobs", f"is allowed only when include has {LOGPROBS}")
    if set(request.include or ()) - {LOGPROBS}:
        ignored = (*ignored, "include")
    functions = _functions(request)
    places = [place for _, _, place in functions.values()]

    def name_of(chat_field: str) -> str:
        return re.sub(r"^tools\.(\d+)", lambda match: f"tools.{places[int(match[1])]}", field_name(chat_field))

    body = translated(_chat(request, functions), bounds, neutralise, name_of)
    form = request.text.format if request.text else None
    if isinstance(form, SchemaFormat) and body["response_format"]["type"] != form.type:
        ignored = (*ignored, "text.format.schema")
    return body, ResponsesAnswer(_echo(request), functions, ignored, gathered(body))


def field_name(chat_field: str) -> str:
    """Return the name here for a field of chat."""
    return renamed(chat_field, NAMES)


def _wants_logprobs(request: ResponsesRequest) -> bool:
    return LOGPROBS in (request.include or ())


# ------------------------------------------------------------------------------------------------------- chat


Functions = Mapping[str, tuple[FunctionTool, str | None, str]]
"""The name that the model knows -> the function, the namespace that it is in, and its place in `tools`."""


def _functions(request: ResponsesRequest) -> Functions:
    found: dict[str, tuple[FunctionTool, str | None, str]] = {}
    for index, tool in enumerate(request.tools or ()):
        if isinstance(tool, FunctionTool):
            found[tool.name] = tool, None, f"{index}"
        elif isinstance(tool, NamespaceTool):
            for inner, function in enumerate(tool.tools):
                if isinstance(function, FunctionTool):
                    found[_full(function.name, tool.name)] = function, tool.name, f"{index}.tools.{inner}"
    return found


def _full(name: str, namespace: str | None) -> str:
    return f"{namespace.rstrip('_')}__{name}" if namespace else name


def _chat(request: ResponsesRequest, functions: Functions) -> dict[str, Any]:
    choice = request.tool_choice
    sent = [{**tool.model_dump(exclude_none=True), "name": name} for name, (tool, _, _) in functions.items()]
    return {
        **{name: getattr(request, name) for name in ("model", *Sampling.model_fields)},
        "messages": _messages(request),
        "max_completion_tokens": request.max_output_tokens,
        "logprobs": True if _wants_logprobs(request) else None,
        "top_logprobs": (request.top_logprobs or 0) if _wants_logprobs(request) else None,
        "stream_options": {"include_usage": True} if request.stream else None,
        "tools": [_nested(tool) for tool in sent],
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
            function = {"name": _full(item.name, item.namespace), "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            # Calls belong to one turn with the text before them.
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant"})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif isinstance(item, FunctionOutputItem):
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": joined(item.output)})
        elif not isinstance(item, OtherItem):
            messages.append({"role": item.role, "content": joined(item.content)})
    return messages


def _echo(request: ResponsesRequest) -> dict[str, Any]:
    """What of a request comes back with its answer, as the client wrote it."""
    sent = request.model_dump(by_alias=True, exclude_none=True)
    sent["tools"] = [tool for tool in sent.get("tools", ()) if tool["type"] in ("function", "namespace")]
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


# ----------------------------------------------------------------------------------------------------- answer


class ResponsesAnswer(TranslatedAnswer):
    """`echo`: the fields of the request that come back with its answer."""

    def __init__(
        self, echo: Mapping[str, Any], functions: Functions, ignored: tuple[str, ...] = (), gathers: bool = False
    ) -> None:
        super().__init__(ignored, gathers)
        self._echo = echo
        self._functions = functions
        self._status = "in_progress"
        self._output: list[Json] = []
        self._logprobs: list[Json] = []
        self._sequence = 0

    def emit(self, event: str, **fields: Any) -> None:
        super().emit(event, sequence_number=self._sequence, **fields)
        self._sequence += 1

    def error_event(self, body: Mapping[str, Any]) -> bytes:
        self._events = []
        error = body["error"]
        self.emit("error", code=error["code"], message=error["message"], param=error["param"])
        return b"".join(self._events)

    def started(self) -> None:
        self.emit("response.created", response=self.whole())
        self.emit("response.in_progress", response=self.whole())

    def opened(self, call: Json) -> None:
        item: Json = {"id": f"{'fc' if call else 'msg'}_{self.id}_{self.parts}", "status": "in_progress"}
        if call:
            item |= {"type": "function_call", "call_id": call["id"], "name": call["name"], "arguments": ""}
            tool, namespace, _ = self._functions.get(call["name"], (None, None, ""))
            if tool and namespace:
                item |= {"name": tool.name, "namespace": namespace}
        else:
            item |= {"type": "message", "role": "assistant", "content": []}
        self._output.append(item)
        self._logprobs = []
        self.emit("response.output_item.added", output_index=self.parts, item=item)
        if not call:
            self.emit("response.content_part.added", **self._place(), part=_output_text("", []))

    def said(self, piece: str, logprobs: list[Json]) -> None:
        if self._output[-1]["type"] == "message":
            self._logprobs += logprobs
            brief = [_without_bytes(token) for token in logprobs]
            self.emit("response.output_text.delta", **self._place(), delta=piece, logprobs=brief)
        else:
            self.emit("response.function_call_arguments.delta", **self._place(), delta=piece)

    def closed(self, whole: str, last: bool) -> None:
        item = self._output[-1]
        item["status"] = "incomplete" if last and self.finish == "length" else "completed"
        if item["type"] == "message":
            part = _output_text(whole, self._logprobs)
            brief = [_without_bytes(token) for token in self._logprobs]
            self.emit("response.output_text.done", **self._place(), text=whole, logprobs=brief)
            self.emit("response.content_part.done", **self._place(), part=part)
            item["content"] = [part]
        else:
            item["arguments"] = whole
            self.emit("response.function_call_arguments.done", **self._place(), name=item["name"], arguments=whole)
        self.emit("response.output_item.done", output_index=self.parts, item=item)

    def ended(self) -> None:
        self._status = "incomplete" if self.finish == "length" else "completed"
        self.emit(f"response.{self._status}", response=self.whole())

    def whole(self) -> Json:
        """Return the response as it stands. Only fields of ours are in it, whatever chat's answer holds."""
        ended = self._status != "in_progress"
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "status": self._status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "model": self.model,
            "output": self._output if ended else [],
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
            **self._echo,
        }

    def _place(self) -> Json:
        item = self._output[-1]
        index = {"content_index": 0} if item["type"] == "message" else {}
        return {"item_id": item["id"], "output_index": self.parts, **index}

    def _usage(self) -> Json:
        return {
            "input_tokens": self.usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": cached_tokens(self.usage), "cache_write_tokens": 0},
            "output_tokens": self.usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.usage["total_tokens"],
        }


def _output_text(text: str, logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _without_bytes(token: Json) -> Json:
    """A token's log-probability as it is in events, where only whole answers have the bytes."""
    top = [{"token": other["token"], "logprob": other["logprob"]} for other in token["top_logprobs"]]
    return {"token": token["token"], "logprob": token["logprob"], "top_logprobs": top}
