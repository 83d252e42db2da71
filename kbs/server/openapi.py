"""OpenAPI documents of the three surfaces, for tests and for people; no listener serves them.

The protocol and the attestation service are described here by hand, because their bodies are read
as bytes; the administrators' document is made from their routes.
"""

from __future__ import annotations

from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from cai import __version__
from cai.attest.rcar import FLAT_VERSION, SELECTOR, TEE, VERSION

_VERSION: Final = "3.0.3"

_ERROR: Final = {
    "type": "object",
    "required": ["type", "detail"],
    "properties": {
        "type": {"type": "string", "description": "ends in the kind, see kbs-errors.md"},
        "detail": {"type": "string"},
        "code": {"type": "string"},
        "request": {"type": "string"},
        "hint": {"type": "string"},
    },
}

_NONCE: Final = {"type": "string", "maxLength": 256}

_KEY: Final = {
    "type": "object",
    "required": ["kty", "alg"],
    "properties": {
        "kty": {"enum": ["EC", "RSA"]},
        "alg": {"enum": ["ECDH-ES+A256KW", "RSA-OAEP-256"]},
        "crv": {"enum": ["P-256", "P-521"]},
        "x": {"type": "string"},
        "y": {"type": "string"},
        "n": {"type": "string"},
        "e": {"type": "string"},
    },
}

_REQUEST: Final = {
    "type": "object",
    "required": ["version", "tee", "extra-params"],
    "properties": {
        "version": {"enum": [VERSION, FLAT_VERSION, "0.1.1"]},
        "tee": {"enum": [TEE]},
        "extra-params": {
            "type": "object",
            "properties": {SELECTOR: {"type": "string", "pattern": "^[A-Za-z0-9_-]{1,64}$"}},
        },
    },
}

_ATTESTATION: Final = {
    "type": "object",
    "required": ["runtime-data", "tee-evidence"],
    "properties": {
        "init-data": {
            "type": "object",
            "nullable": True,
            "properties": {"format": {"enum": ["toml"]}, "body": {"type": "string"}},
        },
        "runtime-data": {
            "type": "object",
            "required": ["nonce", "tee-pubkey"],
            "properties": {"nonce": _NONCE, "tee-pubkey": _KEY},
        },
        "tee-evidence": {
            "type": "object",
            "required": ["primary_evidence", "additional_evidence"],
            "properties": {
                "primary_evidence": {
                    "type": "object",
                    "properties": {
                        "quote": {"type": "string", "format": "byte"},
                        "cc_eventlog": {"type": "string", "format": "byte", "nullable": True},
                    },
                },
                "additional_evidence": {"type": "string"},
            },
        },
    },
}

_LEASE: Final = {
    "type": "object",
    "description": "docs/spec-lease.md",
    "properties": {
        "resource": {"type": "string"},
        "nonce": {"type": "string"},
        "channels": {"type": "array", "items": {"type": "string"}},
        "renews": {"type": "string", "nullable": True},
        "checkpoint": {"type": "object", "nullable": True},
    },
}

_ENTRY: Final = {
    "type": "object",
    "required": ["tee", "evidence"],
    "properties": {
        "tee": {"enum": [TEE, "nvidia"]},
        "evidence": {"type": "string", "description": "base64url of the evidence's JSON"},
        "runtime_data": {
            "type": "object",
            "nullable": True,
            "properties": {"raw": {"type": "string"}, "structured": {"type": "object"}},
        },
        "runtime_data_hash_algorithm": {
            "enum": ["sha256", "sha384", "sha512"], "nullable": True,
        },
        "init_data": {
            "type": "object",
            "nullable": True,
            "properties": {
                "init_data_digest": {"type": "string"},
                "init_data_toml": {"type": "string"},
            },
        },
        "cai_statement": {"type": "string", "description": "base64url of a channel statement"},
    },
}  # fmt: skip

_QUESTION: Final = {
    "type": "object",
    "properties": {
        "verification_requests": {"type": "array", "items": _ENTRY},
        "policy_ids": {"type": "array", "items": {"type": "string"}},
        **_ENTRY["properties"],  # type: ignore[dict-item]
    },
}

_SEGMENT: Final = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,128}$"}


def main_document() -> dict[str, Any]:
    """The key broker protocol."""
    resource = "/kbs/v0/resource/{repository}/{type}/{tag}"
    names = [_in_path(name, _SEGMENT) for name in ("repository", "type", "tag")]
    return _document(
        "CAI key broker",
        {
            "/kbs/v0/auth": {"post": _operation("Begin a session.", body=_REQUEST)},
            "/kbs/v0/attest": {
                "post": _operation(
                    "Verify the evidence of a session.", body=_ATTESTATION, session=True
                )
            },
            resource: {
                "get": {
                    **_operation("Release a resource, as a JWE.", session=True, bearer=True),
                    "parameters": [*names, _cookie(required=False)],
                }
            },
            "/kbs/v0/lease": {
                "post": _operation(
                    "Grant or renew a lease.", body=_LEASE, session=True, bearer=True
                )
            },
            "/kbs/v0/errors/{kind}": {
                "get": {
                    **_operation("What a kind of error means.", media="text/plain"),
                    "parameters": [_in_path("kind", {"type": "string"})],
                }
            },
            "/healthz": {"get": _operation("The process lives.")},
            "/readyz": {"get": _operation("The database answers.")},
        },
    )


def appraisal_document() -> dict[str, Any]:
    """The attestation service."""
    challenge = {
        "type": "object",
        "properties": {"tee": {"enum": [TEE]}, "tee_params": {"type": "string"}},
    }
    text = "text/plain"
    return _document(
        "CAI attestation service",
        {
            "/as/challenge": {"post": _operation("A single-use challenge.", body=challenge)},
            "/as/attestation": {
                "post": _operation("Appraise evidence.", body=_QUESTION, media=text)
            },
            "/as/certificate": {"get": _operation("The authorities to pin.", media=text)},
            "/as/.well-known/jwks.json": {"get": _operation("The keys in use.")},
            "/as/policy": {"get": _operation("Ids of the attestation policies.")},
        },
    )


def admin_document(app: FastAPI) -> dict[str, Any]:
    """The administrators' routes, as they are mounted."""
    document = get_openapi(
        title="CAI key broker, administration", version=__version__, openapi_version=_VERSION,
        routes=app.routes,
    )  # fmt: skip
    for operations in document["paths"].values():
        for method, operation in operations.items():
            operation["security"] = [{"administrator": []}]
            operation["responses"] = {"200": {"description": "done"}, **_refusals()}
            if method in ("post", "put"):
                operation["requestBody"] = {
                    "content": {
                        "application/json": {"schema": {"type": "object"}},
                        "application/octet-stream": {
                            "schema": {"type": "string", "format": "binary"}
                        },
                    }
                }
    document.setdefault("components", {})["securitySchemes"] = {
        "administrator": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}
    }
    return document


def _document(title: str, paths: dict[str, Any]) -> dict[str, Any]:
    return {
        "openapi": _VERSION,
        "info": {"title": title, "version": __version__},
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(
    summary: str,
    *,
    body: dict[str, Any] | None = None,
    media: str = "application/json",
    session: bool = False,
    bearer: bool = False,
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "done", "content": {media: {}}},
            **_refusals(),
        },
    }
    if body is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": body}},
        }
    if session:
        operation["parameters"] = [_cookie(required=not bearer)]
    if bearer:
        operation["security"] = [{}, {"token": []}]
    return operation


def _refusals() -> dict[str, Any]:
    content = {"application/json": {"schema": _ERROR}}
    return {"default": {"description": "an ErrorInformation", "content": content}}


def _cookie(*, required: bool) -> dict[str, Any]:
    return {
        "name": "kbs-session-id", "in": "cookie", "required": required,
        "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
    }  # fmt: skip


def _in_path(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": schema}
