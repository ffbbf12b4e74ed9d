"""YAML as everybody means it: recipe files and the values of flags."""

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML as everybody means it: a repeated key is an error and `3e-4` is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ValueError(f"{node.start_mark.name}:{key_node.start_mark.line + 1}: key {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, kind: str = "recipe") -> dict[str, Any]:
    """The mapping that a file of this kind holds. Raises ValueError in one sentence where there is none."""
    try:
        with path.open(encoding="utf-8") as file:
            tree = yaml.load(file, UniqueKeyLoader)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such {kind} file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    except (yaml.YAMLError, RecursionError, TypeError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: a {kind} file is a mapping of keys to values, not {type(tree).__name__}")
    return tree


def yaml_value(text: str, flag: str) -> Any:
    """The value that a flag of this name was given. Raises ValueError where it is not YAML."""
    try:
        return yaml.load(text, UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{flag}: {text!r} is not valid YAML: {' '.join(str(error).split())}") from None
