"""Which paths of an OpenAI-compatible engine a client may reach, and which members of a body.

vLLM's server has some seventy routes. By default only those pass that take a prompt and give back
what the model makes of it; everything else administers the engine (``/sleep``, ``/update_weights``,
``/v1/load_lora_adapter``, ``/collective_rpc``), shows other people's traffic (``/metrics``,
``/load``, ``/server_info``, ``GET /v1/responses/ID``), reads forms instead of JSON
(``/v1/audio/…``) or takes tokens and tensors that bypass the prompt (``/inference/v1/generate``,
``/pooling``).

A member of a body is kept, dropped (known to OpenAI's clients, of no effect in the engine) or
refused. What is in no list is refused too: an engine's next version may give it a meaning.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

_SAMPLING = frozenset({
    "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "n", "best_of",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "length_penalty", "logit_bias",
    "max_tokens", "min_tokens", "use_beam_search", "ignore_eos", "bad_words", "allowed_token_ids",
    "include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens",
    "truncate_prompt_tokens", "truncation_side", "add_special_tokens", "repetition_detection",
    "thinking_token_budget", "response_format", "structured_outputs", "return_token_ids",
    "return_tokens_as_token_ids", "logprobs", "prompt_logprobs", "stream", "stream_options", "echo",
    "model", "user",
})  # fmt: skip

_IGNORED = frozenset({
    "metadata", "modalities", "prediction", "prompt_cache_key", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "verbosity", "web_search_options",
})  # fmt: skip
"""Members of OpenAI's that an engine does not act on."""

_CHAT = _SAMPLING | {
    "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice",
    "parallel_tool_calls", "reasoning_effort", "include_reasoning", "add_generation_prompt",
    "continue_final_message", "documents", "chat_template_kwargs",
}
_COMPLETION = _SAMPLING | {"prompt", "suffix"}
_RESPONSES = frozenset({
    "input", "instructions", "max_output_tokens", "model", "logit_bias", "parallel_tool_calls",
    "reasoning", "include_reasoning", "include", "stream", "temperature", "text", "tool_choice",
    "tools", "top_logprobs", "top_p", "top_k", "min_p", "truncation", "user", "seed", "stop",
    "skip_special_tokens", "include_stop_str_in_output", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "stop_token_ids", "ignore_eos", "structured_outputs",
    "chat_template_kwargs",
})  # fmt: skip
_COUNT = frozenset(
    {"model", "messages", "system", "thinking", "tool_choice", "tools", "output_config"}
)
_MESSAGES = _COUNT | {
    "max_tokens", "stop_sequences", "stream", "temperature", "top_k", "top_p",
    "chat_template_kwargs",
}
_POOLING = frozenset(
    {"model", "user", "truncate_prompt_tokens", "truncation_side", "use_activation"}
)
_EMBEDDING = _POOLING | {
    "input", "messages", "dimensions", "encoding_format", "add_special_tokens", "padding",
    "add_generation_prompt", "continue_final_message", "chat_template_kwargs",
}
_SCORE = _POOLING | {
    "queries", "documents", "items", "text_1", "text_2", "query", "top_n", "instruction",
    "max_tokens_per_query", "max_tokens_per_doc",
}
_TOKENS = frozenset({
    "model", "prompt", "messages", "add_special_tokens", "add_generation_prompt", "tokens", "tools",
    "continue_final_message", "return_token_strs", "chat_template_kwargs",
})  # fmt: skip

REFUSED = {
    "cache_salt": "the gateway sets it",
    "prompt_embeds": "a prompt is text, not tensors",
    "kv_transfer_params": "transfers between engines are not for clients",
    "ec_transfer_params": "transfers between engines are not for clients",
    "mm_payload": "it reaches into the engine's handling of media",
    "media_io_kwargs": "it reaches into the engine's handling of media",
    "mm_processor_kwargs": "it reaches into the engine's handling of media",
    "return_mm_kwargs": "it reaches into the engine's handling of media",
    "vllm_xargs": "it reaches into the engine",
    "chat_template": "a template is a program, and runs in the engine",
    "priority": "it would push other people's requests aside",
    "request_id": "it could be that of another caller's request",
    "session_id": "it could be that of another caller's session",
    "previous_response_id": "answers are not kept, least of all for everybody",
    "background": "answers are not kept, least of all for everybody",
    "prompt": "stored prompts are not kept",
}
"""Why a member is refused wherever its route does not keep it; ``cache_salt`` is overwritten."""


class Counting(StrEnum):
    """How a route tells what a request used."""

    NONE = "none"
    OPENAI = "openai"
    """``usage`` in the answer; in streams only where ``stream_options.include_usage`` asks."""

    TOLD = "told"
    """``usage`` in the answer and in its stream, without being asked."""


@dataclass(frozen=True, slots=True)
class Route:
    """One path and what it takes.

    Attributes:
        path: exact.
        method: the one that it takes.
        fields: top-level members of its JSON body that are kept; empty where it has no body.
        ignored: members that are dropped.
        salted: whether the engine's prompt cache takes a salt here.
        counting: how it tells what a request used.
        why: what it is for.
    """

    path: str
    method: str = "POST"
    fields: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    salted: bool = False
    counting: Counting = Counting.NONE
    why: str = ""


_OPENAI, _TOLD = Counting.OPENAI, Counting.TOLD

INFERENCE: tuple[Route, ...] = (
    Route("/v1/chat/completions", "POST", _CHAT, _IGNORED, salted=True, counting=_OPENAI,
          why="a conversation in, its next turn out"),
    Route("/v1/completions", "POST", _COMPLETION, _IGNORED, salted=True, counting=_OPENAI,
          why="text in, its continuation out"),
    Route("/v1/responses", "POST", _RESPONSES, _IGNORED, salted=True, counting=_TOLD,
          why="a conversation in, its next turn out; nothing is kept (store is false)"),
    Route("/v1/messages", "POST", _MESSAGES, frozenset({"metadata"}), salted=True, counting=_TOLD,
          why="a conversation in Anthropic's form"),
    Route("/v1/messages/count_tokens", "POST", _COUNT, why="the length of a conversation"),
    Route("/v1/embeddings", "POST", _EMBEDDING, salted=True, counting=_OPENAI,
          why="text in, its vector out"),
    Route("/v1/rerank", "POST", _SCORE, salted=True, counting=_OPENAI,
          why="a query and texts in, their order out"),
    Route("/v1/score", "POST", _SCORE, salted=True, counting=_OPENAI,
          why="two texts in, their likeness out"),
    Route("/v1/models", "GET", why="the names of what is served; every client asks"),
)  # fmt: skip
"""What passes when a configuration names no paths."""

OTHERS: tuple[Route, ...] = (
    Route("/rerank", "POST", _SCORE, salted=True, counting=_OPENAI, why="as /v1/rerank"),
    Route("/v2/rerank", "POST", _SCORE, salted=True, counting=_OPENAI, why="as /v1/rerank"),
    Route("/score", "POST", _SCORE, salted=True, counting=_OPENAI, why="as /v1/score"),
    Route("/tokenize", "POST", _TOKENS, why="text in, tokens out"),
    Route("/detokenize", "POST", _TOKENS, why="tokens in, text out"),
    Route("/health", "GET", why="whether the engine lives"),
    Route("/ping", "GET", why="whether the engine lives"),
    Route("/version", "GET", why="the engine's version"),
)
"""What a configuration may name besides."""

KNOWN = {route.path: route for route in (*INFERENCE, *OTHERS)}
"""Every path with rules of its own."""
