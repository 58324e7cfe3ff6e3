"""YAML that a user wrote: read as it is meant, or refused in a few words."""
from typing import Any

import yaml


def parse_yaml(text: str) -> Any:
    """What YAML says. Raises ValueError where it is none, is nested beyond sense, or has a mapping with one key twice."""
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
