"""Megatron-core is imported without torch's compiler; its fused functions are compiled when they are called."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exits import write_exits
from random_models import random_model

from ee_tuning.parallel import megatron_import
from ee_tuning.parallel.megatron_import import importing_megatron


def test_a_function_is_compiled_when_it_is_first_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user on a GPU whose functions stay unfused, or are compiled at each call; a method that loses its object."""
    compiled: list[str] = []
    monkeypatch.delitem(sys.modules, "megatron.core.jit", raising=False)
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function.__name__) or function)
    stock = torch.compile

    with importing_megatron():

        @torch.compile
        def doubled(x: int) -> int:
            return 2 * x

        class Layer:
            bias = 1

            @torch.compile
            def biased(self, x: int) -> int:
                return x + self.bias

    assert torch.compile is stock and not compiled
    assert [doubled(3), doubled(x=4), Layer().biased(5)] == [6, 8, 6]
    assert compiled == ["doubled", "biased"] and doubled.__name__ == "doubled"


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
        torch.compile(test_a_function_is_compiled_when_it_is_first_called)
    assert len(compiled) == 2


@pytest.mark.slow
def test_commands_import_what_they_need(tmp_path: Path) -> None:
    """Commands on files, and the front of a server's replicas, that wait for Megatron-core; any command that waits for
    torch's compiler, over a second. Modules are counted, for a loaded machine makes time lie.
    """
    model = tmp_path / "model"
    random_model("mixtral", model)
    exits = write_exits(model, tmp_path / "exits", exit_layers=[2], init="copy")
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
        f"words = ['--model', {str(model)!r}, '--exits', {str(exits)!r}, '--prompt-ids', '1,2,3', '--max-new-tokens', '2']\n"
        "assert cli.main(['generate', *words]) == 0\n"
        "assert 'megatron.core' in sys.modules and not {'torch._dynamo', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
