from pathlib import Path

import pytest
from training.by_two import by_two

from bdclean import registry


@pytest.mark.slow
def test_every_recipe_that_says_it_is_data_parallel_ends_by_two_processes_as_by_one(tmp_path):
    found = by_two(Path(__file__).with_name("recipes_of_two.py"), tmp_path / "found.json", 500)
    assert found[0].keys() == found[1].keys()
    for name, entry in registry.RECIPES.items():
        for kind, path in (("classifier", entry.path), ("encoder", entry.encoder)):
            shared = path and getattr(registry.load_recipe(name, kind), "data_parallel", False)
            assert (f"{name} {kind}" in found[0]) == bool(shared and name != "auto"), name
    for name, first in found[0].items():
        assert first["apart"] < 1e-4 and first["stages"], name
        assert first["weights"] == found[1][name]["weights"], name
