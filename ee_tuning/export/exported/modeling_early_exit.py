"""Causal language models with early exits: a token may leave the network at an intermediate layer whose exit is
confident enough.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True).generate(**inputs, exit_threshold=0.8)

This file stands alone: it needs torch, transformers 5 and safetensors. The exit heads are in the files that config.json
lists under `early_exit`, beside the model's own `model*.safetensors`; transformers' own class reads the same folder and
ignores them.

A token that leaves early lacks keys and values in the deeper layers. Its hidden state waits at their entrance and runs
with the next token of its row that goes deeper, as a causal block: shallow layers never run twice, and the caches end
up as a full pass leaves them.
"""

import os
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput, cached_file

# r rows · q tokens of the longest row in a pass · c positions of a cache · g key-value heads · d width of a head · h
# hidden · v vocabulary

_CACHE_STEP, _WHERE = 256, ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_FOREIGN = ("assistant_model", "past_key_values", "inputs_embeds", "synced_gpus")


@dataclass
class EarlyExitOutput(ModelOutput):
    """The output for return_dict_in_generate=True with a threshold. `exit_layers` [r, new tokens]: the layer each token
    left at, the number of layers where it did not leave early; 0 after a row's end.
    """

    sequences: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    exit_layers: Tensor | None = None


class LayerStates(NamedTuple):
    """States of a layer for its head: the layer's output, the residual after its attention, that residual normed, and
    the output of the head's own layer.
    """

    hidden: Tensor
    residual: Tensor
    normed: Tensor
    own: Tensor


class ExitHead(nn.Module):
    """The head after a layer. Its weights are buffers outside the state dict: the plain model's checkpoint stays the
    plain model's.
    """

    def __init__(self, number: int, tensors: dict[str, Tensor], layers: nn.ModuleList, config: Any):
        super().__init__()
        self.names = list(tensors)
        for name in self.names:
            self.register_buffer(name.replace(".", "_"), tensors[name], persistent=False)
        self.size, listed = config.vocab_size, config.early_exit.get("token_ids")
        # Token ids of the rows of its output matrix; the last one stands for any other token.
        self.said = torch.tensor([*listed, self.size]) if listed else None
        # A layer like the model's last one, which lends its code. A head's own transformer layer has keys and values of
        # its own, under a number of its own.
        with torch.device("meta"):
            layer = type(layers[-1])(config, layer_idx=len(layers) - 1).eval()
        (layer.attn if hasattr(layer, "attn") else layer.self_attn).layer_idx = -number
        norm = layer.ln_1 if hasattr(layer, "ln_1") else layer.input_layernorm
        self.code = {
            "layer.": layer,
            "mlp.": layer.mlp,
            "norm.": norm,
            "adapter.norm.": norm,
            "linear.": nn.Linear(1, 1),
        }
        self.activation = ACT2FN[getattr(config, "hidden_act", None) or config.activation_function]

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Name in the file, without its prefix -> tensor."""
        return {
            name.removeprefix(prefix): getattr(self, name.replace(".", "_"))
            for name in self.names
            if name.startswith(prefix)
        }

    def run(self, part: str, x: Tensor, **more: Any) -> Tensor:
        """Applies a part of the head to `x`; returns `x` where the head has no such part."""
        weights = self.tensors(part)
        return (
            torch.func.functional_call(self.code[part], weights, (x.to(next(iter(weights.values())).device),), more)
            if weights
            else x
        )

    def forward(self, seen: LayerStates, lm_head: nn.Module) -> Tensor:  # […, v + 1]
        """Returns logits, the last one of any token that the head can not predict. `lm_head` is the model's output
        matrix, for heads without one.
        """
        x, w = seen.own, self.tensors()
        if "adapter.down.weight" in w:
            x = x + F.linear(
                self.activation(F.linear(self.run("adapter.norm.", x), w["adapter.down.weight"])),
                w["adapter.up.weight"],
            )
        elif self.tensors("mlp."):
            x = seen.residual + self.run("mlp.", seen.normed)
        x, down = self.run("norm.", x), w.get("linear.down.weight")  # of a map of low rank
        x = (
            self.run("linear.", x)
            if down is None
            else x + F.linear(F.linear(x, down), w["linear.up.weight"], w["linear.bias"])
        )
        logits = F.linear(x, w["output.weight"]) if "output.weight" in w else lm_head(x)
        return (
            F.pad(logits, (0, 1), value=-torch.inf)
            if self.said is None
            else logits.new_full((*logits.shape[:-1], self.size + 1), -torch.inf).index_copy(
                -1, self.said.to(logits.device), logits
            )
        )


class _WithExits:
    """Methods that are added to a class of transformers; `forward` is that class's own."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads the model as transformers does, and then the exit heads."""
        # Without an explicit value, transformers asks on standard input whether to run other code in the folder.
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **{"trust_remote_code": False, **kwargs})
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.load_exits(pretrained_model_name_or_path, **{key: kwargs[key] for key in _WHERE if key in kwargs})
        return loaded

    def load_exits(self, path: Any, **where: Any) -> None:
        """Reads the exit heads of config.early_exit from the folder or hub repository `path`, in each layer's dtype, on
        its device.
        """
        self.exits = nn.ModuleDict()
        described = getattr(self.config, "early_exit", None) or {"files": (), "exit_layers": ()}
        tensors = dict(
            item for file in described["files"] for item in load_file(cached_file(path, file, **where)).items()
        )
        for number in described["exit_layers"]:
            beside, prefix = next(_layers_of(self)[number - 1].parameters()), f"exits.{number}."
            own = {
                name.removeprefix(prefix): tensor.to(beside)
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            self.exits[str(number)] = ExitHead(number, own, _layers_of(self), self.config)

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Saves the model as transformers does, with the exit heads beside it."""
        if tensors := {
            f"exits.{layer}.{name}": tensor
            for layer, head in self.exits.items()
            for name, tensor in head.tensors().items()
        }:
            self.config.early_exit = {**self.config.early_exit, "files": ["exit_heads.safetensors"]}
            os.makedirs(save_directory, exist_ok=True)
            save_file(tensors, os.path.join(save_directory, "exit_heads.safetensors"), metadata={"format": "pt"})
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def generate(self, *args: Any, exit_threshold: float | None = None, max_pending: int = 16, **kwargs: Any) -> Any:
        """Generates like transformers; with `exit_threshold`, a token leaves at the first exit whose largest
        probability reaches it.

        Each row of a batch decides for itself; the first token comes from full depth, which the prompt runs through
        anyway. Above 1 nothing leaves early. Once a row has `max_pending` tokens waiting before a layer, all rows catch
        up. Greedy or sampled, no beams.
        """
        if exit_threshold is None:
            return super().generate(*args, **kwargs)
        if not exit_threshold >= 0 or max_pending < 1:
            raise ValueError(
                f"exit_threshold must be at least 0 and max_pending at least 1, got {exit_threshold} and {max_pending}"
            )
        if not self.exits:
            raise ValueError(
                "exit_threshold needs exit heads, and this folder's config.json describes none (no `early_exit`)"
            )
        if wrong := [name for name in _FOREIGN if kwargs.get(name) is not None]:
            raise ValueError(f"exit_threshold does not go with {wrong[0]}; leave one of them out")
        decode = partial(
            _decode, exit_threshold=exit_threshold, max_pending=max_pending, streamer=kwargs.get("streamer")
        )
        return super().generate(*args, custom_generate=decode, **kwargs)

    @torch.no_grad()
    def exit_logits(self, input_ids: Tensor) -> dict[int, Tensor]:  # [r, s] -> layer -> [r, s, v]
        """Returns the logits of whole rows by every exit (-inf for tokens that it can not predict) and, under the
        number of layers, by the model's own head.
        """
        walk = _Walk(self, input_ids.tolist(), max_pending=1)
        return {
            end: walk.judge(index, walk.run(index, list(range(len(input_ids))))[0])[..., :-1]
            for index, end in enumerate(walk.ends)
        }


def _layers_of(model: Any) -> nn.ModuleList:
    return model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers


def _decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    exit_threshold: float,
    max_pending: int,
    streamer: Any = None,
    **prepared: Any,
) -> Any:
    """Runs the decoding loop; transformers' `generate` calls it after its preparations."""
    if generation_config.num_beams > 1:
        raise ValueError(
            f"exit_threshold goes with greedy decoding and sampling, not with num_beams={generation_config.num_beams}"
        )
    device, ends_rows = input_ids.device, any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    mask = prepared["attention_mask"] if prepared.get("attention_mask") is not None else torch.ones_like(input_ids)
    walk = _Walk(model, [ids[keep].tolist() for ids, keep in zip(input_ids, mask.bool(), strict=True)], max_pending)
    unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=device)
    scores, layers = (), []
    while unfinished.any():
        logits, left = walk.step(unfinished.nonzero()[:, 0].tolist(), exit_threshold)
        processed = logits_processor(input_ids, logits.to(device))
        scores += (processed,) if generation_config.output_scores else ()
        tokens = (
            torch.multinomial(processed.softmax(-1), 1)[:, 0] if generation_config.do_sample else processed.argmax(-1)
        )
        tokens = (
            torch.where(unfinished, tokens, generation_config._pad_token_tensor.to(device)) if ends_rows else tokens
        )
        layers.append(left)
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
        _ = streamer and streamer.put(tokens.cpu())
        for row, token in zip(walk.tokens, tokens.tolist(), strict=True):
            row.append(token)  # a row is not run after its end
        unfinished = unfinished & ~stopping_criteria(input_ids, scores)
    _ = streamer and streamer.end()
    exit_layers = torch.tensor(layers, device=device).T
    return (
        EarlyExitOutput(input_ids, scores or None, exit_layers)
        if generation_config.return_dict_in_generate
        else input_ids
    )


class _Walk:
    """Rows on their way through the segments between exits, with the pending states in front of each segment, and the
    caches.
    """

    def __init__(self, model: Any, prompts: list[list[int]], max_pending: int):
        if model.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"early exits need attn_implementation sdpa or eager, got {model.config._attn_implementation}; "
                'load the model with attn_implementation="sdpa"'
            )
        if not all(prompts):
            raise ValueError("each row must have at least one token that its attention_mask lets through")
        self.model, self.tokens, self.max_pending, self.cache = model, prompts, max_pending, _Cache(len(prompts))
        depth = len(_layers_of(model))
        self.ends = [*sorted(int(layer) for layer in model.exits if int(layer) < depth), depth]
        # Per segment and row: the number of tokens with keys and values there, and the hidden states [k, h] that wait
        # at its entrance.
        self.watermarks = [[0] * len(prompts) for _ in self.ends]
        self.waiting: list[list[list[Tensor]]] = [[[] for _ in prompts] for _ in self.ends]

    def pending(self, index: int, row: int) -> int:  # tokens that wait at the entrance
        return (self.watermarks[index - 1][row] if index else len(self.tokens[row])) - self.watermarks[index][row]

    def step(
        self, rows: list[int], threshold: float
    ) -> tuple[Tensor, list[int]]:  # [all rows, v], the layer each left at
        """Returns the next token's logits of `rows`; zeros and layer 0 for the others."""
        reads_prompt = self.watermarks[0][rows[0]] == 0
        logits, left, going, last = None, [0] * len(self.tokens), list(rows), len(self.ends) - 1
        for index, end in enumerate(self.ends):
            if not going:
                break
            # Rows that left wait here with their states. They run along, since the weights are read anyway.
            running = [row for row in rows if self.pending(index, row)]
            seen, lengths = self.run(index, running)
            if reads_prompt and index < last:
                continue
            places = torch.tensor([running.index(row) for row in going], device=seen.hidden.device)
            asked = self.judge(
                index, LayerStates(*(states[places, lengths.to(places.device)[places] - 1] for states in seen))
            )
            likely, token = asked.softmax(-1).max(-1)
            leaves = [
                index == last or is_sure for is_sure in ((likely >= threshold) & (token < asked.shape[-1] - 1)).tolist()
            ]
            logits = asked.new_zeros(len(self.tokens), asked.shape[-1] - 1) if logits is None else logits
            for i, row in ((i, row) for i, row in enumerate(going) if leaves[i]):
                logits[row], left[row] = asked[i, :-1].to(logits.device), end
            going = [row for row, goes in zip(going, leaves, strict=True) if not goes]
        self._catch_up(rows)
        return logits, left

    def judge(self, index: int, seen: LayerStates) -> Tensor:  # […, v + 1], at least float32
        """Returns the logits of the exit at the end of a segment or, at the very end, of the model's own head, as
        ExitHead does.
        """
        if index == len(self.ends) - 1:
            norm = self.model.base_model.ln_f if hasattr(self.model.base_model, "ln_f") else self.model.base_model.norm
            logits = F.pad(self.model.lm_head(norm(seen.hidden)), (0, 1), value=-torch.inf)
        else:
            logits = self.model.exits[str(self.ends[index])](seen, self.model.lm_head)
        return logits if logits.dtype == torch.float64 else logits.float()

    def run(self, index: int, rows: list[int]) -> tuple[LayerStates, Tensor]:  # states [r, q, h], lengths [r]
        """Runs the rows' pending tokens through a segment in one pass. Shorter rows repeat their last token, which
        changes nothing.
        """
        starts, counts = [self.watermarks[index][row] for row in rows], [self.pending(index, row) for row in rows]
        base, device = self.model.base_model, self.model.get_input_embeddings().weight.device
        lengths, first = torch.tensor(counts, device=device), torch.tensor(starts, device=device)[:, None]
        place = torch.minimum(torch.arange(max(counts), device=device)[None], lengths[:, None] - 1)
        if index == 0:
            ids = [self.tokens[row][start : start + n] for row, start, n in zip(rows, starts, counts, strict=True)]
            padded = torch.tensor([row + row[-1:] * (max(counts) - len(row)) for row in ids], device=device)
            hidden = self.model.get_input_embeddings()(padded)
            hidden = hidden + base.wpe(first + place) if hasattr(base, "wpe") else hidden
        else:
            parts = [torch.cat(self.waiting[index][row]) for row in rows]
            hidden = torch.stack([states[place[i].to(states.device)] for i, states in enumerate(parts)])
            self.waiting[index] = [[] if row in rows else own for row, own in enumerate(self.waiting[index])]
        seen = self._layers(index, hidden, first + place, rows, max(s + n for s, n in zip(starts, counts, strict=True)))
        for i, (row, n) in enumerate(zip(rows, counts, strict=True)):
            self.watermarks[index][row] += n
            if index + 1 < len(self.ends):
                self.waiting[index + 1][row].append(seen.hidden[i, :n])
        return seen, lengths

    def _layers(self, index: int, hidden: Tensor, positions: Tensor, rows: list[int], end: int) -> LayerStates:
        base, layers, (first, last) = (
            self.model.base_model,
            _layers_of(self.model),
            ([0, *self.ends][index], self.ends[index]),
        )
        self.cache.aim(rows, positions, end)
        unseen = (torch.arange(end, device=positions.device) > positions[..., None]).to(hidden.device)  # [r, q, c]
        mask = hidden.new_zeros(unseen.shape).masked_fill_(unseen, torch.finfo(hidden.dtype).min)[:, None]
        more = {"attention_mask": mask, "past_key_values": self.cache}
        if hasattr(base, "rotary_emb"):
            more |= {
                "position_ids": positions,
                "position_embeddings": base.rotary_emb(hidden, position_ids=positions.to(hidden.device)),
            }
        norm, kept = getattr(layers[last - 1], "ln_2", None) or layers[last - 1].post_attention_layernorm, []
        with norm.register_forward_hook(lambda _, before, after: kept.extend((*before, after))):
            for layer in layers[first:last]:
                hidden = layer(hidden, **more)
        return LayerStates(
            hidden, *kept, hidden if last == len(layers) else self.model.exits[str(last)].run("layer.", hidden, **more)
        )

    def _catch_up(self, rows: list[int]) -> None:
        crowded = (
            index
            for index in range(1, len(self.ends))
            if any(self.pending(index, row) >= self.max_pending for row in rows)
        )
        for index in range(next(crowded, len(self.ends)), len(self.ends)):
            self.run(index, [row for row in rows if self.pending(index, row)])


class _Cache:
    """Keys and values of each layer, [all rows, g, c, d], filled by each row at positions of its own. Stands in for
    transformers' Cache.
    """

    def __init__(self, num_rows: int):
        self.num_rows = num_rows
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def aim(self, rows: list[int], positions: Tensor, end: int) -> None:
        """Prepares the next pass: these rows' tokens stand at `positions` [r, q], and see the first `end` positions."""
        self.rows, self.positions, self.end = torch.tensor(rows, device=positions.device), positions, end
        self.is_all = len(rows) == self.num_rows

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Stores [r, g, q, d] and returns [r, g, c, d]: the method that transformers' attention calls."""
        stored = self._room(layer_idx, keys)
        rows, positions = self.rows.to(keys.device), self.positions.to(keys.device)
        for whole, new in zip(stored, (keys, values), strict=True):
            whole[rows[:, None], :, positions] = new.transpose(1, 2)
        return tuple(whole[:, :, : self.end] if self.is_all else whole[rows, :, : self.end] for whole in stored)

    def _room(self, layer_idx: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        old = self.layers.get(layer_idx) or (keys.new_zeros(self.num_rows, keys.shape[1], 0, keys.shape[3]),) * 2
        if (missing := self.end - old[0].shape[2]) > 0:
            # Zeros, not empty: a masked place is multiplied by weight 0, and a stray NaN would survive that.
            more = keys.new_zeros(self.num_rows, keys.shape[1], -(-missing // _CACHE_STEP) * _CACHE_STEP, keys.shape[3])
            self.layers[layer_idx] = (torch.cat((old[0], more), 2), torch.cat((old[1], more), 2))
        return self.layers[layer_idx]


for _name in (
    *(f"{_family}ForCausalLM" for _family in ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe")),
    "GPT2LMHeadModel",
):
    _early = type(
        f"EarlyExit{_name}",
        (_WithExits, getattr(transformers, _name)),
        {"__module__": __name__, "__doc__": "With early exits."},
    )
    _early.register_for_auto_class("AutoModelForCausalLM")
    globals()[_early.__name__] = _early
