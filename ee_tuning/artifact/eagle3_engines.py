"""The serving engines that take an EAGLE-3 head, by the family of its model: what their sources say, of the versions
READ.

An engine needs two things: the model's class must hand out the states of layers (vLLM's `SupportsEagle3`, SGLang's
`set_eagle3_layers_to_capture`), and the head's class must exist. vLLM's Mixtral and SGLang's do not hand them out, and
SGLang lacks `Eagle3Qwen3ForCausalLM`, the class of a head with norms of queries and keys.
"""

READ = {"vLLM": "0.32.0", "SGLang": "0.5.23"}
"""Versions whose sources were read."""
_ENGINES: dict[str, tuple[str, ...]] = {
    "llama": ("vLLM", "SGLang"),
    "mistral": ("vLLM", "SGLang"),
    "qwen2": ("vLLM", "SGLang"),
    "qwen3": ("vLLM",),
    "qwen3_moe": ("vLLM",),
    "mixtral": (),
    "gpt2": (),  # no head fits its layers: `can_draft`
}


def eagle3_engines(family: str) -> tuple[str, ...]:
    """Returns the names of those of vLLM and SGLang that serve a model of `family` with an EAGLE-3 head; of a family
    that is not known, none.
    """
    return _ENGINES.get(family, ())
