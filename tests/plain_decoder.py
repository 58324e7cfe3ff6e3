"""Early-exit decoding as plainly as it can be said: transformers, no cache, every token read again at every step."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

Choice = Callable[[Tensor, list[int]], int]
"""(logits [v], the tokens before) -> the next one."""


def confidence(logits: Tensor, measure: str) -> float:
    """How sure logits [v] are."""
    p = logits.softmax(-1)
    largest = p.sort(descending=True)[0]
    entropy = -sum(x * math.log(x) for x in p.tolist() if x > 0) / math.log(len(p))
    return {"max_probability": largest[0].item(), "margin": (largest[0] - largest[1]).item(), "entropy": 1 - entropy}[
        measure
    ]


class PlainDecoder:
    """A Hugging Face model with the heads of an artifact, read with safetensors and applied by hand."""

    def __init__(self, model: Any, artifact: Path, exit_layers: tuple[int, ...], dtype: torch.dtype):
        self.model, self.exit_layers = model.to(dtype), exit_layers
        self.is_gpt2 = model.config.model_type == "gpt2"
        self.layers = model.transformer.h if self.is_gpt2 else model.model.layers
        self.heads = {name: tensor.to(dtype) for name, tensor in load_file(artifact / "exit_heads.safetensors").items()}

    def logits(self, tokens: list[int], *, differentiates: bool = False) -> dict[int, Tensor]:  # layer -> [s, v]
        """Of every exit and, under the number of layers, of the final head, after each prefix of `tokens`.

        `differentiates`: with a graph through the model behind them.
        """
        residuals: dict[int, Tensor] = {}
        hooks = [
            (layer.ln_2 if self.is_gpt2 else layer.post_attention_layernorm).register_forward_hook(
                lambda _, x, y, number=number: residuals.update({number: (x[0][0], y[0])})
            )
            for number, layer in enumerate(self.layers, 1)
        ]
        with torch.set_grad_enabled(differentiates):
            out = self.model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
        for hook in hooks:
            hook.remove()
        # A model of transformers norms the last of its hidden states.
        states = {layer: out.hidden_states[layer][0] for layer in self.exit_layers if layer < len(self.layers)}
        logits = {layer: self._head(layer, hidden, residuals[layer]) for layer, hidden in states.items()}
        return {**logits, len(self.layers): out.logits[0]}

    def decode(
        self,
        prompt: list[int],
        num_tokens: int,
        threshold: float | dict[int, float],
        measure: str = "max_probability",
        choose: "Choice | None" = None,
        fixed: int | None = None,
        stop: frozenset[int] = frozenset(),
    ) -> tuple[list[int], list[int]]:
        """(tokens, the layer each left at): the first exit sure enough, else the final head; the first token is the
        final head's.
        """
        tokens, left, last = list(prompt), [], len(self.layers)
        for step in range(num_tokens):
            logits = self.logits(tokens)
            for layer in (*self.exit_layers, last):
                wanted = threshold.get(layer, 2.0) if isinstance(threshold, dict) else threshold
                if layer == (fixed or last) or (
                    fixed is None and step > 0 and confidence(logits[layer][-1], measure) >= wanted
                ):
                    break
            tokens.append(int(logits[layer][-1].argmax()) if choose is None else choose(logits[layer][-1], tokens))
            left.append(layer)
            if tokens[-1] in stop:
                break
        return tokens[len(prompt) :], left

    def _head(self, layer: int, hidden: Tensor, residual: tuple[Tensor, Tensor]) -> Tensor:
        def tensor(name: str) -> Tensor | None:
            return self.heads.get(f"exits.{layer}.{name}")

        x, (a, normed) = hidden, residual
        if any(name.startswith(f"exits.{layer}.layer.") for name in self.heads):
            x = self._own_layer(layer, hidden)
        if tensor("adapter.up.weight") is not None:
            act = partial(F.gelu, approximate="tanh") if self.is_gpt2 else F.silu
            inner = act(F.linear(self._norm(x, tensor, "adapter.norm"), tensor("adapter.down.weight")))
            x = x + F.linear(inner, tensor("adapter.up.weight"))
        if tensor("mlp.gate_proj.weight") is not None:
            x = a + F.linear(
                F.silu(F.linear(normed, tensor("mlp.gate_proj.weight")))
                * F.linear(normed, tensor("mlp.up_proj.weight")),
                tensor("mlp.down_proj.weight"),
            )
        if tensor("mlp.c_fc.weight") is not None:  # as gpt2 has it: [inputs, outputs]
            inner = F.gelu(normed @ tensor("mlp.c_fc.weight") + tensor("mlp.c_fc.bias"), approximate="tanh")
            x = a + inner @ tensor("mlp.c_proj.weight") + tensor("mlp.c_proj.bias")
        if tensor("norm.weight") is not None:
            x = self._norm(x, tensor, "norm")
        if tensor("linear.down.weight") is not None:
            x = x + F.linear(
                F.linear(x, tensor("linear.down.weight")), tensor("linear.up.weight"), tensor("linear.bias")
            )
        if tensor("linear.weight") is not None:
            x = F.linear(x, tensor("linear.weight"), tensor("linear.bias"))
        output = tensor("output.weight")
        return F.linear(x, self.model.lm_head.weight if output is None else output)

    def _norm(self, x: Tensor, tensor: Callable[[str], Tensor | None], name: str) -> Tensor:
        weight, shape, config = tensor(f"{name}.weight"), (x.shape[-1],), self.model.config
        if self.is_gpt2:
            return F.layer_norm(x, shape, weight, tensor(f"{name}.bias"), config.layer_norm_epsilon)
        return F.rms_norm(x, shape, weight, config.rms_norm_eps)

    def _own_layer(self, exit_layer: int, hidden: Tensor) -> Tensor:  # [s, h] -> [s, h]
        """transformers' own class of layer with the head's weights, over the whole sequence."""
        prefix = f"exits.{exit_layer}.layer."
        weights = _packed(
            {name.removeprefix(prefix): tensor for name, tensor in self.heads.items() if name.startswith(prefix)}
        )
        assert weights.keys() == dict(self.layers[-1].named_parameters()).keys()
        positions = torch.arange(len(hidden))[None]
        # No mask: sdpa is then causal.
        rotation = {} if self.is_gpt2 else {"position_embeddings": self.model.model.rotary_emb(hidden[None], positions)}
        out = functional_call(self.layers[-1], weights, (hidden[None],), {"attention_mask": None, **rotation})
        return (out[0] if isinstance(out, tuple) else out)[0]


def _packed(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, experts as transformers has them in memory: all in one tensor."""
    packed = {name.replace("block_sparse_moe.", "mlp."): tensor for name, tensor in layer.items()}
    experts = {name: packed.pop(name) for name in list(packed) if ".experts." in name}
    if experts:
        parts = ("w1", "w3", "w2") if "mlp.experts.0.w1.weight" in experts else ("gate_proj", "up_proj", "down_proj")
        gate, up, down = (
            torch.stack([experts[f"mlp.experts.{i}.{part}.weight"] for i in range(len(experts) // 3)]) for part in parts
        )
        packed.update({"mlp.experts.gate_up_proj": torch.cat((gate, up), dim=1), "mlp.experts.down_proj": down})
    return packed
