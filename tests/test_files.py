"""Files that are whole or not there, and locks that end with the process that holds them."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import save_file

from switch_sae import files, runs
from switch_sae.files import RunError, holder, lock, remove_part_files, try_lock, wait_for_lock, write_atomically

HOLD = (
    "import sys, time; from switch_sae.files import try_lock; held = try_lock(sys.argv[1]); "
    "print('held', held is not None, flush=True); time.sleep(60)"
)


def holding_process(path):
    process = subprocess.Popen((sys.executable, "-c", HOLD, str(path)), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held True\n"
    return process


def test_runs_offers_the_same_names():
    assert runs.write_atomically is write_atomically and runs.RunError is RunError


def test_a_failed_write_keeps_the_old_file_and_ends_in_the_callers_advice(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "file"
    write_atomically(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"cannot write .*file: No space left on device\. What was there before is untouched\. Buy a disk\.$"):
        write_atomically(path, b"new", "Buy a disk.")
    with pytest.raises(RunError, match="RESUME="):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["file"]


def test_whoever_may_read_other_files_may_read_tensors_too(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "bytes", b"")
        write_atomically(tmp_path / "tensors", lambda part: save_file({"x": torch.zeros(2)}, part))
    finally:
        os.umask(before)
    assert [oct((tmp_path / name).stat().st_mode)[-3:] for name in ("bytes", "tensors")] == ["640", "640"]


def test_part_files_are_removed_and_nothing_else(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in (".a.7.part", "sub/.b.8.part", "c.part", "sub/d"):
        (tmp_path / name).touch()
    remove_part_files(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["c.part", "sub", "sub/d"]


def test_what_a_kill_leaves_of_a_safetensors_file_is_removed(tmp_path):
    """safetensors writes beside its target under a name of its own."""
    write = "import sys, numpy; from safetensors.numpy import save_file; save_file({'x': numpy.zeros(10**8)}, sys.argv[1])"
    process = subprocess.Popen((sys.executable, "-c", write, str(tmp_path / ".x.7.part")))
    while not (left := os.listdir(tmp_path)) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert left
    remove_part_files(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_lock_excludes_everyone_until_it_is_released(tmp_path):
    path = tmp_path / "new" / "lock"
    held = try_lock(path)
    assert held is not None and try_lock(path) is None and holder(path).startswith(f"process {os.getpid()} on ")
    held.release()
    held.release()
    assert holder(path) == "another process" == holder(tmp_path / "nowhere")
    with lock(path) as second:
        assert second.path == path and try_lock(path) is None
    with pytest.raises(KeyError), lock(path):
        raise KeyError
    again = try_lock(str(path))
    assert again is not None
    again.release()


def test_a_killed_process_holds_nothing(tmp_path):
    path = tmp_path / "lock"
    process = holding_process(path)
    try:
        assert try_lock(path) is None and holder(path).startswith(f"process {process.pid} on ")
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    held = try_lock(path)
    assert held is not None and holder(path).startswith(f"process {os.getpid()} on ")
    held.release()


def test_waiting_says_once_for_whom_and_can_be_given_up(tmp_path):
    path, said, asked = tmp_path / "lock", [], []
    held = try_lock(path)

    def give_up():
        asked.append(time.perf_counter())
        return len(asked) == 4

    assert wait_for_lock(path, give_up, said.append) is None
    assert len(said) == 1 and said[0].startswith(f"waiting for process {os.getpid()} on ") and said[0].endswith(f", which holds {path}")
    threading.Timer(0.25, held.release).start()
    with lock(path, said.append):
        assert len(said) == 2
    with lock(path, said.append):
        assert len(said) == 2


def test_a_lock_file_that_was_removed_locks_nobody_out_and_nothing_twice(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    real, removed = files.os.open, []

    def removed_after_opening(name, flags, mode=0o777):
        descriptor = real(name, flags, mode)
        if not removed:
            removed.append(os.unlink(path))
        return descriptor

    monkeypatch.setattr(files.os, "open", removed_after_opening)
    with lock(path):
        assert removed and path.exists() and try_lock(path) is None


def test_a_lock_that_cannot_be_made_says_why(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot lock .*lock: (Not a directory|File exists)\. Make its folder writable"):
        try_lock(tmp_path / "file" / "lock")

    def none_here(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", none_here)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    with pytest.raises(RunError, match=r"No locks available\. .*flock"):
        try_lock(tmp_path / "lock")
    assert before is None or len(os.listdir("/proc/self/fd")) == before, "the file is closed again"
