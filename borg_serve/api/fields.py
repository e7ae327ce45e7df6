"""Fields that no model of a request holds: those that are refused, with the reason, and hints that are ignored.

It does not know the fields that are honoured.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["CHAT", "HINTS", "MESSAGES", "NEUTRAL", "RESPONSES", "counted", "is_neutral", "shown_names"]

MAX_NAMES = 16
NAME_LENGTH = 64


def _fields(names_by_reason: Mapping[str, str]) -> dict[str, str]:
    return {name: reason for reason, names in names_by_reason.items() for name in names.split()}


CHAT = _fields(
    {
        "it replaces, cuts or prints the prompt, and every prompt begins with the identity": (
            "prompt prompt_token_ids prompt_embeds kv_transfer_params truncate_prompt_tokens truncation_side echo "
            "prompt_logprobs return_token_ids return_prompt_text return_token_offsets return_assistant_tokens_mask "
            "routed_experts_prompt_start add_special_tokens enable_response_messages"
        ),
        "it belongs to the servers, not to clients": "ec_transfer_params vllm_xargs",
        "the chat template takes nothing from a request": "chat_template chat_template_kwargs documents",
        "it would let the client speak as the assistant": "add_generation_prompt continue_final_message",
        "it puts words into the model's mouth; response_format takes a JSON Schema": (
            "structured_outputs guided_json guided_regex guided_choice guided_grammar guided_decoding_backend "
            "guided_whitespace_pattern logit_bias allowed_token_ids bad_words"
        ),
        "it runs code of the client's choice": "logits_processors",
        "it unshares the identity's cache": "cache_salt",
        "it costs more than one request should": "best_of use_beam_search",
        "tokens are shown as text; use top_logprobs": "logprob_token_ids return_tokens_as_token_ids",
        "this model reads and writes text only": "audio modalities",
        "it is the old form of tools and tool_choice": "functions function_call",
    }
)
"""Refused fields of chat requests: unsafe ones, and those without which the answer would mean something else."""

RESPONSES = CHAT | _fields(
    {
        "nothing is stored here; send the whole conversation as input": (
            "background conversation previous_response_id previous_input_messages"
        ),
        "prompts of clients are not stored here, and every prompt begins with the identity": "prompt",
        "it cuts the prompt, and every prompt begins with the identity": "truncation",
        "the form of the answer is text.format here": "response_format",
    }
)

MESSAGES = CHAT | _fields(
    {
        "nothing is stored here; send the whole conversation as messages": "thread",
        "the form of the answer is output_config.format here": "response_format output_format",
    }
)

NEUTRAL: Mapping[str, Any] = {
    "add_generation_prompt": True,
    "best_of": 1,
    "modalities": ["text"],
    "truncation": "disabled",
}
"""Values of refused fields that say what their absence says; of the others those are null, false and empty."""


def is_neutral(name: str, value: Any) -> bool:
    """Whether a refused field's value says what the field's absence says."""
    if name not in NEUTRAL:
        return isinstance(value, bool | str | list | dict) and not value
    neutral = NEUTRAL[name]
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


_HINTS = (
    # of requests
    "access_programs background_options betas billing_policy cache_control client_metadata compaction container "
    "context_management diagnostics early_stopping fallback_credit_token fallbacks include include_reasoning "
    "inference_geo length_penalty max_tool_calls mcp_servers media_io_kwargs metadata mm_payload mm_processor_kwargs "
    "moderation prediction priority prompt_cache_key prompt_cache_options prompt_cache_retention reasoning "
    "reasoning_effort repetition_detection request_id return_mm_kwargs safety_identifier service_tier session_id "
    "skip_special_tokens spaces_between_special_tokens speed store stream_interval stream_options thinking "
    "thinking_token_budget user user_profile_id verbosity watermarking web_search_options workspace_id effort image "
    # of messages and items, most of them parts of answers that clients send back
    "annotations audio caller citations content function_call index logprobs name parsed parsed_arguments phase "
    "reasoning_content reasoning_details redacted_thinking refusal signature server_tool_use is_error created_by "
    # of tools, and tools that no client runs
    "allowed_callers allowed_domains apply_patch bash code_execution code_interpreter computer computer_use "
    "computer_use_preview custom defer_loading eager_input_streaming file_search image_generation input_examples "
    "local_shell mcp mcp_toolset memory shell text_editor tool_search web_fetch web_search web_search_preview "
    "include_obfuscation task_budget"
)
HINTS = frozenset(_HINTS.split())
"""Last parts of the names that are ignored under `server.unknown_fields: refuse` too."""


def counted(name: str) -> str:
    """Return an ignored field's label in metrics: the last part of its name if that is a hint, else `other`."""
    last = name.rpartition(".")[2]
    return last if last in HINTS else "other"


def shown_names(paths: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the names of ignored fields, fit for a header, such as `messages.annotations`; at most 16 of them."""
    names = dict.fromkeys(".".join(part for part in path if not part.isdecimal()) for path in paths)
    fit = dict.fromkeys(re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:NAME_LENGTH] for name in names)
    return tuple(fit)[:MAX_NAMES]
