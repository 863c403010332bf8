"""An 8-bit cache: the kit's promises, the size of the error, and the memory it takes."""

import pytest
import torch
from own_method.int8_cache import Int8Cache, Int8CacheConfig

import hf_accel
from hf_accel.testing import promises
from hf_accel.testing.models import tiny

# A tiny prompt is shorter than the default window: nothing would be encoded.
SETTINGS = {"window": 4, "group_size": 4}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks transformers
@pytest.mark.parametrize("promise", promises("int8-cache", "llama", settings=SETTINGS), ids=str)
def test_promises(promise):
    promise()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_comes_back_is_within_half_a_step(dtype):
    method = Int8Cache(Int8CacheConfig())
    x = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0, 0] = 0
    x[0, 0, 1] *= 100  # of one token only: the others have scales of their own
    codes = method.encode(x, -x, layer=0)
    keys, values = method.decode(codes, layer=0)
    assert keys.dtype == values.dtype == dtype
    step = x.float().abs().amax(-1, keepdim=True) / 127
    rounding = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype] * x.float().abs()
    assert bool(((keys.float() - x.float()).abs() <= 0.51 * step + rounding).all())
    assert torch.equal(values, -keys)
    assert not keys[0, 0, 0].any()


@torch.no_grad()
def test_it_holds_less_than_the_plain_cache():
    model = tiny.build("llama")
    ids = torch.randint(1, 50, (2, 64), generator=torch.Generator().manual_seed(0))
    with hf_accel.apply(model, "int8-cache", **SETTINGS) as applied:
        cache = model(ids, use_cache=True).past_key_values  # what is held is counted while it is there
        stats = applied.stats()["model"]["int8-cache"]
        assert cache.get_seq_length() == 64
    assert stats["held_bytes"] < 0.5 * stats["plain_bytes"]
