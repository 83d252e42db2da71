"""Configuration texts: JSON and YAML, read so that nothing is silently overridden."""

from __future__ import annotations

import json
from typing import Any

import yaml

from cai.errors import FormatError, LimitExceeded, SettingError
from cai.settings import MAX_SETTINGS_FILE


def parse_json(data: bytes, where: str) -> Any:
    """JSON with duplicate members refused.

    Raises:
        SettingError, LimitExceeded: it is not JSON, or too long.
    """
    if len(data) > MAX_SETTINGS_FILE:
        raise LimitExceeded(f"{where}: more than {MAX_SETTINGS_FILE} bytes")
    try:
        return json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (FormatError, RecursionError) as error:
        raise SettingError(f"{where}: {error}") from error
    except ValueError as error:
        raise SettingError(
            f"{where}: not JSON ({error})", hint="the file's suffix .yaml or .yml selects YAML"
        ) from error


def parse_yaml(data: bytes, where: str) -> Any:
    """YAML of plain values, with duplicate keys and aliases refused.

    Raises:
        SettingError: it is not such YAML.
    """
    try:
        return yaml.load(data, Loader=_UniqueLoader)  # noqa: S506 - derived from SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        text = " ".join(str(error).split())
        raise SettingError(f"{where}: not YAML ({text})") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise FormatError(f"duplicate member {name!r}")
        result[name] = value
    return result


def _no_constant(text: str) -> Any:
    raise FormatError(f"{text} is not JSON")


class _UniqueLoader(yaml.SafeLoader):
    """Safe YAML that refuses duplicate keys and aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases, which can make a small file huge."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not accepted")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:  # noqa: FBT001, FBT002
        """Refuse duplicate keys and keys that are not strings."""
        seen: set[str] = set()
        for key_node, _value in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str) or key in seen:
                raise yaml.YAMLError(f"duplicate or non-text key {key!r}")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)
