"""The speed table's own arithmetic and contenders, and what keeps the command line quick."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from bdclean.bench.speed import speed
from bdclean.bench.speed.pairs import Cell, Worker, interleaved, process, ratios
from bdclean.bench.speed.plain_bcu import PillowImages, PlainBCU, augmentation
from bdclean.bench.speed.plain_distillation import PlainDistillation, views
from bdclean.networks.normalisation import parse_preprocess
from bdclean.record.run import RunRecord
from bdclean.training.losses import distillation_kl


def test_contenders_take_turns_and_pairs_are_compared_with_their_neighbours():
    said: list[str] = []

    def speak(word: str, figures: list[float]) -> float:
        said.append(word)
        return figures[said.count(word) - 1]

    mine, others = interleaved(
        partial(speak, "a", [9.0, 1.0, 2.0, 3.0]), partial(speak, "b", [9.0, 2.0, 2.0, 12.0]), 3
    )
    assert said == ["a", "b", "a", "b", "b", "a", "a", "b"]  # once before, then the first one alternates
    assert ratios(mine, others) == [0.5, 1.0, 0.25]


@pytest.mark.parametrize(
    ("values", "goal", "met"),
    [
        ([1.0, 4.0, 5.0], ">= 4", True),
        ([1.0, 3.9, 5.0], ">= 4", False),
        ([1.5], "<= 1.5", True),
        ([2.0], "", None),
    ],
)
def test_a_cell_is_its_median_and_knows_whether_that_is_enough(values, goal, met):
    cell = Cell.of("name", "what", values, goal)
    assert (cell.value, cell.low, cell.high) == (sorted(values)[len(values) // 2], min(values), max(values))
    assert cell.met is met
    assert speed.row(cell).count("|") == 7


@pytest.mark.slow
def test_a_worker_keeps_its_state_and_hands_back_what_went_wrong():
    # Of the standard library: the worker's process imports what it is given, and tests are in no package of its own.
    with Worker(partial, next, iter([12, 13])) as worker:
        assert [worker(), worker()] == [12, 13]
        with pytest.raises(RuntimeError, match="StopIteration"):
            worker()


def test_a_process_is_accounted_for_and_a_crash_is_no_figure():
    ended = process((sys.executable, "-c", "x = bytearray(30_000_000)"))
    assert ended.wall >= ended.cpu / 2 > 0 and ended.peak_mib > 30
    with pytest.raises(RuntimeError, match="exited 3"):
        process((sys.executable, "-c", "raise SystemExit(3)"))


def test_cells_that_are_there_are_not_measured_again(tmp_path, monkeypatch):
    measured = []

    def driver(place):
        measured.append(place)
        yield Cell.of("one", "what", [1.0, 2.0, 4.0], ">= 2", "note")

    monkeypatch.setitem(speed.DRIVERS, "start", driver)
    place = speed.Place((), tmp_path, None, 3)
    first = list(speed.cells("start", place, {"threads": 1}))
    again = list(speed.cells("start", place, {"threads": 2}))
    assert first == again and len(measured) == 1
    assert json.loads((tmp_path / "speed-start.json").read_text())[0]["machine"] == {"threads": 1}


def pictures(folder: Path, count: int) -> list[Path]:
    generator = torch.Generator().manual_seed(0)
    files = []
    for number in range(count):
        pixels = torch.randint(0, 256, (12, 12, 3), dtype=torch.uint8, generator=generator).numpy()
        files.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(files[-1])
    return files


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))


@pytest.mark.parametrize("from_disk", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_the_plain_reference_learns_the_teacher_and_leaves_it_alone(tmp_path, from_disk, gradients):
    transform = augmentation(parse_preprocess("half"), (8, 8))
    images = PillowImages(pictures(tmp_path, 32), transform, from_disk)
    network = small_network()
    plain = PlainBCU(network, images, torch.device("cpu"), batch_size=16, teacher_gradients=gradients)
    before = {name: tensor.clone() for name, tensor in plain.teacher.state_dict().items()}
    for _ in range(30):
        plain.step()
    assert plain.epoch == 14 and sum(plain.losses[-5:]) < sum(plain.losses[:5]) / 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.teacher.state_dict().items())


def test_the_plain_distillation_learns_the_teacher_and_leaves_it_alone(tmp_path):
    images = PillowImages(pictures(tmp_path, 32), views(parse_preprocess("half"), 8), False)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    plain = PlainDistillation(network, images, ["0", "2"], 8, torch.device("cpu"), batch_size=16)
    before = {name: tensor.clone() for name, tensor in plain.teacher.state_dict().items()}
    for _ in range(40):
        plain.step()
    assert sum(plain.losses[-5:]) < 0.8 * sum(plain.losses[:5])
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.teacher.state_dict().items())
    assert not plain.teacher[0]._forward_hooks


def test_the_plain_reference_minimises_the_recipes_loss(tmp_path):
    transform = augmentation(parse_preprocess("half"), (8, 8))
    images = PillowImages(pictures(tmp_path, 16), transform, False)
    plain = PlainBCU(small_network(), images, torch.device("cpu"), batch_size=16, teacher_gradients=False)
    batch = next(iter(plain.loader))
    plain.batches = iter([batch])
    plain.student.train()
    expected = distillation_kl(plain.student(batch), plain.teacher(batch), 1.03)
    plain.step()
    assert plain.losses == [pytest.approx(expected.item(), rel=1e-4)]


def test_results_come_from_records_alone(tmp_path):
    (tmp_path / "other.json").write_text("[]")
    assert speed.results(tmp_path).startswith("no records of either")
    assert "cifar10 bench" in speed.results(None)


# --- the command line starts quickly because of what it does not import ----------------------------------------

HEAVY = ("torch", "numpy", "pydantic", "importlib.metadata", "bdclean.cli.batch", "asyncio")


@pytest.mark.parametrize("words", [["ls", "recipes"], ["ls", "recipe", "bcu"], ["report", "RECORD"]])
def test_lists_and_reports_import_nothing_heavy(tmp_path, words):
    record = tmp_path / "record.json"
    RunRecord("scan").write(record)
    words = [str(record) if word == "RECORD" else word for word in words]
    code = f"import sys; from bdclean.cli.main import run; code = run({words!r}); " + (
        f"sys.exit(code or ', '.join(m for m in {HEAVY!r} if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout
