from __future__ import annotations

import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from farfield.bench.compare import Failure, Outcome, RunResult, Settings
from farfield.bench.cost import Cost, CostPoint
from farfield.bench.page import to_html
from farfield.bench.plots import looks, short, smooth
from farfield.bench.report import REPORT_FILE, RESULTS_FILE, to_json, write
from farfield.bench.tables import bytes_in_words, cost_table, position_table, result_table, seconds_in_words


def make_outcome(seeds: int = 1, **changes: object) -> Outcome:
    names = ("dense", "window", "fma")
    settings = Settings(attentions=names, context=256, seconds=5.0, seeds=seeds, options={"block": 16, "rank": 4})
    runs = [
        RunResult(
            name, seed, 2.0 + i / 10 + seed / 100, (2.0 + i / 10, 2.0 + i / 10 + seed / 50),
            tuple((a, b, 2.2 + i / 10) for a, b in ((0, 64), (64, 128), (128, 256))),
            100 - i, 25_600, 5.0, 50 * 2**20, 1000, tuple((s, s / 20, 8.0 - s / 20) for s in range(1, 100)), {},
        )
        for seed in range(seeds)
        for i, name in enumerate(names)
    ]  # fmt: skip
    points = [CostPoint(n, 1024 << k, 0.01 * 2**k, 0.03 * 2**k, 2**20 << k, 3) for k in range(3) for n in names]
    values: dict[str, object] = {
        "settings": settings,
        "text": {
            "source": "a <b> & c", "files": 3, "skipped": 0, "fingerprint": "0" * 64, "train_bytes": 100_000,
            "valid_bytes": 5_000, "byte_frequencies_bits": 4.5, "zlib_bits": 2.5, "simple_bytes": 4_000,
        },
        "machine": {"cores": 2, "threads": 1, "torch": "2.13.0"},
        "runs": runs,
        "cost": Cost(128, 4, points, {"dense": "too slow", "window": "limit", "fma": "limit"}, 3.0),
        "command": "farfield compare --budget 5 --out 'x y'",
        **changes,
    }  # fmt: skip
    return Outcome(**values)  # type: ignore[arg-type]


class Reader(HTMLParser):
    """Checks that tags close in order, and collects addresses and text."""

    void = ("meta", "img", "br", "link", "path", "use", "rect")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def page() -> str:
    return to_html(make_outcome(seeds=2))


def test_the_page_is_well_formed_and_fetches_nothing(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in reader.addresses)
    assert "<script" not in page
    assert "@import" not in page
    assert "url(http" not in page


def test_the_page_says_everything(page: str) -> None:
    reader = Reader()
    reader.feed(page)
    for words in (
        "Which attention for this text?", "Loss by time", "Loss by position", "Cost of one attention layer",
        "Who sees whom", "Settings", "Machine", "farfield compare --budget 5", "a <b> & c", "too slow", "2.13.0",
    ):  # fmt: skip
        assert words in reader.text, words
    assert page.count("<svg") == 3
    assert page.count("data:image/png") == 1


def test_a_page_without_runs_or_cost_still_stands() -> None:
    failures = [Failure("fma", 1, "training diverged <at> step 3")]
    page = to_html(make_outcome(runs=[], cost=None, interrupted=True, failures=failures))
    assert "training diverged &lt;at&gt; step 3" in page
    assert "nothing to compare" in page
    assert "Results</h2>" not in page


def test_unmeasured_memory_is_a_dash() -> None:
    outcome = make_outcome()
    runs = [dataclasses.replace(run, peak_bytes=None) for run in outcome.runs]
    assert outcome.cost is not None
    points = [dataclasses.replace(p, memory=None) for p in outcome.cost.points]
    page = to_html(make_outcome(runs=runs, cost=dataclasses.replace(outcome.cost, points=points)))
    assert "<td>–</td>" in page


def test_json_holds_every_number(tmp_path: Path) -> None:
    outcome = make_outcome(seeds=2)
    report = write(outcome, tmp_path)
    assert report == tmp_path / REPORT_FILE
    values = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert values == json.loads(json.dumps(to_json(outcome)))
    assert values["status"] == "finished"
    assert values["answer"]["best"] == "dense"
    assert {s["attention"] for s in values["summary"]} == {"dense", "window", "fma"}
    assert RunResult.from_json(values["runs"][0]) == outcome.runs[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_the_schema_names_every_key() -> None:
    import farfield.bench.report as module

    assert module.__doc__ is not None
    for key, value in to_json(make_outcome()).items():
        assert re.search(rf"^    {key} ", module.__doc__, re.MULTILINE), key
        inner = value[0] if isinstance(value, list) and value else value
        for name in inner if isinstance(inner, dict) and key != "machine" else ():
            assert name in module.__doc__, (key, name)


def test_tables_fit_a_terminal() -> None:
    outcome = make_outcome(seeds=2)
    assert outcome.cost is not None
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(result_table(outcome), position_table(outcome))
    console.print(cost_table(outcome.cost, "time"), cost_table(outcome.cost, "memory"))
    text = console.export_text()
    assert "…" not in text
    assert "2.005 ± 0.007" in text
    assert "max−min" in text
    assert "30 ms" in text
    assert "4 MiB" in text


@pytest.mark.parametrize(("value", "said"), [(None, "–"), (5 * 2**20, "5 MiB"), (3 * 2**30, "3.0 GiB")])
def test_bytes_in_words(value: int | None, said: str) -> None:
    assert bytes_in_words(value) == said


def test_small_words() -> None:
    assert seconds_in_words(0.0123) == "12.3 ms"
    assert seconds_in_words(2.34) == "2.3 s"
    assert [short(n) for n in (64, 1024, 3000, 65536, 1 << 20)] == ["64", "1k", "3,000", "64k", "1M"]


def test_every_attention_has_its_own_look() -> None:
    names = ("dense", "window", "fma", "blocks", "transformer_ls", "l2vit")
    colours = [colour for colour, _ in looks(names).values()]
    assert len(set(colours)) == len(names)
    assert looks(("fma",))["fma"][0] == looks(names)["fma"][0]


def test_smoothing_keeps_constants_and_the_first_point() -> None:
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    assert smooth([8.0, 7.0, 6.0])[0] == 8.0
