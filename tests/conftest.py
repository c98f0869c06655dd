"""What every test starts from: no settings of the developer's own, strict, a cache of its own, an empty Dynamo."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from trt_dynamo.settings import PREFIX

if TYPE_CHECKING:
    import torch

    from tests.cache_cases import Warned

# Always the same few examples; `pytest --hypothesis-profile=wide` looks further, elsewhere each time.
SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=10, suppress_health_check=SLOW)
settings.register_profile("wide", deadline=None, max_examples=1000, suppress_health_check=SLOW)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def fresh_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Settings that hide no error of ours, and nothing left over from the test before."""
    for variable in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv(f"{PREFIX}STRICT", "1")
    monkeypatch.setenv(f"{PREFIX}CACHE_DIR", str(tmp_path / "engine-cache"))
    monkeypatch.setenv(f"{PREFIX}PROGRESS", "off")
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    forget()
    yield
    forget()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that an engine may work on."""
    import torch

    return torch.device(request.param)


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[Warned]:
    """Every warning must be expected: those that no test asked for fail it."""
    from tests.cache_cases import Warned

    each = Warned(caplog)
    yield each
    each.never()


def forget() -> None:
    """Drops what Dynamo compiled and counted, the report's counts, and which warnings were given; imports nothing for
    it.
    """
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    if "torch._dynamo.utils" in sys.modules:  # where it counts what it did not trace, for warnings of ours
        sys.modules["torch._dynamo.utils"].counters.clear()
    if "trt_dynamo.reports" in sys.modules:
        sys.modules["trt_dynamo.reports"].reset_report()
    sys.modules["trt_dynamo.settings"].warn_once.cache_clear()
