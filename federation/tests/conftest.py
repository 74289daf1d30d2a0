"""Tests with Flower itself: real processes, on this machine's loopback only."""

import socket

import pytest

from federation import rehearsal


@pytest.fixture
def port():
    """A port that is free, and most likely some behind it, too."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return min(s.getsockname()[1], 65000)


@pytest.fixture
def machine(tmp_path, port):
    """Make a machine in this test's folder; all its processes end with the test."""
    with rehearsal.machine(tmp_path, port) as made:
        yield made
