"""A random Llama of about 30M parameters in Hugging Face form with its untuned exit heads, for the other benchmarks
here.

    python benchmarks/random_model.py --output /tmp/llama-30m
    python benchmarks/random_model.py --output /tmp/llama-wide --hidden-size 512 --intermediate-size 1024 --vocab-size
    8000

Speed does not depend on the weights, so they are drawn and not trained. Writes OUTPUT/model and OUTPUT/exit_heads.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ee_tuning.artifact.convert import write_initial_exits
from ee_tuning.config import load_config
from ee_tuning.data.tokenizer import TOKENIZER_FILES
from ee_tuning.parallel.topology import init_parallel

SHIPPED_MODEL = Path(__file__).parents[1] / "examples" / "tiny-python-llama"
TOKENIZER_SIZE = 257
SHAPE = {
    "num_hidden_layers": 12,
    "hidden_size": 448,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": TOKENIZER_SIZE,
    "max_position_embeddings": 1024,
}
EXIT_LAYERS = (3, 6, 9)


class Folders(NamedTuple):
    """A model and its exit heads."""

    model: Path
    exits: Path


def main() -> None:
    """Writes the model and its exits, and says how large they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for both, made where it is missing")
    parser.add_argument(
        "--tokenizer", type=Path, default=SHIPPED_MODEL, help="model folder whose byte tokenizer is copied"
    )
    for name, size in SHAPE.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=size)
    parser.add_argument("--exit-layers", type=int, nargs="+", default=list(EXIT_LAYERS))
    options = vars(parser.parse_args())
    shape = {name: options[name] for name in SHAPE}
    folders = write_random_model(options["output"], options["tokenizer"], tuple(options["exit_layers"]), **shape)
    print(f"{num_parameters(folders.model) / 1e6:.1f}M parameters in {folders.model}, exits in {folders.exits}")


def write_random_model(
    output: Path, tokenizer: Path, exit_layers: tuple[int, ...] = EXIT_LAYERS, seed: int = 0, **shape: int
) -> Folders:
    """Writes the model (float32, drawn from `seed`) and its `mlp` exits at copy initialization below `output`.

    `tokenizer` is a folder with the byte tokenizer; `shape` replaces keys of SHAPE, spelled as in config.json.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = output / "model"
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {**SHAPE, **shape}
    config = transformers.LlamaConfig(
        **sizes, tie_word_embeddings=False, bos_token_id=TOKENIZER_SIZE - 1, eos_token_id=TOKENIZER_SIZE - 1
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, folder / name)
    return Folders(folder, write_exits(folder, output, exit_layers))


def write_exits(model: Path, output: Path, exit_layers: tuple[int, ...] = EXIT_LAYERS) -> Path:
    """Converts the model: `mlp` exits, copied from it, in output/exit_heads."""
    exits = output / "exit_heads"
    config = load_config(None, {"model.path": str(model), "exits.exit_layers": list(exit_layers)})
    write_initial_exits(config, exits, init_parallel(config.parallel), overwrite=True)
    return exits


def num_parameters(model: Path) -> int:
    """Returns the number of parameters in the model's safetensors files."""
    from safetensors import safe_open

    total = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                total += torch.Size(file.get_slice(name).get_shape()).numel()
    return total


if __name__ == "__main__":
    main()
