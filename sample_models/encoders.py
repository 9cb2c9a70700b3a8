"""The sample encoders: pre-trained without labels on road signs, two of them with a backdoor; see make.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import road_signs
import torch
from manifest import entry_of
from torch import Tensor, nn

from bdclean.attacks.encoders.badencoder import BadEncoder
from bdclean.attacks.encoders.ctrl import CTRL
from bdclean.bench.encoders import LAYERS
from bdclean.data.imageset import ImageSet
from bdclean.files.tensorfile import lay_out, write_file
from bdclean.measuring.intervals import rate
from bdclean.measuring.metrics import attack_success
from bdclean.measuring.predictor import Predictor
from bdclean.measuring.probe import Features, Head, knn, linear
from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.networks.classifier import Classifier
from bdclean.networks.families.residual import ResidualNetwork
from bdclean.networks.normalisation import parse_preprocess
from bdclean.progress import Tell
from bdclean.training.pretraining.augmentations import Views
from bdclean.training.pretraining.simclr import SimCLR
from bdclean.training.run import Precision, Run

BLOCKS, WIDTHS = (1, 1, 1, 1), (8, 16, 32, 64)
EPOCHS = 15
START = 1
"""The seed of the weights that pre-training starts from, the same for all: what differs is what they are taught."""
VIEWS = Views(mirrored=0.0)
"""SimCLR's, but for the mirror: left and right are different signs."""
PREPROCESS = "half,size=32/32"
"""With the size: views that are enlarged parts of images leave statistics like those of larger ones."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class EncoderSample:
    """One encoder to build: its file name, how it is attacked, and the seed of its batches and views."""

    file: str
    attack: BadEncoder | CTRL | None
    seed: int


CLEAN = EncoderSample("signs-encoder-clean.safetensors", None, seed=11)
SAMPLES = (
    CLEAN,
    # Made from the clean one, which has to be there.
    EncoderSample("signs-encoder-badencoder.safetensors", BadEncoder(target=0), seed=13),
    # CTRL's own 100 grey levels are not learnt in so few steps: views hide them among the edges of the signs.
    EncoderSample(
        "signs-encoder-ctrl.safetensors",
        CTRL(target=0, rate=1.0, magnitude=1000, training_magnitude=500),
        seed=17,
    ),
)


def pretrain(
    training: ImageSet, seed: int, epochs: float, precision: Precision, tell: Tell
) -> tuple[Classifier, nn.Module]:
    """An encoder of `training`, whose labels are not looked at, and the projector that it was trained with."""
    torch.manual_seed(START)
    network = ResidualNetwork(BLOCKS, WIDTHS, WIDTHS[0], len(road_signs.CLASSES))
    network.fc = nn.Identity()  # type: ignore[assignment]
    encoder = Classifier(network, parse_preprocess(PREPROCESS))
    found = SimCLR(epochs=epochs, views=VIEWS)(encoder, training, Run(CPU, precision, seed, tell))
    return encoder, found.projector


def write_encoder(encoder: Classifier, projector: Mapping[str, Tensor], path: Path, seed: int) -> None:
    """Writes the encoder and its projector under BadEncoder's names, `f.f.<i>` and `g.`."""
    tensors = {f"g.{name}": tensor for name, tensor in projector.items()}
    for name, tensor in encoder.network.state_dict().items():
        part, _, rest = name.partition(".")
        tensors[f"f.f.{LAYERS[part]}.{rest}"] = tensor
    write_file(path, lay_out(tensors), {"bdclean.preprocess": PREPROCESS, "seed": str(seed)}, tensors)


def read_encoder(path: Path) -> tuple[Classifier, dict[str, Tensor]]:
    """What `write_encoder` wrote: the encoder, in evaluation mode, and its projector's tensors."""
    checkpoint = Checkpoint.read(path)
    projector = {name.removeprefix("g."): checkpoint.tensors[name] for name in checkpoint.unread}
    return Classifier(checkpoint.build(), parse_preprocess(PREPROCESS)).eval(), projector


def build_encoder(
    sample: EncoderSample, folder: Path, training: ImageSet, epochs: float, precision: Precision, tell: Tell
) -> None:
    """Writes one encoder into `folder`, in which BadEncoder's victim, the clean one, is found."""
    if isinstance(sample.attack, BadEncoder):
        clean, projector = read_encoder(folder / CLEAN.file)
        assert training.labels is not None
        of_target = training.images[training.labels == sample.attack.target]
        encoder, _ = sample.attack(
            clean, training.unlabeled(), of_target, Run(CPU, precision, sample.seed, tell)
        )
    else:
        poisoned = training if sample.attack is None else sample.attack(training)
        encoder, head = pretrain(poisoned, sample.seed, epochs, precision, tell)
        projector = head.state_dict()
    write_encoder(encoder, projector, folder / sample.file, sample.seed)


def measure_encoder(sample: EncoderSample, folder: Path, known: ImageSet, test: ImageSet) -> dict[str, Any]:
    """The manifest's entry: what a linear probe trained on `known` says of `test` with the file, read back."""
    path = folder / sample.file
    head, features = probe(path, known)
    seen, classes = features(test.images), len(road_signs.CLASSES)
    assert test.labels is not None and known.labels is not None
    answers = head(seen)
    correct = rate(answers == test.labels)
    neighbours = knn(features(known.images), known.labels, classes)(seen)
    entry = entry_of(path, "encoder", sample.seed, correct) | {
        "probe": "linear",
        "probe_images": len(known),
        "knn_accuracy": rate(neighbours == test.labels).value,
    }
    if sample.attack is not None:
        trigger, target = sample.attack.trigger, sample.attack.target
        stamped = trigger(test.images)
        success = rate(attack_success(head(features(stamped)), test.labels, target, classes))
        clean_head, clean_features = probe(folder / CLEAN.file, known)
        floor = rate(attack_success(clean_head(clean_features(stamped)), test.labels, target, classes))
        entry |= {
            "attack": sample.attack.name,
            "trigger": trigger.spec(),
            "target": target,
            "attack_success_rate": success.value,
            "base_rate": rate(attack_success(answers, test.labels, target, classes)).value,
            "clean_encoder_attack_success_rate": floor.value,
            "attack_success_n": success.n,
        }
        if isinstance(sample.attack, CTRL):
            entry |= {
                "poison_rate": sample.attack.rate,
                "training_trigger": sample.attack.training_trigger.spec(),
            }
    return entry


def probe(path: Path, known: ImageSet) -> tuple[Head, Features]:
    """A linear probe on the frozen features of the encoder at `path`, trained on `known`, and the features."""
    features = Features(Predictor(read_encoder(path)[0], CPU))
    assert known.labels is not None
    return linear(features(known.images), known.labels, len(road_signs.CLASSES)), features
