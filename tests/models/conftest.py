"""Fixtures of the exported models."""

from __future__ import annotations

import pytest

from models import export, noisy


@pytest.fixture(scope="session")
def exports(library: str) -> export.Exports:
    """All exported models, made on the first use. Skips, saying why, if they cannot be had."""
    try:
        return export.ensure()
    except export.UnavailableError as error:
        pytest.skip(f"no exported models: {error}")


@pytest.fixture(scope="session", params=noisy.RECIPES)
def float_model(
    request: pytest.FixtureRequest,
    exports: export.Exports,
    tmp_path_factory: pytest.TempPathFactory,
) -> noisy.Noisy:
    """A float model that no format holds exactly."""
    return noisy.make(request.param, exports, tmp_path_factory.mktemp("float") / request.param)
