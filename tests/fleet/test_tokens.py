"""Clusters that ask for a token, as Ray's do that were started on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.ray_head import RayHead

from aioengine.errors import ConfigError
from aioengine.executors.ray.address import check_address

RIGHT, WRONG = "0123456789abcdef", "f" * 16


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's folder; the user has no token."""
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if not k.startswith("RAY_")})
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    (tmp_path / ".ray").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def heads() -> Iterator[dict[bool, str]]:
    """Addresses of a head that asks for a token, and of one that does not."""
    servers = {True: RayHead(RIGHT), False: RayHead()}
    yield {asks: server.open() for asks, server in servers.items()}
    for server in servers.values():
        server.close()


def hold(token: str, where: str, home: Path) -> None:
    if where == "variable":
        os.environ["RAY_AUTH_TOKEN"] = token
    else:
        file = home / (".ray/auth_token" if where == "file" else "elsewhere")
        file.write_text(f"{token}\n")
        if where == "other file":
            os.environ["RAY_AUTH_TOKEN_PATH"] = str(file)


@pytest.mark.parametrize("where", ["variable", "file", "other file"])
def test_this_users_token_is_shown(where: str, home: Path, heads: dict[bool, str]) -> None:
    """Also to a head that asks for none, as Ray does."""
    hold(RIGHT, where, home)
    for head in heads.values():
        check_address(head)
        assert os.environ["RAY_AUTH_MODE"] == "token", "so that Ray shows it, too"


@pytest.mark.parametrize(
    ("token", "mode"),
    [
        (None, None),
        (None, "token"),
        (RIGHT, "disabled"),
        (WRONG, None),
        (WRONG, "token"),
    ],
)
def test_a_cluster_that_refuses(
    token: str | None, mode: str | None, home: Path, heads: dict[bool, str]
) -> None:
    """Ray would try for half a minute, and not say why."""
    if token is not None:
        hold(token, "file", home)
    if mode is not None:
        os.environ["RAY_AUTH_MODE"] = mode
    where = re.escape(heads[True])
    with pytest.raises(ConfigError, match=rf"^RAY_ADDRESS={where}: .*UNAUTHENTICATED.*auth_token"):
        check_address(heads[True])
    check_address(heads[False])


def test_another_server_of_grpc_is_no_head(home: Path) -> None:
    server = RayHead(another=True)
    where = server.open()
    try:
        with pytest.raises(ConfigError, match=f"RAY_ADDRESS={where}: .*UNIMPLEMENTED"):
            check_address(where)
    finally:
        server.close()
