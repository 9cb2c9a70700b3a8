"""Whatever a header says, reading ends in the tensors that the safetensors library reads, or in a refusal."""

import json
import os
import random

import pytest
import torch
from hostile.case import good_model, raw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from bdclean.bench.abuse import fuzz
from bdclean.bench.abuse.mutations import ODD, blurred
from bdclean.bench.abuse.parsers import library_reads, parsers, read_safetensors, valid
from bdclean.errors import Refused
from bdclean.networks.checkpoint.checkpoint import Checkpoint

SETTINGS = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
FIELDS = ("dtype", "shape", "data_offsets")


@st.composite
def headers(draw):
    """Bytes of a file: a valid header with edits of its tree, its text, its length and the data behind it."""
    table, data = valid()
    table = json.loads(json.dumps(table))
    odd = (
        st.sampled_from(ODD)
        | st.integers(-3, 100)
        | st.lists(st.integers(0, 9), max_size=4)
        | st.text(max_size=5)
    )
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from([*table, "new"]))
        action = draw(st.sampled_from(("field", "drop", "copy", "rename", "value", "shift")))
        entry = table.get(name)
        if action == "field" and isinstance(entry, dict):
            entry[draw(st.sampled_from(FIELDS))] = draw(odd)
        elif action == "drop":
            table.pop(name, None)
        elif action == "copy":
            table[name] = json.loads(json.dumps(table.get(draw(st.sampled_from(list(table) or [""])))))
        elif action == "rename" and name in table:
            table[draw(st.text(max_size=5))] = table.pop(name)
        elif action == "value":
            table[name] = draw(odd)
        elif isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list):
            moved = draw(st.integers(-8, 8))
            entry["data_offsets"] = [n + moved if isinstance(n, int) else n for n in entry["data_offsets"]]
    text = json.dumps(table, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 3)) == 0:
        text = blurred(text, random.Random(draw(st.integers(0, 2**32))))
    if draw(st.integers(0, 9)) == 0:
        data = draw(st.sampled_from((data[:-1], data + b"x", b"", data + data)))
    length = (
        None
        if draw(st.integers(0, 9))
        else draw(st.sampled_from((0, 1, len(text) + 1, len(text) - 1, 2**63)))
    )
    return raw(text, data, length)


@settings(SETTINGS, max_examples=200)
@given(content=headers())
def test_a_header_is_read_as_the_library_reads_it_or_refused(content, tmp_path):
    try:
        read_safetensors(content, tmp_path)
    except Refused as error:
        assert str(error).endswith(".") and str(error).isprintable()


@settings(SETTINGS, max_examples=20)
@given(seed=st.integers(0, 2**32), times=st.integers(0, 2))
def test_a_model_is_read_as_the_library_reads_it_or_refused(seed, times, tmp_path):
    content, draw = good_model(), random.Random(seed)
    for _ in range(times):
        content = blurred(content, draw)
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    try:
        found = Checkpoint.read(path)
    except Refused:
        assert times
        return
    theirs = load(content)
    assert theirs.keys() == found.tensors.keys()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in found.tensors.items())


def test_the_valid_file_is_read_and_the_comparison_can_fail(tmp_path):
    table, data = valid()
    read_safetensors(raw(table, data), tmp_path)
    assert library_reads(raw(table, data + b"x")) is None
    with pytest.raises(Refused):
        read_safetensors(raw(table, data + b"x"), tmp_path)


class TestFuzz:
    def test_a_case_is_the_same_again_and_shares_are_whole(self):
        known = parsers()
        assert sum(parser.share for parser in known.values()) == 1000
        assert [fuzz.drawn(known, 3, n) for n in range(50)] == [fuzz.drawn(known, 3, n) for n in range(50)]
        assert {fuzz.drawn(known, 3, n)[0] for n in range(600)} == set(known)

    def test_it_goes_on_where_it_was_stopped_and_counts_every_case_once(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(fuzz, "CHUNK", 40)
        assert fuzz.main(["--cases", "80", "--work", str(tmp_path)]) == 0
        first = (tmp_path / "fuzz-0.jsonl").read_text()
        assert fuzz.main(["--cases", "120", "--work", str(tmp_path)]) == 0
        assert (tmp_path / "fuzz-0.jsonl").read_text().startswith(first)
        assert "| `all` | 120 |" in capsys.readouterr().out

    @pytest.mark.parametrize("broken", ["crash", "hang", "dead", "laxer"])
    def test_what_breaks_is_counted_kept_and_repeated(self, broken, tmp_path, capsys, monkeypatch):
        from bdclean.bench.abuse import parsers as made

        def attempt(content, folder):
            if content == b"3":
                if broken == "hang":
                    while True:
                        pass
                if broken == "dead":
                    os._exit(9)
                raise made.Laxer("other") if broken == "laxer" else ValueError("ouch")

        parser = made.Parser(1000, lambda draw: str(draw.randrange(10)).encode(), attempt)
        monkeypatch.setattr(fuzz, "parsers", lambda: {"x": parser})
        monkeypatch.setattr(fuzz, "SLOW", 0.2)
        monkeypatch.setattr(fuzz, "CHUNK", 15)
        assert fuzz.main(["--cases", "30", "--seed", "1", "--work", str(tmp_path)]) == 1
        shown = capsys.readouterr().out
        end = "crash" if broken == "dead" else broken
        kept = sorted(tmp_path.glob(f"{end}-1-*.bin"))
        assert kept and all(path.read_bytes() == b"3" for path in kept)
        case = kept[0].stem.split("-")[-1]
        assert f"python -m bdclean.bench fuzz --seed 1 --case {case}" in shown
        assert "| `all` | 30 | " in shown
