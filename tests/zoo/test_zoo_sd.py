"""mini-sd: its data, its tokenizer, its judge, and the folder that stock diffusers shall load."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline

from hf_accel import zoo
from hf_accel_zoo.training.mini_sd import assemble, data, grammar, judge, train
from hf_accel_zoo.training.mini_sd import model as parts

LIMIT = 6_000_000  # bytes of the folder


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(zoo.path("mini-sd"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, prompt: str, steps: int = 2, seed: int = 0, **call) -> torch.Tensor:
    call = {"guidance_scale": 5.0, "num_inference_steps": steps, "generator": seeded(seed), **call}
    return pipe(prompt, output_type="pt", **call).images


# --- captions, held-out set, pictures ---


def test_claims_of_a_caption_are_what_it_was_drawn_from():
    scenes = grammar.sample(300, seeded())
    scenes.said[:] = True
    for index in range(len(scenes)):
        claims, shapes = grammar.claims(grammar.caption(scenes, index)), int(scenes.count[index])
        assert claims["shapes"] == [
            {
                "colour": grammar.COLOURS[scenes.colour[index, shape]],
                "form": grammar.FORMS[scenes.form[index, shape]],
                "size": grammar.SIZES[scenes.size[index, shape]],
                "texture": grammar.TEXTURES[scenes.texture[index, shape]],
            }
            for shape in range(shapes)
        ]
        assert claims.get("relation") == (grammar.RELATIONS[scenes.relation[index]] if shapes == 2 else None)
        colour, texture = scenes.back[index].tolist()
        assert claims["background"] == {
            "colour": grammar.BACK_COLOURS[colour],
            "texture": grammar.BACK_TEXTURES[texture],
        }


def test_heldout_set_is_what_the_recipe_draws():
    entries = zoo.heldout("mini-sd")
    assert len(entries) == 64
    assert entries == grammar.draw_heldout()
    assert len({tuple(pair) for pair in grammar.heldout_pairs().tolist()}) == 64


def test_training_never_draws_a_heldout_pair():
    codes = grammar.heldout_pairs() @ torch.tensor([64, 1])
    free = grammar.pair_code(grammar.sample(20_000, seeded()))
    assert torch.isin(free, codes).sum() > 200
    drawn = grammar.sample(20_000, seeded(), grammar.heldout_pairs())
    assert not torch.isin(grammar.pair_code(drawn), codes).any()
    assert (drawn.colour[:, 0] != drawn.colour[:, 1]).all()


def test_pictures_are_a_function_of_the_seed_and_shapes_stand_as_told():
    scenes = grammar.sample(64, seeded(1))
    pictures, places = data.render_with_places(scenes, seeded(2))
    assert pictures.shape == (64, 3, 64, 64)
    assert pictures.abs().max() <= 1
    torch.testing.assert_close(pictures, data.render(scenes, seeded(2)), rtol=0, atol=0)
    assert not torch.equal(pictures, data.render(scenes, seeded(3)))
    for index in (scenes.count == 2).nonzero().flatten().tolist():
        first, second = map(tuple, places[index].tolist())
        assert judge.relation(first, second) == grammar.RELATIONS[scenes.relation[index]]


# --- recipe ---


def test_standardise_changes_the_latents_and_not_the_pictures():
    torch.manual_seed(0)
    vae, pictures = parts.build_vae().requires_grad_(False), data.render(grammar.sample(16, seeded()), seeded())
    before, variance = train.reconstruct(vae, pictures), vae.encode(pictures).latent_dist.var
    mean, std = map(torch.tensor, train.standardise(vae, pictures))
    torch.testing.assert_close(train.reconstruct(vae, pictures), before, rtol=1e-4, atol=1e-5)
    latents = train.encode(vae, pictures)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), rtol=1e-4, atol=0)
    assert (std - std[0]).abs().max() > 1e-3  # one factor for all channels would not have done
    assert mean.abs().max() > 1e-3
    scaled = variance / (std.view(1, -1, 1, 1) * train.SCALING) ** 2
    torch.testing.assert_close(vae.encode(pictures).latent_dist.var, scaled, rtol=1e-3, atol=0)


def test_byte_pairs_make_one_token_of_each_word():
    tokenizer = assemble.build_tokenizer()
    for word, index in grammar.vocabulary().items():
        if word not in grammar.SPECIAL:
            assert tokenizer(word).input_ids == [grammar.START, index, grammar.END]
    strange = tokenizer("a Red zeppelin").input_ids
    assert strange[:3] == tokenizer("a red").input_ids[:3]
    assert min(strange[3:-1]) >= len(grammar.vocabulary())


# --- judge ---


def test_judge_reads_rendered_pictures_also_through_the_autoencoder(pipe):
    plain, through = judge.ceiling(pipe.vae, 64)
    assert plain["all"] > 0.98
    assert through["all"] > 0.97
    assert min(through.values()) > 0.94


def test_judge_finds_little_of_another_caption():
    scenes = grammar.sample(64, seeded(4))
    pictures, texts = data.render(scenes, seeded(4)) / 2 + 0.5, [grammar.caption(scenes, i) for i in range(64)]
    assert judge.caption_accuracy(pictures, texts)["all"] > 0.97
    assert judge.caption_accuracy(pictures, texts[1:] + texts[:1])["all"] < 0.4
    with pytest.raises(ValueError, match="64 and 63"):
        judge.caption_accuracy(pictures, texts[1:])


def test_judge_counts_claim_by_claim():
    claims = grammar.claims("a large red disc left of a striped blue ring on a grey background")
    seen = {
        "shapes": {
            "red": {"form": "disc", "size": "small", "texture": "plain", "place": (0.5, 0.0)},
            "green": {"form": "ring", "size": "small", "texture": "striped", "place": (-0.5, 0.0)},
        },
        "background": {"colour": "grey", "texture": "plain"},
    }
    assert judge.agreement(claims, seen) == {
        "colour": [1 / 3],
        "form": [1.0, 0.0],
        "size": [0.0],
        "texture": [0.0],
        "relation": [0.0],
        "background": [1.0],
    }


# --- the folder ---


def test_folder_is_small(pipe):
    folder = zoo.path("mini-sd")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < LIMIT
    assert judge.WEIGHTS.stat().st_size < 300_000
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert len(pipe.unet.down_blocks) == 4
    assert pipe.vae.config.scaling_factor == train.SCALING


def test_tokenizer_gives_the_ids_of_training(pipe):
    texts = ["", *(entry["prompt"] for entry in judge.prompts(32, 0))]
    length = pipe.tokenizer.model_max_length
    ids = pipe.tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids
    assert torch.equal(ids, grammar.encode(texts))


def test_autoencoder_keeps_pictures(pipe):
    pictures = data.render(grammar.sample(32, seeded(5)), seeded(5))
    latents = train.encode(pipe.vae, pictures)
    assert latents.shape == (32, 4, 16, 16)
    assert 0.9 < latents.std() < 1.1
    assert train.psnr(train.reconstruct(pipe.vae, pictures), pictures) > 30


def test_a_call_is_a_function_of_prompt_and_seed(pipe):
    red, again = (picture(pipe, "a large red ring") for _ in range(2))
    assert red.shape == (1, 3, 64, 64)
    assert torch.equal(red, again)
    assert (red - picture(pipe, "a large green ring")).abs().max() > 0.05
    assert (red - picture(pipe, "a large red ring", seed=1)).abs().max() > 0.05


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of DPM++ with this numpy
@pytest.mark.parametrize(("scheduler", "steps"), [(PNDMScheduler, 50), (DPMSolverMultistepScheduler, 25)])
def test_other_schedulers_draw_what_the_prompt_says(pipe, scheduler, steps):
    other = StableDiffusionPipeline(
        **{**pipe.components, "scheduler": scheduler.from_config(pipe.scheduler.config)}, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    entries = zoo.heldout("mini-sd")[:4]
    pictures = judge.sample(other, entries, steps=steps, guidance=5.0)
    scores = judge.caption_accuracy(pictures, [entry["prompt"] for entry in entries])
    assert min(scores["colour"], scores["background"], scores["texture"]) > 0.8


def test_samples_of_heldout_prompts_show_what_they_say(pipe):
    entries = zoo.heldout("mini-sd")[:8]
    texts = [entry["prompt"] for entry in entries]
    pictures = judge.sample(pipe, entries, steps=20, guidance=5.0)
    scores = judge.caption_accuracy(pictures, texts)
    floor = judge.caption_accuracy(pictures, texts[1:] + texts[:1])
    assert scores["all"] > 0.8  # 0.90 when this was written; over all 64 at 50 steps 0.86
    assert scores["all"] > floor["all"] + 0.4
