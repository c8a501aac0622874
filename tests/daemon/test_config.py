import argparse
import os
import subprocess
import sys
import tomllib
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklog.config import Settings
from ranklog.errors import UsageError
from ranklogd.config import Config, load_config
from ranklogd.flags import add_flags, field_docs, flag_values, sample_file
from ranklogd.units import format_value, parse_duration, parse_mode, parse_size

SAMPLE = Path(__file__).parents[2] / "systemd" / "ranklogd.toml"


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path / "home"), "XDG_CONFIG_HOME": str(tmp_path / "config")}


@pytest.fixture
def write(tmp_path: Path):
    def make(text: str) -> Path:
        path = tmp_path / "config/ranklog/ranklogd.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return make


def refusal(overrides: dict[str, str], env: dict[str, str], file: Path | None = None) -> str:
    with pytest.raises(UsageError) as refused:
        load_config(overrides, env, file)
    return str(refused.value)


def test_the_daemon_starts_without_any_config(env, tmp_path):
    config = load_config({}, env)
    home = tmp_path / "home"
    assert config.to == str(home / ".local/share/ranklog")
    assert config.state_dir == home / ".local/state/ranklog"
    assert config.socket == config.runtime_dir / "ranklog.sock"
    assert config.node
    assert config == load_config({}, env, None)
    places = {"to": "", "state_dir": Path(), "runtime_dir": Path(), "socket": Path(), "node": ""}
    assert replace(config, **places) == Config(), "every other option is at its default"


def test_an_environment_without_home_and_user_still_gives_absolute_places():
    config = load_config({}, {})
    assert config.state_dir.is_absolute()
    assert Path(config.to).is_absolute()


def test_flags_win_over_environment_over_file_over_default(env, write):
    assert load_config({}, env).seal_age_s == 10
    write("seal_age_s = 11\nupload_batch_max = 7\nretry_base_s = '2s'")
    assert load_config({}, env).seal_age_s == 11
    env["RANKLOG_SEAL_AGE_S"] = "12"
    env["RANKLOG_UPLOAD_BATCH_MAX"] = "8"
    assert load_config({}, env).seal_age_s == 12
    config = load_config({"seal_age_s": "13s"}, env)
    assert (config.seal_age_s, config.upload_batch_max, config.retry_base_s) == (13, 8, 2)


def test_systemd_directories_win_over_everything_for_those_two_and_the_first_of_several_counts(env):
    env |= {"STATE_DIRECTORY": "/var/lib/ranklog:/var/lib/other", "RUNTIME_DIRECTORY": "/run/unit"}
    env["RANKLOG_STATE_DIR"] = "/variable"
    config = load_config({"state_dir": "/flag", "runtime_dir": "/flag2"}, env)
    assert config.state_dir == Path("/var/lib/ranklog")
    assert config.runtime_dir == Path("/run/unit")
    assert config.socket == Path("/run/unit/ranklog.sock")


def test_the_named_file_must_exist_and_the_default_one_need_not(env, write, tmp_path):
    absent = tmp_path / "absent.toml"
    assert "absent.toml does not exist" in refusal({}, env, absent)
    assert "absent.toml does not exist" in refusal({}, env | {"RANKLOG_CONFIG": str(absent)})
    named = tmp_path / "named.toml"
    named.write_text("seal_age_s = 3")
    write("seal_age_s = 4")
    assert load_config({}, env).seal_age_s == 4
    assert load_config({}, env | {"RANKLOG_CONFIG": str(named)}).seal_age_s == 3
    assert load_config({}, env, named).seal_age_s == 3


@pytest.mark.parametrize("text", ["seal_age_s = ", "= 3", "\udcff", "a = {"])
def test_a_file_that_is_no_toml_is_refused_by_name(env, write, text):
    path = write("")
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert str(path) in refusal({}, env)


def test_a_directory_in_place_of_the_file_is_refused_by_name(env, tmp_path):
    (tmp_path / "config/ranklog/ranklogd.toml").mkdir(parents=True)
    assert "ranklogd.toml" in refusal({}, env)


def test_an_unknown_key_is_an_error_with_a_suggestion(env, write):
    path = write("seal_age = 4")
    assert refusal({}, env) == f"{path}: unknown option 'seal_age'; did you mean 'seal_age_s'?"
    write("[daemon]\nseal_age_s = 4")
    assert "unknown option 'daemon'" in refusal({}, env)
    write("")
    assert "did you mean 'upload_batch_max'" in refusal({"upload_batch": "3"}, env)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("seal_age_s", "0", "outside of its limits 10ms to 1h"),
        ("seal_age_s", "2h", "outside of its limits"),
        ("seal_age_s", "soon", "not a time"),
        ("seal_age_s", "nan", "not a time"),
        ("seal_age_s", "-1", "not a time"),
        ("commit_interval_s", "1s", "outside of its limits 0 to 100ms"),
        ("seal_size_bytes", "1", "4KiB to 1GiB"),
        ("seal_size_bytes", "much", "not a size"),
        ("upload_batch_max", "1001", "0 to 1000"),
        ("upload_batch_max", "5k", "not a whole number"),
        ("socket_mode", "0o888", "octal"),
        ("socket_mode", "7777", "0000 to 0777"),
        ("allow_network_fs", "maybe", "true or false"),
        ("log_level", "loud", "debug, info, warning, error"),
        ("to", "ftp://x", "scheme 'ftp'"),
        ("retry_max_s", "1ms", "retry_base_s=1 is longer than retry_max_s=0.001"),
        ("node", "n" * 600, "longer than 512 bytes"),
        ("state_dir", "a\0b", "not a path"),
    ],
)
def test_a_bad_value_is_refused_with_source_value_and_limit(env, write, name, text, says):
    flag = refusal({name: text}, env)
    variable = refusal({}, env | {f"RANKLOG_{name.upper()}": text})
    assert says in flag
    assert says in variable
    if "longer than retry_max_s" not in says:
        assert f"--{name.replace('_', '-')}={text!r}" in flag
        assert f"RANKLOG_{name.upper()}={text!r}" in variable


WRONG_KINDS = [
    "seal_age_s = true", "seal_age_s = nan", "seal_age_s = inf", "seal_age_s = -1", "seal_age_s = [1]",
    "seal_age_s = 1979-05-27", "upload_batch_max = 1.5", "upload_batch_max = true", "to = 5", "state_dir = 1",
    "allow_network_fs = 1", "seal_size_bytes = 1e9", "socket_mode = 660", "socket_mode = 0o660",
]  # fmt: skip


@pytest.mark.parametrize("line", WRONG_KINDS)
def test_a_toml_value_of_the_wrong_kind_is_refused_by_name(env, write, line):
    path = write(line)
    assert refusal({}, env).startswith(f"{path}: {line.split()[0]}=")


def test_sizes_times_and_modes_take_units_in_every_source(env, write):
    env |= {"RANKLOG_CACHE_SIZE_BYTES": "1.5GiB", "RANKLOG_WRITER_KEEP_S": "2d"}
    write('seal_size_bytes = "1 GB"\ndisk_quota_bytes = 4096\nseal_age_s = "20ms"\nsocket_mode = "660"')
    config = load_config({"retry_base_s": "1m", "reserve_size_bytes": "64k"}, env)
    assert config.seal_size_bytes == 1 << 30
    assert config.disk_quota_bytes == 4096
    assert config.seal_age_s == 0.02
    assert config.socket_mode == 0o660
    assert config.cache_size_bytes == 3 << 29
    assert config.writer_keep_s == 172800
    assert config.retry_base_s == 60
    assert config.reserve_size_bytes == 65536


@pytest.mark.parametrize("source", ["flag", "variable", "file"])
def test_an_empty_text_means_the_default(env, write, source):
    if source == "file":
        write('seal_age_s = ""\njournal_dir = ""')
    variables = {"RANKLOG_SEAL_AGE_S": "", "RANKLOG_JOURNAL_DIR": ""} if source == "variable" else {}
    config = load_config({"seal_age_s": "", "journal_dir": ""} if source == "flag" else {}, env | variables)
    assert config.seal_age_s == 10
    assert config.journal_dir is None


def test_paths_and_a_store_that_is_a_directory_are_made_absolute(env, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somewhere")
    config = load_config({"to": "out", "state_dir": "~/state", "spool_dir": "spool"}, env)
    assert config.to == str(tmp_path / "out")
    assert config.state_dir == Path("/somewhere/state")
    assert config.spool_dir == tmp_path / "spool"
    assert load_config({"to": "file:///data"}, env).to == "file:///data"


def test_a_socket_path_too_long_for_the_kernel_is_refused_with_the_remedy(env):
    fits = "/" + "x" * 106
    assert load_config({"socket": fits}, env).socket == Path(fits)
    for overrides in ({"socket": fits + "x"}, {"socket": "/" + "é" * 54}, {"runtime_dir": "/" + "d" * 100}):
        text = refusal(overrides, env)
        assert "107" in text
        assert "--runtime-dir /tmp/ranklog-" in text


def test_the_config_cannot_be_changed_and_checks_itself_however_it_is_made():
    with pytest.raises(FrozenInstanceError):
        Config().seal_age_s = 1  # type: ignore[misc]
    with pytest.raises(UsageError, match="seal_age_s"):
        Config(seal_age_s=0)
    with pytest.raises(UsageError, match="seal_age_s"):
        Config(seal_age_s=float("nan"))
    with pytest.raises(UsageError, match="state_dir"):
        Config(state_dir="/a")  # type: ignore[arg-type]
    assert Config(seal_age_s=3).seal_age_s == 3


def test_a_config_goes_through_json_on_one_line_and_comes_back_equal(env):
    config = load_config({"journal_dir": "/j", "seal_age_s": "20ms", "node": 'a"b\nc'}, env)
    assert "\n" not in config.to_json()
    assert Config.from_json(config.to_json()) == config
    for text in ("", "[]", "3", '{"seal_age_s": 0}', '{"state_dir": 1}', "{"):
        with pytest.raises(UsageError):
            Config.from_json(text)
    # A later daemon's shipper may be of this version, after a downgrade in place.
    assert Config.from_json('{"later_option": 1}') == Config()


def test_every_field_is_documented_and_has_a_flag_with_and_without_its_unit():
    names = [field.name for field in fields(Config)]
    assert set(field_docs()) == set(names)
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert flag_values(parser.parse_args([])) == {}
    parsed = parser.parse_args(["--seal-age", "3s", "--cache-size-bytes", "1M", "--to", "/x", "--allow-network-fs"])
    assert flag_values(parsed) == {"seal_age_s": "3s", "cache_size_bytes": "1M", "to": "/x", "allow_network_fs": "true"}
    for name in names:
        assert f"--{name.replace('_', '-')}" in parser.format_help()


def test_the_sample_file_says_every_default_and_loads_to_them(env):
    assert SAMPLE.read_text() == sample_file()
    given = tomllib.loads(SAMPLE.read_text())
    assert list(given) == [field.name for field in fields(Config)]
    assert load_config({}, env, SAMPLE) == load_config({}, env)


def test_an_uploaded_shard_is_kept_only_if_the_store_is_elsewhere():
    assert not Config(to="/data").keeps_cache
    assert not Config(to="file:///data").keeps_cache
    assert not Config(to="").keeps_cache


def test_where_calls_are_counted_one_call_takes_as_many_shards_as_the_hub_does_unless_told_otherwise():
    assert Config(to="hf://buckets/me/b").batch_max == 1000
    assert Config(to="/data").batch_max == Config(to="s3://b").batch_max == 64
    assert Config(to="hf://buckets/me/b", upload_batch_max=7).batch_max == 7
    assert (Config(to="/data").is_remote, Config(to="file:///data").is_remote) == (False, False)
    assert (Config(to="hf://buckets/me/b").is_remote, Config(to="s3://b").is_remote) == (True, True)


def test_the_clients_settings_take_the_places_of_this_config(env, tmp_path):
    config = load_config({"runtime_dir": str(tmp_path / "r"), "journal_dir": str(tmp_path / "j")}, env)
    settings = config.settings(env)
    assert isinstance(settings, Settings)
    assert settings.runtime_dir == tmp_path / "r"
    assert settings.journal_dir == tmp_path / "j"
    assert settings.spool_dir is None
    assert settings.socket == config.socket


def test_without_flags_client_and_daemon_come_to_the_same_places(env):
    settings, config = Settings.from_env(env), load_config({}, env)
    assert (config.to, config.state_dir, config.runtime_dir) == (settings.to, settings.state_dir, settings.runtime_dir)


def test_reading_the_config_loads_nothing_heavy():
    code = "import ranklogd.config, sys; print(sorted({'pyarrow', 'huggingface_hub', 'zmq'} & set(sys.modules)))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@given(st.integers(min_value=0, max_value=1 << 60))
def test_every_size_reads_back_from_its_text(size_bytes):
    assert parse_size(format_value("x_bytes", size_bytes)) == size_bytes


@given(st.integers(min_value=0, max_value=10**12))
def test_every_time_in_whole_milliseconds_reads_back_from_its_text(milliseconds):
    assert parse_duration(format_value("x_s", milliseconds / 1000)) == pytest.approx(milliseconds / 1000)


@pytest.mark.parametrize("text", ["0600", "600", "0o600", " 600 "])
def test_a_mode_is_octal_however_it_is_written(text):
    assert parse_mode(text) == 0o600
