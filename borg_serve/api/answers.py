"""JSON Schemas of the answers: the models of OpenAI's and Anthropic's packages, narrowed to what is answered here.

It does not know the routes.
"""

from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, Field, create_model

__all__ = ["answer_schemas"]


def answer_schemas() -> dict[str, Any]:
    """Return a JSON Schema for each answer, by its name. Imports both packages, which takes a second."""
    models = (*_chat(), _response(), _message(), *_ours())
    schemas = {model.__name__: model.model_json_schema() for model in models}
    return {name: _inlined(schema, schema.pop("$defs", {})) for name, schema in schemas.items()}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """Return a schema without references; an integer in an answer is a count or a time, and never negative."""
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].removeprefix("#/$defs/")], definitions)
    least = {"minimum": 0} if schema.get("type") == "integer" else {}
    return {**{name: _inlined(item, definitions) for name, item in schema.items()}, **least}


def _model(title: str, /, **fields: Any) -> Any:
    """Return a model with these fields: a type, or a type and its default."""
    kinds: dict[str, Any] = {name: kind if isinstance(kind, tuple) else (kind, ...) for name, kind in fields.items()}
    return create_model(title, **kinds)


def _narrowed(model: type[BaseModel], /, **fields: Any) -> Any:
    """Return a model with the fields that `model` requires, and with these."""
    required = {name: field.annotation for name, field in model.model_fields.items() if field.is_required()}
    return _model(model.__name__, **{**required, **fields})


def _some(*kinds: Any) -> Any:
    return Annotated[list[Union[kinds]], Field(min_length=1)]  # type: ignore[valid-type]  # noqa: UP007


def _chat() -> list[Any]:
    from openai.types import CompletionUsage, Model, chat
    from openai.types.chat.chat_completion import Choice

    calls = list[chat.ChatCompletionMessageFunctionToolCall]
    message = _narrowed(chat.ChatCompletionMessage, content=(str | None, None), tool_calls=(calls, []))
    finishes = Literal["stop", "length", "tool_calls"]
    choice = _narrowed(Choice, message=message, finish_reason=finishes, logprobs=(dict[str, Any] | None, None))
    cached = _model("PromptTokensDetails", cached_tokens=(int | None, None))
    usage = _narrowed(CompletionUsage, prompt_tokens_details=(cached | None, None))
    model = _narrowed(Model, max_model_len=(int | None, None))
    completion = _narrowed(chat.ChatCompletion, choices=_some(choice), usage=usage)
    return [completion, model, _model("ModelList", object=Literal["list"], data=_some(model))]


def _response() -> Any:
    from openai.types import responses

    message = _narrowed(
        responses.ResponseOutputMessage, content=_some(_narrowed(responses.ResponseOutputText, annotations=list[Any]))
    )
    return _narrowed(
        responses.Response,
        created_at=int,
        status=Literal["completed", "incomplete"],
        model=str,
        output=_some(message, _narrowed(responses.ResponseFunctionToolCall, id=str, status=str)),
        usage=responses.ResponseUsage,
        incomplete_details=dict[str, str] | None,
        error=None,
        tools=list[dict[str, Any]],
        tool_choice=str | dict[str, Any],
    )


def _message() -> Any:
    from anthropic import types

    return _narrowed(
        types.Message,
        model=str,
        content=_some(_narrowed(types.TextBlock), _narrowed(types.ToolUseBlock)),
        stop_reason=Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"],
        stop_sequence=str | None,
        usage=_narrowed(types.Usage, cache_read_input_tokens=int),
    )


def _ours() -> list[Any]:
    fields = _model("ErrorFields", message=str, type=str, param=str | None, code=str | None)
    error = _model("MessagesErrorFields", type=str, message=str)
    identity = _model("Identity", sha256=str, tokens=int)
    counts = ("requests", "aborted", "refused", "prompt_tokens", "identity_tokens", "cached_tokens", "output_tokens")
    used: Any = _model("UsageRow", **dict.fromkeys(counts, int), engine_s=float)
    checkpoint = _model("Checkpoint", root=(str | None, None), revision=(str | None, None))
    return [
        _model("Error", error=fields),
        _model("MessagesError", type=Literal["error"], error=error, request_id=str),
        _model("ResponseInputTokens", object=Literal["response.input_tokens"], input_tokens=int),
        _model("MessageTokens", input_tokens=int),
        _model("Usage", object=Literal["list"], key=str | None, since=str, data=list[used]),
        _model("Health", status=Literal["alive"]),
        _model("Ready", status=str, reason=(str, "")),
        _model(
            "Version",
            borg_serve=str,
            vllm=str,
            ray=(str | None, None),
            model=str,
            identity=identity,
            checkpoint=checkpoint,
        ),
    ]
