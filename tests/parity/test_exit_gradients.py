"""What tuning sees of an exit head, its loss and every gradient, is what autograd finds in transformers' own
modules.
"""

from functools import partial
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from exits import write_exits
from plain_decoder import PlainDecoder
from random_models import FAMILIES, WITH_EXPERTS, random_model
from torch import Tensor

from ee_tuning.artifact.exit_names import exit_shard
from ee_tuning.artifact.load import load_for_tuning
from ee_tuning.checkpoint.names import merge_shards
from ee_tuning.config import Architecture, ParallelSection, load_config
from ee_tuning.losses.loss import linear_loss
from ee_tuning.parallel.topology import init_parallel

TOKENS = [5, 17, 80, 3, 9, 77, 0, 41, 12, 60]


@pytest.mark.parametrize("output", ["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_equal_autograd_through_transformers(tmp_path, family: str, output: str) -> None:
    """A head that is fed the wrong states; a weight of a `layer` head that Megatron's modules train less, or twice."""
    deep = {"n_layer" if family == "gpt2" else "num_hidden_layers": 7}  # one more than architectures
    reference = random_model(family, tmp_path / "model", **deep)
    words = [
        word
        for word in get_args(Architecture)
        if (word, output) != ("embedding", "tied")
        and not (word == "mlp" and family in WITH_EXPERTS)
        and word != "eagle3"
    ]
    layers = list(range(1, 1 + len(words)))
    exits = write_exits(
        tmp_path / "model", tmp_path / "exits", architecture=words, exit_layers=layers, output=output, adapter_rank=7
    )
    config = load_config(
        None,
        {
            "model.path": str(tmp_path / "model"),
            "exits.path": str(exits),
            "model.dtype": "float64",
            "tuning.seq_length": len(TOKENS),
        },
    )
    model = load_for_tuning(config, init_parallel(ParallelSection())).model
    plain = PlainDecoder(reference, exits, tuple(layers), torch.float64)
    for tensor in plain.heads.values():
        tensor.requires_grad_()
    labels, said = torch.tensor(TOKENS[1:] + TOKENS[:1]), plain.logits(TOKENS)
    _, inputs = model.run_layers(model.embed(torch.tensor([TOKENS])))
    for spec in model.plan.own_exits:
        wanted = F.cross_entropy(said[spec.layer], labels, reduction="sum")
        wanted.backward()
        head = model.exit_head(spec.layer)

        def project(hidden: Tensor, weight: Tensor) -> Tensor:
            return linear_loss(
                hidden, weight, labels[:, None], torch.ones(len(TOKENS), 1), vocab=model.vocab, chunk_tokens=4
            ).loss

        got: Any = head(inputs[spec.layer], project)
        got.backward()
        # transformers makes its rotations in another precision.
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0, msg=partial("{}: {}".format, spec))
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None, name
            plan = exit_shard(spec, name, model.config, 1, 0)
            for whole, gradient in merge_shards([plan], [parameter.grad]).items():
                torch.testing.assert_close(
                    gradient, plain.heads[whole].grad, rtol=1e-5, atol=5e-6, msg=partial("{}: {}".format, whole)
                )
