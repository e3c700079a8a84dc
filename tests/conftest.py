"""What every test runs under: a fixed seed, NaN in uninitialised memory, and GPU tests that say why they did not run."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ultrazoo.testing.poison import poisoned_memory, restored_state

# what a developer measured on this machine must not decide what a test runs
os.environ["ULTRAZOO_CACHE"] = str(Path(tempfile.gettempdir()) / f"ultrazoo-tests-{os.getpid()}")

_gpu_outcomes: list[str] = []


@pytest.fixture(autouse=True)
def _clean_room() -> Iterator[None]:
    """Seeds restored, default dtype restored, memory that ultrazoo leaves uninitialised filled with NaN."""
    # other libraries draw from numpy's legacy generator, so that is the one to seed
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    with restored_state(seed=0), poisoned_memory("ultrazoo"):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002


def no_gpu() -> str:
    """Why GPU tests cannot run here, or the empty string."""
    if not torch.backends.cuda.is_built():
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return ""


def claims_gpu() -> bool:
    """Whether this machine says that it has a GPU, whatever torch thinks."""
    wanted = os.environ.get("ULTRAZOO_EXPECT_GPU", "")
    if wanted:
        return wanted != "0"
    return Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = no_gpu()
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "gpu" in report.keywords and (report.when == "call" or report.skipped):
        _gpu_outcomes.append(report.outcome)


def canary(outcomes: list[str], claimed: bool, markexpr: str) -> str:
    """Why a run on a machine with a GPU must not count as passed, or the empty string."""
    if not claimed or "not gpu" in markexpr:
        return ""
    if outcomes and all(outcome == "skipped" for outcome in outcomes):
        return f"this machine claims a GPU, but all {len(outcomes)} GPU tests were skipped: {no_gpu() or 'see above'}"
    if not outcomes and markexpr.strip() == "gpu":
        return "this machine claims a GPU, but no GPU test was collected"
    return ""


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    # workers of xdist report to the controller, which alone sees every outcome
    if hasattr(session.config, "workerinput") or session.config.option.collectonly:
        return
    problem = canary(_gpu_outcomes, claims_gpu(), session.config.option.markexpr or "")
    if problem:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None:
            reporter.write_line(f"\nGPU canary: {problem}", red=True)
