"""The command line as users meet it: real processes, their exit codes and both of their streams."""

import os
import signal
import subprocess
import sys

import pytest

from cli import environment, ranklog
from ranklog.cli import COMMANDS, main
from ranklog.version import __version__
from shards import records, write_shard, writer

A = writer("a")


def test_help_lists_every_command_and_every_exit_code(tmp_path):
    done = ranklog("--help", home=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    for name, command in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert command.help in done.stdout
    for code in ("0", "1", "2", "3", "4", "130", "141"):
        assert f"  {code} " in done.stdout
    assert ranklog("help", home=tmp_path).stdout == ranklog("-h", home=tmp_path).stdout == done.stdout


def test_help_fits_eighty_columns():
    from ranklog.cli import usage

    assert max(map(len, usage().splitlines())) <= 100


def test_version(tmp_path):
    done = ranklog("--version", home=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"ranklog {__version__}\n")


def test_no_command_is_wrong_usage_and_shows_the_help(tmp_path):
    done = ranklog(home=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: ranklog COMMAND" in done.stderr


@pytest.mark.parametrize(
    ("name", "hint"), [("qurey", "Did you mean 'query'?"), ("--jsno", "ranklog --help"), ("zzz", "Commands: demo")]
)
def test_an_unknown_command_is_wrong_usage_with_a_suggestion(tmp_path, name, hint):
    done = ranklog(name, home=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"ranklog: {name!r} is no command.")
    assert hint in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["ls", "query", "tail"])
def test_a_commands_own_help_needs_no_extra_and_names_the_exit_codes(tmp_path, name):
    for arguments in ([name, "--help"], ["help", name]):
        done = ranklog(*arguments, home=tmp_path, without=("duckdb", "pyarrow"))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"usage: ranklog {name} ")
        assert "--json" in done.stdout
        assert "exit codes:" in done.stdout


@pytest.mark.parametrize(
    "arguments", [["ls", "--frobnicate"], ["query"], ["tail", "-n", "x"], ["query", "--form", "csv", "x"]]
)
def test_wrong_arguments_exit_with_2(tmp_path, arguments):
    done = ranklog(*arguments, home=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: ranklog" in done.stderr


@pytest.mark.parametrize("package", ["duckdb", "pyarrow"])
@pytest.mark.parametrize("arguments", [["ls"], ["query", "SELECT 1"], ["tail"]])
def test_a_missing_package_becomes_the_pip_line_and_exit_2(tmp_path, package, arguments):
    if arguments == ["ls"] and package == "duckdb":
        arguments = ["query", "SELECT 2"]  # `ls` reads footers only, and needs no duckdb.
    done = ranklog(*arguments, home=tmp_path, without=(package,))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"ranklog: ranklog {arguments[0]} needs the package {package!r}, which is not installed. "
        'Run: pip install "ranklog[read]"\n'
    )


@pytest.mark.parametrize("package", ["duckdb", "pyarrow"])
def test_read_without_its_extra_names_the_pip_line(tmp_path, package):
    code = f"import sys; sys.modules[{package!r}] = None; import ranklog; ranklog.read({str(tmp_path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ranklog.errors.MissingExtra: ranklog.read() needs the package {package!r}, which is not installed. "
        'Run: pip install "ranklog[read]"'
    )


@pytest.mark.parametrize("package", ["pyarrow", "msgspec", "numpy", "watchdog", "huggingface_hub", "psutil"])
def test_ranklogd_without_its_extra_names_the_pip_line(tmp_path, package):
    code = f"import sys; sys.modules[{package!r}] = None; from ranklog.cli import main_daemon; sys.exit(main_daemon())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr == (
        f'ranklog: ranklogd needs the package {package!r}, which is not installed. Run: pip install "ranklog[daemon]"\n'
    )


def test_looking_for_the_daemons_packages_loads_none_of_them(tmp_path):
    code = (
        "import sys; sys.argv = ['ranklogd', '--help']; from ranklog.cli import main_daemon\n"
        "try: main_daemon()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('pyarrow', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_frame_loads_nothing_heavy(tmp_path):
    code = (
        "import sys; from ranklog.cli import main; main(['--help']); heavy = ['argparse', 'zmq', 'pyarrow', 'duckdb', "
        "'numpy', 'asyncio', 'huggingface_hub', 'difflib']; print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_errors_are_one_line_without_a_traceback(tmp_path):
    path = write_shard(tmp_path / "store", records(A, [{"x": 1.0}]))
    path.write_bytes(b"garbage")
    done = ranklog("ls", str(tmp_path / "store"), home=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"ranklog: {path} is named like a shard but is no parquet file")
    assert done.stderr.count("\n") == 1


def test_a_bad_environment_variable_is_wrong_usage(tmp_path):
    done = ranklog("ls", home=tmp_path, env={"RANKLOG_MODE": "sideways"})
    assert done.returncode == 2
    assert "RANKLOG_MODE='sideways'" in done.stderr


def test_main_returns_the_code_to_a_caller_in_process(capsys):
    assert main(["ls", "--nonsense"]) == 2
    assert main(["--version"]) == 0
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_error_to_talk_about(tmp_path):
    command = [
        sys.executable,
        "-m",
        "ranklog.cli",
        "query",
        "FROM range(100000000)",
        "--format",
        "csv",
        "--to",
        str(tmp_path),
    ]
    with subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "range\n"
        process.stdout.close()
        try:
            assert process.wait(60) == 141
            assert process.stderr.read() == ""
        finally:
            process.kill()


@pytest.mark.parametrize(
    "statement", ["SELECT count(*) FROM range(1000000000000) r WHERE r.range % 7 = 3", "FROM range(1000000000000)"]
)
def test_ctrl_c_ends_a_long_query_quietly(tmp_path, statement):
    mark = tmp_path / "mark.csv"
    # The statement's own first action proves that it is running when the signal is sent.
    command = [
        sys.executable, "-m", "ranklog.cli", "query", f"COPY (SELECT 1) TO '{mark}'; {statement}", "--format", "csv",
        "--to", str(tmp_path / "store"),
    ]  # fmt: skip
    with subprocess.Popen(
        command, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until(mark.exists)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(60) == 130
            assert process.stderr.read() == ""
        finally:
            process.kill()


def wait_until(condition, timeout_s=60.0):
    import threading
    import time

    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        threading.Event().wait(0.02)


def test_a_terminal_that_knows_ascii_only_shows_escapes(tmp_path):
    write_shard(tmp_path / "store", records(A, [{"x": 1.0}], project="größe 🙂"))
    done = ranklog("ls", str(tmp_path / "store"), home=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0
    assert "gr\\xf6\\xdfe \\U0001f642" in done.stdout


def test_every_command_of_this_room_has_the_two_functions():
    import importlib

    for name in ("ls", "query", "tail"):
        module = importlib.import_module(COMMANDS[name].module)
        assert callable(module.add_arguments)
        assert callable(module.run)
    assert os.path.exists(os.path.join(os.path.dirname(sys.modules["ranklog.cli"].__file__), "__main__.py"))
