"""What README says of the tool is what the tool says of itself."""

import re
from pathlib import Path

from bdclean.cli.catalogue import listing
from bdclean.registry import RECIPES

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()


def test_what_is_recognised_is_what_the_command_lists():
    assert f"```\n{listing('architectures')}```" in README


def test_every_recipe_is_named():
    assert all(f"| `{name}`" in README or f"`{name}` runs" in README for name in RECIPES)


def test_every_file_of_the_map_is_there():
    package = Path(__file__).resolve().parents[2] / "bdclean"
    tree = README.split("## Map of the code")[1].split("    sample_models/")[0]
    named = set(re.findall(r"\b[a-z_]+\.py\b", tree)) - {"make.py"}
    assert named <= {path.name for path in package.rglob("*.py")}
    missing = {path.name for path in package.glob("*.py") if not path.name.startswith("_")} - named
    assert not missing
