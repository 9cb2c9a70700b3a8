"""Makes the table of known networks anew: `python -m bdclean.bench known_networks`."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from bdclean.networks.arch import COUNTER
from bdclean.networks.families.known import CLASSES, FILE, Known, digest, sketch, written


def generate() -> list[dict]:
    """All rows anew, from what is installed; imports torch and builds every network on the meta device."""
    from torchvision import models

    from bdclean.networks.recognition.recognition import build_shapes, well_known

    theirs = set(models.list_models(module=models))
    rows = []
    for proposal in well_known(CLASSES):
        found = build_shapes(proposal)
        if found is None:
            raise RuntimeError(f"{proposal.name} cannot be built")
        network, shapes = found
        head = tuple(sorted(name for name, shape in shapes.items() if shape[:1] == (CLASSES,)))
        counted = {name: shape for name, shape in shapes.items() if not name.endswith(COUNTER)}
        known = Known(
            name=proposal.name,
            source="torchvision" if proposal.name in theirs else "bdclean",
            parameters=sum(p.numel() for name, p in network.named_parameters() if name not in head),
            tensors=len(counted),
            input=proposal.input[1],
            head=head,
            idle=proposal.idle,
            digest=digest(shapes, head),
            sketch="".join(sorted(sketch(shapes, head))),
        )
        rows.append(asdict(known))
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bdclean.bench known_networks", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 where the file is stale"
    )
    text = written(generate()) if parser.parse_args(arguments).check else None
    if text is None:
        FILE.write_text(written(generate()), encoding="utf-8")
        return 0
    old = set(FILE.read_text(encoding="utf-8").splitlines()) if FILE.exists() else set()
    stale = [row for row in text.splitlines() if row not in old]
    for row in stale:
        print(row[:120])
    return 1 if stale else 0
