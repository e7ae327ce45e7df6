"""Which attention a profile gets on which device, and what vLLM is told of it."""

from pathlib import Path
from typing import Any

import pytest
from vllm.config import VllmConfig
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from borg_serve.config import Config, load
from borg_serve.engine import arguments, attention_choice
from borg_serve.errors import EngineError
from borg_serve.vllm_plugin import attention

PROFILE = Path(__file__).parents[2] / "configs" / "7b-h100.yaml"


def profile(*sets: str) -> Config:
    return load(PROFILE, ["identity.attention=auto", *sets])


@pytest.mark.parametrize(
    ("sets", "tokens", "device", "capability", "name", "reason"),
    [
        ([], 2128, "cuda", 9, "shared", "2128 tokens is read once"),
        ([], 511, "cuda", 9, "stock", "pays from 512 on"),
        ([], 2128, "cuda", 8, "stock", "compute capability 8"),
        ([], 2128, "cuda", 10, "stock", "compute capability 10"),
        ([], 2128, "cuda", None, "stock", "no GPU was found"),
        ([], 2128, "cpu", None, "stock", "on the CPU"),
        (["identity.attention=stock"], 2128, "cuda", 9, "stock", "says so"),
        (["identity.attention=shared"], 100, "cuda", 9, "shared", "100 tokens"),
        (["engine.attention_backend=FLASHINFER"], 2128, "cuda", 9, "stock", "FLASHINFER"),
        (["engine.attention_config={backend: FLASHINFER}"], 2128, "cuda", 9, "stock", "FLASHINFER"),
    ],
)
def test_backend_is_chosen_for_a_reason(
    sets: list[str], tokens: int, device: Any, capability: int | None, name: str, reason: str
) -> None:
    found = attention_choice.choose(profile(*sets), tokens, device, capability)
    assert found.name == name
    assert reason in found.reason


@pytest.mark.parametrize(
    ("sets", "device", "capability"),
    [([], "cpu", None), ([], "cuda", 8), (["engine.attention_backend=FLASHINFER"], "cuda", 9)],
)
def test_backend_that_was_asked_for_and_cannot_be_had_is_an_error(
    sets: list[str], device: Any, capability: int | None
) -> None:
    with pytest.raises(
        EngineError, match=r"7b-h100\.yaml: identity\.attention: cannot be shared: .*, got 'shared'\. Set"
    ):
        attention_choice.choose(profile("identity.attention=shared", *sets), 2128, device, capability)


def test_backend_arguments_are_vllms() -> None:
    config = profile("engine.additional_config={other: 1}")
    shared = attention_choice.choose(config, 2128, "cuda", 9)
    given = attention_choice.arguments(config, shared, 2128)
    parsed = arguments.namespace({"model": "/x", **given})
    assert AttentionBackendEnum[parsed.attention_backend] == AttentionBackendEnum.CUSTOM
    assert parsed.additional_config == {"other": 1, attention_choice.PREFIX_OPTION: 2128}
    stock = attention_choice.arguments(config, attention_choice.choose(config, 2128, "cpu", None), 2128)
    assert stock == {"additional_config": parsed.additional_config}


@pytest.mark.parametrize("found", [{}, {attention_choice.PREFIX_OPTION: 0}, {attention_choice.PREFIX_OPTION: "many"}])
def test_backend_refuses_an_engine_without_the_guards_promise(found: dict[str, Any]) -> None:
    config = VllmConfig(additional_config=found)
    with pytest.raises(EngineError, match="only behind the guard"):
        attention.prefix_tokens(config)
    assert attention.prefix_tokens(VllmConfig(additional_config={attention_choice.PREFIX_OPTION: 2128})) == 2128
