"""Pretrain the small byte-level Llama that ships with this project, on the standard library's own sources.

    python tools/pretrain_tiny.py --output examples/tiny-python-llama --steps 4000

Every Python installation contains its training text. The output folder is a plain Hugging Face model with a model card
that records data, steps, seed and held-out loss. The learning rate warms up, stays constant, and falls to zero over the
last fifth; `--resume` continues from the last evaluation, also with another `--steps`.
"""

import argparse
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ee_tuning.data.sample_corpus import sample_corpus
from ee_tuning.json_file import to_json

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 256


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer with one token per byte, whose id is the byte; 256 ends a document. Built on a BPE without
    merges, so that AutoTokenizer loads it.
    """
    # The ByteLevel alphabet: printable bytes stand for themselves, the others for code points from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    alphabet = {chr(byte) if byte in printable else chr(next(others)): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def stream(files: dict[str, bytes]) -> Tensor:
    """Returns the files one after the other, each closed by the end-of-text token. [n] int16"""
    end = torch.tensor([END_OF_TEXT_ID], dtype=torch.int16)
    parts = [
        part
        for text in files.values()
        if text
        for part in (torch.frombuffer(bytearray(text), dtype=torch.uint8).to(torch.int16), end)
    ]
    return torch.cat(parts)


def batches(tokens: Tensor, batch_size: int, seq_length: int, seed: int) -> Iterator[Tensor]:
    """Yields [b, s] int64 windows endlessly. They cover the stream once an epoch, at a new random offset and order each
    time.
    """
    rng = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(seq_length, (1,), generator=rng))
        windows = tokens[offset : offset + (len(tokens) - offset) // seq_length * seq_length].view(-1, seq_length)
        order = torch.randperm(len(windows), generator=rng)
        for chosen in order.split(batch_size):
            if len(chosen) == batch_size:
                yield windows[chosen].long()


def learning_rate_factor(step: int, steps: int, warmup: int = 100) -> float:
    """Returns the factor: warm-up, plateau, and a linear fall to zero over the last fifth."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / (0.2 * steps)))


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: Tensor, seq_length: int, num_windows: int = 96) -> float:
    """Returns the mean negative log-likelihood in nats per byte over evenly spaced held-out windows."""
    model.eval()
    starts = torch.linspace(0, len(tokens) - seq_length, num_windows).long()
    windows = torch.stack([tokens[s : s + seq_length].long() for s in starts])
    losses = [model(input_ids=part, labels=part).loss.item() for part in windows.split(8)]
    model.train()
    return sum(losses) / len(losses)


def optimizers_for(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Returns Muon for the matrices of the layers, and AdamW for embeddings and norms."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    rest = [p for name, p in model.named_parameters() if p.dim() != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(matrices, lr=0.01, momentum=0.95, weight_decay=0.05, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path, facts: dict) -> None:
    """Writes the Hugging Face folder, its facts as JSON, and its model card."""
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    for path in output.iterdir():
        path.chmod(0o644)  # safetensors writes 0600 whatever the umask
    (output / "training.json").write_text(to_json(facts, indent=2) + "\n", encoding="utf-8")
    rows = "\n".join(f"| {key.replace('_', ' ')} | {value} |" for key, value in facts.items())
    (output / "README.md").write_text(
        "# tiny-python-llama\n\nA byte-level Llama for trying ee_tuning on a laptop: it completes Python code so that it looks like\n"
        "Python, and knows nothing else. Trained from scratch by `tools/pretrain_tiny.py` on the sources and the documentation topics of\n"
        "the Python standard library (Python Software Foundation License); the model is under this project's Apache-2.0.\n\n"
        f"| fact | value |\n|---|---|\n{rows}\n",
        encoding="utf-8",
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the model that is written")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences per step")
    parser.add_argument("--seq-length", type=int, default=1024, help="bytes per sequence")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument(
        "--evaluate-every", type=int, default=250, help="steps between evaluations, each of which also saves"
    )
    parser.add_argument(
        "--state", type=Path, default=Path("runs/pretrain_tiny.pt"), help="where a run that can be resumed is kept"
    )
    parser.add_argument("--resume", action="store_true", help="continue from --state")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    training, held_out = sample_corpus()
    tokens, validation = stream(training), stream(held_out)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=args.seq_length,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
        pad_token_id=None,
        rms_norm_eps=1e-5,
    )
    model = LlamaForCausalLM(config)
    optimizers = optimizers_for(model)
    first_step, seconds_before = 0, 0.0
    if args.resume:
        state = torch.load(args.state, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first_step, seconds_before = state["step"], state["seconds"]
    source = batches(tokens, args.batch_size, args.seq_length, args.seed)
    for _ in range(first_step):
        next(source)
    peak = [
        [group["initial_lr"] if "initial_lr" in group else group["lr"] for group in o.param_groups] for o in optimizers
    ]
    started = time.monotonic()
    args.state.parent.mkdir(parents=True, exist_ok=True)
    for step in range(first_step, args.steps):
        for optimizer, rates in zip(optimizers, peak, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["initial_lr"], group["lr"] = rate, rate * learning_rate_factor(step, args.steps)
        batch = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        seconds = seconds_before + time.monotonic() - started
        done = step + 1
        if done % 20 == 0:
            rate = (done - first_step) * batch.numel() / (seconds - seconds_before)
            print(
                f"step {done}/{args.steps}  loss {loss.item():.4f}  {rate:,.0f} bytes/s  {seconds / 60:.1f} min",
                flush=True,
            )
        if done % args.evaluate_every == 0 or done == args.steps:
            value = held_out_loss(model, validation, args.seq_length)
            print(f"step {done}  held-out {value:.4f} nats/byte, {value / math.log(2):.3f} bits/byte", flush=True)
            write_model(
                model,
                byte_tokenizer(),
                args.output,
                {
                    "python": platform.python_version(),
                    "training_bytes": len(tokens),
                    "held_out_bytes": len(validation),
                    "parameters": sum(p.numel() for p in model.parameters()),
                    "steps": done,
                    "planned_steps": args.steps,
                    "batch_size": args.batch_size,
                    "seq_length": args.seq_length,
                    "seed": args.seed,
                    "held_out_loss_nats_per_byte": round(value, 4),
                    "held_out_bits_per_byte": round(value / math.log(2), 4),
                    "minutes": round(seconds / 60, 1),
                },
            )
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": done,
                    "seconds": seconds,
                },
                args.state,
            )


if __name__ == "__main__":
    main()
