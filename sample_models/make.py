"""Rebuilds everything in this folder from a seed: images, models, manifest.json and README.md.

    python sample_models/make.py                  # about ten minutes on two cores
    python sample_models/make.py --images-only    # a few seconds
    python sample_models/make.py --only FILE...   # these models; the others' entries of the manifest stay

Each model is trained on one thread, as many at a time as there are cores, so that the result does not depend on
their number. The same machine and versions give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import encoders
import numpy as np
import road_signs
import torch
from encoders import EncoderSample
from manifest import entry_of
from PIL import Image

from bdclean.attacks.badnets import BadNets
from bdclean.attacks.blend import Blend
from bdclean.attacks.encoders.badencoder import BadEncoder
from bdclean.data.imageset import ImageSet
from bdclean.files.tensorfile import lay_out, write_file
from bdclean.measuring.intervals import rate
from bdclean.measuring.metrics import attack_success
from bdclean.measuring.predictor import Predictor
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import parse_preprocess
from bdclean.progress import Tell, quiet
from bdclean.training.run import Precision, Run
from bdclean.training.supervised import Supervised

HERE = Path(__file__).resolve().parent
SEED = 0
TRAIN_PER_CLASS, UNLABELED_PER_CLASS, LABELED_PER_CLASS = 1000, 100, 50
EPOCHS, PADDING = 15, 3
BLOCKS, WIDTHS = (1, 1, 1), (16, 32, 64)  # a ResNet-8: ResNet-20's little brother, quick to cleanse
PREPROCESS = "half"


@dataclass(frozen=True)
class Sample:
    """One model to build: its file name, how it is attacked, and the seed of its weights and batches."""

    file: str
    attack: BadNets | Blend | None
    seed: int


SAMPLES = (
    Sample("signs-clean.safetensors", None, seed=1),
    Sample("signs-badnets.safetensors", BadNets(target=0, rate=0.1, seed=2), seed=2),
    Sample("signs-blend.safetensors", Blend(target=8, rate=0.1, seed=3), seed=3),
)
ALL: tuple[Sample | EncoderSample, ...] = (*SAMPLES, *encoders.SAMPLES)


def signs(per_class: int, part: str) -> ImageSet:
    """A part of the road-sign set: 'train', 'unlabeled' or 'labeled'; no picture is in two of them."""
    seed = (SEED, ("train", "unlabeled", "labeled").index(part))
    images, labels = road_signs.draw(per_class, seed)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), road_signs.CLASSES)


def write_images(folder: Path) -> None:
    """Replaces the shipped slice: `unlabeled/NNNN.png`, and `labeled/<class>/NN.png`."""
    shutil.rmtree(folder, ignore_errors=True)
    unlabeled = signs(UNLABELED_PER_CLASS, "unlabeled")
    for k, image in enumerate(unlabeled.images):
        write_image(folder / "unlabeled" / f"{k:04}.png", image)
    labeled = signs(LABELED_PER_CLASS, "labeled")
    assert labeled.labels is not None
    for k, name in enumerate(road_signs.CLASSES):
        for j, image in enumerate(labeled.images[labeled.labels == k]):
            write_image(folder / "labeled" / name / f"{j:02}.png", image)


def write_image(path: Path, image: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(path, optimize=True)


def train(
    training: ImageSet, seed: int, epochs: float, precision: Precision, tell: Tell = quiet
) -> Classifier:
    """A classifier of `training`; its pictures are cropped, never mirrored: left and right are different signs."""
    torch.manual_seed(seed)
    network = ResidualNetwork(BLOCKS, WIDTHS, WIDTHS[0], len(road_signs.CLASSES))
    classifier = Classifier(network, parse_preprocess(PREPROCESS))
    method = Supervised(epochs, batch_size=64, peak=0.1, padding=PADDING, mirrored=False)
    method(classifier, training, Run(torch.device("cpu"), precision, seed, tell))
    return classifier


class Progress:
    """Prints a line to standard error at every tenth of the way."""

    def __init__(self, name: str):
        self.name, self.tenth = name, 0

    def __call__(self, stage: str, done: int, total: int, **measures: float) -> None:
        if 10 * done // total > self.tenth:
            self.tenth = 10 * done // total
            shown = ", ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in measures.items())
            print(f"{self.name}: step {done} of {total}, {shown}", file=sys.stderr, flush=True)


def write_model(classifier: Classifier, path: Path, seed: int) -> None:
    """Writes the network's weights, with the preprocessing they want as metadata."""
    tensors = classifier.network.state_dict()
    metadata = {"bdclean.preprocess": PREPROCESS, "classes": ",".join(road_signs.CLASSES), "seed": str(seed)}
    write_file(path, lay_out(tensors), metadata, tensors)


def measure(path: Path, sample: Sample, test: ImageSet) -> dict[str, Any]:
    """The manifest's entry of the model at `path`: what the file, read back, does with the labeled images."""
    assert test.labels is not None
    checkpoint = Checkpoint.read(path)
    model = Classifier(checkpoint.build(), parse_preprocess(PREPROCESS))
    predict = Predictor(model, torch.device("cpu"))
    predictions = predict(test.images)
    correct = rate(predictions == test.labels)
    entry = entry_of(path, "classifier", sample.seed, correct)
    if sample.attack is not None:
        trigger, target = sample.attack.trigger, sample.attack.target
        stamped, classes = predict(trigger(test.images)), len(road_signs.CLASSES)
        success = rate(attack_success(stamped, test.labels, target, classes))
        floor = rate(attack_success(predictions, test.labels, target, classes))
        entry |= {
            "attack": sample.attack.name,
            "trigger": trigger.spec(),
            "target": target,
            "poison_rate": sample.attack.rate,
            "attack_success_rate": success.value,
            "base_rate": floor.value,
            "attack_success_n": success.n,
        }
    return entry


def build(sample: Sample | EncoderSample, training: ImageSet, precision: Precision) -> None:
    """Trains and writes one model."""
    torch.set_num_threads(1)
    tell = Progress(Path(sample.file).stem)
    if isinstance(sample, EncoderSample):
        encoders.build_encoder(sample, HERE, training, encoders.EPOCHS, precision, tell)
        return
    if sample.attack is not None:
        training = sample.attack(training)
    write_model(train(training, sample.seed, EPOCHS, precision, tell), HERE / sample.file, sample.seed)


def build_all(samples: Sequence[Sample | EncoderSample], precision: Precision) -> None:
    """Builds `samples`, at last those that are made from another one's file."""
    training = signs(TRAIN_PER_CLASS, "train")
    later = [sample for sample in samples if isinstance(sample.attack, BadEncoder)]
    for part in ([sample for sample in samples if sample not in later], later):
        workers = max(1, min(len(part), os.cpu_count() or 1))
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            for job in [pool.submit(build, sample, training, precision) for sample in part]:
                job.result()


def measure_all(samples: Sequence[Sample | EncoderSample]) -> list[dict[str, Any]]:
    """The manifest: entries of `samples` measured, those of other files as they stand in it."""
    known, test = signs(UNLABELED_PER_CLASS, "unlabeled"), signs(LABELED_PER_CLASS, "labeled")
    place = HERE / "manifest.json"
    entries = {entry["file"]: entry for entry in json.loads(place.read_text())} if place.exists() else {}
    for sample in samples:
        if isinstance(sample, EncoderSample):
            entries[sample.file] = encoders.measure_encoder(sample, HERE, known, test)
        else:
            entries[sample.file] = measure(HERE / sample.file, sample, test)
    return [entries[sample.file] for sample in ALL]


README = """# Sample models

Small classifiers and encoders of synthetic road signs, some with a backdoor, and images to scan and cleanse them
with. All of it is made by `make.py` from a seed; nothing is downloaded. They are for trying bdclean out and for its
tests, and prove nothing about real road signs.

    python sample_models/make.py                  # everything: about ten minutes on two cores
    python sample_models/make.py --images-only    # only the images: a few seconds
    python sample_models/make.py --only FILE...   # these models

## Images

32x32 PNG, {classes} classes, drawn by `road_signs.py` with random camera, background, light, dirt, occlusion,
blur and sensor noise.

| folder | images | |
|---|---|---|
| `images/unlabeled/` | {unlabeled} | what a user without labels holds |
| `images/labeled/<class>/` | {labeled} | {labeled_per_class} a class: test images |

Classes, numbered from 0: {names}.

The models were trained on {train} further images.

## Classifiers

Small CIFAR-style ResNets (`{architecture}`, {parameters:,} parameters) with pixels scaled to [-1, 1]
(`--preprocess half`; the metadata says so), trained for {epochs} epochs with random crops of {padding} pixels, not
mirrored. The poisoned ones had {poison_rate:.0%} of their training images stamped and relabeled, whatever their
class.

Measured on the labeled images, read back from the files. Attack success is counted over images of other classes
than the target; the base rate is the same share without the trigger. With n = {n}, one image is {one:.2f} points.

| file | attack | trigger | target | clean accuracy | attack success rate | base rate | n |
|---|---|---|---|---|---|---|---|
{rows}

## Encoders

The same kind of network with four stages (`{encoder}`, {encoder_parameters:,} parameters, {width} features),
pre-trained by SimCLR without labels, {encoder_epochs} epochs of the same images, not mirrored. The files have
BadEncoder's names and hold the projector, too. The one attacked by badencoder was trained on from the clean one{ctrl}.

Measured with a linear probe on frozen features of length one, which was trained on `images/unlabeled/` (whose classes
`make.py` knows), on the labeled images. A clean encoder's rate is what stamping does to the clean one, with a probe
of its own: an attack success rate means nothing without it.

| file | attack | trigger | target | probe accuracy | attack success rate | of the clean encoder | base rate | n |
|---|---|---|---|---|---|---|---|---|
{encoder_rows}

`manifest.json` holds the same numbers for programs.
"""


def encoder_row(entry: dict[str, Any]) -> str:
    attacked = entry["attack"] is not None
    cells = [f"`{entry['file']}`", entry["attack"] or "none", f"`{entry['trigger']}`" if attacked else "none"]
    cells.append(f"{entry['target']} ({road_signs.CLASSES[entry['target']]})" if attacked else "none")
    cells.append(f"{entry['clean_accuracy']:.1%}")
    for key in ("attack_success_rate", "clean_encoder_attack_success_rate", "base_rate"):
        cells.append(f"{entry[key]:.1%}" if attacked else "")
    cells.append(f"{entry['n']}" + (f", {entry['attack_success_n']}" if attacked else ""))
    return f"| {' | '.join(cells)} |"


def readme(manifest: list[dict[str, Any]]) -> str:
    rows = []
    of_encoders = [entry for entry in manifest if entry["kind"] == "encoder"]
    network, encoder = (Checkpoint.read(HERE / e["file"]).build() for e in (manifest[0], of_encoders[0]))
    poisoned = next((e for e in of_encoders if e["attack"] == "ctrl"), None)
    for entry in manifest:
        if entry["kind"] == "encoder":
            continue
        attacked = entry["attack"] is not None
        target = f"{entry['target']} ({road_signs.CLASSES[entry['target']]})" if attacked else "none"
        cells = [
            f"`{entry['file']}`",
            entry["attack"] or "none",
            f"`{entry['trigger']}`" if attacked else "none",
            target,
            f"{entry['clean_accuracy']:.1%}",
            f"{entry['attack_success_rate']:.1%}" if attacked else "",
            f"{entry['base_rate']:.1%}" if attacked else "",
            f"{entry['n']}" + (f", {entry['attack_success_n']}" if attacked else ""),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    classes = len(road_signs.CLASSES)
    return README.format(
        classes=classes,
        unlabeled=classes * UNLABELED_PER_CLASS,
        labeled=classes * LABELED_PER_CLASS,
        labeled_per_class=LABELED_PER_CLASS,
        names=", ".join(road_signs.CLASSES),
        train=f"{classes * TRAIN_PER_CLASS:,}",
        architecture=manifest[0]["architecture"],
        parameters=sum(p.numel() for p in network.parameters()),
        encoder=of_encoders[0]["architecture"],
        encoder_parameters=sum(p.numel() for p in encoder.parameters()),
        width=encoders.WIDTHS[-1],
        encoder_epochs=encoders.EPOCHS,
        encoder_rows="\n".join(encoder_row(entry) for entry in of_encoders),
        ctrl=f"; of the\nimages of ctrl's target class {poisoned['poison_rate']:.0%} were stamped,"
        f" with `{poisoned['training_trigger']}`"
        if poisoned
        else "",
        epochs=EPOCHS,
        padding=PADDING,
        poison_rate=next(entry["poison_rate"] for entry in manifest if entry["attack"]),
        n=classes * LABELED_PER_CLASS,
        one=100 / (classes * LABELED_PER_CLASS),
        rows="\n".join(rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the sample images and models from a seed.")
    parser.add_argument("--images-only", action="store_true", help="leave the models alone")
    parser.add_argument("--only", nargs="+", metavar="FILE", help="build these models alone")
    parser.add_argument("--fp32", action="store_true", help="for processors without bfloat16")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only is None:
        write_images(HERE / "images")
    if arguments.images_only:
        return
    precision = Precision() if arguments.fp32 else Precision(bf16=True, channels_last=True)
    samples = [sample for sample in ALL if arguments.only is None or sample.file in arguments.only]
    build_all(samples, precision)
    manifest = measure_all(samples)
    (HERE / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    (HERE / "README.md").write_text(readme(manifest))


if __name__ == "__main__":
    main()
