"""Settings from an environment: defaults, every variable, and refusals that name the variable."""

import os
from dataclasses import fields
from pathlib import Path

import pytest

from ranklog.config import SOCKET_PATH_SIZE_MAX, Settings, runtime_dir, state_dir, xdg_runtime
from ranklog.errors import UsageError

UID = os.geteuid()


def settings(**env: str) -> Settings:
    return Settings.from_env({"HOME": "/home/ada", **env})


def test_an_empty_environment_gives_the_documented_defaults() -> None:
    found = settings()
    assert found.to == "/home/ada/.local/share/ranklog"
    assert found.state_dir == Path("/home/ada/.local/state/ranklog")
    assert found.runtime_dir == Path("/run/ranklog" if UID == 0 else f"/tmp/ranklog-{UID}")
    assert (found.mode, found.autostart, found.quiet, found.allow_network_fs) == ("online", False, False, False)
    assert (found.project, found.name, found.run_id, found.run_id_hint) == (None, None, None, None)
    assert (found.socket, found.journal_dir, found.spool_dir, found.runtime_dir_given) == (None, None, None, False)
    assert (found.journal_size_bytes, found.journal_file_size_bytes) == (32 << 20, 512 << 10)
    assert (found.spool_size_bytes, found.flush_interval_s, found.uid) == (1 << 30, 0.1, UID)


def test_an_empty_variable_is_an_unset_one() -> None:
    variables = {f"RANKLOG_{field.name.upper()}": "" for field in fields(Settings)}
    assert "RANKLOG_SPOOL_DIR" in variables
    assert settings(**variables, XDG_DATA_HOME="", XDG_STATE_HOME="", XDG_RUNTIME_DIR="") == settings()


def test_every_variable_is_read() -> None:
    found = settings(
        RANKLOG_TO="hf://buckets/me/runs", RANKLOG_MODE="Offline", RANKLOG_PROJECT="llama", RANKLOG_NAME="brave",
        RANKLOG_RUN_ID="r1", RANKLOG_RUN_ID_HINT="r2", RANKLOG_SOCKET="/s/x.sock", RANKLOG_RUNTIME_DIR="/r",
        RANKLOG_STATE_DIR="/st", RANKLOG_JOURNAL_DIR="/j", RANKLOG_SPOOL_DIR="/sp", RANKLOG_AUTOSTART="1",
        RANKLOG_QUIET="yes", RANKLOG_ALLOW_NETWORK_FS="TRUE", RANKLOG_JOURNAL_SIZE_BYTES="1M",
        RANKLOG_JOURNAL_FILE_SIZE_BYTES="65536", RANKLOG_SPOOL_SIZE_BYTES="2 GiB", RANKLOG_FLUSH_INTERVAL_S="0.5",
        RANKLOG_TOKEN_FILE="/t", RANKLOG_READ_CACHE_DIR="/c", RANKLOG_READ_CACHE_SIZE_BYTES="3M",
    )  # fmt: skip
    assert found == Settings(
        to="hf://buckets/me/runs", mode="offline", project="llama", name="brave", run_id="r1", run_id_hint="r2",
        socket=Path("/s/x.sock"), runtime_dir=Path("/r"), runtime_dir_given=True, state_dir=Path("/st"),
        journal_dir=Path("/j"), spool_dir=Path("/sp"), autostart=True, quiet=True, allow_network_fs=True,
        journal_size_bytes=1 << 20, journal_file_size_bytes=65536, spool_size_bytes=2 << 30, flush_interval_s=0.5,
        token_file=Path("/t"), read_cache_dir=Path("/c"), read_cache_size_bytes=3 << 20,
        uid=UID, xdg_runtime=None, xdg_state=Path("/home/ada/.local/state"), xdg_data=Path("/home/ada/.local/share"),
    )  # fmt: skip


def test_the_environment_of_the_process_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKLOG_PROJECT", "from-the-process")
    assert Settings.from_env().project == "from-the-process"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MODE", "onlien"), ("AUTOSTART", "maybe"), ("QUIET", "2"), ("ALLOW_NETWORK_FS", "x"), ("JOURNAL_DIR", "a\0b"),
        ("JOURNAL_SIZE_BYTES", "lots"), ("SPOOL_SIZE_BYTES", "-1"), ("SPOOL_SIZE_BYTES", "0"),
        ("SPOOL_SIZE_BYTES", "1.5G"),
        ("JOURNAL_FILE_SIZE_BYTES", "1T"), ("SPOOL_SIZE_BYTES", "9" * 30), ("SPOOL_SIZE_BYTES", "999999999999999G"),
        ("FLUSH_INTERVAL_S", "0"), ("FLUSH_INTERVAL_S", "-1"), ("FLUSH_INTERVAL_S", "nan"), ("FLUSH_INTERVAL_S", "inf"),
        ("FLUSH_INTERVAL_S", "fast"), ("FLUSH_INTERVAL_S", "61"),
    ],
)  # fmt: skip
def test_a_bad_value_is_refused_by_name_with_what_would_be_right(name: str, value: str) -> None:
    with pytest.raises(UsageError) as caught:
        settings(**{f"RANKLOG_{name}": value})
    assert f"RANKLOG_{name}={value!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("4096", 4096), ("4k", 4096), ("4 KiB", 4096), ("3M", 3 << 20), ("3mb", 3 << 20), ("1G", 1 << 30)],
)
def test_sizes_take_binary_units(text: str, size: int) -> None:
    assert settings(RANKLOG_SPOOL_SIZE_BYTES=text).spool_size_bytes == size


def test_a_socket_path_the_kernel_cannot_take_is_refused_at_once() -> None:
    longest = "/" + "s" * (SOCKET_PATH_SIZE_MAX - 1)
    assert settings(RANKLOG_SOCKET=longest).socket == Path(longest)
    with pytest.raises(UsageError, match=r"RANKLOG_SOCKET: .* 108 bytes, and the kernel takes 107"):
        settings(RANKLOG_SOCKET=longest + "s")
    with pytest.raises(UsageError, match=r"RANKLOG_RUNTIME_DIR: .* 113 bytes"):
        settings(RANKLOG_RUNTIME_DIR="/" + "r" * 99)


def test_relative_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings(RANKLOG_SPOOL_DIR="spool").spool_dir == tmp_path / "spool"


def test_xdg_directories_are_followed_unless_relative(tmp_path: Path) -> None:
    found = settings(XDG_STATE_HOME="/x/state", XDG_DATA_HOME="/x/data", XDG_RUNTIME_DIR=str(tmp_path))
    assert (found.xdg_state, found.state_dir) == (Path("/x/state"), Path("/x/state/ranklog"))
    assert (found.xdg_data, found.to) == (Path("/x/data"), "/x/data/ranklog")
    assert (found.xdg_runtime, found.runtime_dir) == (tmp_path, tmp_path / "ranklog")
    assert settings(XDG_STATE_HOME="state", XDG_DATA_HOME="data", XDG_RUNTIME_DIR=".") == settings()


def test_a_session_directory_that_is_missing_or_somebody_elses_is_not_used(tmp_path: Path) -> None:
    """sbatch and sudo hand XDG_RUNTIME_DIR on to where it does not exist or is not ours."""
    (tmp_path / "file").touch()
    for path in (tmp_path / "missing", tmp_path / "file"):
        assert settings(XDG_RUNTIME_DIR=str(path)).runtime_dir == settings().runtime_dir
    assert xdg_runtime({"XDG_RUNTIME_DIR": str(tmp_path)}, UID) == tmp_path
    assert xdg_runtime({"XDG_RUNTIME_DIR": str(tmp_path)}, UID + 1) is None


def test_client_and_daemon_share_the_rules_for_their_meeting_places(tmp_path: Path) -> None:
    for env in (
        {"HOME": "/h"}, {"HOME": "/h", "XDG_RUNTIME_DIR": str(tmp_path)}, {"HOME": "/h", "RANKLOG_RUNTIME_DIR": "/r"},
        {"HOME": "/h", "RANKLOG_STATE_DIR": "/s", "XDG_STATE_HOME": "/x"}, {"HOME": "/h", "XDG_STATE_HOME": "/x"},
    ):  # fmt: skip
        found = Settings.from_env(env)
        assert (found.runtime_dir, found.state_dir) == (runtime_dir(env, UID), state_dir(env, UID))


def test_the_runtime_directory_depends_on_the_user() -> None:
    assert runtime_dir({}, 0) == Path("/run/ranklog")
    assert runtime_dir({}, 1234) == Path("/tmp/ranklog-1234")


def test_a_user_without_a_home_gets_a_place_of_their_own() -> None:
    nobody = 3_999_999_999  # No such user: a container started with a made-up uid.
    assert state_dir({}, nobody) == Path(f"/var/tmp/ranklog-{nobody}/.local/state/ranklog")
    assert state_dir({"HOME": "relative"}, nobody) == Path(f"/var/tmp/ranklog-{nobody}/.local/state/ranklog")
