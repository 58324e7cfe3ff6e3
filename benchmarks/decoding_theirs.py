"""`generate` of transformers on the same weights, for the other benchmarks here: from ids to ids, greedy, never
stopping early.
"""

from pathlib import Path

import torch

CACHES = ("dynamic", "static")


class Theirs:
    """A model run by transformers, with its default attention (scaled_dot_product_attention)."""

    def __init__(self, folder: Path):
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        ).eval()
        self.pad = self.model.config.eos_token_id
        # Without an end of text it never stops early, and needs no logits processor that suppresses it at every step.
        self.model.generation_config.eos_token_id = None

    def generate(self, prompts: list[list[int]], cache: str, new_tokens: int) -> list[list[int]]:
        """Returns each prompt's new ids. Prompts have one length, so that nothing is padded."""
        return self._generate(prompts, new_tokens, cache_implementation=cache)

    def exit_early(self, prompts: list[list[int]], new_tokens: int, layer: int) -> list[list[int]]:
        """Runs self-speculation of transformers: layers 1..`layer` under the model's own last norm and output matrix
        draft, and the whole model checks. How many tokens are drafted adapts by its own schedule. One prompt.
        """
        return self._generate(prompts, new_tokens, assistant_early_exit=layer)

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], new_tokens: int, **options: object) -> list[list[int]]:
        ids = torch.tensor(prompts)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=self.pad,
            **options,
        )
        return out[:, ids.shape[1] :].tolist()
