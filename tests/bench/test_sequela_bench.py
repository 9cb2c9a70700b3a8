"""The bench of what is left behind: who is a member of what, its commands, cells that are kept, and the tables."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bdclean.bench import sequela, sequela_rows
from bdclean.bench.encoders import attacks_of
from bdclean.errors import Refused
from bdclean.measuring.sequela import lira, membership
from bdclean.record.run import REFUSED, Measure, Problem, Rate, RunRecord, Side, Skipped, TriggerRow
from bdclean.record.sequela import (
    CONTROL,
    REFERENCE,
    SUSPECT,
    TRIGGER,
    UNPOISONED,
    Injection,
    Reactivation,
    Score,
    Sequela,
)

ATTACK = "badnets:target=1/rate=0.25"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes in CIFAR-10's folders: bright above, bright below."""
    rng, data = np.random.default_rng(0), tmp_path_factory.mktemp("data")
    for split, count in (("train", 40), ("test", 60)):
        for label, rows in (("above", slice(0, 16)), ("below", slice(16, 32))):
            folder = data / split / label
            folder.mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 90, (32, 32, 3))
                pixels[rows] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
    return data


def made(pictures, work, shadows=16):
    (attack,) = attacks_of(ATTACK).values()
    method = sequela.Supervised(epochs=2, batch_size=16)
    work.mkdir(exist_ok=True)
    return sequela.Bench(work, pictures, "resnet8", method, attack, shadows, 64, 12, 40, "cpu")


def written(record, arguments):
    """A record of the command, where it would be."""
    option = "--out" if "--out" in arguments else "--record"
    record.write(Path(arguments[arguments.index(option) + 1]).with_suffix(".json"))


def injection(part, model, stamped, poisoned, asr, reached, until=1000):
    return Injection(
        part, model, "badnets", 1, stamped, poisoned, 36, [Score(0, Rate(0.02, 9)), Score(until, Rate(asr, 9))],
        reached, until,
    )  # fmt: skip


def left(part):
    """What a scan by one part of `--sequela` found, and what it did not."""
    found = Sequela([part])
    if part == "reinjection":
        for model, stamped, asr, reached in (
            (SUSPECT, TRIGGER, 0.9, 100), (SUSPECT, CONTROL, 0.3, None), (REFERENCE, TRIGGER, 0.2, None),
            (REFERENCE, CONTROL, 0.1, None),
        ):  # fmt: skip
            found.injections.append(injection(part, model, stamped, 10, asr, reached))
        return found, [Skipped("sequela reinjection", "36 images to tune on"), Skipped("mm-bd", "slow")]
    if part == "retuning":
        found.injections = [injection(part, SUSPECT, UNPOISONED, 0, 0.01, None, 100)]
    else:
        found.reactivation = [Reactivation(SUSPECT, "badnets", 1, "amplified 1.5 times", Rate(0.11, 9))]
    return found, []


@pytest.fixture
def commands(monkeypatch):
    """The command lines that the bench runs, each of which only writes a record and, for an output, the suspect."""
    ran = []

    def write(*arguments):
        ran.append(arguments)
        record = RunRecord(arguments[0], verdict="no-evidence", seconds=61.4)
        row = TriggerRow("badnets", target=1, asr=Rate(0.07, 18), base_rate=Rate(0.05, 18))
        record.triggers, record.measures = [row], [Measure("clean_accuracy", 0.98, 40)]
        if arguments[0] == "cleanse":
            shutil.copy(arguments[1], arguments[arguments.index("--out") + 1])
            before = TriggerRow("badnets", target=1, asr=Rate(0.95, 18), base_rate=Rate(0.04, 18))
            record.before = Side("backdoored", [Measure("clean_accuracy", 0.99, 40)], [before])
        else:
            record.sequela, record.skipped = left(arguments[arguments.index("--sequela") + 1])
        written(record, arguments)
        return 1

    monkeypatch.setattr(sequela, "bdclean", write)
    return ran


def test_a_half_is_trained_on_and_members_are_who_was_seen_as_he_is(pictures, tmp_path):
    bench = made(pictures, tmp_path / "work")
    for seed in (0, 1):
        half, cleansing, others = bench.drawn(seed)
        assert sorted(torch.cat([half, cleansing, others]).tolist()) == list(range(64))
        assert list(map(len, (half, cleansing, others))) == [32, 12, 20]
        people = bench.people(seed)
        stamped = set(half.tolist()) - set(people.training.tolist())
        assert len(stamped) == 8 and len(people.training) == 24
        assert torch.equal(people.others, others) and torch.equal(people.cleansing, cleansing)
    assert not torch.equal(bench.drawn(0)[0], bench.drawn(1)[0])


def test_margins_are_of_the_file_and_its_pool_and_shadow_networks_know_their_halves(pictures, tmp_path):
    bench = made(pictures, tmp_path / "work", 4)
    margins, trained_on = bench.shadow_margins
    assert margins.shape == trained_on.shape == (4, 64) and margins.isfinite().all()
    assert torch.equal(trained_on, lira.halves(4, 64, sequela.DRAWN))
    files = sorted((tmp_path / "work").glob("*shadow-*.safetensors"))
    assert len(files) == 4
    weights = [load_file(file)["conv1.weight"] for file in files]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])
    kept = files[0].with_suffix(".margins").stat().st_mtime_ns
    assert torch.equal(bench.margins(files[0]), made(pictures, tmp_path / "work", 4).margins(files[0]))
    assert files[0].with_suffix(".margins").stat().st_mtime_ns == kept


def test_what_is_told_is_what_the_scores_give(pictures, tmp_path):
    bench = made(pictures, tmp_path / "work")
    bench.__dict__["shadow_margins"] = (
        torch.randn(16, 64, generator=torch.Generator().manual_seed(0)).double(),
        lira.halves(16, 64, 0),
    )
    found = bench.told(0, bench.target(0))
    asked, people = bench.margins(bench.target(0)), bench.people(0)
    ratios = lira.likelihood_ratios(asked, *bench.shadow_margins)
    assert set(found) == {"training loss", "training LiRA", "cleansing loss", "cleansing LiRA"}
    assert found["training loss"][0] == membership.area(asked[people.training], asked[people.others])
    assert found["cleansing LiRA"][0] == membership.area(ratios[people.cleansing], ratios[people.others])
    assert [rate.value for rate in found["training LiRA"][1:]] == [None, None]  # 20 others are too few


def test_cells_are_made_once_and_end_in_three_tables(pictures, tmp_path, capsys, commands, monkeypatch):
    monkeypatch.setattr(sequela, "SHADOWS", 4)  # for the time that it takes
    work = tmp_path / "work"
    arguments = [
        "--shadows", "4",
        "--data", str(pictures), "--work", str(work), "--epochs", "1", "--pool", "64", "--images", "12", "--test", "40",
        "--attack", ATTACK, "--recipes", "clp,ft:epochs=2", "--seeds", "0,1", "--device", "cpu",
    ]  # fmt: skip
    assert sequela.main(arguments) == 0
    printed = capsys.readouterr().out
    networks, members, back = (part.splitlines()[2:] for part in printed.strip().split("\n\n"))
    assert networks == [
        "| as it was trained | 99.0 / 99.0 | 95.0 / 95.0 | 4.0 / 4.0 | - / - | 40 | 18 |",
        "| clp | 98.0 / 98.0 | 7.0 / 7.0 | 5.0 / 5.0 | 61 / 61 | 40 | 18 |",
        "| ft:epochs=2 | 98.0 / 98.0 | 7.0 / 7.0 | 5.0 / 5.0 | 61 / 61 | 40 | 18 |",
    ]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in members]
    assert [cell[:2] for cell in cells] == [
        [f"{group} images", name]
        for group in ("training", "cleansing")
        for name in ("as it was trained", "clp", "ft:epochs=2")
    ]
    assert all(cell[4:8] == ["- / -"] * 4 and cell[9] == "20" for cell in cells)
    assert [cell[8] for cell in cells] == ["24"] * 3 + ["12"] * 3
    assert cells[0][2:4] == cells[1][2:4], "outputs here are the suspect itself"
    assert back[:2] + back[2:8:2] + back[9:10] == [
        "| clp | amplified 1.5 times | 11.0 / 11.0 |  | - / - |  | 9 |",
        "| ft:epochs=2 | amplified 1.5 times | 11.0 / 11.0 |  | - / - |  | 9 |",
        "| clp | re-tuning, 0 of 36 images poisoned | 1.0 (>100) / 1.0 (>100) | - / - | - / - | - / - | 9 |",
        "| clp | re-injection, 10 of 36 images poisoned | 90.0 (100) / 90.0 (100) | 30.0 (>1,000) / 30.0 (>1,000) "
        "| 20.0 (>1,000) / 20.0 (>1,000) | 10.0 (>1,000) / 10.0 (>1,000) | 9 |",
        "| clp | not measured with seed 1: sequela reinjection: 36 images to tune on |  |  |  |  |  |",
        "| ft:epochs=2 | not measured with seed 1: sequela reinjection: 36 images to tune on |  |  |  |  |  |",
    ]
    assert len(back) == 10
    cleansed = [command for command in commands if command[0] == "cleanse"]
    data = [Path(command[command.index("--data") + 1]) for command in cleansed]
    assert [folder.name for folder in data] == [
        "cleansing-seed0-unlabeled", "cleansing-seed1-unlabeled", "cleansing-seed0", "cleansing-seed1",
    ]  # fmt: skip
    bench = made(pictures, work)
    wanted = {bench.pool.paths[k] for k in bench.drawn(1)[1].tolist()}
    assert {str(file.relative_to(data[3])) for file in data[3].glob("*/*")} == wanted
    scans = [command for command in commands if command[0] == "scan"]
    assert [scan[scan.index("--sequela") + 1] for scan in scans] == [
        part for part in ("reactivation", "retuning", "reinjection") for _ in range(4)
    ]
    assert all(Path(scan[scan.index("--reference") + 1]).name.endswith("-twin.safetensors") for scan in scans)
    assert all(scan[scan.index("--target") + 1] == "1" for scan in scans)
    count = len(commands)
    assert sequela.main(arguments) == 0
    assert capsys.readouterr().out == printed and len(commands) == count


def test_a_recipe_that_made_nothing_ends_the_bench_with_its_words(pictures, tmp_path, monkeypatch):
    def refuse(*arguments):
        record = RunRecord("cleanse", outcome=REFUSED, problem=Problem("moth has too few images.", 3))
        written(record, arguments)
        return 3

    monkeypatch.setattr(sequela, "bdclean", refuse)
    with pytest.raises(Refused, match=r"moth made no output: moth has too few images"):
        list(sequela.tables(made(pictures, tmp_path / "work"), ["moth"], ["retuning"], [0]))


def test_a_scan_that_ended_early_says_so_in_its_row():
    record = RunRecord("scan", outcome=REFUSED, problem=Problem("no images.", 3))
    (line,) = sequela_rows.left_lines("ft", [record], [4])
    assert line == "| ft | not measured with seed 4: no images. |  |  |  |  |  |"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--shadows", "15"), "even number of shadow networks, 16 or more: not 15"),
        (("--shadows", "8"), "16 or more: not 8"),
        (("--images", "32"), "none is left to be a non-member"),
        (("--attack", "lc"), "does not send stamped images of all classes to one"),
        (("--attack", "badnets:victims=next"), "does not send stamped images of all classes to one"),
        (("--recipes", ""), "name the --recipes"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_made(pictures, tmp_path, words, said):
    work = tmp_path / "work"
    with pytest.raises(Refused, match=said):
        sequela.main(["--data", str(pictures), "--work", str(work), "--pool", "64", "--images", "12", *words])
    assert not work.exists()


def test_a_pool_that_is_larger_than_what_is_there_is_refused(pictures, tmp_path):
    with pytest.raises(Refused, match="a pool of 12,000 images was asked for: there are 80"):
        sequela.main(["--data", str(pictures), "--work", str(tmp_path / "work"), "--device", "cpu"])


@pytest.mark.slow
def test_the_command_line_is_run_for_real(pictures, tmp_path, capfd):
    """A re-tuning takes 50 images, of which a third of 120 are held out."""
    arguments = [
        "--data", str(pictures), "--work", str(tmp_path / "work"), "--epochs", "40", "--batch-size", "16",
        "--pool", "64", "--images", "24", "--test", "120", "--attack", ATTACK, "--recipes", "clp",
        "--parts", "retuning", "--seeds", "0", "--device", "cpu",
    ]  # fmt: skip
    assert sequela.main(arguments) == 0
    networks, members, back = capfd.readouterr().out.strip().split("\n\n")
    assert len(networks.splitlines()) == 4 and len(members.splitlines()) == 6
    assert "re-tuning, 5 of 50 images poisoned" in back
