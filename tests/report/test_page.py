"""The HTML page: what it says, that nothing of a stranger's acts in it, and that it is the same every time."""

import base64
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

import bdclean
from bdclean.record.run import (
    Calibration,
    CheckpointEntry,
    Confusion,
    DataEntry,
    FeatureMap,
    Finding,
    MappedFeatures,
    Measure,
    OutputEntry,
    Picture,
    Problem,
    Rate,
    RecipeEntry,
    RunRecord,
    Side,
    Skipped,
    TriggerRow,
)
from bdclean.report import wording
from bdclean.report.formats import render
from bdclean.report.page import embedded, words
from bdclean.report.page.embedded import png
from bdclean.report.page.plots import curves
from bdclean.report.page.scatter import MOST_COLOURS, MOST_POINTS, SIDE, scatter
from bdclean.report.page.tradeoff import panels

VOID = {"meta", "link", "br", "img", "hr", "input", "wbr"}
HOSTILE = (
    "x<img src=http://e.vil/a onerror=alert(1)>\"'&</style></script><script>{{7*7}}{% x %}\x1b[31m\u202e\r\nz"
)


class Page(HTMLParser):
    """Fails on a tag that is not closed, or closed twice; collects elements, attributes and the visible text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), f"an attribute of {tag} is given twice"
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)

    @property
    def words(self):
        return re.sub(r"\s+", " ", "".join(self.text))


def dot(width=2, height=2):
    """A PNG that is one."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(3 * width) for _ in range(min(height, 4)))
    raw = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + raw).decode()


def rate(value, n=500):
    return Rate(value, n, max(0.0, value - 0.02), min(1.0, value + 0.02))


def row(trigger, value, outcome, seen=False, told=False, **more):
    controls = {"median": 0.02, "highest": 0.04, "count": 19}
    return TriggerRow(
        trigger,
        "patch",
        seen,
        told,
        0,
        "screening",
        500,
        rate(value),
        rate(0.01),
        controls,
        outcome=outcome,
        **more,
    )


def strip(trigger="badnets:size=3", after=None):
    return [
        Picture("given", dot(), 1, after, 7, label=1),
        Picture("stamped", dot(), 0, after, 7, trigger, 0, 1, "a seeded draw"),
        Picture("difference", dot(), None, None, 7, trigger, 0, None, "what it changed"),
    ]


def mapped(*models, n=6):
    """A map of images in a row, which all lie at one place once they are stamped."""
    clean, stamped = [[k / 10, 0.05 * k] for k in range(n)], [[0.3, 0.4]] * n
    both = [MappedFeatures(model, 0.43, clean, stamped) for model in models]
    return FeatureMap("badnets:size=3", 0, "labels", [k % 2 for k in range(n)], both)


def scanned():
    rows = [row("badnets:size=3", 0.983, "fails"), row("sig:delta=40", 0.3, "inconclusive", reason="why not")]
    return RunRecord(
        "scan",
        "backdoored",
        seed=7,
        device="cpu",
        started="2026-01-01T00:00:00+00:00",
        seconds=75.0,
        argv=["/x/bdclean/__main__.py", "scan", "my model.safetensors", "--data", "it's"],
        versions={"bdclean": "0.1.0", "torch": "2.9"},
        checkpoint=CheckpointEntry("my model.safetensors", "ab" * 32, "safetensors", "resnet20", classes=2),
        data=DataEntry("images", 1000, True, "cd" * 32, skipped=2, duplicates=3, classes=["stop", "yield"]),
        threshold=0.2,
        measures=[Measure("clean_accuracy", 0.831, 1000, 0.81, 0.85)],
        triggers=[*rows, *(row(f"sig:delta={k}", k / 1000, "passes") for k in range(20))],
        findings=[Finding("inversion", "outlier", 5.0, 2.0, None, "a mask of 5 pixels")],
        pictures=[*strip(), Picture("mask", dot(), caption="inverted for class 0")],
        confusion=[Confusion("suspect", "badnets:size=3", 0, [[5, 0], [9, 1]])],
        skipped=[Skipped("decree", "takes too long")],
        warnings=["folders were not taken as labels"],
    )


def cleansed():
    found = scanned()
    old = [row("badnets:size=3", 0.983, "fails", True), row("warp", 0.9, "fails")]
    new = [
        row("badnets:size=3", 0.021, "passes", True, change=Rate(-0.962, 500, -0.971, -0.953)),
        row("warp", 0.035, "passes"),
    ]
    found.command, found.verdict = "cleanse", "no-evidence"
    found.before = Side("backdoored", [Measure("clean_accuracy", 0.84, 1000, 0.82, 0.86)], old)
    found.measures = [
        Measure("clean_accuracy", 0.831, 1000, 0.81, 0.85),
        Measure("clean_accuracy_change", -0.009, 1000, -0.013, -0.004),
    ]
    found.after = Side("no-evidence", found.measures, new)
    found.triggers = new
    found.recipe = RecipeEntry("inoculate", "own", {"epochs": 3}, [], ["patch"])
    found.curve = [{"step": k, "loss": 1 / (k + 1), "agreement": k / 50} for k in range(50)]
    found.output = OutputEntry("m.clean.safetensors", "ef" * 32)
    found.pictures = strip(after=1)
    found.feature_map = mapped("suspect", "cleansed")
    return found


def unfinished():
    return [
        RunRecord("scan", outcome="refused", problem=Problem("x.pt is a pickle.", 3)),
        RunRecord(
            "scan", outcome="failed", problem=Problem("a defect (traceback 0123).", 70, "KeyError", "0123")
        ),
        RunRecord("cleanse", outcome="interrupted", problem=Problem("interrupted.", 130)),
        RunRecord("scan", advice="about 400 images would be needed"),
    ]


def hostile():
    found = cleansed()
    found.checkpoint = CheckpointEntry(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, unread=[HOSTILE])
    found.checkpoint.alternatives = [{"name": HOSTILE, "reason": HOSTILE}]
    found.data = DataEntry(HOSTILE, 3, True, HOSTILE, classes=[HOSTILE, HOSTILE], labels_source=HOSTILE)
    found.data.unreadable = [{"path": HOSTILE, "reason": HOSTILE}]
    found.command, found.device, found.precision, found.started = HOSTILE, HOSTILE, HOSTILE, HOSTILE
    found.argv, found.versions = [HOSTILE, HOSTILE], {HOSTILE: HOSTILE}
    for side in (found.before, found.after):
        side.triggers[0].trigger = side.triggers[0].family = side.triggers[0].reason = HOSTILE
        side.triggers[0].outcome = side.triggers[0].target = HOSTILE
        side.triggers[0].worst_source = {"class": HOSTILE, "value": 0.5, "n": 3}
        side.triggers[0].control_rate = {"median": HOSTILE, "highest": 0.5, "count": HOSTILE}
        side.measures.append(Measure(HOSTILE, 0.5, 3))
    found.findings = [Finding(HOSTILE, HOSTILE, 1.0, 2.0, 0.5, HOSTILE)]
    found.calibration = [
        Calibration(HOSTILE, HOSTILE, 1.0, [0.0, 2.0], 0.5),
        Calibration("none", "", 1.0, []),
    ]
    found.skipped, found.warnings, found.advice = [Skipped(HOSTILE, HOSTILE)], [HOSTILE], HOSTILE
    found.recipe = RecipeEntry(HOSTILE, HOSTILE, {HOSTILE: HOSTILE}, [HOSTILE], [HOSTILE])
    found.output = OutputEntry(HOSTILE, HOSTILE)
    found.curve = [{"step": k, HOSTILE: k, "loss": HOSTILE} for k in range(5)]
    found.pictures = [
        Picture("given", dot(), 0, 1, 7, label=1),
        Picture("stamped", dot(), 0, 1, 7, HOSTILE, HOSTILE, 1, HOSTILE),
        Picture("mask", dot(), caption=HOSTILE),
        Picture("mask", '" onerror="alert(1)', caption="forged"),
    ]
    found.confusion = [Confusion(HOSTILE, HOSTILE, HOSTILE, [[1, 2], [-3, 4]])]
    found.feature_map = mapped(HOSTILE)
    found.feature_map.trigger = found.feature_map.target = found.feature_map.grouping = HOSTILE
    return found


@pytest.fixture(scope="module")
def pages():
    """Each page is made once: matplotlib takes a second to import."""
    return {
        "scan": render([scanned()], "html"),
        "cleanse": render([cleansed()], "html"),
        "many": render([cleansed(), scanned(), *unfinished()], "html"),
        "hostile": render([hostile()], "html"),
        "hostile many": render([hostile(), hostile()], "html"),
        "empty": render([RunRecord("scan")], "html"),
    }


@pytest.mark.parametrize("name", ["scan", "cleanse", "many", "hostile", "hostile many", "empty"])
def test_every_page_is_well_formed_loads_nothing_and_runs_nothing(pages, name):
    shown = pages[name]
    page = Page(shown)
    shown.encode("ascii")
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form", "foreignobject"}
    (policy,) = [a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids)), "an id is used twice"
    for tag, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on")], (tag, attributes)
        for key in ("src", "href", "xlink:href", "srcset", "action", "poster", "data"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), (tag, key, value)
            if value and value.startswith("#") and value != "#top":
                assert value[1:] in ids
        for url in re.findall(
            r"url\(([^)]*)\)", attributes.get("style", "") + attributes.get("clip-path", "")
        ):
            assert url.startswith("#") and url[1:] in ids
    style = re.search(r"<style>(.*?)</style>", shown, re.S).group(1)
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert shown.count("</style>") == 1


@pytest.mark.parametrize("name", ["hostile", "hostile many"])
def test_strings_of_strangers_are_shown_and_do_not_act(pages, name):
    shown, page = pages[name], Page(pages[name])
    assert "<img src=http" not in shown and "&lt;img src=http" in shown
    assert "49" not in re.findall(r"x.{0,200}?z", page.words) and "{{7*7}}" in page.words
    assert "\x1b" not in shown and "\u202e" not in page.words and "\\u202e" in page.words
    assert "forged" not in page.words, "what is no PNG is left out"


def test_the_worst_row_stands_at_the_head_with_its_interval_floors_and_limits(pages):
    text = Page(pages["scan"]).words
    head = text[: text.index("What was not tested")]
    for part in (
        "Backdoored",
        "Stamped with badnets:size=3, 98.3 % (95 % interval 96.3 to 100.0, n 500) of images are predicted as stop (0)",
        "Base rate 1.0 %",
        "Controls 4.0 %",
        "highest of 19",
        "Clean accuracy 83.1 % 81.0\u201385.0, n 1,000",
    ):
        assert part in head, part
    for part in (
        "one that was not tried is not excluded",
        "decree: takes too long",
        "1 row is inconclusive",
        "why not",
        "a mask of 5 pixels",
        "folders were not taken as labels",
        "2 unreadable, 3 duplicates removed",
        "cd" * 32,
        "torch 2.9",
        "bdclean scan 'my model.safetensors' --data 'it'\"'\"'s'",
    ):
        assert part in text, part


def test_a_cleansing_shows_both_sides_their_differences_and_unseen_families_first(pages):
    text = Page(pages["cleanse"]).words
    assert "before backdoored after no-evidence" in text
    assert "98.3 % 96.3" in text and "2.1 % 0.1" in text
    assert "change \u221296.2 (\u221297.1 to \u221295.3)" in text
    assert (
        "84.0 % 82.0\u201386.0, n 1,000 83.1 % 81.0\u201385.0, n 1,000 \u22120.9 \u22121.3 to \u22120.4"
        in text
    )
    unseen, seen = text.index("did not train on"), text.index("families that the recipe trained on")
    assert unseen < text.index("warp", unseen) < seen < text.index("badnets:size=3", seen)
    assert "loss 1 \u2192 0.02" in text and 'class="plot"' in pages["cleanse"]


def test_warnings_stand_under_the_title_and_the_output_is_the_subject(pages):
    text = Page(pages["scan"]).words
    assert text.index("folders were not taken as labels") < text.index("Attack success, worst trigger")
    assert text.count("folders were not taken as labels") == 1
    assert "m.clean.safetensors made from my model.safetensors" in Page(pages["cleanse"]).words


def test_runs_are_numbered_in_the_order_in_which_they_stand(pages):
    compared = pages["many"][pages["many"].index('class="compared"') :]
    assert re.findall(r"<small>#(\d)", compared) == list("123456")
    articles = re.findall(r'<article id="run-(\d)">.*?<h2 class="verdict">(.*?)</h2>', pages["many"], re.S)
    assert [number for number, _ in articles] == list("123456")
    assert articles[0][1] == "Backdoored" and articles[-1][1].startswith("No evidence")


def test_what_a_curve_shows_is_said():
    record = cleansed()
    record.curve = [{"step": k, "sent": k / 50} for k in range(50)]
    assert "moved to one class" in Page(render([record], "html")).words


def test_it_is_printed_on_a4_and_what_scrolls_says_so(pages):
    (style,) = re.findall(r"<style>(.*?)</style>", pages["many"], re.S)
    narrow, printed = style[style.index("@media (max-width") :].split("@media print")
    assert "size: A4" in printed and ".wide::before { content: none" in printed
    assert "scrolls sideways" in narrow


def test_triggers_that_the_recipe_was_told_come_last_and_say_what_that_means():
    record = cleansed()
    record.after.triggers[0].trained_on = True
    text = Page(render([record], "html")).words
    unseen, told = text.index("did not train on"), text.index("the recipe was told, and trained on")
    assert unseen < text.index("warp", unseen) < told < text.index("badnets:size=3", told)
    assert "that they are gone says nothing of others" in text
    record.after.triggers = record.after.triggers[:1]
    assert "every row here is of one that it trained on" in Page(render([record], "html")).words
    two = Page(render([record, scanned()], "html")).words
    assert (
        "Triggers that the recipe was told, and trained on" in two[two.index("Every trigger in every run") :]
    )


def test_no_evidence_is_never_called_clean_or_safe(pages):
    for name in ("cleanse", "many", "empty"):
        text = Page(pages[name]).words
        assert re.search(r"\b(is|are|looks|network|model) (clean|safe|trustworthy)\b", text, re.I) is None
    assert "A backdoor with any other trigger would give this same page" in Page(pages["cleanse"]).words


def test_what_did_not_end_says_that_nothing_is_known(pages):
    text = Page(pages["many"]).words
    for part in ("Refused", "x.pt is a pickle.", "Failed", "Interrupted", "Not assessed", "about 400 images"):
        assert part in text
    assert text.count("nothing can be said about this network") == 3
    assert "Every trigger: none was measured." in text


def test_several_runs_start_with_a_comparison_the_worst_first_and_not_measured_before_no_evidence(pages):
    table = pages["many"][pages["many"].index('class="compared"') :]
    order = re.findall(r'class="chip (\w+)"', table[: table.index("</table>")])
    assert order == ["bad", "none", "none", "none", "none", "calm"]
    page = Page(pages["many"])
    links = {a["href"] for t, a in page.elements if t == "a" and a["href"].startswith("#run")}
    assert {f"#run-{k}" for k in range(1, 7)} <= links


@pytest.mark.parametrize("name", ["cleanse", "many"])
def test_each_run_begins_with_its_contents(pages, name):
    page = Page(pages[name])
    headings = [
        a["id"] for tag, a in page.elements if tag in ("h2", "h3") and a.get("id", "").startswith("run-")
    ]
    links = [a["href"][1:] for t, a in page.elements if t == "a" and re.fullmatch(r"#run-\d+-\d+", a["href"])]
    assert len(headings) > 4 and links == headings
    assert sum(tag == "nav" for tag, _ in page.elements) == len({place.rsplit("-", 1)[0] for place in links})


def test_the_page_is_the_same_byte_for_byte_in_any_process(pages, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(cleansed().to_json()))
    (tmp_path / "matplotlibrc").write_text("font.size: 30\nlines.linewidth: 9\nsvg.fonttype: path\n")
    code = (
        "import sys; from bdclean.cli.main import run; "
        "assert run(['report', 'a.json', '--out', 'page.html']) == 0; "
        "bad = {'torch', 'torchvision', 'scipy'} & set(sys.modules); assert not bad, bad"
    )
    root = str(Path(bdclean.__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": "5", "TZ": "Asia/Tokyo"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").read_text() == pages["cleanse"]


def test_an_image_counts_as_moved_only_where_the_trigger_moved_it():
    record = scanned()
    (moved,) = embedded.strips(record)[0].pairs
    assert moved.moved_before and (moved.given_before, moved.before) == ("yield", "stop")
    record.pictures[0].before = 0
    (mistaken,) = embedded.strips(record)[0].pairs
    assert not mistaken.moved_before and mistaken.given_before == "stop, is yield"


def test_only_pictures_of_moderate_size_are_shown():
    assert png(dot()) == dot()
    for text in ("", "x", dot()[:20], dot(2000, 2), dot(0, 2), dot() + "\n", "A" * 400_000):
        assert png(text) == "", text[:30]


def test_curves_come_from_numbers_alone():
    rows = [
        {"step": 1, "loss": 1.0, "x": "<", "big": 1e300},
        {"step": 2, "loss": float("nan")},
        3,
        {"loss": 2},
    ]
    assert [name for name, *_ in curves([*rows, {"step": 3, "loss": 0.5}])] == ["loss"]
    assert curves([]) == curves([{"loss": 1}]) == []
    (found,) = curves([{"step": k % 7, "loss": 1e8 * k} for k in range(3000)])
    assert found[2:] == (0.0, 1e8 * 2999) and len(found[1]) < 60_000


@pytest.mark.parametrize(
    "word",
    ["plain", "two words", "it's", "a\nb\x1b[0m", "back\\slash\n", "caf\u00e9", "\u202eabc", "x\udc80y", ""],
)
def test_the_command_is_read_back_by_a_shell(word):
    script = f"printf %s {wording.quoted(word)}"
    done = subprocess.run(["bash", "-c", os.fsencode(script)], capture_output=True, timeout=60)
    assert done.stdout == os.fsencode(word)


def test_many_rows_that_pass_are_folded_but_there(pages):
    shown = pages["scan"]
    assert "more that pass" in shown and all(f"sig:delta={k}" in shown for k in range(20))


def test_the_command_names_the_model_that_came_from_standard_input():
    record = scanned()
    record.argv = ["bdclean", "scan", "-", "--data", "images"]
    assert words.command(record) == "bdclean scan 'my model.safetensors' --data images"


def test_bars_are_as_long_as_the_rates_they_stand_for(pages):
    """ASR, interval, base rate, controls (median to highest) and threshold, in percent of the track."""
    (tag,) = re.findall(
        r'aria-label="[^"]*badnets:size=3[^"]*">(.*?)</div>', pages["scan"], re.S
    ) or re.findall(r'<code>badnets:size=3</code>.*?<div class="plot">(.*?)</div>', pages["scan"], re.S)
    found = {
        kind: {key: float(value) for key, value in re.findall(r"(left|width):([\d.]+)%", style)}
        for kind, style in re.findall(r'<i class="(\w+)" style="([^"]*)"', tag)
    }
    record = scanned()
    first = record.triggers[0]
    assert found["asr"] == {"width": pytest.approx(98.3)}
    assert found["interval"] == {
        "left": pytest.approx(100 * first.asr.low, abs=0.01),
        "width": pytest.approx(100 * (first.asr.high - first.asr.low), abs=0.02),
    }
    assert found["base"] == {"left": pytest.approx(1.0)}
    controls = first.control_rate
    assert found["controls"] == {
        "left": pytest.approx(100 * controls["median"]),
        "width": pytest.approx(100 * (controls["highest"] - controls["median"]), abs=0.02),
    }
    assert found["threshold"] == {"left": pytest.approx(20.0)}


def test_the_map_of_features_shows_both_encoders_and_says_what_is_seen(pages):
    shown, page = pages["cleanse"], Page(pages["cleanse"])
    drawings = re.findall(r'<svg [^>]*class="scatter".*?</svg>', shown, re.S)
    assert len(drawings) == 2
    for number, drawing in enumerate(drawings, 1):
        assert drawing.count("<circle") == drawing.count("<path") == 6
        assert drawing.count('class="ringed"') == 3, "those of the target class"
        names = re.search(r'role="img" aria-labelledby="([^"]*)"', drawing).group(1).split()
        assert names == [f"run-1-map{number}", f"run-1-map{number}-more"]
        assert all(f'id="{name}"' in drawing for name in names) and "6 images as given" in drawing
        assert "yield (1), stamped" in drawing
        places = re.findall(r'c[xy]="([\d.]+)"', drawing) + re.findall(r"[M ]([\d.]+)(?= |m)", drawing)
        assert places and all(0 <= float(place) <= SIDE for place in places)
    for part in (
        "Before stamped images lie 0.00 times as far apart as clean ones; two axes of clean features, 43 %",
        "Both maps have one scale",
        "stop (0), where stamped images go",
    ):
        assert part in page.words, part
    assert "Where features lie" not in Page(pages["scan"]).words


def test_a_map_of_one_encoder_has_no_sides_and_clusters_have_no_names():
    record = scanned()
    record.feature_map = mapped("suspect")
    record.feature_map.grouping = "clusters"
    found = scatter(record)
    assert [panel.title for panel in found.panels] == [""] and found.target == "cluster 0"
    assert [name for name, _ in found.legend] == ["cluster 0", "cluster 1"]
    assert len({hue for _, hue in found.legend}) == 2


def test_of_many_classes_the_targets_images_alone_are_coloured():
    record = scanned()
    record.feature_map = mapped("suspect", n=40)
    record.feature_map.groups = [k % (MOST_COLOURS + 1) for k in range(40)]
    found = scatter(record)
    assert len(found.legend) == 1
    assert all((mark.hue is not None) == mark.ringed for mark in found.panels[0].given)


@pytest.mark.parametrize(
    "change",
    [
        {"clean": [[0.0, 0.0]]},
        {"stamped": [[0.0]] * 6},
        {"stamped": [[0.0, 1e9]] * 6},
        {"clean": [[0.0, 0.0, 0.0]] * 6},
    ],
)
def test_what_a_file_calls_a_map_and_is_none_is_left_out(change):
    record = scanned()
    record.feature_map = mapped("suspect")
    for key, value in change.items():
        setattr(record.feature_map.models[0], key, value)
    assert scatter(record) is None
    record.feature_map = mapped("suspect", n=MOST_POINTS + 1)
    assert scatter(record) is None
    record.feature_map = mapped("suspect", n=3)
    record.feature_map.models[0].clean = record.feature_map.models[0].stamped = [[0.5, 0.5]] * 3
    assert scatter(record).panels[0].given[0].x == SIDE / 2, "all at one place is in the middle"


def luminance(colour):
    channels = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_is_read_on_its_ground_in_light_and_dark(pages):
    """WCAG 2's contrast of 4.5 for each colour of text on the grounds that it stands on, in both colour schemes."""
    style = re.search(r"<style>(.*?)</style>", pages["scan"], re.S).group(1)
    assert '<meta name="viewport" content="width=device-width' in pages["scan"]
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in style.split("@media", 2)[:2]
    )
    assert "prefers-color-scheme: dark" in style and light["ground"] != dark["ground"]
    for scheme in (light, dark):
        for ink in ("ink", "muted", "bad", "doubt", "calm", "none", "accent"):
            for ground in ("ground", "raised", f"{ink}-ground"):
                if ground in scheme:
                    low, high = sorted((luminance(scheme[ink]), luminance(scheme[ground])))
                    assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, ground)


def test_a_score_is_drawn_among_those_of_clean_networks():
    record = scanned()
    record.calibration = [Calibration("mm-bd", "more than 4 classes", 3.0, [0.0, 1.0, 1.5, 4.0], None)]
    page = Page(render([record], "html"))
    (ticks,) = [a["d"] for tag, a in page.elements if tag == "path" and a.get("class") == "clean"]
    (mark,) = [a["d"] for tag, a in page.elements if tag == "path" and a.get("class") == "own"]
    places = [float(x) for x in re.findall(r"M([\d.]+) ", ticks)]
    assert places == [12.0, 156.0, 228.0, 588.0] and mark.startswith("M444.0 ")
    assert "1 of 4 clean networks score as high; too few to calibrate" in " ".join(page.text)
    assert "clean networks score" not in render([scanned()], "html")


def test_runs_of_one_model_stand_in_one_drawing_of_accuracy_against_attack_success():
    other, blind = scanned(), scanned()
    other.checkpoint.sha256, blind.checkpoint.sha256, blind.measures = "ef" * 32, "01" * 32, []
    one, two = panels([cleansed(), scanned(), other, blind])  # one has no accuracy
    assert [point.begun for point in one.points] == [True, False, False] and len(two.points) == 1
    ((start, end),) = one.moves
    assert start.x > end.x and start.y < end.y  # a lower rate is further left, a lower accuracy lower
    assert end.xs[0] < end.x < end.xs[1] and end.ys[1] < end.y < end.ys[0]
    assert one.points[1].title == "run 1, after: attack success 3.5 %, accuracy 83.1 %"
