"""The child process that speaks to a KMS instance; runs under an interpreter of its own.

Nothing of this project is imported: the interpreter has ``alibabacloud-dkms-gcs`` and nothing of
ours. One JSON object a line on standard input, one on standard output; the first line configures.
So neither a password nor a key is ever in an argument, the environment or a log.
"""

import base64
import json
import os
import sys
from importlib import import_module
from typing import Any

Answer = dict[str, Any]


def open_client(settings: Answer) -> tuple[Any, Any, Any]:
    """The SDK's client, its models and the options of each call."""
    models = import_module("sdk.models")
    config = import_module("openapi.models").Config()
    config.protocol = settings["protocol"]
    config.endpoint = settings["endpoint"]
    config.client_key_content = settings["client_key"]
    config.password = settings["password"]
    config.ca_file_path = settings["ca_file"] or None
    options = import_module("openapi_util.models").RuntimeOptions(
        autoretry=False, ignore_ssl=False, verify=settings["ca_file"] or None,
        connect_timeout=settings["timeout_ms"], read_timeout=settings["timeout_ms"],
    )
    return import_module("sdk.client").Client(config), models, options


def encrypt(client: Any, models: Any, options: Any, order: Answer) -> Answer:
    """Encrypt under a key; everything that decryption needs comes back."""
    request = models.EncryptRequest(
        key_id=order["key"], plaintext=base64.b64decode(order["data"]), request_headers={}
    )
    answer = client.encrypt_with_options(request, options)
    sealed = {
        "blob": base64.b64encode(answer.ciphertext_blob).decode("ascii"),
        "iv": base64.b64encode(answer.iv or b"").decode("ascii"),
        "algorithm": answer.algorithm or "",
        "padding": answer.padding_mode or "",
    }
    return {"sealed": sealed}


def decrypt(client: Any, models: Any, options: Any, order: Answer) -> Answer:
    """Decrypt what ``encrypt`` gave."""
    sealed = order["sealed"]
    request = models.DecryptRequest(
        key_id=order["key"], ciphertext_blob=base64.b64decode(sealed["blob"]),
        iv=base64.b64decode(sealed["iv"]), algorithm=sealed["algorithm"],
        padding_mode=sealed["padding"], request_headers={},
    )
    answer = client.decrypt_with_options(request, options)
    return {"data": base64.b64encode(answer.plaintext).decode("ascii")}


def secret(client: Any, models: Any, options: Any, order: Answer) -> Answer:
    """The current version of a secret."""
    request = models.GetSecretValueRequest(secret_name=order["name"], request_headers={})
    answer = client.get_secret_value_with_options(request, options)
    return {
        "data": answer.secret_data,
        "kind": answer.secret_data_type,
        "version": answer.version_id,
    }


OPERATIONS = {"encrypt": encrypt, "decrypt": decrypt, "secret": secret}


def refusal(error: Exception) -> Answer:
    """What is told of an error: its code or kind, never its text, which repeats the request."""
    code = getattr(error, "code", None)
    data = getattr(error, "data", None)
    status = data.get("httpCode", 500) if isinstance(data, dict) else 500
    if isinstance(code, str) and code and status < 500:
        return {"refused": code}
    return {"failed": type(error).__name__}


def main() -> None:
    """Serve orders until the input ends."""
    # Whatever a library prints must not get into the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lines = sys.stdin
    try:
        opened = open_client(json.loads(lines.readline()))
        first: Answer = {"ready": True}
    except Exception as error:  # told to the parent, which decides
        opened, first = None, {"failed": type(error).__name__}
    answers.write(json.dumps(first) + "\n")
    answers.flush()
    if opened is None:
        return
    for line in lines:
        try:
            order = json.loads(line)
            answer = OPERATIONS[order["op"]](*opened, order)
        except Exception as error:
            answer = refusal(error)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
