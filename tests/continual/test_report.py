"""The report of a run: complete, self-contained, and with the figures of the run."""

from __future__ import annotations

import html
import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from run_inputs import TASKS, go
from typer.testing import CliRunner

from rkif.cli import app
from rkif.continual.config import RunConfig
from rkif.continual.display.report import plots, write_report
from rkif.continual.evaluation.history import RoundHistory
from rkif.continual.rundir.folder import RunReader
from rkif.fusion import FusionReport
from rkif.ledger.chain import read_ledger

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "br", "path", "use", "image"}


class Page(HTMLParser):
    """Collects text and attributes, and checks that every element is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_the_page_is_complete_and_self_contained(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def right(predictions, records):\n    return 41.5 + len(records)\n")
    metrics = go(config(metrics=[f"{tmp_path / 'own.py'}:right"]), tmp_path / "run")
    written = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert written.exit_code == 0
    path = Path(written.output.strip())
    assert path == tmp_path / "run" / "report.html"
    page = Page()
    page.feed(path.read_text())
    assert page.open == []
    assert all(link.startswith(("#", "data:image/png")) for link in page.links)  # nothing is fetched
    text = " ".join(page.text)
    assert f"{metrics['op']:.1f}" in text
    for task in TASKS:
        assert task in text
    assert text.count("49.5") == len(TASKS) * (len(TASKS) + 1)  # the user metric is in every table
    assert (
        path.read_text().count("<svg") == 6
    )  # curves, importance of both, masks, size and place of the changes
    first = path.read_bytes()
    write_report(tmp_path / "run")
    assert path.read_bytes() == first


def test_methods_without_rounds_and_unfinished_runs_have_a_page(
    config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    run = go(config(method="multi_task"), tmp_path / "run")
    assert run["bwt"] is None
    assert write_report(tmp_path / "run").read_text().count("<svg") == 1
    (tmp_path / "begun").mkdir()
    shutil.copy(tmp_path / "run" / "config.yaml", tmp_path / "begun")
    for folder, message in (("begun", "has measured nothing yet"), ("nowhere", "no such folder: ")):
        failed = CliRunner().invoke(app, ["report", str(tmp_path / folder)])
        assert message in str(failed.exception)


def test_names_are_escaped(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """A name is neither HTML nor a formula for matplotlib."""
    name = '<script>alert(1)<,script>&$x$ "q'
    go(config(), tmp_path / "run")
    path = tmp_path / "run" / "metrics.json"
    path.write_text(path.read_text().replace('"tense"', json.dumps(name)))
    (tmp_path / "run/tasks/02-tense").rename(tmp_path / "run/tasks" / f"02-{name}")
    page = write_report(tmp_path / "run").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;,script&gt;&amp;$x$") >= 4


def test_the_folder_of_an_unfinished_task_is_ignored(
    config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    go(config(), tmp_path)
    expected = write_report(tmp_path).read_bytes()
    (tmp_path / "tasks/02-tense.tmp").mkdir()
    (tmp_path / "tasks/02-tense.tmp/rounds.safetensors").write_text("half")
    assert write_report(tmp_path).read_bytes() == expected


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.json", "[]", "metrics.json is damaged: it does not hold an object"),
        (
            "metrics.json",
            '{"op": 1}',
            "metrics.json is damaged, or of another version of rkif: it lacks 'met",
        ),
        ("metrics.json", "{", "metrics.json is damaged: Expecting"),
        ("config.yaml", b"\xff\xfe", "config.yaml is damaged: 'utf-8'"),
        ("tasks/02-tense/rounds.safetensors", "half", "rounds.safetensors is damaged"),
    ],
)
def test_a_damaged_run_is_one_clear_line(
    config: Callable[..., RunConfig], tmp_path: Path, file: str, content: str | bytes, message: str
) -> None:
    go(config(), tmp_path)
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(message)):
        write_report(tmp_path)


GATE = {"criteria": [{"metric": "memory_loss", "floor": -1, "tolerance": None}], "every": 2, "ladder": [0.5]}


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_a_browser_renders_the_page(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """No request, no error, no page wider than the window, and every picture is drawn, in light and dark."""
    sync_api = pytest.importorskip("playwright.sync_api")
    go(config(gate=GATE), tmp_path / "run")
    requests: list[str] = []
    complaints: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 800})
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        url = write_report(tmp_path / "run").as_uri()
        page.goto(url)
        for width in (480, 1000):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        colours = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            colours.append(
                page.evaluate(
                    "[document.body, document.querySelector('svg text')]"
                    ".map((part, i) => getComputedStyle(part)[i ? 'fill' : 'backgroundColor'])"
                )
            )
        headings = [heading.inner_text() for heading in page.query_selector_all("h2")]
        pictures = [picture.bounding_box() for picture in page.query_selector_all("svg")]
        refused = page.query_selector_all("section:has(h2:text-is('Gate')) table tr")
        browser.close()
    assert requests == [url]
    assert complaints == []
    wanted = [
        "Forgetting",
        "Accuracy",
        "Importance",
        "Masks",
        "Movement",
        "Gate",
        "Change by tensor",
        "Ledger",
    ]
    assert headings == [*wanted, "Settings"]
    assert len(pictures) == 7
    (page_light, text_light), (page_dark, text_dark) = colours
    assert page_light == "rgb(255, 255, 255)" != page_dark
    assert len({text_light, text_dark, page_light, page_dark}) == 4  # the plots' text follows the page
    assert all(box["width"] > 500 and box["height"] > 100 for box in pictures)
    assert len(refused) == 1 + 2  # a heading, and one of three rounds in each of two tasks


def test_the_headline_has_the_hand_computed_share(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    go(config(), tmp_path)
    path = tmp_path / "metrics.json"
    metrics = json.loads(path.read_text())

    def page(matrix: list[list[float]], bwt: float | None = -1.0) -> str:
        path.write_text(json.dumps(metrics | {"accuracy": matrix, "bwt": bwt}))
        return html.unescape(write_report(tmp_path).read_text())

    # (60 + 45) / (80 + 60); the last task does not count.
    text = page([[80, 70, 60], [10, 60, 45], [0, 0, 100]])
    assert (
        "Keeps 75 % of what it learned: the accuracy on the first 2 tasks was 70.0 % right after learning "
        "and is 52.5 % at the end."
    ) in text
    assert '<div class="tile bad">' in text
    assert "method recurrent_kif; model model; 20" in text
    assert "the first task was 80.0 % right after learning and is 76.0 % at the end." in page(
        [[80, 76], [10, 60], [0, 0]]
    )
    assert "some forgetting" in page([[80, 70, 72], [10, 60, 50], [0, 0, 100]])  # 122 / 140
    assert "little forgetting" in page([[80, 70, 80], [10, 60, 54], [0, 0, 100]])  # 134 / 140
    for undefined in ([[80], [10], [0]], [[0, 9, 9], [9, 0, 9], [9, 9, 9]]):
        assert "Keeps" not in page(undefined)
    assert "Mean accuracy over 3 tasks" in page([[80, 70, 60], [10, 60, 45], [0, 0, 100]], bwt=None)


def test_runs_are_compared(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    expected = {}
    for name in ("replay", "sequential"):
        expected[name] = go(config(method=name), tmp_path / "runs" / name)
    go(
        config(method="replay", tasks={**config().tasks.model_dump(), "order": TASKS[::-1]}),
        tmp_path / "other",
    )
    runs = [str(tmp_path / "runs" / name) for name in expected]
    written = CliRunner().invoke(app, ["report", *runs, "--out", str(tmp_path / "page.html")])
    assert (written.exit_code, written.output) == (0, f"{tmp_path / 'page.html'}\n")
    page = Page()
    page.feed((tmp_path / "page.html").read_text())
    assert page.open == []
    text = " ".join(page.text)
    for name, metrics in expected.items():
        assert f"{name} keeps " in text
        assert f"{metrics['op']:.1f}" in text
        assert f"{metrics['samples']:,}" in text
    assert (tmp_path / "page.html").read_text().count("<svg") == 1
    settings = (
        (tmp_path / "page.html").read_text().partition("Differing settings")[2].partition("</table>")[0]
    )
    assert "<tr><th>method</th><td>replay</td><td>sequential</td></tr>" in settings
    assert settings.count("<tr>") == 2
    best = max(expected.values(), key=lambda metrics: metrics["op"])["op"]
    assert f"<td class=best>{best:.1f}</td>" in (tmp_path / "page.html").read_text()
    # The same folder's name, and other orders.
    CliRunner().invoke(app, ["report", runs[0], runs[0], "--out", str(tmp_path / "page.html")])
    assert "replay (2)" in (tmp_path / "page.html").read_text()
    CliRunner().invoke(
        app, ["report", runs[0], str(tmp_path / "other"), "--out", str(tmp_path / "page.html")]
    )
    assert "not compared by task" in (tmp_path / "page.html").read_text()
    refused = CliRunner().invoke(app, ["report", runs[0], "--out", str(tmp_path / "one.html")])
    assert "--out names the page that compares" in str(refused.exception)
    refused = CliRunner().invoke(app, ["report", *runs, "--out", str(tmp_path / "nowhere" / "page.html")])
    assert str(refused.exception) == f"no such folder: {tmp_path / 'nowhere'}"
    refused = CliRunner().invoke(app, ["report", runs[0], str(tmp_path)])
    assert "is not a run" in str(refused.exception)
    assert not (tmp_path / "one.html").exists()


@pytest.mark.parametrize("command", ["report", "log"])
def test_a_folder_of_runs_is_listed(config: Callable[..., RunConfig], tmp_path: Path, command: str) -> None:
    metrics = go(config(method="replay"), tmp_path / "runs" / "a")
    shutil.copytree(tmp_path / "runs" / "a", tmp_path / "runs" / "deep" / "b")
    (tmp_path / "runs" / "deep" / "b" / "metrics.json").write_text("{")
    (tmp_path / "runs" / "begun").mkdir()
    shutil.copy(tmp_path / "runs" / "a" / "config.yaml", tmp_path / "runs" / "begun")
    before = sorted(tmp_path.rglob("*"))
    shown = CliRunner().invoke(app, [command, str(tmp_path / "runs")], env={"COLUMNS": "300"})
    assert shown.exit_code == 0
    lines = {line.split()[0]: line for line in shown.output.splitlines() if str(tmp_path) in line}
    assert list(lines) == [str(tmp_path / "runs" / name) for name in ("a", "begun", "deep/b")]
    a, begun, b = lines.values()
    assert f"replay 3 of 3 {metrics['op']:.1f} {metrics['bwt']:+.1f}" in " ".join(a.split())
    assert "has measured nothing yet" in begun
    assert "damaged" in b
    assert sorted(tmp_path.rglob("*")) == before


def test_the_page_shows_the_digests_of_an_average_and_of_the_trained_parameters(
    config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    go(config(ema={"decay": 0.75}, method="sequential"), tmp_path)
    text = write_report(tmp_path).read_text()
    digests = [r["parameters"] for r in read_ledger(tmp_path / "ledger.jsonl") if "parameters" in r][-1]
    assert digests["after"] != digests["trained"]
    assert f"<th>parameters</th><td>{digests['trained']}</td>" in text
    assert f"<th>published average</th><td>{digests['after']}</td>" in text


def test_the_page_shows_the_gate_and_the_ledger_check(
    config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(config(gate=GATE), tmp_path)
    with monkeypatch.context() as patch:
        reads = Mock(side_effect=read_ledger)
        patch.setattr("rkif.continual.rundir.folder.read_ledger", reads)
        text = html.unescape(write_report(tmp_path).read_text())
    reads.assert_called_once()
    records = list(read_ledger(tmp_path / "ledger.jsonl"))
    assert records[-1]["hash"] in text
    assert next(r for r in reversed(records) if "parameters" in r)["parameters"]["after"] in text
    assert f"torch {importlib.metadata.version('torch')}" in text
    assert '<div class="tile bad"><b>2</b>undone</div><div class="tile"><b>4</b>not checked</div>' in text
    for record in records:
        if record["event"] == "round" and record["gate"]["verdict"] == "undo":
            assert record["gate"]["attempts"][0]["objections"][0] in text
    path = tmp_path / "ledger.jsonl"
    path.write_text(path.read_text().replace('"seed":3', '"seed":4', 1))
    broken = write_report(tmp_path).read_text()
    assert "The ledger is broken" in broken
    assert "record 0 was changed" in broken
    assert "<h2>Gate</h2>" not in broken
    path.unlink()
    assert "The ledger is missing" in write_report(tmp_path).read_text()


def test_history_has_the_hand_computed_counts() -> None:
    inner = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0]), "b": torch.tensor([[5.0]])}
    outer = {"a": torch.tensor([4.0, 3.0, 2.0, 1.0]), "b": torch.tensor([[0.0]])}
    norms = {"inner": 1.0, "outer": 2.0, "update": 3.0}
    history = RoundHistory()
    history.add(inner, outer, FusionReport(5, (2.0, 1.5), {}, norms))
    history.add(inner, outer, FusionReport(5, ({"a": 2.0, "b": 9.0}, {"a": 0.0, "b": -1.0}), {}, norms))
    history.add(inner, outer, FusionReport(5, (0.0, 0.0), {}, norms, applied=False))
    tensors = history.tensors()
    #                                    inner only, outer only, both, neither
    assert tensors["counts.a"].tolist() == [[1, 2, 1, 0], [0, 2, 2, 0], [0, 0, 0, 0]]
    assert tensors["counts.b"].tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert tensors["importance.a"].tolist() == [[2.5, 2.5]] * 3
    assert tensors["norms"].tolist() == [[1.0, 2.0, 3.0]] * 3


def test_history_sums_to_the_reports(config: Callable[..., RunConfig], tmp_path: Path) -> None:
    metrics = go(config(), tmp_path)
    rounds = RunReader(tmp_path).rounds()
    assert list(rounds) == TASKS[1:]
    for parts in rounds.values():
        counts = torch.stack([tensor for name, tensor in parts.items() if name.startswith("counts.")]).sum(0)
        assert counts.shape == (3, 4)  # 7 steps of Q = 3: three rounds
        assert counts.sum(1).tolist() == [metrics["trainable"]] * 3
        for side in (0, 1):  # density 0.2: n - 1 - floor(0.8 (n - 1)) of n distinct scores are selected
            selected = counts[:, side] + counts[:, 2]
            n = metrics["trainable"]
            assert (selected <= n - 1 - (n - 1) * 4 // 5).all()
            assert (selected > 0).all()


def test_lines_break_where_a_task_begins() -> None:
    drawn: list[tuple[tuple[int, ...], tuple[float, ...], str]] = []

    class Panel:
        def plot(self, x: tuple[int, ...], y: tuple[float, ...], *, label: str, **_: object) -> None:
            drawn.append((x, y, label))

    plots._line(Panel(), [0, 1, 3, 4], [5.0, 6.0, 7.0, 8.0], ["a", "a", "b", "c", "c"], "red", label="value")
    # No round of task b was checked.
    assert drawn == [((0, 1), (5.0, 6.0), "value"), ((3, 4), (7.0, 8.0), "_")]
