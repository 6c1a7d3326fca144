"""Models that are loaded once, and a server of two of them."""

import pytest
from support.servers import serving

import hfkit


@pytest.fixture(scope="session")
def lm(tiny):
    return hfkit.load(tiny)


@pytest.fixture(scope="session")
def llama(tiny_llama):
    return hfkit.load(tiny_llama)


@pytest.fixture(scope="session")
def story():
    """The bundled model: its context is long, and its choices are those of a real one."""
    return hfkit.load("bundled")


@pytest.fixture(scope="session")
def server(story, lm):
    """(address, Server) of the bundled model, the default, and of `lm`."""
    with serving(story, lm) as running:
        yield running
