"""Private names of PyTorch and Lightning are used in one module, which has a fallback for each."""

from __future__ import annotations

import builtins
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import audiot
from audiot.base import private

NAMES = re.compile(
    r"\b(?:torch|pl|pytorch_lightning|lightning_fabric)(?:\.\w+)*\._(?!_)\w+"  # torch._dynamo
    r"|(?:from|import) (?:torch|pytorch_lightning|lightning_fabric)\S*\._\w+"
    r"|\b_(?:step_supports_amp_scaling|broadcast_sigterm_tensor|data_parallel_size|ddp_kwargs|setup_model|new_shared|overloadpacket"
    r"|experiment)\b"
)


def test_private_names_of_pytorch_and_lightning_stand_in_one_module():
    root = Path(audiot.__file__).parent
    found = {
        f"{path.relative_to(root)}:{number}: {line.strip()}"
        for path in root.rglob("*.py")
        if path.name != "private.py"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if NAMES.search(line)
    }
    assert not found


@pytest.fixture
def without(monkeypatch):
    """Makes modules fail to import, as if they had been renamed."""

    def hide(*names):
        real = builtins.__import__

        def hidden(name, *rest):
            if name in names:
                raise ImportError(f"no module {name}")
            return real(name, *rest)

        for name in names:
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(builtins, "__import__", hidden)

    return hide


def test_a_step_compiles_without_the_pass_over_graphs(without, monkeypatch):
    without("torch._inductor.custom_graph_pass")
    monkeypatch.delitem(sys.modules, "audiot.training.compilation", raising=False)
    from audiot.training import compilation

    given = {}
    monkeypatch.setattr(torch, "compile", lambda function, options: given.update(options) or function)
    assert compilation.compiled(len, graphs=True) is len
    assert given == {"triton.cudagraphs": True}
    monkeypatch.delitem(sys.modules, "audiot.training.compilation")


def test_a_lack_of_compilers_is_a_runtime_error_without_dynamos_own(without):
    assert issubclass(private.compile_error(), Exception)
    without("torch._dynamo.exc")
    assert private.compile_error() is RuntimeError


def test_without_a_dispatch_mode_counting_says_so(without):
    without("torch.utils._python_dispatch")
    with pytest.raises(RuntimeError, match="operations can't be counted"):
        private.dispatch_mode()


@pytest.mark.parametrize("missing", [False, True])
def test_shared_storage_is_shared(monkeypatch, missing):
    if missing:
        monkeypatch.setattr(torch.UntypedStorage, "_new_shared", None, raising=False)
    storage = private.shared_storage(24)
    assert storage.is_shared()
    assert storage.nbytes() == 24


@pytest.mark.parametrize("missing", [False, True])
def test_tensors_are_scaled_together_or_one_after_the_other(monkeypatch, missing):
    if missing:
        monkeypatch.delattr(torch, "_foreach_mul_")
    tensors = [torch.ones(2), torch.arange(3.0)]
    private.scale(tensors, torch.tensor(0.5))
    assert [tensor.tolist() for tensor in tensors] == [[0.5, 0.5], [0.0, 0.5, 1.0]]


@pytest.mark.parametrize("missing", [False, True])
def test_tensors_approach_others_together_or_one_after_the_other(monkeypatch, missing):
    if missing:
        monkeypatch.delattr(torch, "_foreach_sub")
    tensors = [torch.ones(2), torch.arange(3.0)]
    private.approach(tensors, [torch.zeros(2), torch.tensor([4.0, 1.0, 6.0])], torch.tensor(0.25))
    assert [tensor.tolist() for tensor in tensors] == [[0.75, 0.75], [1.0, 1.0, 3.0]]


def test_settings_that_dynamo_no_longer_has_are_left_alone(monkeypatch):
    import torch._dynamo

    monkeypatch.setattr(torch._dynamo, "config", SimpleNamespace())
    private.compile_ddp_whole()
    with private.many_compilations():
        pass
    assert not vars(torch._dynamo.config)


def test_a_loop_that_asks_in_another_way_is_left_alone():
    trainer = SimpleNamespace(fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace()))
    private.skip_sigterm_broadcast(trainer)
    assert not vars(trainer.fit_loop.epoch_loop)
