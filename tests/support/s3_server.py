"""An S3 on this machine, by moto: fixtures, and what tests do to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import httpx
import pytest
from moto.server import ThreadedMotoServer


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of an S3 that has an empty bucket "lora"; the environment is that of a server that uses it."""
    environment = {
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    httpx.post(f"{s3_server}/moto-api/reset", trust_env=False)
    client = boto3.client("s3")
    client.create_bucket(Bucket="lora")
    return client


def check_keys_after(server: str, requests: str) -> None:
    """Have the server look at who asks, after so many requests."""
    httpx.post(f"{server}/moto-api/reset-auth", content=requests, trust_env=False)


def put(s3: Any, folder: str, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        s3.put_object(Bucket="lora", Key=f"{folder}/{name}", Body=data)
