"""8-bit weights and a pair that repairs them: the kit's promises, and what each singular value gives back."""

import pytest
import torch
from own_method.low_rank_repair import RepairedLinear

import hf_accel
from hf_accel.testing import promises
from hf_accel.testing.models import tiny

SETTINGS = {"rank": 2}  # a tiny linear has no more than 32 singular values


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks transformers
@pytest.mark.parametrize("promise", promises("low-rank-repair", "llama", settings=SETTINGS), ids=str)
def test_promises(promise):
    promise()


def test_the_pair_is_the_best_of_its_rank():
    weight = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-1, 1, 24)
    x = torch.eye(16)
    values = torch.linalg.svdvals(_error(RepairedLinear(weight, bias, 0), weight, bias, x))
    for rank in (1, 4, 16):
        left = _error(RepairedLinear(weight, bias, rank), weight, bias, x).norm()
        assert left == pytest.approx(float(values[rank:].norm()), abs=1e-5)


def _error(linear, weight, bias, x):
    return linear(x) - torch.nn.functional.linear(x, weight, bias)


@torch.no_grad()
def test_undo_gives_the_very_same_linears_back():
    model = tiny.build("wan")
    before, dense = dict(model.named_modules()), tiny.run(model, "wan")
    with hf_accel.apply(model, "low-rank-repair", rank=2) as applied:
        names = [patched.module for patched in applied.report().entries[0].patched]
        assert all(isinstance(model.get_submodule(name), RepairedLinear) for name in names)
        assert not torch.equal(tiny.run(model, "wan"), dense)
    assert all(module is before[name] for name, module in model.named_modules())
    assert torch.equal(tiny.run(model, "wan"), dense)
