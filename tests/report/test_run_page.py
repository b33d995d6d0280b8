"""A run's page: every part of it is there, nothing in a run can write markup, and it needs no other file."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from decal.errors import RunError
from decal.recipes.finetune import finetune
from decal.report import graded, plots
from decal.report import run as pages
from decal.report.plots import Series
from decal.rundir import RunDir
from tests.training.tiny_run import config, make_files

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = "<script>alert('x')</script> & \"quotes\""


class Page(HTMLParser):
    """What a browser would see: headings, texts by section, elements; tags that do not close are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.words: dict[str, list[str]] = {"": []}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "h2":
            self.headings.append(data)
            self.words[data] = []
        elif data.strip() and "style" not in self._open:
            self.words[self.headings[-1] if self.headings else ""].append(data.strip())

    def said(self, heading: str) -> str:
        return " ".join(self.words[heading])


# What planning/grading.py writes; tests/planning/test_plan.py holds the page to a run's own.
PLAN: dict[str, Any] = {
    "forecast": {
        "peak": 3 << 30,
        "parts": {"activations": 2 << 30, "frozen weights": 96 << 20, "logits": 0, "optimizer": 700},
        "step_seconds": 0.05,
        "step_tokens": 2048,
        "seconds_by_one_step": 1234.5,
        "made_in": 0.31,
    },
    "measured": {"peak": 2 << 30, "by": "some counter", "exact": False, "step_seconds": 0.04, "seconds": 1300.0},
    "grade": {"peak_error": 0.5, "step_error": 0.25, "seconds_error": -0.0504},
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with everything that a page can show."""
    folder = make_files(tmp_path_factory.mktemp("files"))
    run = RunDir(finetune(config(folder, output="done", steps=6)).run)
    run.event("advice", advice="spike", step=4, text="the loss jumped")
    run.event("note", text=EVIL)
    run.event("check", name="stop token", status="passed", text="18 of 18 replies train one", seconds=0.25)
    run.event("check", name="packing", status="failed", text="rows leak", fix="Set data.packing=false.")
    manifest = run.manifest()
    manifest["plan"] = PLAN
    manifest["data"]["notes"] = [EVIL]
    manifest["data"]["dropped"] = {"longer than max_length": 7}
    run.write_manifest(manifest)
    pages.write(run)
    return run.path


@pytest.fixture(scope="module")
def page(done: Path) -> Page:
    return Page((done / "report.html").read_text(encoding="utf-8"))


def test_every_part_is_there(page: Page) -> None:
    assert page.headings == [
        "Advice",
        "What was trained",
        "Curves",
        "Evaluations",
        "Checks",
        "Data",
        "Forecast and measured",
        "Notes",
        "Seal",
        "Versions and machine",
        "All settings",
    ]


def test_the_parts_say_what_the_run_was(page: Page, done: Path) -> None:
    manifest = RunDir(done).manifest()
    outcome = manifest["outcome"]
    assert f"{outcome['eval_loss_before']:.3f} → {outcome['eval_loss']:.3f}" in page.said("")
    assert "Finished: step 6 of 6." in page.said("")
    assert "r=4, lora_alpha=8: scale 2 (alpha / r)" in page.said("What was trained")
    assert manifest["config"]["model"] in page.said("What was trained")
    assert page.said("Advice") == "step 4: the loss jumped"
    assert "7 longer than max_length" in page.said("Data")
    assert manifest["data"]["digest"] in page.said("Data")
    assert "stop token passed 18 of 18 replies train one 0.25 s" in page.said("Checks")
    assert "packing failed rows leak; Set data.packing=false." in page.said("Checks")
    assert manifest["versions"]["torch"] in page.said("Versions and machine")
    assert (done / "run.yaml").read_text(encoding="utf-8").strip() == page.said("All settings").partition("run.yaml ")[
        2
    ]
    evals = [e for e in RunDir(done).events() if e["kind"] == "eval"]
    assert all(f"{e['loss']:.4f}" in page.said("Evaluations") for e in evals)


def test_forecast_and_measured_stand_beside_each_other_in_units(page: Page) -> None:
    said = page.said("Forecast and measured")
    assert said.startswith(
        "part forecast measured error "
        "peak memory 3.00 GiB 2.00 GiB +50.0 % "
        "a step of 2,048 tokens 0.0500 s 0.0400 s +25.0 % "
        "all steps, foretold from one 1,234 s 1,300 s -5.0 % "
    )
    assert "Memory measured: some counter. This system does not let the peak be counted anew" in said
    assert said.endswith("part memory activations 2.00 GiB frozen weights 96.0 MiB optimizer under 0.01 MiB")


@pytest.mark.parametrize("odd", [None, "good", {}, {"forecast": 3, "measured": [], "grade": "A"}])
def test_what_is_no_forecast_is_not_shown(odd: object) -> None:
    assert graded.plan(odd) == ""


def test_the_seal_is_told_in_words(page: Page, done: Path) -> None:
    sealed = json.loads((done / "adapter" / "decal.json").read_text(encoding="utf-8"))
    assert f"adapter tensors {sealed['tensors'][:12]} scale 2 (lora_alpha=8, r=4) tokenizer " in page.said("Seal")
    assert "reference 8 prompts; the adapter moves its base by " in page.said("Seal")


def test_a_seal_of_another_form_is_shown_as_it_stands(done: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(done, tmp_path / "run"))
    (run / "adapter" / "decal.json").write_text('{"version": 9, "base": {"name": "x"}}')
    assert Page(pages.page(RunDir(run))).said("Seal") == "version 9 base name: x"


def test_there_is_a_curve_of_each_and_each_point_is_drawn(page: Page) -> None:
    for title in ("Loss", "Gradient norm", "Learning rate", "Tokens per second"):
        assert title in page.words["Curves"]
    lines = [attributes for tag, attributes in page.elements if tag == "polyline"]
    assert [line["class"] for line in lines] == ["faint", "main", "second", "main", "limit", "main", "main"]
    assert len(str(lines[0]["points"]).split()) == 6


def test_what_a_run_says_is_text_and_never_markup(page: Page, done: Path) -> None:
    assert "script" not in {tag for tag, _ in page.elements}
    assert page.said("Notes").endswith(EVIL)
    assert f"note: {EVIL}" in page.said("Data")
    assert "<script>" not in (done / "report.html").read_text(encoding="utf-8")


def test_the_page_needs_no_other_file(page: Page) -> None:
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "img", "iframe", "object")
        assert not {"src", "href", "xlink:href"} & attributes.keys()


def test_each_run_writes_its_page_at_its_end(tmp_path: Path) -> None:
    folder = make_files(tmp_path)
    finetune(config(folder, output="whole", steps=2))
    assert "Finished: step 2 of 2." in Page((folder / "whole" / "report.html").read_text()).said("")

    def stop(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(config(folder, output="broken"), on_event=stop)
    words = Page((folder / "broken" / "report.html").read_text()).said("")
    assert "Not finished: the run got to step 2 of 10. decal train run.yaml --resume begins it again, for no " in words

    def later(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(config(folder, output="broken"), resume=True, on_event=later)
    words = Page((folder / "broken" / "report.html").read_text()).said("")
    assert (
        "Not finished: the run got to step 5 of 10. decal train run.yaml --resume goes on from step-4." in words
    )  # its evaluation was the best


def test_what_stopped_an_earlier_sitting_is_not_how_the_run_ended() -> None:
    stop = {"kind": "stop", "step": 2, "kept": 1, "text": "the loss rose"}
    step = {"kind": "step", "step": 3, "steps": 3, "time": 0}
    assert "Stopped at step 2:</b> the loss rose" in pages.ended({}, [step, stop], ["step-1"])
    done = pages.ended({"outcome": {}}, [stop, {"kind": "resume"}, step], ["step-1"])
    assert done == "<p>Finished: step 3 of 3.</p>"


def test_a_run_that_wrote_nothing_but_its_settings_has_a_page(done: Path, tmp_path: Path) -> None:
    shutil.copy(done / "run.yaml", tmp_path / "run.yaml")
    page = Page(pages.page(RunDir(tmp_path)))
    assert page.headings == ["All settings"]
    assert "Not finished: the run got to its first step." in page.said("")


def test_a_folder_without_a_run_and_a_damaged_manifest_are_errors(done: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no run here.*the --output of decal train"):
        pages.page(RunDir(tmp_path))
    shutil.copy(done / "run.yaml", tmp_path / "run.yaml")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RunError, match=r"manifest\.json is damaged"):
        pages.page(RunDir(tmp_path))


def test_a_page_that_cannot_be_written_says_where_else(done: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"page\.html could not be written .*choose a place that you may write to"):
        pages.write(RunDir(done), tmp_path / "file" / "page.html")


def test_the_command_writes_it_without_torch(done: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from decal.cli import main; code = main.run(sys.argv[1:], debug=True); "
        "print(code, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    words = [sys.executable, "-c", code, "report", str(done / "run.yaml"), "--out", str(tmp_path / "page.html")]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.split("\n") == [str(tmp_path / "page.html"), "0 []", ""]
    assert (tmp_path / "page.html").read_bytes() == (done / "report.html").read_bytes()


# --- curves --------------------------------------------------------------------------------------------------------


def test_ticks_are_round_and_inside() -> None:
    assert plots.ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert plots.ticks(-3.0, 14.0) == [0.0, 5.0, 10.0]
    assert plots.ticks(2e-5, 9.1e-5) == [2e-5, 4e-5, 6e-5, 8e-5]
    assert plots.ticks(5.0, 5.0) == [5.0]


def test_a_short_logarithmic_scale_has_round_ticks_too() -> None:
    line = plots.curve("t", [Series(name="a", points=[(1.0, 0.8), (2.0, 2.6)])], log=True)
    assert Page(f"<h2>t</h2>{line}").words["t"][2:6] == ["1", "1.5", "2", "2.5"]  # then the steps


def test_a_long_line_is_thinned_without_losing_a_spike() -> None:
    points = [(float(i), 1.0) for i in range(10_000)]
    points[4321] = (4321.0, 99.0)
    thin = plots.thinned(points)
    assert len(thin) <= plots.MOST + 2
    assert (4321.0, 99.0) in thin
    assert thin == sorted(thin)


def test_smoothing_keeps_a_constant_and_the_mean_of_a_line() -> None:
    assert plots.smoothed([(1.0, 3.0), (2.0, 3.0), (3.0, 3.0)]) == [(1.0, 3.0), (2.0, 3.0), (3.0, 3.0)]
    line = [(float(i), float(i)) for i in range(100)]
    assert plots.smoothed(line)[50] == (50.0, 50.0)


def test_what_is_not_finite_is_left_out_and_an_empty_curve_is_nothing() -> None:
    assert plots.curve("t", [Series(name="a", points=[(1.0, math.nan), (2.0, math.inf)])]) == ""
    one = plots.curve("t", [Series(name="a", points=[(1.0, math.inf), (2.0, 5.0), (3.0, 0.0)])], log=True)
    page = Page(one)
    assert [tag for tag, _ in page.elements].count("circle") == 1
    assert json.dumps(page.elements).count("nan") == 0
