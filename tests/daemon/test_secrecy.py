"""What the shipper is born with, what it is told, and what nobody sees."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklogd.config import Config
from ranklogd.secrecy import pack, shipper_environment, unpack

XET = Path("/state/xet")
SECRETS = {
    "HF_TOKEN": "hf_abc", "HUGGING_FACE_HUB_TOKEN": "hf_old", "AWS_SECRET_ACCESS_KEY": "s", "AWS_SESSION_TOKEN": "t",
    "AZURE_STORAGE_ACCOUNT_KEY": "k", "GOOGLE_APPLICATION_CREDENTIALS": "/c.json", "PGPASSWORD": "p",
}  # fmt: skip
PLAIN = {
    "PATH": "/bin", "HOME": "/home/u", "HF_HOME": "/hf", "HF_ENDPOINT": "https://hub", "HTTPS_PROXY": "http://proxy",
    "NO_PROXY": "x", "SSL_CERT_FILE": "/certs.pem", "REQUESTS_CA_BUNDLE": "/ca.pem", "PYTHONPATH": "/p",
    "AWS_REGION": "eu", "RANKLOG_FAILPOINT": "", "LD_LIBRARY_PATH": "/lib",
}  # fmt: skip


def test_secrets_are_told_and_everything_else_of_the_user_is_kept():
    seen, hidden = shipper_environment(PLAIN | SECRETS, XET)
    assert hidden == SECRETS
    assert seen.items() >= PLAIN.items()
    assert not seen.keys() & SECRETS.keys()


def test_the_hubs_libraries_are_told_to_keep_to_themselves_and_where():
    seen, _ = shipper_environment({"HF_XET_CACHE": "/home/u/xet", "HF_HUB_DISABLE_TELEMETRY": "0"}, XET)
    assert seen == {
        "HF_XET_CACHE": "/state/xet",
        "HF_XET_LOG_DEST": "/dev/null",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "MALLOC_ARENA_MAX": "2",
    }
    seen, _ = shipper_environment({"HF_XET_LOG_DEST": "/var/log/xet"}, XET)
    assert seen["HF_XET_LOG_DEST"] == "/var/log/xet", "who looks for a fault may have the log"


NAMES = st.text(st.characters(exclude_characters="=\0", exclude_categories=["Cs"]), min_size=1)


@given(st.dictionaries(NAMES, st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_nothing_of_an_environment_is_lost_on_the_way_and_nothing_hidden_is_seen(env):
    seen, hidden = shipper_environment(env, XET)
    line = pack(Config().to_json(), hidden)
    assert "\n" not in line
    assert Config.from_json(line) == Config(), "a shipper of an earlier version reads it, too"
    assert not seen.keys() & hidden.keys()
    found = dict(seen)
    unpack(line, found)
    ours = ("HF_", "MALLOC_")
    assert {name: value for name, value in found.items() if not name.startswith(ours)} == {
        name: value for name, value in env.items() if not name.startswith(ours)
    }


@pytest.mark.parametrize("line", ["", "{", "[]", "3", "{}", '{"environment": 3}', Config().to_json()])
def test_a_line_without_secrets_changes_nothing(line):
    env = {"A": "1"}
    unpack(line, env)
    assert env == {"A": "1"}


def test_what_is_printed_of_a_config_holds_no_secret(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, f"secret-{value}")
    assert "secret-" not in Config().to_json()
    assert "environment" not in json.loads(Config().to_json())


@pytest.mark.parametrize("hard", [resource.RLIM_INFINITY, 4096, 0])
def test_a_crash_leaves_no_core_file_whatever_the_limit_was(tmp_path, hard):
    code = (
        "import os, resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_CORE, ({hard}, {hard}))\n"
        "from ranklogd.secrecy import forbid_core_file\n"
        "forbid_core_file()\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE), flush=True)\n"
        "os.abort()\n"
    )
    env = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path
    )
    assert done.stdout.strip() == str((min(1, hard % (1 << 63)),) * 2), done.stderr
    assert done.returncode == -6
    assert list(tmp_path.iterdir()) == []
