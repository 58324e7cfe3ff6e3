"""Megatron-core is imported without torch's compiler."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from byte_tokenizer import END, VOCABULARY, write_byte_tokenizer
from exits import write_exits
from random_models import random_model

from ee_tuning.parallel import megatron_import
from ee_tuning.parallel.megatron_import import importing_megatron


def test_functions_that_would_be_fused_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch.compile that outlives the import, also one that fails, or the import in two threads."""
    stock = torch.compile
    monkeypatch.delitem(sys.modules, "megatron.core.jit", raising=False)

    def doubled(x: int) -> int:
        return 2 * x

    def enter() -> None:
        with importing_megatron():
            assert torch.compile(doubled) is doubled
            time.sleep(0.01)

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.compile is stock
    with pytest.raises(ImportError), importing_megatron():
        raise ImportError("no Megatron-core")
    assert torch.compile is stock


def test_what_is_compiled_with_options_or_after_the_import_is_compiled_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that torch.compile no longer works for, because Megatron-core was imported before."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda *given, **options: compiled.append((given, options)))
    monkeypatch.delitem(sys.modules, "megatron.core.jit", raising=False)
    with importing_megatron():
        torch.compile(len, dynamic=False)
    assert compiled == [((len,), {"dynamic": False})]
    monkeypatch.setitem(sys.modules, "megatron.core.jit", megatron_import)
    with importing_megatron():
        torch.compile(test_functions_that_would_be_fused_stay_as_they_are)
    assert len(compiled) == 2


@pytest.mark.slow
def test_commands_import_what_they_need(tmp_path: Path) -> None:
    """Commands on files, and the front of a server's replicas, that wait for Megatron-core; any command that waits for
    torch's compiler, over a second. Modules are counted, for a loaded machine makes time lie.
    """
    model = tmp_path / "model"
    random_model("mixtral", model, vocab_size=VOCABULARY, eos_token_id=END, bos_token_id=END)
    write_byte_tokenizer(model)
    exits = write_exits(model, tmp_path / "exits", exit_layers=[2], architecture=["norm"], init="copy")
    script = (
        "import importlib, sys\n"
        "for name in ('artifact.convert', 'artifact.inspect', 'checkpoint.verify', 'data.preprocess', 'export.command',"
        " 'planning.advise', 'serving.replicated'):\n"
        "    importlib.import_module(f'ee_tuning.{name}')\n"
        "assert not {'megatron.core', 'transformers'} & set(sys.modules)\n"
        "from ee_tuning import cli\n"
        f"for command in (['inspect', {str(model)!r}], ['verify', {str(exits)!r}]):\n"
        "    assert cli.main(command) == 0\n"
        "assert not {'megatron.core', 'torch._dynamo'} & set(sys.modules)\n"
        "import ee_tuning.evaluation.evaluate_command, ee_tuning.generation.command\n"
        f"words = ['--model', {str(model)!r}, '--exits', {str(exits)!r}, '--prompt', 'one', '--max-new-tokens', '2']\n"
        "assert cli.main(['generate', *words]) == 0\n"
        "assert 'megatron.core' in sys.modules and not {'torch._dynamo', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
