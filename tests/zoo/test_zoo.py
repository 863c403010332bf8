"""The zoo: its names, the data and the recipe of mini-wan, and its folder, which stock diffusers shall load.

What asks only for a folder (size, loading, one generation) runs on an untrained pipeline of the full size, written
by the recipe itself, and on the miniature that is shipped. How good a trained one is, is the judge's business.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file

import hf_accel
from hf_accel import zoo
from hf_accel.errors import InvalidSetting
from hf_accel_zoo.training.mini_wan import assemble, data, grammar, judge
from hf_accel_zoo.training.mini_wan import model as parts
from hf_accel_zoo.training.write import write_pipeline

LIMIT = 10_000_000  # bytes of a shipped folder


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def labels(scenes: grammar.Scenes, index: int) -> dict:
    """What the judge shall find of the two shapes of one scene."""
    shapes = [
        {
            "colour": grammar.COLOURS[scenes.colour[index, shape]],
            "form": grammar.FORMS[scenes.form[index, shape]],
            "direction": grammar.DIRECTIONS[scenes.direction[index, shape]],
        }
        for shape in range(2)
    ]
    return {"shapes": shapes}


# --- names ---


def test_a_name_that_is_not_shipped_is_refused_with_words():
    with pytest.raises(InvalidSetting, match=r"name.*'mini-wam'"):
        zoo.path("mini-wam")
    with pytest.raises(InvalidSetting, match=r"'mini-wan'.*got 'mini-wam'"):
        zoo.heldout("mini-wam")


def test_every_shipped_name_has_a_folder_and_a_heldout_set():
    for name in zoo.names():
        assert any((zoo.path(name) / file).is_file() for file in ("model_index.json", "config.json"))
        assert zoo.heldout(name)


# --- captions and the held-out set ---


def test_heldout_prompts_are_sentences_of_the_grammar():
    entries = zoo.heldout("mini-wan")
    assert len(entries) >= 16
    assert len({entry["seed"] for entry in entries}) == len({entry["prompt"] for entry in entries}) == len(entries)
    ids = grammar.encode([entry["prompt"] for entry in entries])
    assert not (ids == grammar.UNK).any()
    assert ((ids == grammar.EOS).sum(1) == 1).all()
    for entry in entries:  # the labels are those of the prompt, in its order
        named = [f"{shape['colour']} {shape['form']}" for shape in entry["shapes"]]
        places = [entry["prompt"].index(name) for name in named]
        assert places == sorted(places)


def test_training_never_draws_a_heldout_pair():
    pairs = grammar.heldout_pairs()
    assert grammar.contains_pair(grammar.sample(20_000, seeded()), pairs).sum() > 100
    assert not grammar.contains_pair(grammar.sample(20_000, seeded(), pairs), pairs).any()


def test_scenes_and_clips_are_a_function_of_the_seed():
    first, again, other = (grammar.sample(8, seeded(seed)) for seed in (1, 1, 2))
    captions = [[grammar.caption(scenes, i) for i in range(8)] for scenes in (first, again, other)]
    assert captions[0] == captions[1] != captions[2]
    clips = [data.render(first, "cpu", seeded(seed), 5, 32) for seed in (3, 3, 4)]
    assert clips[0].shape == (8, 3, 5, 32, 32)
    assert clips[0].dtype == torch.float32
    assert clips[0].abs().max() <= 1
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])


def test_captions_fit_and_use_only_known_words():
    scenes = grammar.sample(2_000, seeded())
    captions = [grammar.caption(scenes, i) for i in range(len(scenes))]
    ids = grammar.encode(captions)
    assert ids.shape == (2_000, grammar.TOKENS)
    assert not (ids == grammar.UNK).any()
    assert ((ids == grammar.EOS).sum(1) == 1).all()  # a caption cut off would have lost words
    assert max(len(text.split()) for text in captions) < grammar.TOKENS


def test_clips_show_what_their_captions_say():
    scenes = grammar.sample(10, seeded(5))
    scenes.count[:] = 2
    clips = data.render(scenes, "cpu", seeded()).permute(0, 2, 3, 4, 1) / 2 + 0.5
    own = judge.agreement([judge.read(clips[i], labels(scenes, i)) for i in range(10)])
    shifted = judge.agreement([judge.read(clips[i - 1], labels(scenes, i)) for i in range(10)])
    assert own["colour"] > 0.9
    assert own["form"] > 0.6  # shapes hide each other, which no reading of the clip can undo
    assert own["direction"] > 0.85
    assert all(shifted[kind] < 0.5 for kind in ("colour", "form", "direction"))


@pytest.mark.parametrize("relation", grammar.RELATIONS)
def test_the_relation_of_a_caption_is_the_order_of_occlusion(relation):
    scenes = grammar.sample(32, seeded())
    scenes.relation[:] = grammar.RELATIONS.index(relation)
    clips = {}
    for count in (0, 1, 2):
        scenes.count[:] = count
        clips[count] = data.render(scenes, "cpu", seeded())
    first = (clips[1] != clips[0]).any(1).float()  # [N, F, H, W]; its rim is blended with what is beneath
    inner = 1 - torch.nn.functional.max_pool2d(1 - first, 5, stride=1, padding=2)
    hidden = (clips[2] != clips[1]).any(1) & inner.bool()
    if relation == "behind":
        assert hidden.flatten(1).any(1).sum() > 16  # most pairs meet somewhere in their clip
    else:
        assert not hidden.any()


# --- the recipe's own forwards against the stock ones ---


def test_the_forward_of_training_is_that_of_diffusers():
    torch.manual_seed(0)
    transformer = parts.build_transformer(parts.TOY).eval()
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    latents, text = (
        torch.randn(2, parts.TOY.channels, *parts.TOY.grid),
        torch.randn(2, 64, parts.TOY.text_dim),
    )
    sigma = torch.tensor([0.3, 0.8])
    with torch.no_grad():
        ours = parts.predict(transformer, latents, sigma, text)[0]
        stock = transformer(latents, sigma * 1000, text, return_dict=False)[0]
    assert stock.std() > 0.01
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def test_the_vae_over_whole_clips_is_that_of_diffusers():
    torch.manual_seed(0)
    stock = parts.build_vae(parts.TOY).eval()
    whole = parts.build_vae(parts.TOY).eval()
    whole.load_state_dict(stock.state_dict())
    parts.over_whole_clips(whole)
    clip = data.render(grammar.sample(2, seeded()), "cpu", seeded(), 9, 32)
    with torch.no_grad():
        mean = stock.encode(clip).latent_dist.mean
        assert mean.shape == (2, parts.TOY.channels, 5, 8, 8)
        torch.testing.assert_close(parts.encode_clip(whole, clip)[0], mean, rtol=1e-4, atol=1e-5)
        ours = parts.decode_clip(whole, mean).clamp(-1, 1)
        torch.testing.assert_close(ours, stock.decode(mean).sample, rtol=1e-4, atol=1e-5)


# --- folders ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """The shipped miniature, and under "untrained" a folder as the recipe writes it, of seeded noise."""
    checkpoint, folder = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("zoo") / "untrained"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.ModuleDict(
            {"transformer": parts.build_transformer(parts.FULL), "text": parts.build_text_encoder(parts.FULL)}
        )
        torch.nn.init.normal_(model["transformer"].proj_out.weight, std=0.1)  # zero before training
        vae = parts.build_vae(parts.FULL)
    vae.register_buffer("centre", torch.zeros(1, parts.FULL.channels, 1, 1, 1))
    vae.register_buffer("spread", torch.ones(1, parts.FULL.channels, 1, 1, 1))
    for name, module in {"model": model, "vae": vae}.items():
        tensors = {key: value.detach().half().contiguous() for key, value in module.state_dict().items()}
        save_file(tensors, checkpoint / f"{name}.safetensors")
    write_pipeline(assemble.assemble(checkpoint, parts.FULL), folder)
    return {"untrained": folder, "mini-wan": zoo.path("mini-wan")}


@pytest.fixture(scope="module", params=["untrained", "mini-wan"])
def folder(request, folders) -> Path:
    return folders[request.param]


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_folder_is_small_enough_to_ship(folder):
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < LIMIT


def test_a_folder_loads_in_fp32(pipe):
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_the_tokenizer_gives_the_ids_of_training(pipe):
    scenes = grammar.sample(16, seeded())
    captions = ["", *(grammar.caption(scenes, i) for i in range(16))]
    ids = pipe.tokenizer(captions, padding="max_length", max_length=grammar.TOKENS, return_tensors="pt").input_ids
    assert torch.equal(ids, grammar.encode(captions))
    unknown = pipe.tokenizer("A Red zeppelin drifts").input_ids
    known = pipe.tokenizer("a red ring drifts").input_ids
    assert unknown[2] == pipe.tokenizer.unk_token_id == grammar.UNK
    assert unknown[:2] + unknown[3:] == known[:2] + known[3:]


def test_two_steps_at_native_size_depend_on_the_prompt(pipe):
    def frames(prompt: str) -> torch.Tensor:
        call = {"num_frames": 17, "height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.0}
        return pipe(prompt, generator=seeded(), output_type="pt", **call).frames

    red, green = (frames(f"a {colour} ring drifts left behind a blue square") for colour in ("red", "green"))
    assert red.shape == (1, 17, 3, 64, 64)
    assert red.isfinite().all()
    assert red.std() > 0.01
    assert (red - green).abs().max() > 1e-3


@torch.no_grad()
def test_fine_tuned_sla_is_nearer_to_dense_than_untrained():
    pipe = WanPipeline.from_pretrained(zoo.path("mini-wan"))
    noise = torch.randn(2, 12, 9, 16, 16, generator=torch.Generator().manual_seed(5))
    prompts = [item["prompt"] for item in zoo.heldout("mini-wan")[:2]]
    text, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=64)

    def velocity(level):
        given = {"timestep": torch.full((2,), level), "encoder_hidden_states": text}
        return pipe.transformer(noise, **given, return_dict=False)[0]

    def error(dense):
        return sum(float((velocity(level) - wanted).square().mean()) for level, wanted in dense.items())

    dense = {level: velocity(level) for level in (999.0, 800.0)}
    with pytest.warns(UserWarning, match="runs untrained"), hf_accel.apply(pipe, "sla", topk=0.15):
        untrained = error(dense)
    with hf_accel.load_trained(pipe, zoo.trained("mini-wan", "sla")):
        tuned = error(dense)
    assert tuned < 0.7 * untrained
    with pytest.raises(InvalidSetting, match="mini-wan-sla"):
        zoo.trained("mini-wan", "svg2")
