"""The documentation builds without a warning, and says what the code does."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs mkdocs-material: pip install -e '.[docs]'")

from mkdocs.exceptions import PluginError

from deployments.batch.job_args import BatchArgs
from docs.site import bars
from docs.site.hooks import expand
from engine.sampling_params import SamplingParams
from kernels.cpu.compiler import LEVELS
from tests.docs.blocks import ROOT
from tests.house import WINGS


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(directory)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},  # an advertisement
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return directory


def test_the_code_has_what_contributing_names() -> None:
    page = (ROOT / "docs" / "contributing.md").read_text()
    named = {word for code in re.findall(r"`([^`\n]+)`", page) for word in re.findall(r"\w+", code)}
    files = [file for wing in (*WINGS, "tests", "docs") for file in (ROOT / wing).rglob("*.py")]
    there = {part for file in files for part in file.with_suffix("").parts}
    files.append(ROOT / "pyproject.toml")
    there |= {word for file in files for word in re.findall(r"\w+", file.read_text())}
    assert named <= there, named - there


def html(site: Path, page: str) -> str:
    return (site / f"{page}.html").read_text(encoding="utf-8")


def test_pages_show_the_code_and_the_configuration_as_they_are(site: Path) -> None:
    tour = re.sub(r"<[^>]+>", "", html(site, "tour"))
    for line in (
        "def _schedule_waiting",
        "class StepPlan",
        "def uniform",
        "engine/schedule/scheduler.py",
    ):
        assert line in tour
    assert ":::" not in tour
    configuration = html(site, "configuration")
    for name in {**BatchArgs.model_fields, **SamplingParams.model_fields} - {"sampling": 0}.keys():
        assert f"<code>{name}</code>" in configuration, name


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    for page in site.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img)[^>]+>", page.read_text(encoding="utf-8")):
            if 'rel="canonical"' not in tag:
                assert not re.search(r'(?:src|href)="(?:https?:)?//', tag), f"{page.name}: {tag}"


@pytest.mark.parametrize(
    "directive",
    [
        "::: source engine/engine.py Engine.no_such_method",
        "::: source engine/no_such_file.py Engine",
        "::: fields engine.config.NoSuchConfig",
        "::: file no/such/file.py",
        "::: nonsense here",
    ],
)
def test_what_is_not_there_any_more_ends_the_build(directive: str) -> None:
    with pytest.raises(PluginError, match=r"page\.md"):
        expand(f"text\n\n{directive}\n", "page.md")


def test_bars_are_as_long_as_their_numbers() -> None:
    drawn = bars.draw("title: Speed\na | 1,000 tok/s\nb | 250 tok/s | lighter", "", "", {}, None)
    longer, shorter = (float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', drawn))
    assert longer == pytest.approx(4 * shorter, abs=0.2)
    assert 'aria-label="a: 1,000 tok/s; b: 250 tok/s"' in drawn
    with pytest.raises(ValueError, match="LABEL"):
        bars.draw("a 5", "", "", {}, None)


def test_every_variable_of_the_environment_is_listed() -> None:
    listed = (ROOT / "docs" / "configuration.md").read_text()
    for package in ("kernels", "engine", "deployments", "benchmarks", "tests"):
        for file in (ROOT / package).rglob("*.py"):
            for name in re.findall(r'"(MANTA_[A-Z_]+)"', file.read_text()):
                assert f"`{name}`" in listed, f"{name} of {file.name}"


def test_every_level_of_instructions_is_listed() -> None:
    page = (ROOT / "docs" / "cpu.md").read_text()
    for level in {level for levels in LEVELS.values() for level in levels}:
        row = rf"^\| `{level.name}` \| [^|]+ \| {level.bfloat16} \| {level.bytes} \|$"
        assert re.search(row, page, re.M), row
