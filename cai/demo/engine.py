"""The cai reference engine: BERT sentence embeddings behind an OpenAI-compatible API.

It is one module, and exists so that the whole way can be walked without a GPU: numpy does the
arithmetic, tokenizers the words, safetensors maps the weights, so every weight byte comes through
the mount that the model is served from. It says what it is in ``/health``, ``/v1/models`` and the
``Server`` header.

Texts are embedded one at a time, unpadded, so an embedding does not depend on what else stands in
the request, and two runs over the same weights give the same floats.

It listens on a Unix socket only, in a directory that nobody else can enter; it keeps no request
log, because requests are the client's secret.

    python -m cai.demo.engine --model DIR --uds RUN/engine.sock

Sources: BERT (arXiv:1810.04805) as the ``model.safetensors`` layout names its tensors; pooling and
normalisation as sentence-transformers describes them in ``modules.json`` and ``1_Pooling``.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import anyio
import numpy as np
import typer
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from starlette.exceptions import HTTPException
from tokenizers import Tokenizer

from cai import __version__, jcs
from cai.errors import (
    FormatError,
    InputError,
    InputMissing,
    LimitExceeded,
    ListenerFailed,
    StorageError,
    from_os_error,
)
from cai.settings import Section
from cai.terminal import current, run_app

ENGINE = "cai reference engine"
"""What this program calls itself."""

SERVER = f"cai-reference-engine/{__version__}"
"""Value of the ``Server`` header."""

MAX_BODY = 1024 * 1024
"""Largest request body, bytes."""

MAX_INPUTS = 256
"""Most texts in one request."""

MAX_TOKENS = 8192
"""Most tokens in one request, over all of its texts."""

MAX_WAITING = 32
"""Most requests that wait for the processor; the next one gets 429."""

MAX_CONFIG = 4 * 1024 * 1024
"""Largest configuration file of a model that is read, bytes."""

MAX_LAYERS, MAX_WIDTH, MAX_POSITIONS, MAX_VOCABULARY = 48, 8192, 8192, 1_000_000
"""Largest shapes that are served; they bound memory before the weights are looked at."""

MAX_TENSOR_BYTES = 4 * 1024**3
"""Largest single tensor that is loaded, bytes."""

Array = NDArray[np.float32]


# --- the model ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of ``config.json`` that the arithmetic needs; widths in elements."""

    layers: int
    heads: int
    width: int
    inner: int
    positions: int
    vocabulary: int
    longest: int
    epsilon: float


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one encoder layer; matrices as ``[out, in]``, as torch stores them."""

    qkv: Array
    qkv_bias: Array
    out: Array
    out_bias: Array
    norm1: tuple[Array, Array]
    up: Array
    up_bias: Array
    down: Array
    down_bias: Array
    norm2: tuple[Array, Array]


class EmbeddingModel:
    """A BERT encoder with mean pooling and L2 norm, loaded whole.

    Args:
        directory: the model: ``config.json``, ``tokenizer.json``, ``model.safetensors`` and, when
            there, ``1_Pooling/config.json`` and ``sentence_bert_config.json``.

    Raises:
        InputMissing, InputError, StorageError: a file cannot be read.
        FormatError: the model is not a BERT encoder with mean pooling, or a tensor does not fit.
    """

    def __init__(self, directory: Path) -> None:
        self.shape = _shape(directory)
        _require_mean_pooling(directory)
        self._tokenizer = _tokenizer(directory)
        self._load(directory / "model.safetensors")

    def tokens(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens, not truncated."""
        return list(self._tokenizer.encode(text).ids)

    def embed(self, ids: Sequence[int]) -> Array:
        """The embedding of one token sequence.

        Args:
            ids: 1 to ``shape.longest`` token ids below ``shape.vocabulary``.

        Returns:
            ``[width]`` float32 of length 1.
        """
        hidden = self._words[list(ids)] + self._positions[: len(ids)] + self._types
        hidden = _norm(hidden, self._norm, self.shape.epsilon)
        for layer in self._layers:
            hidden = self._encode(hidden, layer)
        pooled = hidden.mean(axis=0)
        return np.asarray(pooled / max(float(np.linalg.norm(pooled)), 1e-12), dtype=np.float32)

    def embed_text(self, text: str) -> Array:
        """The embedding of one text; the demo compares the served floats with these."""
        return self.embed(self.tokens(text))

    def _encode(self, hidden: Array, layer: Layer) -> Array:
        shape, length = self.shape, hidden.shape[0]
        size = shape.width // shape.heads
        mixed = hidden @ layer.qkv.T + layer.qkv_bias
        query, key, value = mixed.reshape(length, 3, shape.heads, size).transpose(1, 2, 0, 3)
        scores = (query @ key.transpose(0, 2, 1)) * np.float32(1 / np.sqrt(size))
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        context = (scores @ value).transpose(1, 0, 2).reshape(length, shape.width)
        hidden = _norm(
            hidden + context @ layer.out.T + layer.out_bias, layer.norm1, shape.epsilon
        )
        inner = _gelu(hidden @ layer.up.T + layer.up_bias)
        return _norm(
            hidden + inner @ layer.down.T + layer.down_bias, layer.norm2, shape.epsilon
        )

    def _load(self, path: Path) -> None:
        shape = self.shape
        wide, inner = (shape.width,), (shape.inner,)
        try:
            with safe_open(path, framework="numpy") as file:
                names = set(file.keys())
                prefix = "bert." if "bert.embeddings.word_embeddings.weight" in names else ""

                def take(name: str, expected: tuple[int, ...]) -> Array:
                    return _tensor(file, names, prefix + name, expected)

                def norm(name: str) -> tuple[Array, Array]:
                    return take(f"{name}.weight", wide), take(f"{name}.bias", wide)

                base = "embeddings."
                self._words = take(
                    base + "word_embeddings.weight", (shape.vocabulary, shape.width)
                )
                self._positions = take(
                    base + "position_embeddings.weight", (shape.positions, shape.width)
                )
                # One segment only, so row 0; a model has one row or more.
                rows = file.get_slice(prefix + base + "token_type_embeddings.weight").get_shape()[0]
                types = take(base + "token_type_embeddings.weight", (rows, shape.width))
                self._types = types[0]
                self._norm = norm(base + "LayerNorm")
                self._layers = [
                    _layer(take, norm, f"encoder.layer.{number}.", wide, inner)
                    for number in range(shape.layers)
                ]
        except FileNotFoundError as error:
            raise InputMissing(f"{path} does not exist", hint="check the model") from error
        except OSError as error:
            raise from_os_error(error, f"read {path}") from error
        except (SafetensorError, ValueError, TypeError, IndexError) as error:
            raise FormatError(f"{path}: not usable weights ({error})") from error


def _layer(
    take: Callable[[str, tuple[int, ...]], Array],
    norm: Callable[[str], tuple[Array, Array]],
    base: str,
    wide: tuple[int],
    inner: tuple[int],
) -> Layer:
    own = [base + f"attention.self.{part}" for part in ("query", "key", "value")]
    return Layer(
        # One product instead of three; the rows are query, key, value.
        qkv=np.concatenate([take(f"{name}.weight", wide * 2) for name in own]),
        qkv_bias=np.concatenate([take(f"{name}.bias", wide) for name in own]),
        out=take(base + "attention.output.dense.weight", wide * 2),
        out_bias=take(base + "attention.output.dense.bias", wide),
        norm1=norm(base + "attention.output.LayerNorm"),
        up=take(base + "intermediate.dense.weight", inner + wide),
        up_bias=take(base + "intermediate.dense.bias", inner),
        down=take(base + "output.dense.weight", wide + inner),
        down_bias=take(base + "output.dense.bias", wide),
        norm2=norm(base + "output.LayerNorm"),
    )


def _tensor(file: Any, names: set[str], name: str, expected: tuple[int, ...]) -> Array:
    if name not in names:
        raise FormatError(f"tensor {name} is missing")
    shape = tuple(file.get_slice(name).get_shape())
    if shape != expected:
        raise FormatError(f"tensor {name} has shape {shape}, expected {expected}")
    if 4 * int(np.prod(shape)) > MAX_TENSOR_BYTES:
        raise LimitExceeded(f"tensor {name} is larger than {MAX_TENSOR_BYTES} bytes")
    return np.ascontiguousarray(file.get_tensor(name), dtype=np.float32)


def _norm(value: Array, weights: tuple[Array, Array], epsilon: float) -> Array:
    centred = value - value.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    return np.asarray(centred / np.sqrt(variance + epsilon) * weights[0] + weights[1], np.float32)


def _gelu(value: Array) -> Array:
    """``x·Φ(x)`` with erf from Abramowitz and Stegun 7.1.26 (absolute error below 1.5e-7)."""
    x = np.abs(value.astype(np.float64)) / np.sqrt(2.0)
    t = 1.0 / (1.0 + 0.3275911 * x)
    series = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    series = t * (0.254829592 + t * (-0.284496736 + t * series))
    erf = np.copysign(1.0 - series * np.exp(-x * x), value)
    return np.asarray(0.5 * value * (1.0 + erf), dtype=np.float32)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG + 1)
    except FileNotFoundError as error:
        raise InputMissing(f"{path} does not exist", hint="check the model") from error
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error
    if len(data) > MAX_CONFIG:
        raise LimitExceeded(f"{path}: more than {MAX_CONFIG} bytes")
    return data


def _config(path: Path) -> Section:
    """A model's configuration: foreign JSON, so floats are kept and unknown members are allowed."""
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON") from error
    return Section(value, where=str(path))


def _shape(directory: Path) -> Shape:
    config = _config(directory / "config.json")
    for name, wanted in (
        ("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute"),
    ):
        found = config.text(name, wanted)
        if found != wanted:
            raise FormatError(
                f"{config.where}: {name} is {found!r}; the {ENGINE} serves {wanted!r}",
                hint="use --engine vllm for other models",
            )

    def number(name: str, most: int) -> int:
        return config.integer(name, least=1, most=most, unit="elements")

    width, heads = number("hidden_size", MAX_WIDTH), number("num_attention_heads", MAX_WIDTH)
    if width % heads:
        raise FormatError(f"{config.where}: {heads} heads do not divide a width of {width}")
    epsilon = config.raw("layer_norm_eps")
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise FormatError(f"{config.where}: layer_norm_eps must lie between 0 and 1")
    positions = number("max_position_embeddings", MAX_POSITIONS)
    return Shape(
        layers=number("num_hidden_layers", MAX_LAYERS), heads=heads, width=width,
        inner=number("intermediate_size", 4 * MAX_WIDTH), positions=positions,
        vocabulary=number("vocab_size", MAX_VOCABULARY),
        longest=_longest(directory, positions), epsilon=epsilon,
    )


def _longest(directory: Path, positions: int) -> int:
    path = directory / "sentence_bert_config.json"
    if not path.exists():
        return positions
    config = _config(path)
    return config.integer("max_seq_length", positions, least=1, most=positions, unit="tokens")


def _require_mean_pooling(directory: Path) -> None:
    path = directory / "1_Pooling" / "config.json"
    if path.exists() and not _config(path).flag("pooling_mode_mean_tokens"):
        raise FormatError(f"{path}: the {ENGINE} pools by the mean only")


def _tokenizer(directory: Path) -> Any:
    data = _read(directory / "tokenizer.json")
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises bare Exception
        raise FormatError(f"{directory / 'tokenizer.json'}: not a tokenizer") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


# --- the API -----------------------------------------------------------------------------------


class ApiError(Exception):
    """An error in OpenAI's shape: ``{"error": {message, type, param, code}}``."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }


@dataclass(frozen=True, slots=True)
class Asked:
    """A parsed request: token sequences and how to write the answer."""

    sequences: list[list[int]]
    base64: bool


def parse_request(body: bytes, model: EmbeddingModel, name: str) -> Asked:
    """Parse the body of ``POST /v1/embeddings`` strictly.

    Raises:
        ApiError: 400, 404 or 413, naming the parameter at fault.
    """
    try:
        value = jcs.parse(body, what="request body", limit=MAX_BODY)
    except LimitExceeded as error:
        raise ApiError(413, error.message, code="request_too_large") from error
    except FormatError as error:
        raise ApiError(400, error.message, code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, "request body must be a JSON object", code="invalid_json")
    unknown = set(value) - {"input", "model", "encoding_format", "dimensions", "user"}
    if unknown:
        first = min(unknown)[:64]
        raise ApiError(400, f"unknown parameter {first!r}", param=first, code="unknown_parameter")
    wanted = value.get("model")
    if not isinstance(wanted, str):
        raise ApiError(400, "model must be a string", param="model", code="invalid_type")
    if wanted != name:
        raise ApiError(
            404, f"the model {wanted[:64]!r} does not exist", param="model", code="model_not_found"
        )
    if value.get("dimensions") not in (None, model.shape.width):
        raise ApiError(
            400, f"this model has {model.shape.width} dimensions and cannot be shortened",
            param="dimensions", code="invalid_value",
        )
    if not isinstance(value.get("user", ""), str):
        raise ApiError(400, "user must be a string", param="user", code="invalid_type")
    encoding = value.get("encoding_format", "float")
    if encoding not in ("float", "base64"):
        raise ApiError(
            400, "encoding_format must be 'float' or 'base64'", param="encoding_format",
            code="invalid_value",
        )
    return Asked(_sequences(value.get("input"), model), encoding == "base64")


def _sequences(value: object, model: EmbeddingModel) -> list[list[int]]:
    items = value if isinstance(value, list) else [value]
    if items and all(type(item) is int for item in items):
        items = [items]
    if not 1 <= len(items) <= MAX_INPUTS:
        raise ApiError(
            400, f"input must hold 1 to {MAX_INPUTS} texts", param="input", code="invalid_value"
        )
    sequences: list[list[int]] = []
    for item in items:
        sequences.append(_sequence(item, model))
        if sum(map(len, sequences)) > MAX_TOKENS:
            raise ApiError(
                400, f"input holds more than {MAX_TOKENS} tokens", param="input",
                code="context_length_exceeded",
            )
    return sequences


def _sequence(item: object, model: EmbeddingModel) -> list[int]:
    if isinstance(item, str) and item:
        ids = model.tokens(item)
    elif isinstance(item, list) and item and all(
        type(token) is int and 0 <= token < model.shape.vocabulary for token in item
    ):
        ids = item
    else:
        raise ApiError(
            400, "each input must be a text, or a list of token ids of this model; not empty",
            param="input", code="invalid_value",
        )
    if len(ids) > model.shape.longest:
        raise ApiError(
            400, f"a text has {len(ids)} tokens; this model reads {model.shape.longest} at most",
            param="input", code="context_length_exceeded",
        )
    return ids


def answer(asked: Asked, vectors: Sequence[Array], name: str) -> dict[str, object]:
    """The body of a successful ``POST /v1/embeddings``."""
    count = sum(map(len, asked.sequences))
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
                if asked.base64 else vector.tolist(),
            }
            for index, vector in enumerate(vectors)
        ],
        "model": name,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }


def build_app(model: EmbeddingModel, name: str) -> FastAPI:
    """The HTTP application over one loaded model, served under ``name``."""
    app = FastAPI(title=ENGINE, docs_url=None, redoc_url=None, openapi_url=None)
    one_at_a_time = anyio.CapacityLimiter(1)
    started = int(time.time())

    async def health() -> dict[str, object]:
        return {"status": "ok", "engine": ENGINE, "version": __version__, "model": name}

    async def models() -> dict[str, object]:
        return {
            "object": "list",
            "data": [
                {
                    "id": name, "object": "model", "created": started, "owned_by": ENGINE,
                    "max_model_len": model.shape.longest,
                }
            ],
        }

    async def embeddings(request: Request) -> JSONResponse:
        if one_at_a_time.statistics().tasks_waiting >= MAX_WAITING:
            raise ApiError(
                429, "the engine is busy; try again", kind="server_error", code="overloaded"
            )
        body = await _body(request)

        def work() -> dict[str, object]:
            asked = parse_request(body, model, name)
            return answer(asked, [model.embed(ids) for ids in asked.sequences], name)

        return JSONResponse(await anyio.to_thread.run_sync(work, limiter=one_at_a_time))

    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/v1/models", models, methods=["GET"])
    app.add_api_route("/v1/embeddings", embeddings, methods=["POST"], response_model=None)
    _add_error_shapes(app)
    return app


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, "content-type must be application/json", code="invalid_content_type")
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise ApiError(
                413, f"the request body is larger than {MAX_BODY} bytes", code="request_too_large"
            )
        parts.append(part)
    return b"".join(parts)


def _add_error_shapes(app: FastAPI) -> None:
    async def ours(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)  # noqa: S101 - registered for this class only
        return JSONResponse(error.body, status_code=error.status)

    async def http(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for this class only
        shaped = ApiError(error.status_code, str(error.detail), code="http_error")
        return JSONResponse(shaped.body, status_code=error.status_code, headers=error.headers)

    async def fault(_request: Request, _error: Exception) -> JSONResponse:
        shaped = ApiError(500, "the engine failed", kind="server_error", code="internal")
        return JSONResponse(shaped.body, status_code=500)

    handlers: list[tuple[type[Exception], Callable[[Request, Exception], Awaitable[JSONResponse]]]]
    handlers = [(ApiError, ours), (HTTPException, http), (Exception, fault)]
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)


# --- the process -------------------------------------------------------------------------------


def private_socket(path: Path) -> socket.socket:
    """Listen on a Unix socket that only this user can reach.

    The socket's directory is created 0700, or must be a directory of this user that nobody else can
    enter: a socket's own mode is not honoured everywhere, its directory's is.

    Raises:
        StorageError: the directory is open to others or cannot be made.
        ListenerFailed: somebody listens there already, or the path cannot be bound.
    """
    directory = path.parent
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise from_os_error(error, f"make {directory}") from error
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise StorageError(
            f"{directory} can be entered by others", hint=f"chmod 700 {directory}"
        )
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(MAX_WAITING)
    except OSError as error:
        listener.close()
        raise ListenerFailed(
            f"listen on {path}: {error.strerror or error}",
            hint="Unix socket paths are at most 107 bytes",
        ) from error
    return listener


def _remove_stale(path: Path) -> None:
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.stat().st_mode):
        raise ListenerFailed(f"{path} exists and is not a socket", hint="choose another --uds")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(str(path)) == 0:
            raise ListenerFailed(f"{path} is in use", hint="choose another --uds")
    path.unlink(missing_ok=True)


def serve(
    model: Annotated[Path, typer.Option(help="Directory of the model, e.g. the mount.")],
    uds: Annotated[Path, typer.Option(help="Unix socket to listen on, in a 0700 directory.")],
    served_model_name: Annotated[
        str, typer.Option(help="Name in /v1/models; default: the directory's name.")
    ] = "",
) -> None:
    """Serve sentence embeddings of a BERT model on a Unix socket (cai reference engine)."""
    if not model.is_dir():
        missing = InputError if model.exists() else InputMissing
        raise missing(f"model {model} is not a directory", hint="check --model")
    loaded = EmbeddingModel(model)
    name = served_model_name or model.resolve().name
    listener = private_socket(uds)
    current().say(f"{ENGINE}: {name} on {uds} (weights {loaded.shape.layers} layers)")
    try:
        config = uvicorn.Config(
            build_app(loaded, name), server_header=False, headers=[("Server", SERVER)],
            access_log=False, log_level="warning", lifespan="off", timeout_graceful_shutdown=2,
        )
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        listener.close()
        uds.unlink(missing_ok=True)


def main() -> None:
    """Entry point of ``python -m cai.demo.engine``."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(serve)
    sys.exit(run_app("engine", app))


if __name__ == "__main__":
    main()
