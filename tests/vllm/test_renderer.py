"""How vLLM finds our renderer; `tests/engine/test_guard.py` compares its tokens with those of vLLM's own."""

import pytest
from vllm.renderers.hf import HfRenderer
from vllm.renderers.registry import RENDERER_REGISTRY

from borg_serve.engine.renderer import register, renderer_class, share
from borg_serve.errors import EngineError
from borg_serve.identity.prefix import TokenPrefix


def test_register_gives_vllm_our_renderer_for_its_own_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = dict(RENDERER_REGISTRY.renderers)
    monkeypatch.setattr(RENDERER_REGISTRY, "renderers", dict(modes))
    register()
    assert RENDERER_REGISTRY.load_renderer_cls("hf") is renderer_class()
    assert {mode for mode in modes if RENDERER_REGISTRY.renderers[mode] != modes[mode]} <= {"hf"}
    assert issubclass(renderer_class(), HfRenderer)
    assert renderer_class().prefix is None, "it does what vLLM's own does until an engine's client gives it a prefix"


def test_share_refuses_a_renderer_that_is_not_ours() -> None:
    with pytest.raises(EngineError, match=r"got <class '.*HfRenderer'>\. Serve a checkpoint with a Hugging Face"):
        share(TokenPrefix("a", (1,), "b"), HfRenderer.__new__(HfRenderer))
