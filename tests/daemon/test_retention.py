import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranklogd.ship.retention import expired, retain

A, B, C = Path("a"), Path("b"), Path("c")
FILES = st.lists(st.tuples(st.integers(0, 100), st.floats(-10, 1000)), max_size=20).map(
    lambda rows: [(Path(str(i)), size, age) for i, (size, age) in enumerate(rows)]
)


def test_what_is_older_than_the_age_goes_and_the_rest_stays():
    assert expired([(A, 10, 5.0), (B, 10, 61.0), (C, 10, 60.0)], 60, 1000) == [B]


def test_above_the_size_the_oldest_go_first():
    assert expired([(A, 10, 1.0), (B, 10, 3.0), (C, 10, 2.0)], 60, 20) == [B]
    assert expired([(A, 10, 1.0), (B, 10, 3.0), (C, 10, 2.0)], 60, 19) == [B, C]


def test_a_size_of_zero_empties_the_cache():
    assert expired([(A, 10, 1.0), (B, 10, 3.0)], 60, 0) == [B, A]


def test_no_older_file_stays_in_the_place_of_a_younger_one_that_does_not_fit():
    assert expired([(A, 10, 1.0), (B, 95, 2.0), (C, 10, 3.0)], 60, 100) == [C, B]


def test_a_file_from_the_future_is_young_so_a_clock_set_back_deletes_nothing():
    assert expired([(A, 10, -3600.0)], 60, 100) == []


@given(FILES, st.floats(0, 1000), st.integers(0, 500))
def test_what_stays_is_young_and_small_enough_and_nothing_else_had_to_go(files, age_max_s, size_max):
    gone = set(expired(files, age_max_s, size_max))
    kept = [file for file in files if file[0] not in gone]
    assert all(age <= age_max_s for _, _, age in kept)
    assert sum(size for _, size, _ in kept) <= size_max
    young_gone = [file for file in files if file[0] in gone and file[2] <= age_max_s]
    if young_gone:
        youngest = min(young_gone, key=lambda file: (file[2], file[0]))
        younger = [f for f in kept if (f[2], f[0]) < (youngest[2], youngest[0])]
        assert sum(size for _, size, _ in younger) + youngest[1] > size_max


def fill(cache: Path, ages_s: dict[str, float], now_s: float) -> None:
    for name, age_s in ages_s.items():
        path = cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 10)
        os.utime(path, (now_s - age_s, now_s - age_s))


def left(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*"))


def test_expired_files_go_with_the_directories_they_leave_empty_and_the_cache_itself_stays(tmp_path):
    cache = tmp_path / "cache"
    fill(cache, {"v1/p/r1/old": 100, "v1/p/r2/old": 100, "v1/p/r2/new": 10}, 1e9)
    assert retain(cache, age_max_s=60, size_max=1000, now_s=1e9) == 2
    assert left(cache) == ["v1", "v1/p", "v1/p/r2", "v1/p/r2/new"]
    assert retain(cache, age_max_s=0, size_max=1000, now_s=1e9) == 1
    assert cache.is_dir()
    assert left(cache) == []
    assert retain(cache, age_max_s=0, size_max=1000, now_s=1e9) == 0


def test_a_link_in_the_cache_is_removed_and_never_followed(tmp_path):
    cache = tmp_path / "cache"
    fill(cache, {"v1/x": 100}, 1e9)
    fill(tmp_path / "outside", {"precious": 100}, 1e9)
    (cache / "v1/dir").symlink_to(tmp_path / "outside")
    (cache / "v1/file").symlink_to(tmp_path / "outside/precious")
    retain(cache, age_max_s=0, size_max=0, now_s=1e10)
    assert left(tmp_path / "outside") == ["precious"]


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_killed_in_the_middle_the_next_retention_finishes(tmp_path, nth):
    cache = tmp_path / "cache"
    fill(cache, {f"v1/p/{i}": 100 for i in range(4)} | {"v1/p/new": 1}, 1e9)
    code = f"from pathlib import Path; from ranklogd.ship.retention import retain; import sys\n" \
           f"retain(Path(sys.argv[1]), age_max_s=60, size_max=1000, now_s={1e9})"  # fmt: skip
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RANKLOG_FAILPOINT": f"retain.delete.mid:{nth}=kill"}
    done = subprocess.run([sys.executable, "-c", code, str(cache)], env=env, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list((cache / "v1/p").iterdir())) == 5 - nth
    assert retain(cache, age_max_s=60, size_max=1000, now_s=1e9) == 4 - nth
    assert left(cache) == ["v1", "v1/p", "v1/p/new"]
