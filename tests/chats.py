"""Chat requests for tests: strategies for ones that are accepted, and ways to break them."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

from borg_serve.api.protocol import Bounds

BOUNDS = Bounds(vocab_size=49_152)
USER = {"role": "user", "content": "hello"}

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(texts, children, max_size=3),
    max_leaves=5,
)
names = st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True)


def _with(required: dict[str, Any], few: int = 2, **optional: Any) -> st.SearchStrategy[dict[str, Any]]:
    """An object with these fields, and a few of the optional ones or their nulls: all at once would be slow to draw."""
    nullable = {name: st.none() | value for name, value in optional.items()}
    chosen = st.lists(st.sampled_from(sorted(optional)), unique=True, max_size=few)

    @st.composite
    def fields(draw: st.DrawFn) -> dict[str, Any]:
        some = {name: draw(nullable[name]) for name in draw(chosen)}
        return some | {name: draw(value) for name, value in required.items()}

    return fields()


def contents(text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    """A content: a string, or parts."""
    part = st.fixed_dictionaries({"type": st.just("text"), "text": text})
    return text | st.lists(part, min_size=1, max_size=3)


def messages(text: st.SearchStrategy[str] = texts) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Conversations that are accepted; every string of the client's is drawn from `text`."""
    arguments = text | st.dictionaries(text, text | st.lists(text, max_size=2), max_size=3).map(json.dumps)
    function = st.fixed_dictionaries({"name": text.filter(bool), "arguments": arguments})
    call = st.fixed_dictionaries({"id": text, "type": st.just("function"), "function": function})
    system = _with({"role": st.sampled_from(["system", "developer"]), "content": contents(text)}, name=text)
    user = _with({"role": st.just("user"), "content": contents(text)}, name=text)
    assistant = _with(
        {"role": st.just("assistant")},
        content=contents(text),
        refusal=text,
        tool_calls=st.lists(call, max_size=2),
        name=text,
    )
    tool = _with({"role": st.just("tool"), "content": contents(text), "tool_call_id": text}, name=text)
    turns = st.lists(system | user | assistant | tool, max_size=3)
    return st.builds(lambda first, more, last: [*first, *more, last], st.lists(system, max_size=2), turns, user)


def tools(text: st.SearchStrategy[str] = texts) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Tools whose parameters hold the client's strings everywhere."""
    anything = st.dictionaries(text, text | st.lists(text, max_size=2), max_size=3)
    function = _with({"name": names}, description=text, parameters=anything, strict=st.just(False))
    return st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": function}), min_size=1, max_size=3)


def formats(text: st.SearchStrategy[str] = texts) -> st.SearchStrategy[dict[str, Any]]:
    """Response formats, with a schema whose names and descriptions are the client's."""
    member = st.fixed_dictionaries({"type": st.just("string"), "description": text})
    schema = st.builds(
        lambda members: {"type": "object", "properties": members, "required": list(members)},
        st.dictionaries(text, member, max_size=3),
    )
    named = _with({"name": names, "schema": schema}, description=text, strict=st.booleans())
    return st.sampled_from([{"type": "text"}, {"type": "json_object"}]) | st.fixed_dictionaries(
        {"type": st.just("json_schema"), "json_schema": named}
    )


TWENTY, FOUR = st.integers(0, 20), st.integers(1, 4)


def requests(text: st.SearchStrategy[str] = texts) -> st.SearchStrategy[dict[str, Any]]:
    """Requests that are accepted."""
    fields = _with(
        {"messages": messages(text)},
        few=5,
        model=st.just(BOUNDS.model),
        stream=st.booleans(),
        stream_options=_with({}, include_usage=st.booleans(), continuous_usage_stats=st.booleans()),
        max_tokens=st.integers(1, 8192),
        max_completion_tokens=st.integers(1, 8192),
        min_tokens=st.integers(0, 1),
        temperature=st.floats(0, 2) | st.integers(0, 2),
        top_p=st.floats(0, 1, exclude_min=True),
        top_k=st.integers(-1, 1_000_000),
        min_p=st.floats(0, 1),
        presence_penalty=st.floats(-2, 2),
        frequency_penalty=st.floats(-2, 2),
        repetition_penalty=st.floats(0.01, 2),
        seed=st.integers(-(2**63), 2**63 - 1),
        stop=st.text(min_size=1, max_size=9) | st.lists(st.text("ab", min_size=1, max_size=9), max_size=4),
        stop_token_ids=st.lists(st.integers(0, 49_151), max_size=16),
        ignore_eos=st.booleans(),
        logprobs=st.just(True),
        tools=tools(text),
        response_format=formats(text),
        parallel_tool_calls=st.booleans(),
        user=texts,
        metadata=st.dictionaries(texts, texts, max_size=3),
    )

    @st.composite
    def request(draw: st.DrawFn) -> dict[str, Any]:
        sent = draw(fields)
        if sent.get("logprobs"):
            sent["top_logprobs"] = draw(TWENTY)
        if "temperature" not in sent:
            sent["n"] = draw(FOUR)
        if sent.get("tools"):
            named = {"type": "function", "function": {"name": sent["tools"][0]["function"]["name"]}}
            sent["tool_choice"] = [None, "none", "auto", named][draw(FOUR) - 1]
        return sent

    return request()


ACCEPTED = requests()


@st.composite
def broken(draw: st.DrawFn) -> Any:
    """An accepted request with up to three places replaced, removed or added to."""
    request = copy.deepcopy(draw(ACCEPTED))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = request
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = place[key]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                place = inner
                continue
            action = draw(st.sampled_from(["replace", "remove", "add"]))
            if action == "replace":
                place[key] = draw(values)
            elif action == "remove":
                del place[key]
            elif isinstance(place, dict):
                place[draw(texts)] = draw(values)
            else:
                place.insert(key, draw(values))
            break
    return request
