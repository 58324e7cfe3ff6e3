"""An exported distributed checkpoint is one that stock Megatron-core wrote: its own GPTModel loads it, at any TP ×
PP.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from exits import write_exits
from random_models import random_llama
from safetensors.torch import load_file
from world import World

from ee_tuning import cli
from ee_tuning.config import ParallelSection, load_config
from ee_tuning.export.export_draft import export_draft
from ee_tuning.export.export_huggingface import export_huggingface
from ee_tuning.export.megatron_writer import write_megatron
from ee_tuning.parallel.topology import init_parallel

TOKENS = [[5, 17, 80, 3, 9, 41, 7], [99, 1, 0, 64, 18, 51, 2]]


def write(model: str, exits: str, output: str) -> None:
    config = load_config(None, {"model.path": model, "exits.path": exits})
    write_megatron(config, Path(output), init_parallel(ParallelSection()))


def write_hf(model: str, exits: str, output: str) -> None:
    config = load_config(None, {"model.path": model, "exits.path": exits})
    export_huggingface(config, Path(output), init_parallel(ParallelSection()))


def write_draft(model: str, exits: str, output: str) -> None:
    config = load_config(None, {"model.path": model, "exits.path": exits})
    export_draft(config, Path(output), 4, init_parallel(ParallelSection()))


def stock_model(tp: int, pp: int, ties: bool) -> Any:
    """Megatron-core's GPTModel from its local layer spec; only the attention core is ours, for the stock one wants
    CUDA.
    """
    import torch.nn.functional as F
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from ee_tuning.model.attention import CausalAttention

    config = TransformerConfig(
        num_layers=6,
        hidden_size=48,
        ffn_hidden_size=88,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=10,
        layernorm_epsilon=1e-6,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        softmax_scale=10**-0.5,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    return GPTModel(
        config,
        spec,
        vocab_size=102,
        max_sequence_length=128,
        position_embedding_type="rope",  # 101 does not divide by 2
        share_embeddings_and_output_weights=ties,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    ).eval()


def stock_logits(folder: str, tp: int, pp: int, ties: bool) -> torch.Tensor | None:
    """[b, s, v] on the ranks of the last stage."""
    from megatron.core import dist_checkpointing
    from megatron.core.pipeline_parallel import get_forward_backward_func

    topology = init_parallel(ParallelSection(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp))
    model = stock_model(tp, pp, ties)
    loaded = dist_checkpointing.load(
        {"model": model.sharded_state_dict()}, folder
    )  # as Megatron-LM loads: arguments lie beside the model
    model.load_state_dict(loaded["model"])
    assert loaded["args"].num_layers == 6 and loaded["args"].padded_vocab_size == 101
    tokens = torch.tensor(TOKENS)
    positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)

    def step(_: Any, model: Any) -> Any:
        return model(tokens, positions, None), lambda out, **_: out

    out = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=None,
        model=[model] if pp == 1 else model,
        num_microbatches=1,
        seq_length=tokens.shape[1],
        micro_batch_size=len(TOKENS),
        forward_only=True,
        collect_non_loss_data=True,
    )
    if not topology.is_last_stage:
        return None
    parts = [torch.empty_like(out[0]) for _ in range(tp)]
    dist.all_gather(parts, out[0].contiguous(), group=topology.tp_group)
    return torch.cat(parts, dim=-1)[..., :101]


def all_tensors(folder: str) -> dict[str, torch.Tensor]:
    from megatron.core import dist_checkpointing

    init_parallel(ParallelSection())
    return {
        name: tensor
        for name, tensor in dist_checkpointing.load_plain_tensors(folder).items()
        if isinstance(tensor, torch.Tensor)
    }


@pytest.mark.parametrize(("ties", "layouts"), [(False, [(1, 1), (2, 1), (1, 2), (2, 2)]), (True, [(2, 1)])])
def test_stock_megatron_loads_it_at_any_layout(
    world: World, tmp_path: Path, ties: bool, layouts: list[tuple[int, int]]
) -> None:
    """A key, an offset or an order of rows that only our own reader understands; exits that a strict loader trips
    over.
    """
    reference = random_llama(tmp_path / "model", tie_word_embeddings=ties)
    exits = write_exits(tmp_path / "model", tmp_path / "exits")
    world.run(write, str(tmp_path / "model"), str(exits), str(tmp_path / "export"))
    with torch.no_grad():
        wanted = reference(torch.tensor(TOKENS)).logits
    for tp, pp in layouts:
        answers = [
            logits for logits in world.run(stock_logits, str(tmp_path / "export"), tp, pp, ties) if logits is not None
        ]
        assert len(answers) == 4 // pp
        for logits in answers:
            torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
    held = world.run(all_tensors, str(tmp_path / "export"))[0]
    own = load_file(exits / "exit_heads.safetensors")
    assert {name for name in held if name.startswith("exits.")} == set(own)
    assert all(torch.equal(held[name], own[name]) for name in own)


def test_one_process_writes_what_four_write(world: World, tmp_path: Path) -> None:
    """Shards described by who wrote them instead of by where they lie."""
    random_llama(tmp_path / "model")
    exits = write_exits(tmp_path / "model", tmp_path / "exits")
    world.run(write, str(tmp_path / "model"), str(exits), str(tmp_path / "four"))
    assert (
        cli.main(
            f"export --format megatron --model {tmp_path / 'model'} --exits {exits} --output {tmp_path / 'one'}".split()
        )
        == 0
    )
    for folder in ("one", "four"):
        assert cli.main(["verify", str(tmp_path / folder)]) == 0
    one, four = (world.run(all_tensors, str(tmp_path / folder))[0] for folder in ("one", "four"))
    assert one.keys() == four.keys() and all(torch.equal(one[name], four[name]) for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exits", "four", "model", "one"]
    # The same for a Hugging Face folder, made of the checkpoint.
    world.run(write_hf, str(tmp_path / "one"), str(exits), str(tmp_path / "hf_four"))
    assert (
        cli.main(
            f"export --format hf --model {tmp_path / 'one'} --exits {exits} --output {tmp_path / 'hf_one'}".split()
        )
        == 0
    )
    names = sorted(path.name for path in (tmp_path / "hf_one").iterdir())
    assert "manifest.json" in names and names == sorted(path.name for path in (tmp_path / "hf_four").iterdir())
    assert all(
        (tmp_path / "hf_one" / name).read_bytes() == (tmp_path / "hf_four" / name).read_bytes() for name in names
    )
    # And for one exit as a plain model.
    world.run(write_draft, str(tmp_path / "one"), str(exits), str(tmp_path / "draft_four"))
    config = load_config(None, {"model.path": str(tmp_path / "one"), "exits.path": str(exits)})
    export_draft(config, tmp_path / "draft_one", 4)
    for path in (tmp_path / "draft_one").iterdir():
        assert path.read_bytes() == (tmp_path / "draft_four" / path.name).read_bytes()
