"""``python -m tests.oss_server DIR``: the OSS server as a process.

Prints one line of JSON with its endpoint, then serves until it is stopped. Credentials come from
``OSS_SERVER_KEY_ID``, ``OSS_SERVER_SECRET`` and ``OSS_SERVER_TOKEN``, or are those of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from tests.oss_server.server import KEY_ID, REGION, SECRET, OssServer
from tests.oss_server.signing import Account


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.oss_server", description=__doc__)
    parser.add_argument("directory", type=Path, help="keeps the buckets")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bucket", action="append", default=[], help="made if missing")
    parser.add_argument("--public", action="append", default=[], help="anybody may read it")
    parser.add_argument("--region", default=REGION)
    given = parser.parse_args()
    account = Account(
        os.environ.get("OSS_SERVER_KEY_ID", KEY_ID), os.environ.get("OSS_SERVER_SECRET", SECRET),
        os.environ.get("OSS_SERVER_TOKEN", ""),
    )
    server = OssServer(
        given.directory, buckets=[*given.bucket, *given.public], accounts=[account],
        region=given.region, port=given.port, public=given.public,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    sys.stdout.write(json.dumps({"endpoint": server.endpoint, "port": server.port}) + "\n")
    sys.stdout.flush()
    try:
        server.serve_forever(0.05)
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()


main()
