"""Engines as users have them."""

import pytest


@pytest.fixture(autouse=True)
def engines_start():
    """Each is a new interpreter."""
