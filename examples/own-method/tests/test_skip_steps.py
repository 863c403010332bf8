"""A step cache at the output: the kit's promises, and which steps run."""

import pytest
import torch

import hf_accel
from hf_accel.testing import promises
from hf_accel.testing.models import tiny

TIMESTEPS = (900.0, 700.0, 500.0, 300.0, 100.0)


@pytest.mark.parametrize("promise", promises("skip-steps", "wan"), ids=str)
def test_promises(promise):
    promise()


@torch.no_grad()
@pytest.mark.parametrize(
    ("settings", "sources"),
    [
        ({"interval": 2}, [0, 0, 2, 2, 4]),
        ({"interval": 3}, [0, 0, 0, 3, 3]),
        ({"interval": 2, "first_steps": 3}, [0, 1, 2, 2, 4]),
        ({"interval": 1}, [0, 1, 2, 3, 4]),
    ],
)
def test_a_step_that_does_not_run_takes_the_output_of_the_one_before(settings, sources):
    model = tiny.build("wan")
    dense = [tiny.run(model, "wan", timestep=t) for t in TIMESTEPS]
    with hf_accel.apply(model, "skip-steps", **settings) as applied:
        ours = [tiny.run(model, "wan", timestep=t) for t in TIMESTEPS]
        assert applied.report().entries[0].run.partial_steps == len(TIMESTEPS) - len(set(sources))
    assert all(torch.equal(output, dense[source]) for output, source in zip(ours, sources, strict=True))
