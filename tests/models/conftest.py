"""Fixture of the exported models."""

from __future__ import annotations

import pytest

from models import export


@pytest.fixture(scope="session")
def exports(library: str) -> export.Exports:
    """All exported models, made on the first use. Skips, saying why, if they cannot be had."""
    try:
        return export.ensure()
    except export.UnavailableError as error:
        pytest.skip(f"no exported models: {error}")
