"""Strict YAML for users' files."""

import re
from typing import Any

import yaml

_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")


def parse_yaml(text: str) -> Any:
    """Parses YAML. Raises ValueError where it is invalid, nested too deeply, or has a mapping with a duplicate key."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuses duplicate keys, of which yaml itself silently keeps the last value."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} stands in it twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node

    def construct_whole_number(self, node: yaml.ScalarNode) -> int | str:
        """Keeps all but plain decimal numbers as text, since folders may have such names: YAML 1.1 reads 010 as 8, 1:30
        as 90, 2024_01 as 202401.
        """
        text = self.construct_scalar(node)
        return int(text) if _DECIMAL.fullmatch(text) else text


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)
