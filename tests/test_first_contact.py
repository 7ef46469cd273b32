"""The first call on a GPU, as far as it goes without one: parts have limits, failures do not stop it, and all that is known is on disk."""

import sys
from pathlib import Path

import pytest

from experiments.benchmarks import first_contact
from experiments.benchmarks.first_contact import Part, main, module, plan, run


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_that_hangs_is_cut_off_and_what_it_said_is_kept(tmp_path, capsys):
    hangs = Part("memory, dense", python("import time; print('began', flush=True); time.sleep(60)"), 2)
    assert run(hangs, tmp_path).startswith("CUT OFF after 2 s")
    assert (tmp_path / "memory_dense.log").read_text() == "began\n" and "began" in capsys.readouterr().out


def test_a_part_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    parts = [
        Part("versions", python("print('one')"), 20),
        Part("compile", [], 20, "there is no GPU"),
        Part("replay", python("raise SystemExit(3)"), 20),
        Part("memory, dense", python("print('two')"), 20),
        Part("suite", python("print('three')"), 20),
    ]
    monkeypatch.setattr(first_contact, "plan", lambda *_: parts)
    with pytest.raises(SystemExit) as ended:
        main(["--out", str(tmp_path / "out"), "--parts", "versions", "compile", "replay", "memory"])
    assert ended.value.code == 1
    text, summary = capsys.readouterr().out, (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert "two" in text and "three" not in text and [line.split()[0] for line in summary] == ["versions", "compile", "replay", "memory,"]
    assert "holds" in summary[0] and "SKIPPED: there is no GPU" in summary[1] and "FAILED with exit code 3" in summary[2]


def test_the_plan_without_a_gpu_says_what_is_left_out(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    skipped = {part.name: part.skipped for part in plan(None, Path("out"), 1.0, True, None)}
    assert skipped.pop("replay") == "no --recording was given" and skipped.pop("versions") == skipped.pop("suite") == ""
    assert set(skipped.values()) == {"there is no GPU"} and len(skipped) == 4
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    parts = {part.name: part for part in plan(Path("launches.zip"), Path("out"), 1.0, True, "abc")}
    assert not parts["replay"].skipped and not parts["memory, sparse"].skipped and parts["suite"].command[-2:] == ["--commit", "abc"]


def test_the_plan_with_a_gpu_is_all_of_it(monkeypatch):
    monkeypatch.setattr(first_contact.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(first_contact.torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(first_contact.shutil, "which", lambda name: f"/somewhere/{name}")
    parts = plan(Path("launches.zip"), Path("out"), 8.3, False, None)
    assert not any(part.skipped for part in parts)
    assert [part.name for part in parts] == ["versions", "compile", "replay", "memory, dense", "memory, sparse", "memory, searches", "suite"]
    assert parts[1].command[3:] == ["--capability", "9.0", "--recording", "launches.zip", "--sections", *first_contact.SUITE]
    assert parts[3].command[0] == "/somewhere/compute-sanitizer" and "--quick" not in parts[-1].command
    assert sum(part.seconds for part in parts[:6]) < 750  # each limit is a last resort; together they still leave the first call an end


def test_it_goes_to_its_end_here(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--quick", "--out", str(tmp_path), "--parts", "versions", "replay"])
    assert ended.value.code == 0 and "python" in (tmp_path / "versions.log").read_text()
    for wrong in ([], ["--out", str(tmp_path), "--recording", "nowhere.zip"]):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2
    assert "replay record FILE" in capsys.readouterr().err
    assert module("gpu", "--quick")[1:] == ["-m", "experiments.benchmarks.gpu", "--quick"]
