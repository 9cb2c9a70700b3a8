import errno
import gc
import hashlib
import json
import os
import threading
import time
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from bdclean.cli.batch import guarded, run_all
from bdclean.cli.console import Shown
from bdclean.cli.defects import digest_of, problem_of
from bdclean.cli.places import Records, check_place
from bdclean.errors import Interrupted, Refused, UsageError, attach
from bdclean.record import gate
from bdclean.record.parsing import parse_records
from bdclean.record.run import CheckpointEntry, DataEntry, Measure, RunRecord


def result(model, verdict="no-evidence"):
    return RunRecord("scan", verdict, checkpoint=CheckpointEntry(model, "ab" * 32))


def play(models, behaviour, form="json", records=None, fail_on=()):
    """Runs the models; `behaviour` maps a model to a verdict or to what it raises."""

    def work(model, progress):
        progress("images", 1, 1)
        found = behaviour[model]
        if isinstance(found, BaseException):
            raise found
        return result(model, found)

    judge = gate.parse(fail_on)
    return run_all("scan", models, work, judge, Shown(form, None, False), records or Records(), True)


def test_one_failing_model_does_not_stop_the_others(capsys):
    behaviour = {
        "a": Refused("a is broken."),
        "b": "backdoored",
        "c": ZeroDivisionError("c"),
        "d": "no-evidence",
    }
    assert play(list("abcd"), behaviour) == 70
    captured = capsys.readouterr()
    runs = json.loads(captured.out)["runs"]
    assert [run["outcome"] for run in runs] == ["refused", "ran", "failed", "ran"]
    assert [run["verdict"] for run in runs] == ["not-assessed", "backdoored", "not-assessed", "no-evidence"]
    assert runs[2]["problem"]["digest"] in captured.err and "ZeroDivisionError" in captured.err
    assert runs[0]["checkpoint"]["path"] == "a" and "a: a is broken." in captured.err


@pytest.mark.parametrize(
    ("behaviour", "code"),
    [
        ({"a": "no-evidence", "b": "no-evidence"}, 0),
        ({"a": "no-evidence", "b": "suspicious"}, 1),
        ({"a": "no-evidence", "b": "not-assessed"}, 3),
        ({"a": Refused("x"), "b": "backdoored"}, 1),
        ({"a": "no-evidence", "b": UsageError("x")}, 3),
        ({"a": "no-evidence"}, 0),
        ({"a": Refused("x")}, 3),
    ],
)
def test_exit_codes(behaviour, code):
    assert play(list(behaviour), behaviour) == code


def test_wrong_usage_ends_the_call_at_the_first_model(capsys):
    assert play(["a", "b"], {"a": UsageError("no trigger."), "b": "backdoored"}) == 2
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 1


def test_usage_that_is_wrong_of_one_model_does_not_stop_the_others(capsys):
    about_it = UsageError("--target 20: it has 10 classes.")
    attach(about_it, result("a"))
    assert play(["a", "b"], {"a": about_it, "b": "backdoored"}) == 1
    assert len(json.loads(capsys.readouterr().out)["runs"]) == 2


@pytest.mark.parametrize(
    ("raised", "code"),
    [(KeyboardInterrupt(), 130), (Interrupted(), 130), (Interrupted("terminated.", 143), 143)],
)
def test_an_interruption_ends_the_call_and_keeps_what_was_found(raised, code, capsys):
    assert play(["a", "b", "c"], {"a": "no-evidence", "b": raised, "c": "backdoored"}) == code
    assert [r["outcome"] for r in json.loads(capsys.readouterr().out)["runs"]] == ["ran", "interrupted"]


def test_json_lines_come_a_model_at_a_time(capsys):
    seen = []

    def work(model, progress):
        seen.append(capsys.readouterr().out)
        return result(model)

    run_all("scan", ["a", "b"], work, gate.parse(()), Shown("jsonl", None, False), Records(), True)
    assert seen[0] == "" and parse_records(seen[1], "x")[0].checkpoint.path == "a"


def test_records_that_were_printed_do_not_pile_up(capsys):
    kept, alive = [], []

    def work(model, progress):
        gc.collect()
        alive.append(sum(found() is not None for found in kept))
        record = result(model)
        kept.append(weakref.ref(record))
        return record

    run_all("scan", list("abcdef"), work, gate.parse(()), Shown("jsonl", None, False), Records(), True)
    assert max(alive) <= 1 and len(capsys.readouterr().out.splitlines()) == 6


def test_progress_counts_all_models_also_past_those_that_fail(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("bdclean.cli.progress.time.monotonic", lambda: now[0])

    def work(model, progress):
        if model == "b":
            raise Refused("b is broken.")
        now[0] += 30
        progress("images", 1, 2)
        return result(model)

    run_all("scan", list("abcd"), work, gate.parse(()), Shown("jsonl", None, False), Records(), False)
    assert capsys.readouterr().err.splitlines() == [
        "model 1/4 a: images 1/2",
        "bdclean: b: b is broken.",
        "model 3/4 (30 s left over all) c: images 1/2",
        "model 4/4 (0 s left over all) d: images 1/2",
    ]


def test_a_lone_failure_leaves_standard_output_empty_for_people_and_full_for_scripts(capsys):
    for form in ("table", "md"):
        assert play(["a"], {"a": Refused("a is empty.")}, form) == 3
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err == "bdclean: a is empty.\n"
    play(["a"], {"a": Refused("a is empty.")}, "json")
    assert json.loads(capsys.readouterr().out)["runs"][0]["problem"]["exit_code"] == 3


def test_a_refusal_may_carry_what_was_known():
    known = result("m", "backdoored")
    known.measures.append(Measure("clean_accuracy", 0.5, 10))

    def work():
        raise Refused("too few images.", record=known)

    record = guarded("scan", "m", work)
    assert record.outcome == "refused" and record.verdict == "not-assessed"
    assert record.measures and record.started and record.seconds is not None and "torch" in record.versions


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (MemoryError(), 3),
        (OutOfMemoryError("CUDA"), 3),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3),
        (RuntimeError("could not create a primitive"), 3),
        (RuntimeError("could not create a primitive descriptor for a pooling"), 70),
        (OSError(errno.ENOSPC, "full"), 3),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 3),
        (ImportError("libx.so: failed to map segment from shared object"), 3),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 3),
        (OSError(errno.EIO, "broken"), 70),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), 3),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/x"), 70),
        (SystemExit(0), 70),
        (SystemExit(1), 70),
        (RecursionError(), 70),
        (AssertionError(), 70),
    ],
)
def test_whatever_is_raised_never_exits_as_a_verdict(raised, code):
    outcome, problem = problem_of(raised)
    assert problem.exit_code == code and outcome == ("failed" if code == 70 else "refused")
    assert play(["a"], {"a": raised}) == code


def test_the_digest_is_that_of_the_place_not_of_the_message():
    def fail(message, kind=ValueError):
        try:
            raise kind(message)
        except Exception as error:
            return digest_of(error)

    assert fail("a") == fail("b") != fail("a", KeyError)


def test_a_defect_leaves_a_record_where_none_was_asked_for(tmp_path, capsys):
    assert play(["a"], {"a": ZeroDivisionError("x")}, "table") == 70
    (path,) = tmp_path.glob("bdclean-defect-*.json")
    (record,) = parse_records(path.read_text(), "x")
    assert record.problem.digest in path.name and path.name in capsys.readouterr().err


@pytest.mark.parametrize("asked", [1, 2, 3, 4])
def test_a_folder_that_another_run_makes_meanwhile_is_no_file(tmp_path, monkeypatch, asked):
    """Of three scans side by side one ended with "is a folder: name a file", once in hundreds of times."""
    place, times = tmp_path / "runs", [0]

    def watched(function):
        def answer(path):
            found = function(path)
            if Path(path) == place:
                times[0] += 1
                if times[0] == asked:  # between this question and the next
                    place.mkdir(exist_ok=True)
            return found

        return answer

    monkeypatch.setattr("os.path.isdir", watched(os.path.isdir))
    monkeypatch.setattr("os.path.exists", watched(os.path.exists))
    records = Records.at(place, [Path("m.safetensors")])
    assert (records.folder, records.file) == (place, None)


def test_records_of_several_models_go_to_a_folder(tmp_path):
    models = [tmp_path / name for name in ("x/m.safetensors", "y/m.safetensors", "z.safetensors")]
    records = Records.at(tmp_path / "runs", models)
    for model in models:
        records.write(result(str(model)), str(model))
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["m-abababab-2.json", "m-abababab.json", "z-abababab.json"]
    (tmp_path / "one.json").write_text(result("m").dump())
    with pytest.raises(UsageError, match="name a folder"):
        Records.at(tmp_path / "one.json", models)
    with pytest.raises(UsageError, match="name a folder"):
        Records.at(tmp_path / "none-yet.json", models)
    assert (
        Records.at(tmp_path / "new", models[:1]).folder and Records.at(tmp_path / "new.json", models[:1]).file
    )


def test_a_record_replaces_records_only(tmp_path):
    (tmp_path / "old.json").write_text(result("m").dump())
    assert Records.at(tmp_path / "old.json", []).file
    (tmp_path / "mine.json").write_text('{"precious": true}')
    with pytest.raises(Refused, match="no record"):
        Records.at(tmp_path / "mine.json", [])
    assert (tmp_path / "mine.json").read_text() == '{"precious": true}'


def outcomes(folder):
    found = {path.stem: parse_records(path.read_text(), "x") for path in folder.glob("*.json")}
    return {stem: records[0].outcome for stem, records in found.items()}


def test_a_record_outlives_a_run_that_did_not_end_and_is_kept_beside_that_of_another(tmp_path, capsys):
    place = tmp_path / "m.clean.json"
    replace(result("m"), argv=["bdclean", "scan", "m"]).write(place)
    earlier = place.read_text()
    records = Records.at(place, [])
    play(["a"], {"a": Refused("m.clean.safetensors exists.")}, records=records)
    assert place.read_text() == earlier and outcomes(tmp_path) == {"m.clean": "ran", "m.clean-2": "refused"}
    assert "m.clean.json is of a run that ended and stays" in capsys.readouterr().err
    play(["a"], {"a": "backdoored"}, records=records)
    assert parse_records(place.read_text(), "x")[0].verdict == "backdoored"
    assert (tmp_path / "m.clean-3.json").read_text() == earlier
    assert "m.clean-3.json now" in capsys.readouterr().err


def test_a_record_that_cannot_be_written_is_not_passed_over(tmp_path, capsys):
    (tmp_path / "there").mkdir()
    place = tmp_path / "there" / "r.json"
    records = Records.at(place, [])
    (tmp_path / "there").rmdir()
    (tmp_path / "there").write_text("a file now")
    assert play(["a"], {"a": "no-evidence"}, records=records) == 3
    assert "cannot be written" in capsys.readouterr().err
    assert play(["a"], {"a": "backdoored"}, records=records) == 1


def test_a_folder_of_records_that_goes_away_meanwhile_is_made_again(tmp_path):
    for place, name in ((tmp_path / "runs", "m-abababab.json"), (tmp_path / "deep" / "r.json", "r.json")):
        place.parent.mkdir(exist_ok=True)
        records = Records.at(place, [])
        if place.parent != tmp_path:
            place.parent.rmdir()
        assert play(["m"], {"m": "no-evidence"}, records=records) == 0
        assert [path.name for path in tmp_path.rglob(name)] == [name]


def test_places_are_checked_before_work(tmp_path):
    model = tmp_path / "m.safetensors"
    model.write_bytes(b"x")
    with pytest.raises(Refused, match="input of this run"):
        check_place(tmp_path / "." / "m.safetensors", [model])
    with pytest.raises(Refused, match="is a folder"):
        check_place(tmp_path, [])
    with pytest.raises(Refused, match="is not a folder"):
        check_place(model / "below" / "r.json", [])
    with pytest.raises(Refused, match="new is not a folder: make it"):
        check_place(tmp_path / "new" / "r.json", [model])
    with pytest.raises(Refused, match="gone is not a folder: make it"):
        Records.at(tmp_path / "gone" / "runs", [model])
    assert Records.at(tmp_path / "runs", [model]).folder == tmp_path / "runs"
    check_place(tmp_path / "r.json", [model])
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_whatever_ends_a_run_its_record_has_what_was_measured():
    for raised, outcome in (
        (ZeroDivisionError("x"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (Interrupted("terminated.", 143), "interrupted"),
        (MemoryError(), "refused"),
    ):

        def work(raised=raised):
            attach(raised, known := result("m", "backdoored"))
            attach(raised, RunRecord("scan"))  # further out: less is known there
            known.measures.append(Measure("clean_accuracy", 0.5, 10))
            raise raised

        record = guarded("scan", "m", work)
        assert record.outcome == outcome and record.verdict == "not-assessed" and record.measures


def test_the_record_of_a_defect_goes_beside_one_that_is_kept(tmp_path):
    place = tmp_path / "m.clean.json"
    result("m").write(place)
    earlier = place.read_text()
    assert play(["a"], {"a": ZeroDivisionError()}, records=Records.at(place, [])) == 70
    assert place.read_text() == earlier and outcomes(tmp_path)["m.clean-2"] == "failed"


def test_a_run_that_is_repeated_replaces_its_own_record_and_no_other(tmp_path):
    place = tmp_path / "r.json"

    def again(**fields):
        record = replace(result("m"), **fields)
        run_all("scan", ["m"], lambda *_: record, gate.parse(()), Shown("json", None, False), records, True)

    records = Records.at(place, [])
    again(argv=["/here/bdclean", "scan", "m"])
    again(argv=["/there/bdclean", "scan", "m"], verdict="backdoored")
    assert outcomes(tmp_path) == {"r": "ran"}
    again(argv=["bdclean", "scan", "m", "--limit", "9"])
    assert outcomes(tmp_path) == {"r": "ran", "r-2": "ran"}
    assert parse_records((tmp_path / "r-2.json").read_text(), "x")[0].verdict == "backdoored"
    again(argv=["bdclean", "scan", "m", "--limit", "9"], checkpoint=CheckpointEntry("m", "cd" * 32))
    assert len(outcomes(tmp_path)) == 3
    other = {"argv": ["bdclean", "scan", "m", "--limit", "9"], "checkpoint": CheckpointEntry("m", "cd" * 32)}
    again(**other, data=DataEntry(digest="ef" * 32))  # the folder holds other images now
    assert len(outcomes(tmp_path)) == 4


def test_a_folder_keeps_every_run(tmp_path):
    for behaviour in ("backdoored", Refused("x."), "no-evidence"):
        play(["m"], {"m": behaviour}, records=Records.at(tmp_path / "runs", [Path("m")]))
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["m-abababab-2.json", "m-abababab.json", "m-unread.json"]


def test_records_of_processes_side_by_side_all_stay(tmp_path):
    threads = [
        threading.Thread(target=lambda: Records(folder=tmp_path / "runs").write(result("m"), "m"))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes(tmp_path / "runs")) == 8
    assert not list((tmp_path / "runs").glob(".*"))


@pytest.mark.parametrize("raised", [Refused, ZeroDivisionError])
def test_a_model_that_cannot_be_read_is_named_by_its_bytes(tmp_path, raised):
    (tmp_path / "m.pth").write_bytes(b"no network")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").write_bytes(b"no network")
    digest = hashlib.sha256(b"no network").hexdigest()
    models = [str(tmp_path / name) for name in ("m.pth", "folder", "missing")]
    records = Records.at(tmp_path / "runs", [Path(model) for model in models])
    play(models, {model: raised("x.") for model in models}, records=records)
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == [f"folder-{digest[:8]}.json", f"m-{digest[:8]}.json", "missing-unread.json"]
    (found,) = parse_records((tmp_path / "runs" / names[1]).read_text(), "x")
    assert found.checkpoint.sha256 == digest and found.outcome != "ran"


def test_the_record_of_a_run_that_did_not_end_is_never_kept(tmp_path):
    place = tmp_path / "m.clean.json"
    for raised in (Refused("one."), Refused("two.")):
        play(["a"], {"a": raised}, records=Records.at(place, []))
    assert parse_records(place.read_text(), "x")[0].problem.message == "two."


def test_the_resume_state_goes_when_the_record_is_written_and_not_before(tmp_path):
    state, place = tmp_path / "m.resume.safetensors", tmp_path / "r.json"
    state.write_bytes(b"x")
    records = Records.at(place, [], spent=(state,))
    assert play(["a"], {"a": Refused("x.")}, records=records) == 3 and state.exists()
    place.unlink()
    place.mkdir()
    assert play(["a"], {"a": "no-evidence"}, records=records) == 3 and state.exists()
    place.rmdir()
    assert play(["a"], {"a": "no-evidence"}, records=records) == 0 and not state.exists()


def test_a_result_that_cannot_be_shown_hides_no_verdict(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    judge, records = gate.parse(()), Records()
    for verdict, code in (("no-evidence", 3), ("backdoored", 1)):
        work = partial(lambda verdict, model, progress: result(model, verdict), verdict)
        assert run_all("scan", ["a"], work, judge, Shown("json", out, False), records, True) == code
    assert "cannot be written" in capsys.readouterr().err


def test_the_clock_may_go_backwards(monkeypatch):
    now = [2e9]

    def backwards():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    record = guarded("scan", "m", lambda: (time.time(), result("m"))[1])
    assert 0 <= record.seconds < 10
    package = Path(gate.__file__).parents[1]
    files = [
        path for path in package.rglob("*.py") if path.parent.name != "bench"
    ]  # its tables say their date
    sources = {path.name: path.read_text() for path in files}
    assert not [name for name, text in sources.items() if "time.time(" in text]
    assert [name for name, text in sources.items() if "datetime.now(" in text] == ["batch.py"]
