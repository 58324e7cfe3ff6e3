"""YAML that a user wrote: read as it is meant, or refused in a few words."""

import re
from typing import Any

import yaml

_DECIMAL = re.compile(r"[-+]?(0|[1-9][0-9]*)")


def parse_yaml(text: str) -> Any:
    """What YAML says. Raises ValueError where it is none, is nested beyond sense, or has a mapping with one key
    twice.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuses what yaml itself passes over: it keeps a key's last value and drops the others in silence."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value} stands in it twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node

    def construct_whole_number(self, node: yaml.ScalarNode) -> int | str:
        """All but plain decimal numbers stay text, as folders may be called: YAML 1.1 takes 010 for 8, 1:30 for 90,
        2024_01 for 202401.
        """
        text = self.construct_scalar(node)
        return int(text) if _DECIMAL.fullmatch(text) else text


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_whole_number)
