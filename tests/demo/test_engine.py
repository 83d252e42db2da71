from __future__ import annotations

import asyncio
import base64
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cai.demo import engine
from cai.demo.engine import EmbeddingModel, build_app, private_socket
from cai.demo.model import find_model
from cai.errors import (
    FormatError,
    InputError,
    InputMissing,
    ListenerFailed,
    SettingError,
    StorageError,
)

# --- arithmetic ---------------------------------------------------------------------------------


def slow_bert(directory: Path, ids: list[int]) -> list[float]:
    """The same model in float64, head by head and token by token, with the library's erf."""
    config = json.loads((directory / "config.json").read_text())
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    w = {name: value.astype(np.float64) for name, value in
         load_file(directory / "model.safetensors").items()}
    width = config["hidden_size"]
    size = width // heads

    def norm(row: np.ndarray, base: str) -> np.ndarray:
        mean = sum(row) / width
        variance = sum((x - mean) ** 2 for x in row) / width
        scaled = np.array([(x - mean) / math.sqrt(variance + 1e-12) for x in row])
        return scaled * w[base + ".weight"] + w[base + ".bias"]

    def linear(row: np.ndarray, base: str) -> np.ndarray:
        return w[base + ".weight"].dot(row) + w[base + ".bias"]

    rows = [
        norm(
            w["embeddings.word_embeddings.weight"][token]
            + w["embeddings.position_embeddings.weight"][place]
            + w["embeddings.token_type_embeddings.weight"][0],
            "embeddings.LayerNorm",
        )
        for place, token in enumerate(ids)
    ]
    for number in range(layers):
        base = f"encoder.layer.{number}."
        query, key, value = (
            [linear(row, f"{base}attention.self.{part}") for row in rows]
            for part in ("query", "key", "value")
        )
        after = []
        for place, row in enumerate(rows):
            context = np.zeros(width)
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                raw = [math.exp(query[place][part].dot(k[part]) / math.sqrt(size)) for k in key]
                for weight, v in zip(raw, value, strict=True):
                    context[part] += weight / sum(raw) * v[part]
            mixed = norm(
                row + linear(context, base + "attention.output.dense"),
                base + "attention.output.LayerNorm",
            )
            inner = linear(mixed, base + "intermediate.dense")
            inner = np.array([x * 0.5 * (1 + math.erf(x / math.sqrt(2))) for x in inner])
            after.append(norm(mixed + linear(inner, base + "output.dense"),
                              base + "output.LayerNorm"))
        rows = after
    mean = sum(rows) / len(rows)
    return list(mean / math.sqrt(sum(x * x for x in mean)))


@pytest.mark.parametrize("ids", [[2, 3], [2, 4, 5, 6, 7, 8, 3], [9], [2] + [8] * 10 + [3]])
def test_embeddings_agree_with_an_independent_computation(tiny_bert: Path, ids: list[int]) -> None:
    ours = EmbeddingModel(tiny_bert).embed(ids)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, slow_bert(tiny_bert, ids), atol=5e-6)


def test_the_published_model_gives_its_published_numbers() -> None:
    """The first numbers that all-MiniLM-L6-v2's users know for this sentence."""
    try:
        found = find_model(None)
    except InputMissing as error:
        pytest.skip(f"{error.message}: {error.hint}")
    vector = EmbeddingModel(found.directory).embed_text("This is an example sentence")
    np.testing.assert_allclose(
        vector[:5], [0.0676569, 0.0634959, 0.0487131, 0.0793050, 0.0374480], atol=2e-7
    )


def test_padding_of_the_published_tokenizer_is_off(tiny_bert: Path) -> None:
    assert EmbeddingModel(tiny_bert).tokens("the key") == [2, 4, 5, 3]


def test_names_with_the_prefix_of_a_full_bert_are_found(tiny_bert: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bert, tmp_path / "m")
    plain = load_file(copy / "model.safetensors")
    save_file({f"bert.{name}": value for name, value in plain.items()}, copy / "model.safetensors")
    np.testing.assert_array_equal(
        EmbeddingModel(copy).embed([2, 3]), EmbeddingModel(tiny_bert).embed([2, 3])
    )


# --- loading refuses ----------------------------------------------------------------------------


def edited(tiny_bert: Path, tmp_path: Path, **changes: object) -> Path:
    copy = shutil.copytree(tiny_bert, tmp_path / "m")
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model_type": "llama"}, FormatError),
        ({"hidden_act": "relu"}, FormatError),
        ({"position_embedding_type": "relative_key"}, FormatError),
        ({"num_attention_heads": 5}, FormatError),
        ({"hidden_size": 48}, FormatError),
        ({"vocab_size": 11}, FormatError),
        ({"num_hidden_layers": 3}, FormatError),
        ({"num_hidden_layers": 10**9}, SettingError),
        ({"hidden_size": "24"}, SettingError),
        ({"hidden_size": True}, SettingError),
        ({"hidden_size": None}, SettingError),
        ({"layer_norm_eps": 0}, FormatError),
        ({"layer_norm_eps": None}, FormatError),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    tiny_bert: Path, tmp_path: Path, change: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        EmbeddingModel(edited(tiny_bert, tmp_path, **change))


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("config.json", None, InputMissing),
        ("config.json", b"{", FormatError),
        ("config.json", b"[]", SettingError),
        ("config.json", b"\xff", FormatError),
        ("tokenizer.json", None, InputMissing),
        ("tokenizer.json", b"{}", FormatError),
        ("model.safetensors", None, InputMissing),
        ("model.safetensors", b"", FormatError),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0notjson!", FormatError),
        ("sentence_bert_config.json", b'{"max_seq_length": 99}', SettingError),
        ("1_Pooling/config.json", b'{"pooling_mode_mean_tokens": false}', FormatError),
        ("1_Pooling/config.json", b"{}", SettingError),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    tiny_bert: Path, tmp_path: Path, name: str, content: bytes | None, error: type[Exception]
) -> None:
    copy = shutil.copytree(tiny_bert, tmp_path / "m")
    path = copy / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error):
        EmbeddingModel(copy)


# --- the API ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tiny_bert: Path) -> EmbeddingModel:
    return EmbeddingModel(tiny_bert)


def ask(model: EmbeddingModel, method: str, path: str, **options: object) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=build_app(model, "tiny"), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            return await client.request(method, path, **options)

    return asyncio.run(send())


def embed(model: EmbeddingModel, **body: object) -> httpx.Response:
    return ask(model, "POST", "/v1/embeddings", json={"model": "tiny", **body})


def test_health_and_models_say_what_this_is(model: EmbeddingModel) -> None:
    assert ask(model, "GET", "/health").json()["engine"] == "cai reference engine"
    (only,) = ask(model, "GET", "/v1/models").json()["data"]
    assert (only["id"], only["owned_by"]) == ("tiny", "cai reference engine")


def test_texts_and_tokens_and_both_encodings_give_the_same_floats(model: EmbeddingModel) -> None:
    expected = model.embed_text("the key").tolist()
    answers = [
        embed(model, input="the key"),
        embed(model, input=["the key"], encoding_format="float", user="u", dimensions=24),
        embed(model, input=[2, 4, 5, 3]),
        embed(model, input=[[2, 4, 5, 3]]),
    ]
    for answer in answers:
        assert answer.status_code == 200
        assert answer.json()["data"][0]["embedding"] == expected
        assert answer.json()["usage"] == {"prompt_tokens": 4, "total_tokens": 4}
    packed = embed(model, input="the key", encoding_format="base64").json()
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert np.frombuffer(raw, "<f4").tolist() == expected


def test_a_text_does_not_depend_on_its_neighbours(model: EmbeddingModel) -> None:
    both = embed(model, input=["the key opens a door", "model"]).json()["data"]
    assert [item["index"] for item in both] == [0, 1]
    assert both[1]["embedding"] == embed(model, input="model").json()["data"][0]["embedding"]


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({}, 400, "input", "invalid_value"),
        ({"input": ""}, 400, "input", "invalid_value"),
        ({"input": []}, 400, "input", "invalid_value"),
        ({"input": ["a", ""]}, 400, "input", "invalid_value"),
        ({"input": ["a", 3]}, 400, "input", "invalid_value"),
        ({"input": {"a": 1}}, 400, "input", "invalid_value"),
        ({"input": [10]}, 400, "input", "invalid_value"),
        ({"input": [-1]}, 400, "input", "invalid_value"),
        ({"input": [True]}, 400, "input", "invalid_value"),
        ({"input": [[]]}, 400, "input", "invalid_value"),
        ({"input": ["a"] * 257}, 400, "input", "invalid_value"),
        ({"input": "a " * 11}, 400, "input", "context_length_exceeded"),
        ({"input": [4] * 13}, 400, "input", "context_length_exceeded"),
        ({"input": "a", "model": "other"}, 404, "model", "model_not_found"),
        ({"input": "a", "model": None}, 400, "model", "invalid_type"),
        ({"input": "a", "model": ["tiny"]}, 400, "model", "invalid_type"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format", "invalid_value"),
        ({"input": "a", "encoding_format": []}, 400, "encoding_format", "invalid_value"),
        ({"input": "a", "dimensions": 8}, 400, "dimensions", "invalid_value"),
        ({"input": "a", "dimensions": "24"}, 400, "dimensions", "invalid_value"),
        ({"input": "a", "user": 1}, 400, "user", "invalid_type"),
        ({"input": "a", "truncate": True}, 400, "truncate", "unknown_parameter"),
    ],
)
def test_errors_have_the_shape_of_openai(
    model: EmbeddingModel, body: dict[str, object], status: int, param: str, code: str
) -> None:
    answer = ask(model, "POST", "/v1/embeddings", json={"model": "tiny"} | body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_more_tokens_than_the_limit_are_refused(
    model: EmbeddingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MAX_TOKENS", 8)
    assert embed(model, input=["the key", "the key"]).status_code == 200
    refused = embed(model, input=["the key", "the key", "a"])
    assert refused.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b'"x"', 400, "invalid_json"),
        (b'{"input":"a","input":"b","model":"tiny"}', 400, "invalid_json"),
        (b'{"input":1.5,"model":"tiny"}', 400, "invalid_json"),
        (b'{"input":"\xff","model":"tiny"}', 400, "invalid_json"),
        (b'{"input":' + b"[" * 70 + b"]" * 70 + b"}", 413, "request_too_large"),
        (b'{"input":"' + b"a" * engine.MAX_BODY + b'"}', 413, "request_too_large"),
    ],
)
def test_bodies_that_are_not_plain_small_json_are_refused(
    model: EmbeddingModel, content: bytes, status: int, code: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = ask(model, "POST", "/v1/embeddings", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/embeddings", 405), ("POST", "/v1/models", 405), ("GET", "/v1/completions", 404),
     ("GET", "/docs", 404), ("GET", "/openapi.json", 404)],
)
def test_other_routes_answer_in_the_same_shape(
    model: EmbeddingModel, method: str, path: str, status: int
) -> None:
    answer = ask(model, method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == "http_error"


def test_another_content_type_is_refused(model: EmbeddingModel) -> None:
    answer = ask(model, "POST", "/v1/embeddings", content=b"{}",
                 headers={"content-type": "text/plain"})
    assert answer.status_code == 415


def test_a_fault_of_the_engine_shows_nothing_of_itself(
    model: EmbeddingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_model: EmbeddingModel, _ids: object) -> None:
        raise RuntimeError("inner detail")

    monkeypatch.setattr(EmbeddingModel, "embed", broken)
    answer = embed(model, input="a")
    assert answer.status_code == 500
    assert "inner detail" not in answer.text


def test_a_request_beyond_the_queue_is_told_to_come_back(
    model: EmbeddingModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MAX_WAITING", 0)
    answer = embed(model, input="a")
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")


# --- the socket and the process -----------------------------------------------------------------


def test_the_socket_is_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "run" / "engine.sock"
    with private_socket(path):
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(ListenerFailed, match="in use"):
            private_socket(path)
    private_socket(path).close()  # a dead socket is replaced


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o750)
    with pytest.raises(StorageError, match="can be entered by others"):
        private_socket(tmp_path / "run" / "engine.sock")


def test_something_else_at_the_path_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "run" / "engine.sock"
    path.parent.mkdir(mode=0o700)
    path.write_text("mine")
    with pytest.raises(ListenerFailed, match="not a socket"):
        private_socket(path)
    assert path.read_text() == "mine"


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ListenerFailed):
        private_socket(tmp_path / "run" / ("x" * 120))


def start(model: Path, uds: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cai.demo.engine", "--model", str(model), "--uds", str(uds)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def test_the_process_serves_on_its_socket_and_leaves_nothing(
    tiny_bert: Path, tmp_path: Path
) -> None:
    uds = tmp_path / "run" / "engine.sock"
    process = start(tiny_bert, uds)
    try:
        deadline = time.monotonic() + 60
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(uds)), base_url="http://e") as http:
            while True:
                try:
                    answer = http.get("/health")
                    break
                except httpx.TransportError:
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
        assert answer.json()["model"] == "tiny-bert"
        assert answer.headers.get_list("server") == [engine.SERVER]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, 143, -signal.SIGTERM)
    finally:
        process.kill()
        process.communicate()
    assert not uds.exists()


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_model_that_is_no_directory_ends_with_status_3(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model"
    if kind == "file":
        path.touch()
    process = start(path, tmp_path / "run" / "e.sock")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 3
    assert b"Traceback" not in stderr
    assert str(path).encode() in stderr


def test_the_demo_model_must_be_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputMissing):
        find_model(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(InputError):
        find_model(tmp_path / "file")
    with pytest.raises(InputError, match=r"no config\.json"):
        find_model(tmp_path)


def test_the_demo_model_is_taken_as_given(tiny_bert: Path) -> None:
    found = find_model(tiny_bert)
    assert (found.directory, found.name) == (tiny_bert, "tiny-bert")
    assert found.size == sum(path.stat().st_size for path in tiny_bert.iterdir())


def test_engine_sockets_are_unix_only(tmp_path: Path) -> None:
    with private_socket(tmp_path / "run" / "e.sock") as listener:
        assert listener.family == socket.AF_UNIX
    assert os.path.lexists(tmp_path / "run" / "e.sock")
