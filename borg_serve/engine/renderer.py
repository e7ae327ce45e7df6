"""vLLM's renderer for prompts that begin with the identity: it tokenises only what follows.

The identity's token ids are constant, and joined to the rest they equal those of the whole text (`identity.prefix`).
It does not know what the identity says, nor how a prompt's text was made.
"""

import asyncio
from functools import cache
from typing import Any

from borg_serve.errors import EngineError
from borg_serve.identity.prefix import TokenPrefix, encode
from borg_serve.upstream import pinned, require

__all__ = ["register", "renderer_class", "share"]

INLINE_CHARS = 4096
"""Text up to this length is tokenised at once (under a millisecond); longer text in the renderer's thread."""


def register() -> None:
    """Make vLLM choose this renderer in this process. Until it is given a prefix it does what vLLM's own does."""
    with pinned("engine"):
        from vllm.renderers.registry import RENDERER_REGISTRY

    RENDERER_REGISTRY.renderers["hf"] = (__name__, "IdentityRenderer")  # register() warns of what it replaces


def share(prefix: TokenPrefix, renderer: Any) -> None:
    """Tell a renderer how every prompt begins. Raises EngineError if it is not ours: it would not use the template."""
    if not isinstance(renderer, renderer_class()):
        cure = "Serve a checkpoint with a Hugging Face tokenizer and a chat template."
        raise EngineError(f"engine: vLLM renders this model's prompts in its own way, got {type(renderer)}. {cure}")
    renderer.prefix = prefix


def __getattr__(name: str) -> Any:
    """The class by its name, as vLLM's registry asks for it: vLLM is imported only then."""
    if name != "IdentityRenderer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return renderer_class()


@cache
def renderer_class() -> Any:
    """vLLM's renderer for Hugging Face tokenizers, which knows the beginning of every prompt once `prefix` is set."""
    with pinned("engine"):
        from vllm.renderers.hf import HfRenderer
    require("engine", HfRenderer, "tokenize_prompt_async")

    class IdentityRenderer(HfRenderer):
        prefix: TokenPrefix | None = None

        async def tokenize_prompt_async(self, prompt: Any, params: Any) -> Any:
            prefix, text = self.prefix, prompt.get("prompt")
            tokens_given = "prompt_token_ids" in prompt or not isinstance(text, str)
            if prefix is None or tokens_given or params.add_special_tokens or params.return_token_offsets:
                return await super().tokenize_prompt_async(prompt, params)
            tokenizer = self.get_tokenizer()
            if len(text) - len(prefix.text) < INLINE_CHARS:
                ids = encode(prefix, text, tokenizer)
            else:
                ids = await asyncio.get_running_loop().run_in_executor(self._executor, encode, prefix, text, tokenizer)
            _check_length(len(ids), len(prefix.token_ids), params.max_total_tokens)
            return params.apply_post_tokenization(tokenizer, {**prompt, "prompt_token_ids": ids})

    return IdentityRenderer


def _check_length(tokens: int, shared: int, limit: int | None) -> None:
    """Raise VLLMValidationError if a prompt leaves no room in the context. vLLM cuts the answer to the room that is."""
    from vllm.exceptions import VLLMValidationError

    if limit is not None and tokens >= limit:
        raise VLLMValidationError(
            f"This model's context length is {limit} tokens: the identity takes {shared}, and your messages take "
            f"{tokens - shared}. Shorten the messages.",
            parameter="messages",
        )
