"""The version, which pyproject.toml takes from here: sources may be run without being installed."""

VERSION = "0.1.0"
