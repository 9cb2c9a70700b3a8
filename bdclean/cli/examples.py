"""What each `--help` ends with: a command that works in a clone, and what it answers."""

from __future__ import annotations

# \b keeps the lines of a paragraph as they are.
SCAN = """\b
Example, in a clone of the repository:
    bdclean scan sample_models/signs-badnets.safetensors \\
        --data sample_models/images/labeled
It says "backdoored: badnets sends 100.0 ... % of images to ahead-only (0)",
and exits 1. Of many models, a record a line:
    find models -name '*.safetensors' | bdclean scan - --data images \\
        --format jsonl --record runs/
On the four GPUs of a machine (torchrun itself exits 1 wherever bdclean does
not exit 0: the record, or what torchrun says, tells more):
    torchrun --nproc-per-node 4 -m bdclean scan model.safetensors --data images
"""
CLEANSE = """\b
Example, in a clone of the repository (minutes on two cores):
    bdclean cleanse sample_models/signs-badnets.safetensors \\
        --data sample_models/images/unlabeled \\
        --test sample_models/images/labeled --out signs.safetensors
It says "no-evidence: (was: backdoored, badnets 100.0 -> 0.0 %)", writes
signs.safetensors with its record signs.json, and exits 0.
On several GPUs, with recipes that "bdclean ls recipe NAME" calls data
parallel: torchrun --nproc-per-node 4 -m bdclean cleanse ..., as for scan.
"""
REPORT = """\b
Example, for what a scan or cleanse has recorded:
    bdclean report signs.json --out audit.html --card README.md
It writes a page that opens offline and the section "Backdoor audit" of a
model card. Into a pull request, failing where a trigger moves 10 % or more:
    bdclean report runs/ --format md --fail-on 'asr>=0.1'
"""
LS = """\b
Example:
    bdclean ls recipe inoculate
It shows what the recipe does, when to use it, what it needs, its known
limits, and what --set changes.
"""
DOCTOR = """\b
Example:
    bdclean doctor > doctor.txt
It exits 0 where bdclean can work, 3 where torch cannot be imported.
"""
ALL = """\b
Example:
    bdclean scan model.safetensors --data images --record runs/
    bdclean cleanse model.safetensors --data images
    bdclean report runs/ model.clean.json --out audit.html

BDCLEAN_LIMIT=500 in the environment stands for --limit 500, and so for every option. bdclean.toml in the working
directory, or [tool.bdclean] in pyproject.toml, holds more such defaults, and findings that are accepted.

Exit codes: 0 no evidence found, 1 backdoored or suspicious, 2 wrong usage, 3 refused or not assessed, 70 a defect
in bdclean, 130 and 143 interrupted.
"""
