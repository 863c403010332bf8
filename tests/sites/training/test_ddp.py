"""Communication hooks: registered once, and plain all-reduce when the recipe is gone."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel
from toys import TOYS, llama, trainer, weights

import hf_accel
from hf_accel import errors, registry
from hf_accel.sites.training.ddp import exchange

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
IDS = torch.arange(16).reshape(2, 8) % 31


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(network) -> list[torch.Tensor]:
    network.zero_grad()
    network(input_ids=IDS, labels=IDS).loss.backward()
    return [p.grad.clone() for p in network.parameters()]


def wrapped(folder):
    """A Trainer whose model is in DDP already, as after a first training in several processes."""
    t = trainer(folder, max_steps=2)
    t.model_wrapped = DistributedDataParallel(t.model)
    return t


def test_hook_of_a_ddp_that_is_there_and_all_reduce_after_it(tmp_path, alone):
    t = wrapped(tmp_path)
    plain = gradients(DistributedDataParallel(llama()))
    applied = hf_accel.apply(t, "toy-hook")
    assert all(torch.equal(a, 2 * b) for a, b in zip(gradients(t.model_wrapped), plain, strict=True))
    assert applied.stats()["trainer"]["toy-hook"]["buckets"] == 1
    applied.revert()
    assert all(torch.equal(a, b) for a, b in zip(gradients(t.model_wrapped), plain, strict=True))
    hf_accel.apply(t, "toy-hook")  # torch takes one hook; ours is there already
    assert [hook for hook, _ in t.model_wrapped._comm_hooks] == [exchange]
    assert all(torch.equal(a, 2 * b) for a, b in zip(gradients(t.model_wrapped), plain, strict=True))
    hf_accel.apply(t, "toy-hook")
    t.train()
    hf_accel.revert(t)
    assert t.model_wrapped._comm_hooks[0][1].recipe is None


def test_hook_of_somebody_else_is_refused(tmp_path, alone):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

    t = wrapped(tmp_path)
    t.model_wrapped.register_comm_hook(None, fp16_compress_hook)
    with pytest.raises(errors.Conflict, match="fp16_compress_hook is registered there already"):
        hf_accel.apply(t, "toy-hook")
    assert "_hf_accel" not in vars(t)
    builtin = wrapped(tmp_path)
    builtin.model_wrapped._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    with pytest.raises(errors.Conflict, match="built-in"):
        hf_accel.apply(builtin, "toy-hook")


def test_a_model_in_ddp_is_the_model(alone):
    inner = llama()
    with hf_accel.apply(DistributedDataParallel(inner), "sparge"):
        assert hf_accel.api.applied_methods(inner) == [("model", "sparge")]


def _train(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    registry.methods()
    for cls in TOYS:
        registry.register(cls)
    settings = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0, "ddp_backend": "gloo"}
    t = trainer(folder, **settings)
    applied = hf_accel.apply(t, "toy-hook")
    t.train()
    stats = applied.stats()["trainer"]["toy-hook"]
    applied.revert()
    doubled = weights(t.model)
    # The same DDP, whose hook must be plain now, beside one that never had a hook.
    t.model.load_state_dict(llama().state_dict())
    t.train()
    reverted = weights(t.model)
    plain = trainer(folder, **settings)
    plain.train()
    other = trainer(folder, **{**settings, "learning_rate": 2e-2})
    other.train()
    out = {"stats": stats, "doubled": doubled, "reverted": reverted, "plain": weights(plain.model)}
    torch.save({**out, "twice": weights(other.model)}, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_train, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    assert first["stats"]["buckets"] >= 2
    for name, value in first["plain"].items():
        assert torch.equal(first["reverted"][name], value)
        assert torch.equal(first["doubled"][name], second["doubled"][name])
        # Of SGD, gradients twice as large are a rate twice as large.
        assert torch.allclose(first["doubled"][name], first["twice"][name], atol=1e-7)
        assert not torch.equal(first["doubled"][name], value) or "norm" in name
