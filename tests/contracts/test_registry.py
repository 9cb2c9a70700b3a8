import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from bdclean import registry
from bdclean.cli.description import describe
from bdclean.errors import UsageError
from bdclean.registry import Entry, configure, load, parse_settings, parse_spec


@dataclasses.dataclass(frozen=True)
class Example:
    name: ClassVar[str] = "example"

    epochs: int = 3
    rate: float = 0.1
    mirror: bool = False
    ratios: tuple[float, ...] = (1.0,)
    size: tuple[int, int] = (1, 2)
    mode: Literal["soft", "hard"] = "soft"
    cap: int | None = 5
    place: int | str = 0
    file: Path | None = None

    def __post_init__(self):
        if self.epochs < 0:
            raise UsageError("epochs is below 0.")


def test_settings_take_the_type_of_their_field():
    text = {
        "epochs": "1_000",
        "rate": "3e-4",
        "mirror": "Yes",
        "ratios": "0.5/0.25",
        "size": "3/4",
        "mode": "hard",
        "cap": "none",
        "place": "7",
        "file": "a/b",
    }
    assert configure(Example, text) == Example(
        1000, 3e-4, True, (0.5, 0.25), (3, 4), "hard", None, 7, Path("a/b")
    )
    assert configure(Example, {"place": "corner"}).place == "corner"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", "3.0"),
        ("epochs", ""),
        ("rate", "nan"),
        ("rate", "inf"),
        ("rate", "fast"),
        ("mirror", "maybe"),
        ("ratios", "1/x"),
        ("size", "1/2/3"),
        ("mode", "medium"),
        ("cap", "many"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_what_is_expected(key, value):
    with pytest.raises(UsageError, match=rf"example: {key}='{value}' does not fit: expected"):
        configure(Example, {key: value})


def test_an_unknown_setting_names_the_nearest_and_lists_all():
    with pytest.raises(
        UsageError, match=r"no setting 'epoch': did you mean epochs\? settings: epochs \(whole"
    ):
        configure(Example, {"epoch": "3"})


def test_a_range_is_checked_by_the_class_itself():
    with pytest.raises(UsageError, match="below 0"):
        configure(Example, {"epochs": "-1"})


def test_a_field_without_default_is_asked_for():
    needs = dataclasses.make_dataclass("Needs", [("path", str)], frozen=True)
    with pytest.raises(UsageError, match="needs path"):
        configure(needs, {})


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("badnets", ("badnets", {})),
        ("badnets:size=3,position=bottom-right", ("badnets", {"size": "3", "position": "bottom-right"})),
        ("blend:source=a:b=c.png", ("blend", {"source": "a:b=c.png"})),
        ("file:C:/x,y.png", ("file", {"path": "C:/x,y.png"})),
        ("file:C:\\triggers\\t.png", ("file", {"path": "C:\\triggers\\t.png"})),
        ("file:C:\\triggers\\t.png:size=3", ("file", {"path": "C:\\triggers\\t.png", "size": "3"})),
        (
            "file:\\\\server\\share\\t.png:size=3,position=top-left,alpha=0.5",
            (
                "file",
                {"path": "\\\\server\\share\\t.png", "size": "3", "position": "top-left", "alpha": "0.5"},
            ),
        ),
        ("file:runs:lr=0.1/t.png", ("file", {"path": "runs:lr=0.1/t.png"})),
        ("wanet:grid=C:\\grids\\g.npz", ("wanet", {"grid": "C:\\grids\\g.npz"})),
        (
            "file:a,b.png,alpha=0.2,position=1/2",
            ("file", {"path": "a,b.png", "alpha": "0.2", "position": "1/2"}),
        ),
    ],
)
def test_a_spec_is_split_at_its_first_colon(spec, expected):
    assert parse_spec(spec) == expected


@pytest.mark.parametrize("spec", ["", ":size=3", "file", "file:", "badnets:3", "badnets:size=3,size=4"])
def test_a_malformed_spec_is_refused(spec):
    with pytest.raises(UsageError):
        parse_spec(spec)


def test_settings_need_an_equals_sign_and_come_once():
    assert parse_settings(["a=1", "weight-decay=x=y"]) == {"a": "1", "weight_decay": "x=y"}
    for pairs in (["a"], ["=1"], ["a=1", "a=2"]):
        with pytest.raises(UsageError):
            parse_settings(pairs)


def test_an_unknown_name_names_the_closest():
    with pytest.raises(UsageError, match=r"no recipe is called 'inocculate': did you mean inoculate\?"):
        load(registry.RECIPES, "inocculate")
    with pytest.raises(UsageError, match="no detector is called"):
        load(registry.DETECTORS, "x")


def test_names_are_lower_case_and_lines_are_one_line():
    for table in registry.TABLES.values():
        for name, entry in table.items():
            assert name == name.lower() and ":" not in name
            assert entry.line and "\n" not in entry.line and len(entry.line) < 120


def test_a_description_comes_from_the_source_text_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "described"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "thing.py").write_text(
        "raise RuntimeError('imported')\n"
        "class Other: pass\n"
        "class Thing:\n"
        '    """First line.\n\n    Limits: none.\n    """\n'
        "    name: ClassVar[str] = 'thing'\n"
        "    families: ClassVar[tuple[str, ...]] = tuple(FAMILIES)\n"
        "    größe: float = 0.5  # of 32 pixels\n"
        "    path: str\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = describe({"thing": Entry("described.thing:Thing", "a thing")}, "thing")
    assert found.docstring == "First line.\n\nLimits: none."
    assert found.constants == {"name": "thing", "families": "tuple(FAMILIES)"}
    assert [dataclasses.astuple(s) for s in found.settings] == [
        ("größe", "float", "0.5", "of 32 pixels"),
        ("path", "str", None, ""),
    ]


@pytest.mark.parametrize("noun", registry.TABLES)
def test_what_is_registered_is_there_and_says_what_its_entry_says(noun):
    table = registry.TABLES[noun]
    for name, entry in table.items():
        cls = load(table, name)
        assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
        assert cls.name == name
        if noun == "recipe":
            assert tuple(cls.families) == entry.families
        if noun == "attack":
            kinds = ("poisoning", "clean-label", "surrogate", "training", "pre-training", "encoder")
            assert cls.kind in kinds
        found = describe(table, name)
        assert found.docstring and found.constants["name"] == name
        assert [s.name for s in found.settings] == [f.name for f in dataclasses.fields(cls)]
