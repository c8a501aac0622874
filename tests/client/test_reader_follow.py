from ranklog.reader.follow import Follower
from ranklog.stores import open_store
from ranklog.stores.dir import DirStore
from shards import STORE_A, STORE_B, records, start, write_shard, writer

A, B = writer("a"), writer("b")


def follower(root, *, run=None, condition="kind = 'metrics'"):
    return Follower(open_store(str(root)), None, run, condition)


def seqs(table):
    return [] if table is None else table.column("seq").to_pylist()


def test_the_newest_rows_come_oldest_first(tmp_path):
    write_shard(tmp_path, start(A) + records(A, [{"x": float(seq)} for seq in range(9)]))
    assert seqs(follower(tmp_path).newest(3)) == [7, 8, 9]
    assert seqs(follower(tmp_path).newest(0)) == []
    assert seqs(follower(tmp_path / "missing").newest(3)) == []


def test_each_new_shard_is_shown_once(tmp_path):
    write_shard(tmp_path, records(A, [{"x": 1.0}] * 3))
    follow = follower(tmp_path)
    follow.newest(1)
    assert follow.fresh() is None
    write_shard(tmp_path, records(A, [{"x": 1.0}] * 2, first_seq=4))
    write_shard(tmp_path, records(B, [{"x": 1.0}], first_seq=9), store_id=STORE_B)
    assert seqs(follow.fresh()) == [4, 5, 9]
    assert follow.fresh() is None


def test_a_merged_shard_shows_nothing_again(tmp_path):
    rows = records(A, [{"x": 1.0}] * 6)
    write_shard(tmp_path, rows[:3])
    follow = follower(tmp_path)
    follow.newest(10)
    write_shard(tmp_path, rows[:5])
    assert seqs(follow.fresh()) == [4, 5]
    write_shard(tmp_path, rows)
    for path in list(tmp_path.rglob("*.parquet")):
        if path != max(tmp_path.rglob("*.parquet"), key=lambda path: path.stat().st_mtime_ns):
            path.unlink()
    assert seqs(follow.fresh()) == [6]


def test_a_run_that_does_not_exist_yet_is_waited_for(tmp_path):
    follow = follower(tmp_path, run="later")
    assert seqs(follow.newest(5)) == []
    write_shard(tmp_path, records(B, [{"x": 1.0}], run="other"), store_id=STORE_A)
    assert follow.fresh() is None
    write_shard(tmp_path, records(A, [{"x": 1.0}], run="later"), store_id=STORE_A)
    assert seqs(follow.fresh()) == [1]


def test_a_shard_without_rows_to_show_is_not_read_again(tmp_path):
    follow = follower(tmp_path, condition="key = 'x'")
    follow.newest(5)
    write_shard(tmp_path, records(A, [{"y": 1.0}]))
    assert seqs(follow.fresh()) == []
    assert follow.fresh() is None


def test_a_shard_that_was_merged_away_since_the_listing_is_passed_over(tmp_path):
    write_shard(tmp_path, records(A, [{"x": 1.0}]))
    ghost = write_shard(tmp_path, records(B, [{"x": 2.0}]), store_id=STORE_B)
    listed = list(open_store(str(tmp_path)).list("v1/"))
    ghost.unlink()

    class LateListing(DirStore):
        def list(self, prefix):
            return iter(listed)

    follow = Follower(LateListing(tmp_path), None, None, "kind = 'metrics'")
    assert seqs(follow.fresh()) == [1]
    assert follow.fresh() is None
    write_shard(tmp_path, records(B, [{"x": 2.0}]), store_id=STORE_B)
    assert follow.fresh().column("writer").to_pylist() == [B]
