"""nanogpt/files.py: files that are written whole or not at all, and a folder that one process alone writes to."""

import errno
import os

import pytest

from nanogpt import files
from nanogpt.errors import UserError


def test_a_file_takes_its_name_only_when_its_block_has_ended(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("old")
    with files.whole_file(path, "w", encoding="utf-8", newline="") as f:
        f.write("new\n")
        assert path.read_text() == "old"
    assert path.read_bytes() == b"new\n" and os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_the_older_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "notes.txt"
    path.write_text("old")
    with pytest.raises(error), files.whole_file(path) as f:
        f.write(b"half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["notes.txt"]


def test_a_file_is_on_the_disk_before_it_takes_the_name_and_then_the_folder_is(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append((str(a), str(b))), replace(a, b)))
    path = str(tmp_path / "notes.txt")
    with files.whole_file(path) as f:
        f.write(b"text")
    temporary, renamed, folder = events
    assert renamed == (temporary, path) and os.path.dirname(temporary) == folder == str(tmp_path)


def test_a_rename_that_fails_for_a_moment_is_tried_again(tmp_path, monkeypatch):
    """On Windows another program may have the file open."""
    replace, left, slept = os.replace, [1, 2], []

    def busy(*names):
        if left:
            left.pop()
            raise PermissionError(13, "Permission denied")
        replace(*names)

    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(files.time, "sleep", slept.append)
    with files.whole_file(tmp_path / "notes.txt") as f:
        f.write(b"text")
    assert (tmp_path / "notes.txt").read_bytes() == b"text" and len(slept) == 2
    left.extend(range(99))
    with pytest.raises(PermissionError), files.whole_file(tmp_path / "notes.txt") as f:
        f.write(b"other")
    assert (tmp_path / "notes.txt").read_bytes() == b"text" and os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.EACCES, errno.ENOTSUP])
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_file_system_that_cannot_flush_a_folder_keeps_the_file_and_no_handle(tmp_path, monkeypatch, code, call):
    real = getattr(os, call)

    def refuse(what, *rest):
        if os.path.isdir(what if call == "open" else f"/proc/self/fd/{what}"):
            raise OSError(code, os.strerror(code))
        return real(what, *rest)

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(os, call, refuse)
    with files.whole_file(str(tmp_path / "notes.txt")) as f:
        f.write(b"text")
    monkeypatch.undo()
    assert (tmp_path / "notes.txt").read_bytes() == b"text" and os.listdir("/proc/self/fd") == before


def test_a_failure_names_the_file(tmp_path):
    path = str(tmp_path / "no folder" / "notes.txt")
    with pytest.raises(OSError) as caught, files.whole_file(path):
        pass
    assert str(caught.value.filename).startswith(path)


def test_a_locked_folder_is_refused_to_another_process_until_the_first_has_ended(tmp_path):
    """The lock is the process's, however that ends, and not a file that stays."""
    folder = str(tmp_path / "made" / "here")
    read, write = os.pipe()
    held_read, held_write = os.pipe()
    if not (child := os.fork()):
        kept = files.lock(folder, "busy")
        os.write(held_write, b"x")
        os.read(read, 1)
        os._exit(kept is None)  # without closing anything
    os.read(held_read, 1)
    with pytest.raises(UserError, match="^another run is here$"):
        files.lock(folder, "another run is here")
    os.write(write, b"x")
    os.waitpid(child, 0)
    files.lock(folder, "another run is here").close()


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"^cannot write to {tmp_path}/file/out: Not a directory$"):
        files.lock(str(tmp_path / "file" / "out"), "busy")


def test_a_file_system_without_locks_is_written_to_with_a_warning(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available"):
        files.lock(str(tmp_path), "busy").close()
