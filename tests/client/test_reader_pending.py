import os

from ranklog import framefile
from ranklog.framefile import FileName
from ranklog.reader.pending import waiting_writers
from ranklog.start import Start, encode_start
from shards import writer

A, B = writer("a"), writer("b")


def frame_file(directory, writer_id, kind, number=0):
    start = encode_start(Start(writer=writer_id, project="proj", run="run-1"))
    return framefile.create(directory, FileName(writer_id, number, kind), start, 4096)


def test_the_journal_of_a_living_writer_is_not_waiting(tmp_path):
    file = frame_file(tmp_path, A, "journal")
    assert waiting_writers([tmp_path]) == set()
    file.close()
    assert waiting_writers([tmp_path]) == {A}


def test_a_spool_waits_even_while_its_writer_lives(tmp_path):
    frame_file(tmp_path, A, "spool")
    assert waiting_writers([tmp_path]) == {A}


def test_files_of_one_writer_count_once(tmp_path):
    (tmp_path / "j").mkdir()
    (tmp_path / "s").mkdir()
    for number in range(3):
        frame_file(tmp_path / "j", A, "journal", number).close()
    frame_file(tmp_path / "s", A, "spool").close()
    frame_file(tmp_path / "s", B, "spool").close()
    assert waiting_writers([tmp_path / "j", tmp_path / "s"]) == {A, B}


def test_looking_leaves_the_file_free_for_its_adopter(tmp_path):
    frame_file(tmp_path, A, "journal").close()
    assert waiting_writers([tmp_path]) == waiting_writers([tmp_path]) == {A}


def test_foreign_names_traps_and_missing_directories_are_passed_over(tmp_path):
    (tmp_path / "notes.journal").write_text("x")
    (tmp_path / f".{A}.00000000.journal").write_text("being made")
    os.mkfifo(tmp_path / f"{A}.00000000.journal")
    (tmp_path / f"{B}.00000000.journal").symlink_to("/etc/passwd")
    assert waiting_writers([tmp_path, tmp_path / "missing"]) == set()
