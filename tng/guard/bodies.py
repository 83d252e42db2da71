"""Bodies of requests: parsed strictly, judged, and written anew: one parser's reading counts.

The backend never sees the client's bytes: what it gets is the serialisation of the value that was
judged (decisions §7, Requests), with the caller's own ``cache_salt`` in it.
"""

from __future__ import annotations

import hmac
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from tng.guard.refusals import GuardRefused
from tng.guard.routes import REFUSED, Counting, Route

MAX_DEPTH = 48
"""Deepest nesting of a body; schemas of tools are the deepest thing that occurs."""

MAX_NODES = 200_000
"""Most objects and lists of a body."""

MAX_INTEGER = 2**63 - 1
"""Largest magnitude of an integer; parsers disagree beyond 64 bits."""

MAX_NUMBER = 64
"""Most characters of a number."""

MAX_CHOICES = 16
"""Most alternatives of one request (``n``, ``best_of``)."""

MAX_BATCH = {"input": 2048, "prompt": 128}
"""Most inputs of one request: texts that become vectors, and prompts that are written on."""

_TEXTS = ("messages", "input", "prompt", "system", "instructions", "documents", "items",
          "queries", "query", "text_1", "text_2")  # fmt: skip
"""Members that hold content parts, where media can be named."""

_MEDIA = frozenset({
    "image_url", "video_url", "audio_url", "file_url", "input_image", "input_video", "input_file",
    "image", "video", "audio", "file", "document", "source", "url", "image_pil",
})  # fmt: skip
"""Members of a content part whose value names media."""

_TENSORS = frozenset({"image_embeds", "audio_embeds", "video_embeds", "prompt_embeds"})
"""Content parts that hold tensors."""

_STORED = frozenset({"file_id", "uuid", "item_reference"})
"""Names of media that were stored before, perhaps by somebody else."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A body that may go to the backend.

    Attributes:
        data: serialised anew.
        stream: whether the client asked for a stream.
        usage_added: whether only the gateway asked for the usage at the stream's end.
        most_tokens: most tokens that it may make, where it says so; 0 where not.
    """

    data: bytes
    stream: bool = False
    usage_added: bool = False
    most_tokens: int = 0


@dataclass(frozen=True, slots=True)
class BodyRules:
    """What a configuration says about bodies.

    Attributes:
        drop_unknown: members in no list are dropped instead of refused.
        remote_media: URLs of media are let through (``unsafe_remote_media``).
    """

    drop_unknown: bool = False
    remote_media: bool = False


STRICT = BodyRules()
"""Nothing unknown, nothing remote."""


def parse_body(data: bytes) -> dict[str, Any]:
    """Parse the JSON object of a request.

    Raises:
        GuardRefused: not UTF-8 or not JSON, a duplicate member, a number no two parsers agree on,
            a lone surrogate, or nested too deep.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
    except GuardRefused:
        raise
    except RecursionError as error:
        raise _malformed("nested too deep") from error
    except ValueError as error:
        # Its text quotes the body.
        raise _malformed("not JSON in UTF-8") from error
    if not isinstance(value, dict):
        raise _malformed("not an object")
    _demand_shallow(value)
    return value


def judge(body: dict[str, Any], route: Route, salt: str | None, rules: BodyRules) -> Judged:
    """Decide over a parsed body and write it anew.

    Args:
        body: as parsed; it is changed.
        route: that it was sent to.
        salt: of the caller; ``None`` leaves the engine's prompt cache shared.
        rules: of the configuration.

    Raises:
        GuardRefused: naming the member that may not pass.
    """
    body = _known(body, route, rules)
    _demand_content(body, rules)
    _demand_tools(body)
    _demand_sizes(body)
    _refuse_inner(body)
    if route.salted and salt is not None:
        body["cache_salt"] = salt
    stream = body.get("stream") is True
    if not isinstance(body.get("stream"), (bool, type(None))):
        raise _bad("stream", "stream is true or false")
    added = stream and route.counting is Counting.OPENAI and _ask_usage(body)
    if route.path == "/v1/responses":
        body["store"] = False
    try:
        data = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise _malformed("it holds a lone surrogate") from error
    return Judged(data, stream, added, _most_tokens(body))


def cache_salt(boot_key: bytes, caller: str) -> str:
    """The salt of one caller's prompt cache: secret, equal for equal callers until the next boot.

    Args:
        boot_key: 32 random bytes of this boot.
        caller: name of the caller, unambiguous over all kinds of callers.

    Returns:
        64 hex digits.
    """
    return hmac.new(boot_key, b"cai/cache-salt/v1\x00" + caller.encode(), sha256).hexdigest()


def _known(body: dict[str, Any], route: Route, rules: BodyRules) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in body.items():
        if name in route.fields:
            kept[name] = value
        elif name in route.ignored or name == "cache_salt":
            continue
        elif name in REFUSED:
            if value is not None and value is not False:
                raise _bad(name, f"{name} is not taken here: {REFUSED[name]}")
        elif not rules.drop_unknown:
            raise _bad(_shown(name), "this member is not known here")
    return kept


def _demand_content(body: dict[str, Any], rules: BodyRules) -> None:
    for name in _TEXTS:
        value = body.get(name)
        if name == "documents" and "messages" in body:
            continue  # of a chat template: texts with any names
        if name in MAX_BATCH and isinstance(value, list):
            _demand_batch(name, value)
        for part in _objects(value):
            _demand_part(part, name, rules)


def _demand_batch(name: str, items: list[Any]) -> None:
    # One prompt of many tokens is a list too.
    if len(items) > MAX_BATCH[name] and not all(type(item) is int for item in items):
        raise _bad(name, f"at most {MAX_BATCH[name]} inputs")


def _demand_part(part: dict[str, Any], where: str, rules: BodyRules) -> None:
    kind = part.get("type")
    for name in (*part, kind if isinstance(kind, str) else ""):
        if name in _TENSORS:
            raise _bad(where, "tensors are not taken, only text and media as data")
        if name in _STORED and part.get(name, True) is not None:
            raise _bad(where, "names of stored media are not taken")
    if rules.remote_media:
        return
    for name in _MEDIA & part.keys():
        value = part[name]
        if isinstance(value, str) and value[:5].lower() != "data:":
            raise _bad(where, "media are taken as data: URLs only; nothing is fetched")


def _demand_tools(body: dict[str, Any]) -> None:
    tools = body.get("tools")
    if tools is None:
        return
    if not isinstance(tools, list):
        raise _bad("tools", "tools is a list")
    for tool in tools:
        # A tool that the engine runs itself (search, MCP, code) would carry the prompt out.
        kind = tool.get("type", "function") if isinstance(tool, dict) else None
        if kind not in ("function", "custom"):
            raise _bad("tools", "only functions that the client runs are taken as tools")


def _demand_sizes(body: dict[str, Any]) -> None:
    for name in ("n", "best_of"):
        value = body.get(name)
        if value is not None and (type(value) is not int or not 1 <= value <= MAX_CHOICES):
            raise _bad(name, f"{name} is a whole number from 1 to {MAX_CHOICES}")


def _refuse_inner(body: dict[str, Any]) -> None:
    inner = body.get("chat_template_kwargs")
    if inner is None:
        return
    if not isinstance(inner, dict) or {"chat_template", "tokenize", "template"} & inner.keys():
        raise _bad("chat_template_kwargs", "a template is a program, and runs in the engine")


def _ask_usage(body: dict[str, Any]) -> bool:
    options = body.get("stream_options")
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise _bad("stream_options", "stream_options is an object")
    asked = options.get("include_usage") is True
    body["stream_options"] = {**options, "include_usage": True}
    return not asked


def _most_tokens(body: dict[str, Any]) -> int:
    for name in ("max_completion_tokens", "max_output_tokens", "max_tokens"):
        value = body.get(name)
        if type(value) is int and value > 0:
            return value
    return 0


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
            # What a model asked of a tool is data of the client under any names.
            called = item.get("type") == "tool_use"
            waiting.extend(child for name, child in item.items() if not called or name != "input")
        elif isinstance(item, list):
            waiting.extend(item)


def _demand_shallow(value: dict[str, Any]) -> None:
    level: list[Any] = [value]
    nodes = depth = 0
    while level:
        depth += 1
        nodes += len(level)
        if depth > MAX_DEPTH or nodes > MAX_NODES:
            raise _malformed("nested too deep, or too many parts")
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _malformed("a member is given twice")
    return result


def _integer(text: str) -> int:
    if len(text) > MAX_NUMBER or abs(value := int(text)) > MAX_INTEGER:
        raise _malformed("an integer beyond 64 bits")
    return value


def _float(text: str) -> float:
    if len(text) > MAX_NUMBER or not math.isfinite(value := float(text)):
        raise _malformed("a number beyond its range")
    return value


def _constant(_text: str) -> Any:
    raise _malformed("not JSON in UTF-8")


def _shown(name: str) -> str:
    clean = "".join(char for char in name[:64] if char.isascii() and char.isprintable())
    return clean or "?"


def _malformed(what: str) -> GuardRefused:
    return GuardRefused(400, "malformed_body", f"the body of the request: {what}")


def _bad(param: str, message: str) -> GuardRefused:
    return GuardRefused(400, "not_allowed", message, param=param)
