"""Documents that share a row are as if each were alone: the same logits as transformers gives for one after the
other.
"""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from decoding import full_logits
from exits import loaded_with, write_exits
from plain_decoder import PlainDecoder
from random_models import random_model

from ee_tuning.model.documents import PackedDocuments

LENGTHS = ((5, 1, 9, 6), (13, 8))  # of the documents in each row


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, document ids, positions), [b, s] each"""
    torch.manual_seed(3)
    tokens = torch.randint(0, 100, (len(LENGTHS), sum(LENGTHS[0])))
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in LENGTHS])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    return tokens, ids, positions


def our_logits(folder: Path, tokens: torch.Tensor, documents: PackedDocuments | None) -> torch.Tensor:  # [b, s, v]
    return full_logits(loaded_with(folder).model, tokens, documents)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_packed_documents_equal_documents_alone(tmp_path: Path, family: str) -> None:
    """A document that reads its neighbour, or stands at its neighbour's positions: rotary ones forgive the second,
    learned ones do not.
    """
    reference = random_model(family, tmp_path)
    tokens, ids, positions = rows()
    documents = PackedDocuments.of(ids, positions, torch.device("cpu"))
    with torch.no_grad():
        alone = [
            torch.cat([reference(part[None]).logits[0] for part in row.split(lengths)])
            for row, lengths in zip(tokens, LENGTHS, strict=True)
        ]
        torch.testing.assert_close(our_logits(tmp_path, tokens, documents), torch.stack(alone), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_positions_alone_may_begin_anew(tmp_path: Path, family: str) -> None:
    """reset_position_ids without reset_attention_mask: all of the row is seen, from positions that begin anew."""
    reference = random_model(family, tmp_path)
    tokens, _, positions = rows()
    documents = PackedDocuments.of(None, positions, torch.device("cpu"))
    seen = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).tril().expand(len(tokens), 1, -1, -1)
    with torch.no_grad():
        wanted = reference(tokens, attention_mask=seen, position_ids=positions).logits
        torch.testing.assert_close(our_logits(tmp_path, tokens, documents), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_layer_head_keeps_documents_apart_too(tmp_path: Path, family: str) -> None:
    """A head that attends over the whole row learns from a past that decoding will not have."""
    random_model(family, tmp_path / "model")
    exits = write_exits(tmp_path / "model", tmp_path / "exits", architecture="layer", exit_layers=[3])
    model = loaded_with(tmp_path / "model", exits).model

    @torch.no_grad()
    def logits(tokens: torch.Tensor, documents: PackedDocuments | None) -> torch.Tensor:  # [b, s] -> [b, s, v]
        _, inputs = model.run_layers(model.embed(tokens, documents), documents)
        return model.exit_head(3)(inputs[3], F.linear).transpose(0, 1)

    tokens, ids, positions = rows()
    alone = [
        torch.cat([logits(part[None], None)[0] for part in row.split(lengths)])
        for row, lengths in zip(tokens, LENGTHS, strict=True)
    ]
    packed = logits(tokens, PackedDocuments.of(ids, positions, torch.device("cpu")))
    torch.testing.assert_close(packed, torch.stack(alone), rtol=0, atol=1e-4)


def test_exits_see_their_own_document_alone(tmp_path: Path) -> None:
    """A head with a layer of its own that attends across documents, at positions of the row."""
    reference = random_model("llama", tmp_path / "model")
    words = ["norm", "mlp", "layer", "adapter"]
    exits = write_exits(tmp_path / "model", tmp_path / "exits", architecture=words, exit_layers=[1, 2, 3, 4])
    model = loaded_with(tmp_path / "model", exits).model
    plain = PlainDecoder(reference, exits, (1, 2, 3, 4), torch.float32)
    tokens, ids, positions = rows()
    documents = PackedDocuments.of(ids, positions, torch.device("cpu"))
    _, inputs = model.run_layers(model.embed(tokens, documents), documents)
    alone = [
        [plain.logits(part.tolist()) for part in row.split(lengths)]
        for row, lengths in zip(tokens, LENGTHS, strict=True)
    ]
    with torch.no_grad():
        for layer in (1, 2, 3, 4):
            got = model.exit_head(layer)(inputs[layer], F.linear).transpose(0, 1)
            wanted = torch.stack([torch.cat([said[layer] for said in row]) for row in alone])
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


def test_where_documents_begin_is_told_to_the_kernel_row_by_row() -> None:
    """A document that ends a row and one that begins the next, taken for one: both may have the same id."""
    documents = PackedDocuments.of(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 2, 3, 3]]), None, torch.device("cpu"))
    assert documents is not None and documents.starts is not None
    assert documents.starts.tolist() == [0, 2, 5, 7, 8, 10] and documents.longest == 3
