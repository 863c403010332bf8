"""Threads that serve the miniatures for a long time: random requests, methods put on, taken off and exchanged between
them, forwards that raise, requests that are abandoned. Every answer is what the request gets alone, and memory is flat.

    python tests/soak.py --minutes 30 --json tests/results/soak_cpu.json
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import random
import resource
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import hf_accel
from hf_accel import zoo
from hf_accel.requests import Request

Outputs = list[torch.Tensor]
WORKERS = 3
REQUESTS = 3  # of each served model
STEPS = 4


class InjectedError(Exception):
    """What a forward raises on purpose."""


class CancelledRequest(Exception):
    """What a caller raises who no longer waits."""


@dataclass
class Served:
    """A model, how a request of it runs step by step, and methods for it.

    Attributes:
        steps: ``(model, number of the request) -> functions``, each one step, which return what the request has so far.
        methods: name and settings; ``{}`` is the unpatched model.
        alone: outputs of each request under each method, one after the other.
    """

    name: str
    model: torch.nn.Module
    steps: Callable[[torch.nn.Module, int], list[Callable[[], torch.Tensor]]]
    methods: list[dict[str, Any]]
    lock: Any = None
    applied: Any = None
    method: int = 0
    readers: int = 0
    alone: dict[tuple[int, int], Outputs] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lock = threading.Condition()
        self.model.requires_grad_(False).eval()
        inner = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear)]
        inner[len(inner) // 2].register_forward_pre_hook(fail_if_told)

    def put(self, method: int) -> None:
        if self.applied is not None:
            self.applied.revert()
        self.method = method
        wanted = self.methods[method]
        self.applied = hf_accel.apply(self.model, wanted) if wanted else None

    @contextlib.contextmanager
    def serving(self):
        """Inside, the methods on the model stay."""
        with self.lock:
            self.readers += 1
        try:
            yield self.method
        finally:
            with self.lock:
                self.readers -= 1
                self.lock.notify_all()

    def exchange(self, method: int) -> None:
        """Wait until nobody is served, and put another method on."""
        with self.lock:
            self.lock.wait_for(lambda: not self.readers)
            self.put(method)


TOLD = threading.local()


def fail_if_told(*_: Any) -> None:
    """Forward pre-hook in the middle of a model: raises at the forward that this thread was told."""
    left = getattr(TOLD, "left", None)
    if left is not None:
        TOLD.left = left - 1
        if left == 0:
            TOLD.left = None
            raise InjectedError


@torch.no_grad()
def denoising(model: Any, number: int, inputs: Callable[[int], dict[str, Any]]) -> list[Callable[[], torch.Tensor]]:
    """The steps of a plain Euler loop."""
    given = inputs(number)
    name = "sample" if "sample" in given else "hidden_states"
    state = {"x": given.pop(name)}
    levels = torch.linspace(900, 100, STEPS + number)

    def step(level: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out = model(**{name: state["x"], "timestep": level[None], **given}, return_dict=False)[0]
            state["x"] = state["x"] - 0.1 * out
        return state["x"]

    return [lambda level=level: step(level) for level in levels]


def served() -> list[Served]:
    from diffusers import UNet2DConditionModel, WanTransformer3DModel
    from transformers import AutoModelForCausalLM

    import hf_accel_zoo.sdar  # noqa: F401 (registers the class)

    wan = WanTransformer3DModel.from_pretrained(zoo.path("mini-wan"), subfolder="transformer")
    unet = UNet2DConditionModel.from_pretrained(zoo.path("mini-sd"), subfolder="unet")
    llama = AutoModelForCausalLM.from_pretrained(zoo.path("mini-llama"))
    sdar = AutoModelForCausalLM.from_pretrained(zoo.path("mini-sdar"))

    def noise(number: int, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(number))

    def of_wan(number: int) -> dict[str, Any]:
        channels, size = wan.config.in_channels, 8 + 4 * (number % 2)
        text = noise(number, 1, 6, wan.config.text_dim)
        return {"hidden_states": noise(number, 1, channels, 3, size, 8), "encoder_hidden_states": text}

    def of_unet(number: int) -> dict[str, Any]:
        size = 16 + 8 * (number % 2)
        text = noise(number, 1, 6, unet.config.cross_attention_dim)
        return {"sample": noise(number, 1, unet.config.in_channels, size, 16), "encoder_hidden_states": text}

    def of_llama(model: Any, number: int) -> list[Callable[[], torch.Tensor]]:
        ids = torch.randint(0, 200, (1, 96 + 8 * number), generator=torch.Generator().manual_seed(number))
        return [lambda: model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)]

    def of_sdar(model: Any, number: int) -> list[Callable[[], torch.Tensor]]:
        ids = torch.randint(4, 60, (1, 32 + 8 * number), generator=torch.Generator().manual_seed(number))
        return [lambda: hf_accel.generate_blocks(model, ids, max_new_tokens=16, eos_token_id=[])]

    cluster = {"num_q_centroids": 8, "num_k_centroids": 12, "kmeans_iter_init": 3, "dense_steps": 1}
    pages = {"budget": 16, "page_size": 8, "min_prefix": 0}
    return [
        Served("mini-wan", wan, lambda m, n: denoising(m, n, of_wan), [{}, {"svg2": cluster}, {"grat": {}}]),
        Served(
            "mini-sd", unet, lambda m, n: denoising(m, n, of_unet),
            [{}, {"deepcache": {"cache_interval": 2}}, {"deepcache": {"cache_interval": 3}, "sparge": {"topk": 0.5}}],
        ),
        Served("mini-llama", llama, of_llama, [{}, {"sparge": {"topk": 0.5}}]),
        Served("mini-sdar", sdar, of_sdar, [{}, {"losa": pages}, {"quest": pages}, {"rcd": {"trained": True}}]),
    ]  # fmt: skip


def run(steps: list[Callable[[], torch.Tensor]], cancelled_at: int | None = None) -> torch.Tensor:
    out = None
    for index, step in enumerate(steps):
        if index == cancelled_at:
            raise CancelledRequest
        out = step()
    assert out is not None
    return out


class Soak:
    """The workers, what they counted, and the first thing that went wrong."""

    def __init__(self, seconds: float, models: list[Served], seed: int = 0):
        self.models, self.seed = models, seed
        self.until = time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []

    @property
    def over(self) -> bool:
        return time.monotonic() > self.until or bool(self.wrong)

    def work(self, number: int) -> None:
        """One thread: request after request."""
        rng = random.Random(self.seed + number)
        while not self.over:
            one = rng.choice(self.models)
            with one.serving() as method:
                if rng.random() < 0.2:
                    self.two_tasks(one, method, rng)
                else:
                    self.one_request(one, method, rng)

    def one_request(self, one: Served, method: int, rng: random.Random) -> None:
        number, fate = rng.randrange(REQUESTS), rng.random()
        steps = one.steps(one.model, number)
        TOLD.left = rng.randrange(4) if fate < 0.1 else None
        opened = hf_accel.request(one.model) if rng.random() < 0.3 else contextlib.nullcontext()
        try:
            with opened:
                out = run(steps, rng.randrange(len(steps)) if 0.1 <= fate < 0.2 else None)
        except (InjectedError, CancelledRequest) as error:
            self.counts[type(error).__name__] += 1
        except Exception as error:  # noqa: BLE001 (whatever it is, it is what the soak looks for)
            self.wrong.append(f"{one.name} under {one.methods[method]}: {type(error).__name__}: {error}")
        else:
            self.judge(one, method, number, out)
        finally:
            TOLD.left = None

    def two_tasks(self, one: Served, method: int, rng: random.Random) -> None:
        """Two asyncio tasks that take turns in this thread."""
        numbers = rng.sample(range(REQUESTS), 2)

        async def task(number: int) -> torch.Tensor:
            out = None
            for step in one.steps(one.model, number):
                out = step()
                await asyncio.sleep(0)
            assert out is not None
            return out

        async def both() -> Outputs:
            return list(await asyncio.gather(*(task(number) for number in numbers)))

        try:
            for number, out in zip(numbers, asyncio.run(both()), strict=True):
                self.judge(one, method, number, out)
        except Exception as error:  # noqa: BLE001 (as above)
            self.wrong.append(f"{one.name}, two tasks: {type(error).__name__}: {error}")

    def judge(self, one: Served, method: int, number: int, out: torch.Tensor) -> None:
        self.counts["requests"] += 1
        if not torch.equal(out, one.alone[method, number]):
            self.wrong.append(f"{one.name} under {one.methods[method]}: request {number} is not what it gets alone")

    def exchange(self) -> None:
        """The thread that puts methods on and off."""
        rng = random.Random(self.seed - 1)
        while not self.over:
            time.sleep(rng.uniform(0.5, 2.0))
            one = rng.choice(self.models)
            one.exchange(rng.randrange(len(one.methods)))
            self.counts["exchanges"] += 1


def living() -> int:
    """Python objects of requests that are held."""
    return sum(type(thing) is Request for thing in gc.get_objects())


def resident() -> float:
    """Memory of this process now, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def soak(minutes: float, seed: int = 0, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Serve for so long; what was counted, and what went wrong (nothing is an empty list)."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="hf_accel")
    models = served()
    for one in models:
        for method in range(len(one.methods)):
            one.put(method)
            for number in range(REQUESTS):
                one.alone[method, number] = run(one.steps(one.model, number))
        one.put(0)
    task = Soak(60 * minutes, models, seed)
    threads = [threading.Thread(target=task.work, args=(number,)) for number in range(WORKERS)]
    threads.append(threading.Thread(target=task.exchange))
    memory: list[float] = []
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(5.0, 6 * minutes))
        gc.collect()
        memory.append(round(resident(), 1))
    for thread in threads:
        thread.join()
    del threads
    gc.collect()
    third = max(len(memory) // 3, 1)
    early, late = max(memory[third : 2 * third] or memory), max(memory[2 * third :] or memory)
    found = {
        "minutes": minutes, "seed": seed, "workers": WORKERS, **task.counts, "wrong": task.wrong,
        "requests_alive_at_the_end": living(), "memory_mb": memory,
        "memory_mb_most_in_second_third": early, "memory_mb_most_in_last_third": late,
    }  # fmt: skip
    say(json.dumps({name: value for name, value in found.items() if name != "memory_mb"}))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = soak(args.minutes, args.seed)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(bool(found["wrong"]))


if __name__ == "__main__":
    main()
