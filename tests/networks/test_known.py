"""The shipped table of known networks: true to what is installed, and enough to find a network without building any."""

import subprocess
import sys

import pytest
import torch
from torchvision import models

from bdclean.bench import known_networks
from bdclean.errors import Refused
from bdclean.networks.families import builders, known, regnet
from bdclean.networks.recognition.recognition import build_shapes, recognise, well_known

ROWS = {row.name: row for row in known.table()}
QUICK = ("resnet18", "alexnet", "squeezenet1_1", "mobilenet_v3_small", "vit_b_32", "resnet20-cifar-a")


def shapes_of(build):
    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in build().state_dict().items()}


def row_is_true(proposal):
    row, shapes = ROWS[proposal.name], build_shapes(proposal)[1]
    assert {n for n, s in shapes.items() if s[:1] == (known.CLASSES,)} == set(row.head)
    assert known.digest(shapes, row.head) == row.digest
    assert "".join(sorted(known.sketch(shapes, row.head))) == row.sketch
    assert proposal.input[1] == row.input


def test_every_classifier_of_torchvision_is_in_it():
    assert set(models.list_models(module=models)) <= set(ROWS)
    assert len({row.digest for row in ROWS.values()}) == len(ROWS)


def test_rows_are_what_the_builders_give():
    for proposal in well_known(known.CLASSES):
        if proposal.name in QUICK:
            row_is_true(proposal)


@pytest.mark.slow
def test_the_shipped_file_is_what_the_command_writes():
    assert known.written(known_networks.generate()) == known.FILE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_regnets_are_torchvisions(monkeypatch):
    """torchvision computes its table with tensors, which the meta device cannot: so here on the CPU."""
    from torchvision.models.regnet import BlockParams

    computed = BlockParams.from_init_params.__func__

    def on_the_cpu(cls, **numbers):
        with torch.device("cpu"):
            return computed(cls, **numbers)

    monkeypatch.setattr(BlockParams, "from_init_params", classmethod(on_the_cpu))
    ours = {p.name: p for p in regnet.named_proposals(7)}
    theirs = [n for n in models.list_models(module=models) if n.startswith("regnet")]
    assert set(theirs) == set(ours)
    for name in theirs:
        expected = shapes_of(lambda name=name: models.get_model_builder(name)(num_classes=7))
        assert shapes_of(ours[name].build) == expected


@pytest.mark.slow
def test_every_classifier_of_torchvision_is_recognised():
    for proposal in well_known(37):
        match = recognise(build_shapes(proposal)[1])[0]
        assert (match.arch.name, match.arch.classes, match.unread) == (proposal.name, 37, ())
        assert match.arch.taps and match.arch.stages[-1].modules == (match.arch.head,)


@pytest.mark.parametrize("classes", [2, 1000])
def test_a_builder_is_found_for_any_class_count(classes):
    shapes = shapes_of(lambda: models.mobilenet_v3_small(num_classes=classes))
    assert [row.name for row in known.find(shapes)] == ["mobilenet_v3_small"]
    assert recognise(shapes)[0].arch.classes == classes
    counters = {n: s for n, s in shapes.items() if "num_batches" not in n}
    assert recognise(counters)[0].arch.name == "mobilenet_v3_small"


@pytest.mark.parametrize(
    "build, name", [(models.googlenet, "googlenet"), (models.inception_v3, "inception_v3")]
)
def test_auxiliary_heads_are_checked_and_left_unread(build, name):
    shapes = shapes_of(lambda: build(num_classes=9, aux_logits=True, init_weights=False))
    match = recognise(shapes)[0]
    idle = {n for n in shapes if n.lower().startswith("aux")}
    assert (match.arch.name, set(match.unread)) == (name, idle)
    assert not any("aux" in n.lower() for n in shapes_of(match.arch.build))
    with pytest.raises(Refused, match=f"nearest is {name} \\(1 differs: {min(idle)}"):
        recognise(shapes | {min(idle): (4, 4)})


def test_old_names_of_densenet_and_vit():
    names = shapes_of(lambda: models.densenet121(num_classes=3))
    old = {
        n.replace("norm1", "norm.1").replace("norm2", "norm.2").replace("conv1.", "conv.1."): n for n in names
    }
    assert recognise({o: names[n] for o, n in old.items()})[0].names == old
    names = shapes_of(lambda: models.vit_b_32(num_classes=3, image_size=96))
    old = {n.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): n for n in names}
    match = recognise({o: names[n] for o, n in old.items()})[0]
    assert (match.arch.name, match.arch.input, match.names) == ("vit_b_32", (3, 96, 96), old)


def test_a_builder_that_is_missing_breaks_nothing(monkeypatch):
    shapes = shapes_of(lambda: models.squeezenet1_1(num_classes=4))
    names = [n for n in builders.names() if n != "squeezenet1_1"]
    monkeypatch.setattr(builders, "names", lambda: names)
    with pytest.raises(Refused, match="no known architecture"):
        recognise(shapes)


@pytest.mark.parametrize("lost", ["conv1.weight", "layer3.0.conv1.weight", "fc.weight"])
def test_the_nearest_is_named_whatever_is_missing(lost):
    shapes = shapes_of(lambda: models.resnet18(num_classes=5))
    del shapes[lost]
    with pytest.raises(Refused, match=f"nearest is resnet18 \\(1 differs: {lost} is missing\\)"):
        recognise(shapes)


def test_listing_needs_no_torch():
    code = (
        "import sys; from bdclean.cli.catalogue import listing; print(listing('architectures')); "
        "assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(row.name in shown for row in known.table())
