"""An encoder on the images that it is measured on: probes with labels, clusters without."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bdclean.data.imageset import ImageSet
from bdclean.data.labels.folders import labels_plausible
from bdclean.errors import Refused
from bdclean.measuring.predictor import Predictor
from bdclean.measuring.probe import Encoded, Features, Probing, check_features, knn
from bdclean.measuring.trial import Trial, halves
from bdclean.progress import Tell
from bdclean.training.clusters import clusters

TELLING = 64
"""Images that show whether features differ at all."""
MOST_PROBING = 5_000
"""Images that probes are trained on, at most."""
CLUSTERS, LEAST_IN_CLUSTER = 16, 20
"""Without labels. With fewer images there are fewer of them: a cluster has about LEAST_IN_CLUSTER or more."""


def open_encoder_trial(
    encode: Predictor,
    images: ImageSet,
    probing: ImageSet | None,
    threshold: float,
    seed: int,
    readings: int,
    tell: Tell,
) -> tuple[Trial, list[str]]:
    """An encoder with a probe on `images`, and what is to be warned of.

    Probes are trained on `probing`, else on a seeded half of `images`, and the other half is measured. Labels that are
    not sure count where nearest neighbours do better than chance on them.
    """
    features = Features(encode)
    check_features(features(images.images[:TELLING]))
    given = len(images if probing is None else probing)
    if probing is None:
        first, second = halves(len(images), seed)
        probing, images = images.select(first.sort().values), images.select(second.sort().values)
    if len(probing) > MOST_PROBING:
        drawn = torch.randperm(len(probing), generator=torch.Generator().manual_seed(seed))[:MOST_PROBING]
        probing = probing.select(drawn.sort().values)
    tell("probes", 0, 1)
    chosen, labeled, doubts = _probing(features, probing, images, given, seed)
    encoded = Encoded.of(features, chosen)
    clean = encoded.predict(images.images)
    tell("probes", 1, 1)
    trial = Trial(
        encoded.predict, images.images, labeled if labeled is not None else clean, clean, chosen.classes,
        labeled is not None, labeled is None, threshold, seed, tell, readings, encoded,
    )  # fmt: skip
    return trial, doubts


def again(trial: Trial, encode: Predictor) -> Trial:
    """Another encoder, such as a cleansed copy, on the images of `trial`, with probes of its own."""
    assert trial.encoded is not None
    encoded = Encoded.of(Features(encode), trial.encoded.probing)
    clean = encoded.predict(trial.images)
    return replace(trial, predict=encoded.predict, clean=clean, own_reference=False, encoded=encoded)


def _probing(
    features: Features, probing: ImageSet, images: ImageSet, given: int, seed: int
) -> tuple[Probing, Tensor | None, list[str]]:
    """What probes are trained on; the labels that they are held against, if there are such; and warnings.

    `given`: how many images `probing` was taken from. Raises Refused where they are too few or all of one class.
    """
    doubts: list[str] = []
    if probing.labels is not None:
        classes = len(probing.classes) if probing.classes else int(probing.labels.max()) + 1
        if len(probing.labels.unique()) < 2:
            raise Refused("the labeled images are all of one class: a probe needs two or more.")
        if len(probing) < classes:
            raise Refused(
                f"{len(probing)} labeled images for a probe are fewer than their {classes} classes: give some of each."
            )
        known = Probing(probing.images, probing.labels, classes, True)
        named = probing.classes is not None and images.classes is not None
        held = images.labels
        if held is not None and ((named and images.classes != probing.classes) or int(held.max()) >= classes):
            held = None
            doubts.append(
                "the labels of these images are of other classes than those that the probes are trained on: the images "
                "are used as unlabeled."
            )
        # Each vouches for itself: the labels that are measured by, and, where there are none, those of the probes.
        if held is not None:
            if images.sure or _plausible(features, probing, images.images, held, classes):
                return known, held, doubts
        elif probing.sure or _plausible_by_half(features, probing, classes, seed):
            return known, None, doubts
        whose = "these images" if held is not None else "the images for probes"
        doubts.append(
            f"nearest neighbours among the encoder's features do no better than chance on the labels of {whose}: "
            "they are used as unlabeled."
        )
    count = min(CLUSTERS, len(probing) // LEAST_IN_CLUSTER)
    if count < 2:
        why = ", and nearest neighbours do no better than chance on their labels" if doubts else ""
        raise Refused(
            f"{given} images are too few to cluster an encoder's features{why}: give {4 * LEAST_IN_CLUSTER} or more."
        )
    groups = clusters(features(probing.images), count, seed)
    return Probing(probing.images, groups, int(groups.max()) + 1, False), None, doubts


def _plausible(features: Features, known: ImageSet, images: Tensor, labels: Tensor, classes: int) -> bool:
    """Whether nearest neighbours among `known` do better than chance on the `labels` of `images`."""
    assert known.labels is not None
    vote = knn(features(known.images), known.labels, classes)
    return labels_plausible(vote(features(images)), labels, classes)


def _plausible_by_half(features: Features, images: ImageSet, classes: int, seed: int) -> bool:
    """The same of one half of `images` among the other."""
    first, second = (images.select(half) for half in halves(len(images), seed))
    assert second.labels is not None
    return _plausible(features, first, second.images, second.labels, classes)
