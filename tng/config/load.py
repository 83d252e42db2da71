"""Configurations from the command line and from files."""

from __future__ import annotations

from pathlib import Path

from cai.settings import read_settings_file
from tng.config.documents import parse_json, parse_yaml
from tng.config.entries import Config, parse


def load_content(text: str) -> Config:
    """The configuration given on the command line, as JSON.

    Raises:
        SettingError, LimitExceeded: it is no configuration.
    """
    data = text.encode("utf-8", "surrogatepass")
    return parse(parse_json(data, "--config-content"), where="--config-content")


def load_file(path: Path) -> Config:
    """The configuration of a file: YAML by its suffix (``.yaml``, ``.yml``), else JSON.

    Raises:
        InputMissing, StorageError: it cannot be read.
        SettingError, LimitExceeded: it is no configuration.
    """
    data = read_settings_file(path, what="configuration")
    yaml_file = path.suffix.lower() in (".yaml", ".yml")
    value = parse_yaml(data, str(path)) if yaml_file else parse_json(data, str(path))
    return parse(value, where=path.name)
