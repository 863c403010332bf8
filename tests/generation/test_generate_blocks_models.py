"""What `generate_blocks` refuses, and which wrappers and methods it works through."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import hf_accel
from hf_accel import generate_blocks
from hf_accel.errors import InvalidSetting, NotApplicable
from hf_accel.testing.models import dream, llada, llada2
from hf_accel.testing.models.gemma import diffusion_gemma
from tiny_sdar import BLOCK, MASK, PAD, VOCABULARY, padded, prompt, sdar


@pytest.fixture(scope="module")
def model():
    return sdar()


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (llada.build, "no block is ever final"),
        (dream.build, "no block is ever final"),
        (llada2.build, "LLaDA2Pipeline"),
        (diffusion_gemma, r"model\.generate"),
        (lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            num_key_value_heads=1, head_dim=8)), "store_kv"),
        (lambda: sdar().model, "no language-model head"),
        (lambda: torch.nn.Linear(2, 2), "store_kv"),
        (lambda: "SDAR-8B", "loaded language model; got str"),
    ],
    ids=["llada", "dream", "llada2", "diffusion-gemma", "autoregressive", "headless", "linear", "name"],
)  # fmt: skip
def test_models_it_cannot_sample_from_are_told_what_to_use(build, words):
    with pytest.raises(NotApplicable, match=words):
        generate_blocks(build(), prompt(5), max_new_tokens=4)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"block_length": 0}, "block_length"),
        ({"block_length": -4}, "block_length"),
        ({"block_length": 5}, "block_length"),
        ({"block_length": 4.0}, "block_length"),
        ({"block_length": True}, "block_length"),
        ({"steps": 0}, "steps"),
        ({"steps": 5}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"rule": "best"}, "rule"),
        ({"threshold": -0.1}, "threshold"),
        ({"threshold": 1.1}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": "high"}, "threshold"),
        ({"rule": "entropy", "threshold": -1}, "threshold"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 1.0}, "generator"),
        ({"temperature": 1.0, "generator": 7}, "generator"),
        ({"temperature": 1.0, "generator": [torch.Generator()] * 2}, "generator"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 124}, "max_new_tokens"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"mask_token_id": VOCABULARY}, "mask_token_id"),
        ({"eos_token_id": VOCABULARY}, "eos_token_id"),
        ({"eos_token_id": [3, "</s>"]}, "eos_token_id"),
        ({"eos_token_id": MASK}, "eos_token_id"),
        ({"pad_token_id": -2}, "pad_token_id"),
        ({"attention_mask": torch.ones(1, 4)}, "attention_mask"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}, "attention_mask"),
        ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1]])}, "attention_mask"),
        ({"attention_mask": torch.zeros(1, 5)}, "input_ids"),
        ({"input_ids": torch.full((1, 5), PAD)}, "input_ids"),
        ({"input_ids": prompt(5)[0]}, "input_ids"),
        ({"input_ids": prompt(5).float()}, "input_ids"),
        ({"input_ids": [[1, 2, 3]]}, "input_ids"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.zeros(0, 3, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.tensor([[1, MASK, 2]])}, "input_ids"),
        ({"input_ids": torch.tensor([[1, VOCABULARY]])}, "input_ids"),
        ({"input_ids": torch.tensor([[1, -100]])}, "input_ids"),
        ({"input_ids": prompt(130)}, "max_new_tokens"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused_by_name(model, settings, field):
    forwards = []
    handle = model.register_forward_pre_hook(lambda *_: forwards.append(1))
    arguments = {"input_ids": prompt(5), "max_new_tokens": 4} | settings
    with pytest.raises(InvalidSetting) as raised:
        generate_blocks(model, **arguments)
    handle.remove()
    assert (raised.value.owner, raised.value.field) == ("generate_blocks", field)
    assert not forwards


def test_positions_are_counted_in_whole_blocks_up_to_the_last(model):
    assert generate_blocks(model, prompt(5), max_new_tokens=123, threshold=0.0).shape == (1, 128)
    ids, mask = padded([prompt(121), prompt(3)])
    with pytest.raises(InvalidSetting, match="the longest prompt, of 121 tokens"):
        generate_blocks(model, ids, attention_mask=mask, max_new_tokens=8)
    odd = sdar(max_position_embeddings=126)
    with pytest.raises(InvalidSetting, match="need 128"):
        generate_blocks(odd, prompt(5), max_new_tokens=120)


def test_a_model_without_mask_token_or_block_length_asks_for_them():
    bare = sdar(mask_token_id=None, block_size=None)
    with pytest.raises(InvalidSetting, match="no block_size"):
        generate_blocks(bare, prompt(5), max_new_tokens=4)
    with pytest.raises(InvalidSetting, match="no mask_token_id"):
        generate_blocks(bare, prompt(5), max_new_tokens=4, block_length=BLOCK)
    out = generate_blocks(bare, prompt(5), max_new_tokens=4, block_length=BLOCK, mask_token_id=MASK)
    assert torch.equal(out, generate_blocks(sdar(), prompt(5), max_new_tokens=4))


def test_a_streamer_follows_one_row(model):
    with pytest.raises(InvalidSetting, match="streamer"):
        generate_blocks(model, prompt(5).expand(2, -1), max_new_tokens=4, streamer=transformers.TextStreamer(None))


def test_pad_tokens_that_also_begin_or_end_texts_are_text(model):
    ids = torch.cat([torch.tensor([[PAD, PAD]]), prompt(6)], dim=1)
    dropped = generate_blocks(model, ids, max_new_tokens=8)[:, 8:]
    assert torch.equal(dropped, generate_blocks(model, prompt(6), max_new_tokens=8)[:, 6:])
    for field in ("bos_token_id", "eos_token_id"):
        kept = copy.deepcopy(model)
        setattr(kept.config, field, PAD)
        text = generate_blocks(kept, ids, max_new_tokens=8)[:, 8:]
        explicit = generate_blocks(
            model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, eos_token_id=kept.config.eos_token_id
        )
        assert torch.equal(text, explicit[:, 8:])
        assert not torch.equal(text, dropped)


# -- wrappers and methods ------------------------------------------------------------------------------------------

NEW = 11


def batch() -> dict:
    ids, mask = padded([prompt(length, seed) for seed, length in enumerate((5, 17, 4))])
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW}


@pytest.mark.parametrize("method", ["prefix-split", "quest", "losa"])
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_exact_methods_leave_the_tokens_as_they_are(model, method, temperature):
    """quest and losa are exact at a budget beyond the prefix with all tokens active."""
    exact = hf_accel.registry.get(method).facts.full_budget if method != "prefix-split" else {}
    settings = {"temperature": temperature, "eos_token_id": [11, 40, 77]}

    def generate():
        generator = torch.Generator().manual_seed(3) if temperature else None
        return generate_blocks(model, **batch(), generator=generator, return_dict=True, **settings)

    expected = generate()
    with hf_accel.apply(model, method, **exact) as applied:
        patched, again = generate(), generate()
        report = str(applied.report())
    assert torch.equal(patched.sequences, expected.sequences)
    assert torch.equal(again.sequences, expected.sequences)
    assert patched.denoising_steps == expected.denoising_steps
    denoise = 2 * sum(expected.steps_per_block)
    assert (
        f"{2 * expected.forwards} forwards ({denoise} denoise, {2 * (expected.blocks - 1)} commit, 2 prefill)" in report
    )
    assert torch.equal(generate().sequences, expected.sequences)


def test_after_an_interrupt_a_patched_model_generates_as_before(model):
    class Stop(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            raise KeyboardInterrupt

    with hf_accel.apply(model, "prefix-split"):
        expected = generate_blocks(model, prompt(9), max_new_tokens=NEW)
        with pytest.raises(KeyboardInterrupt):
            generate_blocks(model, prompt(9, 1), max_new_tokens=NEW, streamer=Stop())
        assert torch.equal(generate_blocks(model, prompt(9), max_new_tokens=NEW), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks by the old name
def test_through_peft(model):
    import peft

    wrapped = peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    ).eval()
    with wrapped.disable_adapter():
        plain = generate_blocks(wrapped, **batch())
    assert torch.equal(plain, generate_blocks(model, **batch()))
    assert not torch.equal(generate_blocks(wrapped, **batch()), plain)


def test_through_torch_compile():
    small = sdar(num_hidden_layers=1)
    compiled = torch.compile(copy.deepcopy(small), backend="eager", dynamic=True)
    settings = {"max_new_tokens": 8, "steps": 2}
    assert torch.equal(generate_blocks(compiled, prompt(8), **settings), generate_blocks(small, prompt(8), **settings))


def test_with_weights_offloaded(model):
    import accelerate

    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert next(offloaded.parameters()).is_meta
    assert torch.equal(generate_blocks(offloaded, **batch()), generate_blocks(model, **batch()))


def test_in_bfloat16():
    model = sdar().bfloat16()
    one = generate_blocks(model, prompt(9), max_new_tokens=NEW)
    assert torch.equal(one, generate_blocks(model, prompt(9), max_new_tokens=NEW, prefill_chunk=BLOCK))


def test_inside_inference_mode(model):
    with torch.inference_mode():
        inside = generate_blocks(model, **batch())
    assert torch.equal(inside, generate_blocks(model, **batch()))


def test_the_name_stays_a_function():
    import hf_accel.generation.block_diffusion.blocks

    assert hf_accel.generate_blocks is hf_accel.generation.block_diffusion.blocks.generate_blocks
    assert "generate_blocks" in hf_accel.__all__
