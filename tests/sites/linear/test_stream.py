"""Block by block the linears see what they see in the whole model, each distinct input is added up once, and nothing of
the stream is left on the model."""

from __future__ import annotations

import pytest
import torch

from hf_accel.errors import InvalidSetting, NotApplicable, QuantizationError
from hf_accel.sites.linear import gates as block_gates
from hf_accel.sites.linear.places import find_linears
from hf_accel.sites.linear.samples import Sample, calibration_from
from hf_accel.sites.linear.stream import LayerStream
from hf_accel.testing.compare import fingerprint
from hf_accel.testing.models import tiny


def ids(rows, length, vocabulary=50, seed=0):
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def llama(**config):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**small | heads | config)).eval()


def gemma():
    """Two kinds of layers, each with masks and rotary embeddings of its own."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, sliding_window=4, sliding_window_pattern=2,
        )
    ).eval()  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()


def t5(whole=False):
    from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(d_model=32, d_ff=64, d_kv=8, num_layers=3, num_heads=4, vocab_size=50, decoder_start_token_id=0)
    return (T5ForConditionalGeneration if whole else T5EncoderModel)(config).eval()


def albert():
    """One block that runs three times."""
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    return AlbertModel(
        AlbertConfig(
            vocab_size=50, embedding_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=2,
        )
    ).eval()  # fmt: skip


def texts(rows=3):
    return [Sample(kwargs={"input_ids": ids(1, 12 + i, seed=i), "use_cache": False}) for i in range(rows)]


def caching(rows=3):
    """The model makes a cache, which every block writes to."""
    return [Sample(kwargs={"input_ids": ids(1, 12 + i, seed=i)}) for i in range(rows)]


def forwards(family, model, rows=2):
    return [Sample(kwargs=tiny.TINY[family].inputs(model, timestep=500.0 + i, seed=i)) for i in range(rows)]


def enc_dec():
    return [Sample(kwargs=s.kwargs | {"decoder_input_ids": ids(1, 7 + i, seed=i + 9)}) for i, s in enumerate(texts())]


MODELS = {
    "llama": lambda: (llama(), texts()),
    "llama-caching": lambda: (llama(), caching()),
    "gemma": lambda: (gemma(), texts()),
    "gpt2": lambda: (gpt2(), texts()),
    "t5-encoder": lambda: (t5(), texts()),
    "t5": lambda: (t5(whole=True), enc_dec()),
    "albert": lambda: (albert(), texts()),
}


def diffusion_gemma():
    """Encoder blocks fill a cache that decoder blocks read; their weights are tied."""
    from hf_accel.testing.models import gemma

    model = gemma.diffusion_gemma()
    return model, [Sample(kwargs={"input_ids": ids(1, 9 + i), "decoder_input_ids": ids(1, 8)}) for i in range(2)]


DENOISERS = ("wan", "wan-i2v", "wan-vace", "flux", "sd3", "cogvideox", "unet", "sdxl")


def case(name):
    if name in MODELS:
        return MODELS[name]()
    model = tiny.build(name)
    return model, forwards(name, model)


def watched(model, samples, sites):
    """Inputs of linears in whole forwards: their second moments and number of tokens."""
    found = {site.name: [torch.zeros(site.in_features, site.in_features, dtype=torch.float64), 0] for site in sites}

    def note(site):
        def hook(module, args):
            rows = args[0].double().reshape(-1, site.in_features)
            found[site.name][0] += 2 * rows.T @ rows
            found[site.name][1] += len(rows)

        return hook

    handles = [site.module.register_forward_pre_hook(note(site)) for site in sites]
    with torch.no_grad():
        for sample in samples:
            args, kwargs = sample.on(torch.device("cpu"))
            model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return found


def collect(model, samples, sites, change=None, **options):
    """Gathered of all units by site, and the units' names; ``change(site)`` after each stage."""
    found, names = {}, []
    with LayerStream(model, samples, sites, progress=False, gram_dtype=torch.float64, **options) as stream:
        for unit in stream:
            names.append(unit.name)
            for stage in unit.stages():
                for gathered in stage:
                    assert not {site.name for site in gathered.sites} & set(found)
                    found |= {site.name: gathered for site in gathered.sites}
                    for site in gathered.sites if change else ():
                        change(site)
    return found, names


def check_equal(found, expected):
    for name, (total, tokens) in expected.items():
        assert found[name].gram.tokens == tokens, name
        if tokens:
            scale = total.abs().max()
            assert (found[name].gram.matrix() * tokens - total).abs().max() < 1e-5 * scale, name


@pytest.mark.parametrize("sequential", [False, True], ids=["at-once", "true-sequential"])
@pytest.mark.parametrize("name", [*MODELS, *DENOISERS])
def test_block_by_block_is_the_whole_model(name, sequential):
    model, samples = case(name)
    sites = find_linears(model)
    before = fingerprint(model)
    expected = watched(model, samples, sites)
    found, _ = collect(model, samples, sites, true_sequential=sequential)
    assert fingerprint(model) == before
    assert set(found) == set(expected)
    assert any(tokens for _, tokens in expected.values())
    check_equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "llama-caching", "gemma", "t5", "flux", "wan-vace"])
def test_later_blocks_see_what_was_changed_before_them(name):
    model, samples = case(name)
    sites = find_linears(model)
    plain = watched(model, samples, sites)

    def change(site):
        site.module.weight.mul_(0.5)

    found, names = collect(model, samples, sites, change)
    # All linears of a block saw it as it was, behind blocks as they are now: put the block back and watch.
    for block in names:
        inside = [site for site in sites if site.name.startswith(f"{block}.")]
        with torch.no_grad():
            later = [s for s in sites if names.index(owner(s, names)) >= names.index(block)]
            for site in later:
                site.module.weight.mul_(2)
            check_equal(found, watched(model, samples, inside))
            for site in later:
                site.module.weight.mul_(0.5)
    last = names[-1]
    moved = [s.name for s in sites if s.name.startswith(f"{last}.") and plain[s.name][1]]
    assert any((found[n].gram.matrix() * plain[n][1] - plain[n][0]).norm() > 1e-3 * plain[n][0].norm() for n in moved)


def owner(site, names):
    return next(name for name in names if site.name.startswith(f"{name}."))


def test_true_sequential_sees_changes_within_the_block():
    model, samples = case("llama")
    sites = [site for site in find_linears(model) if site.name.startswith("model.layers.0.")]
    order = []

    def change(site):
        order.append(site.role)
        site.module.weight.mul_(0.5)

    found, _ = collect(model, samples, sites, change, true_sequential=True)
    assert order == ["query", "key", "value", "output", "gate", "up", "down"]
    down = next(site for site in sites if site.role == "down")
    with torch.no_grad():
        down.module.weight.mul_(2)
    check_equal(found, watched(model, samples, [down]))


@pytest.mark.parametrize("name", ["llama", "wan"])
def test_linears_with_one_input_share_a_gram(name):
    model, samples = case(name)
    found, _ = collect(model, samples, find_linears(model))
    groups = {tuple(site.role for site in gathered.sites) for gathered in found.values()}
    if name == "llama":
        assert groups == {("query", "key", "value"), ("output",), ("gate", "up"), ("down",)}
    else:
        assert {("query", "key", "value"), ("key", "value"), ("query",), ("output",), ("up",), ("down",)} == groups


class Routed(torch.nn.Module):
    """Experts of which a sample runs one, two linears that share their input in some samples only, one that changes
    its input in place, and one that never runs."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Choice() for _ in range(2))

    def forward(self, x, expert):
        for block in self.blocks:
            x = block(x, expert)
        return x


class Choice(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.first, self.second, self.third, self.never = (torch.nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, expert):
        y = self.first(x) + self.experts[expert](x)
        y = y + self.second(x if expert == 0 else 2 * x)
        return self.third(y.relu_()) + self.third(y.mul_(0.5))


def routed(experts=(0, 1, 1)):
    torch.manual_seed(0)
    samples = [Sample(kwargs={"x": torch.randn(1, 5 + i, 8), "expert": e}) for i, e in enumerate(experts)]
    return Routed().eval(), samples


@pytest.mark.parametrize("sequential", [False, True])
def test_routing_that_differs_between_samples(sequential):
    model, samples = routed()
    sites = find_linears(model)
    expected = watched(model, samples, sites)
    found, names = collect(model, samples, sites, true_sequential=sequential)
    assert names == ["blocks.0", "blocks.1"]
    check_equal(found, expected)
    assert found["blocks.0.never"].gram.tokens == found["blocks.0.experts.2"].gram.tokens == 0
    assert len(found["blocks.0.second"].sites) == 1
    with pytest.raises(QuantizationError, match=r"blocks\.0\.never"):
        found["blocks.0.never"].gram.matrix()


def test_siblings_do_not_wait_for_each_other():
    model, samples = routed()
    sites = [site for site in find_linears(model) if "blocks.0" in site.name]
    stages = []
    with LayerStream(model, samples, sites, progress=False, true_sequential=True) as stream:
        for unit in stream:
            stages += [sorted(s.name[9:] for g in stage for s in g.sites) for stage in unit.stages()]
    assert stages[-1] == ["experts.1", "experts.2", "never"]
    assert stages[0] == ["experts.0", "first", "second"]


def test_linears_outside_of_blocks_come_last():
    model, samples = case("llama")
    sites = find_linears(model, targets=["down", "head"])
    expected = watched(model, samples, sites)
    found, names = collect(model, samples, sites)
    assert names[-1] == "outside of blocks"
    check_equal(found, expected)


def test_blocks_that_do_not_run_are_not_waited_for():
    model, samples = case("wan")
    model.extra = torch.nn.ModuleList([type(model.blocks[0])(64, 64, 4)])
    sites = find_linears(model)
    found, names = collect(model, samples, sites)
    assert names == ["blocks.0", "blocks.1", "outside of blocks"]
    assert {name for name, gathered in found.items() if not gathered.gram.tokens} == {
        site.name for site in sites if site.name.startswith("extra.")
    }


def test_only_outputs_that_somebody_reads_are_kept():
    model, samples = case("llama")
    held = []
    with LayerStream(model, samples, find_linears(model), progress=False) as stream:
        for _ in stream:
            kept = [
                gate.name
                for gate in stream._order
                if any(isinstance(leaf, torch.Tensor) for out in gate.outputs.values() for leaf in tree_leaves(out))
            ]
            held.append(kept)
    assert held == [[], ["model.layers.0"], ["model.layers.1"]]
    encoder_decoder, samples = case("t5")
    with LayerStream(encoder_decoder, samples, find_linears(encoder_decoder), progress=False) as stream:
        for _ in stream:
            pass
        assert stream._last_use[2] == 5  # every decoder block reads the encoder's last one


def tree_leaves(tree):
    return torch.utils._pytree.tree_leaves(tree)


def test_each_block_runs_twice_a_sample():
    """Once to be gathered, once for its output, and once for all in the survey; the last one has nobody to tell."""
    model, samples = case("llama")
    runs = [0, 0, 0]

    def count(at):
        def forward(*args, **kwargs):
            runs[at] += 1
            return type(layer).forward(layer, *args, **kwargs)

        layer = model.model.layers[at]
        return forward

    for at, layer in enumerate(model.model.layers):
        layer.forward = count(at)
    collect(model, samples, find_linears(model))
    assert runs == [7, 7, 4]


@pytest.mark.parametrize("sequential", [False, True])
def test_blocks_that_fill_a_cache_for_others(sequential):
    model, samples = diffusion_gemma()
    sites = find_linears(model)
    untied = [site for site in sites if not site.tied]
    found, names = collect(model, samples, sites, true_sequential=sequential)
    assert names[0].startswith("model.encoder")
    assert len(names) == 9  # the vision tower did not run
    check_equal(found, watched(model, samples, untied))
    # A tied linear belongs to the block that runs first: the decoder's tokens come too late for it.
    tied = [site for site in sites if site.tied]
    assert tied
    assert {found[site.name].gram.tokens for site in tied} == {9 + 10}


def test_pads_have_no_part():
    model = llama()
    row = ids(1, 9, seed=3)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), row], 1)
    mask = torch.tensor([[0] * 4 + [1] * 9])
    sites = find_linears(model)
    # Positions of left-padded rows: rotary embeddings are relative, so that sums over real tokens are the same.
    both = [
        Sample(kwargs={"input_ids": x, "attention_mask": m}) for x, m in ((padded, mask), (row, torch.ones_like(row)))
    ]
    first, second = (collect(model, [sample], sites)[0] for sample in both)
    for name, gathered in second.items():
        assert first[name].gram.tokens == gathered.gram.tokens == 9
        assert torch.allclose(first[name].gram.matrix(), gathered.gram.matrix(), atol=1e-6)


def test_pads_of_prompts_have_no_part_in_denoisers():
    model, samples = case("hunyuan-video")
    found, _ = collect(model, samples, find_linears(model))
    tokens = {name: gathered.gram.tokens for name, gathered in found.items()}
    video, text = 2 * 3 * 4 * 4, 2 * 6  # two samples; 4 of 10 text tokens are pads
    assert tokens["transformer_blocks.0.attn.to_q"] == video
    assert tokens["transformer_blocks.0.attn.add_q_proj"] == text
    assert tokens["single_transformer_blocks.0.attn.to_q"] == video + text


def test_nan_in_a_sample_names_the_layer():
    model, samples = case("wan")
    samples[1].kwargs["hidden_states"][0, 0, 0, 0, 0] = float("nan")
    with pytest.raises(QuantizationError, match=r"blocks\.0\.attn1\.to_q"):
        collect(model, samples, find_linears(model))


def test_the_model_is_as_before_also_after_an_exception():
    model, samples = case("llama")
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = fingerprint(model)

    class Stop(Exception):
        pass

    def change(site):
        raise Stop

    with pytest.raises(Stop):
        collect(model, samples, find_linears(model), change)
    assert fingerprint(model) == before
    assert {name: module.training for name, module in model.named_modules()} == modes
    collect(model, samples, find_linears(model))
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_one_block_at_a_time_is_on_the_device(monkeypatch):
    """Without a second device: what is lent counts as being there."""
    model, samples = case("llama")
    lent: set[int] = set()
    most = []

    class Lending(block_gates.Mover):
        def _lent(self, tensors):
            from contextlib import contextmanager

            @contextmanager
            def lend():
                new = {id(t) for t in tensors} - lent
                lent.update(new)
                most.append(len(lent))
                yield
                lent.difference_update(new)

            return lend()

    monkeypatch.setattr("hf_accel.sites.linear.stream.Mover", Lending)
    found, _ = collect(model, samples, find_linears(model), device="cpu")
    everything = len(list(model.parameters())) + len(list(model.buffers()))
    block = len(list(model.model.layers[0].parameters()))
    assert max(most) == everything - 2 * block
    assert not lent
    check_equal(found, watched(model, samples, find_linears(model)))


def test_tensors_come_back_to_the_memory_they_had():
    model = llama()
    tensors = block_gates.tensors_of(model)
    places = [tensor.data_ptr() for tensor in tensors]
    mover = block_gates.Mover(model, torch.device("cpu"))
    mover.device = torch.device("cpu", 0)  # no tensor says that it is there, so that all are copied
    layers = list(model.model.layers)

    def away(module):
        return {tensor.data_ptr() not in places for tensor in block_gates.tensors_of(module)}

    with mover.holding(layers):
        assert away(model.model.norm) == away(model.lm_head) == {True}
        assert away(layers[0]) == {False}
        with mover.inside(layers[0]), mover.inside(layers[0]):
            assert away(layers[0]) == {True}
            assert away(layers[1]) == {False}
            layers[0].mlp.up_proj = torch.nn.Linear(32, 64)
        assert away(layers[0].self_attn) == {False}
    assert [tensor.data_ptr() for tensor in tensors] == places


def test_a_model_that_accelerate_spread_is_not_moved():
    from accelerate import dispatch_model

    model = dispatch_model(llama(), {"": "cpu"}, force_hooks=True)
    with pytest.raises(NotApplicable, match="accelerate"):
        LayerStream(model, texts(), find_linears(model), device="cpu")
    found, _ = collect(model, texts(), find_linears(model))
    check_equal(found, watched(model, texts(), find_linears(model)))


# -- what is given ---------------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer: one token a letter, 1 begins and 2 ends a text."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text, add_special_tokens=True):
        ids = [3 + (ord(letter) - 97) % 26 for letter in text]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def sequences(given, model=None, **options):
    found = calibration_from(given, model or llama(), Letters(), owner="gptq", **options)
    return [sample.kwargs["input_ids"][0].tolist() for sample in found.samples], found.notes


def test_texts_are_joined_and_cut_into_windows():
    found, notes = sequences(["abc", "", "de"], sequence_length=4)
    assert found == [[1, 3, 4, 5], [1, 2, 6, 7]]  # the rest, one token, is shorter than what there is
    assert any("1 empty" in note for note in notes)
    assert sequences(["abc"])[0] == [[1, 3, 4, 5, 2]]


def test_windows_are_drawn_by_the_seed():
    text = ["".join(chr(97 + i * i % 23) for i in range(200))]
    first, again, other = (sequences(text, sequence_length=11, samples=4, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 4


def test_texts_of_encoders_stay_apart():
    found, notes = sequences(["abc", "de", "abcdefg"], t5(), sequence_length=5)
    assert found == [[1, 3, 4, 5], [1, 6, 7], [1, 3, 4, 5, 6], [7, 8, 9]]
    assert any("1 sequences of more than 5" in note for note in notes)
    assert sequences(["abc", "de"], windows="joined", sequence_length=7)[0] == [[1, 3, 4, 5, 2, 6, 7]]


def test_rows_of_a_data_set():
    assert sequences([{"text": "abc", "id": 3}, {"text": "d", "id": 4}])[0] == [[1, 3, 4, 5, 2, 6, 2]]
    assert sequences(iter([{"story": "abc", "id": 3}]))[0] == [[1, 3, 4, 5, 2]]
    with pytest.raises(InvalidSetting, match="column"):
        sequences([{"story": "abc", "title": "d"}])


class Split(list):
    """What `datasets` calls a Dataset: rows as dicts, and the names of its columns."""

    column_names = ("text",)


def test_a_data_set_of_one_split():
    data = Split([{"text": "abc"}, {"text": "de"}])
    assert sequences(data)[0] == sequences(["abc", "de"])[0]
    with pytest.raises(InvalidSetting, match="split"):
        sequences({"train": data})


def test_token_ids_in_every_form():
    rows = [[5, 6, 7], [8, 9, 10]]
    assert (
        sequences(rows)[0] == sequences(torch.tensor(rows))[0] == sequences([torch.tensor(r) for r in rows])[0] == rows
    )
    assert sequences([5, 6, 7])[0] == sequences(torch.tensor([5, 6, 7]))[0] == [[5, 6, 7]]
    batch = {"input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    assert sequences(batch)[0] == [[5, 6], [7, 8, 9]]
    assert sequences([{"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}])[0] == [[5, 6]]


def test_forwards_are_kept_as_they_are():
    model = tiny.build("wan")
    given = [tiny.TINY["wan"].inputs(model, seed=i) for i in range(6)]
    found = calibration_from(given, model, owner="gptq", samples=3)
    assert [torch.equal(s.kwargs["hidden_states"], given[2 * i]["hidden_states"]) for i, s in enumerate(found.samples)]
    assert len(found.samples) == 3
    given[0]["hidden_states"].zero_()
    assert bool(found.samples[0].kwargs["hidden_states"].any())


def test_forwards_of_a_function_are_recorded():
    model = tiny.build("wan")

    def run():
        for seed in range(3):
            tiny.run(model, "wan", seed=seed)

    found = calibration_from(run, model, owner="gptq")
    assert len(found.samples) == 3
    assert torch.equal(
        found.samples[2].kwargs["hidden_states"], tiny.TINY["wan"].inputs(model, seed=2)["hidden_states"]
    )
    assert not model._forward_pre_hooks
    text = llama()
    (forward,) = calibration_from(lambda: text(ids(1, 5)), text, owner="gptq").samples
    assert forward.kwargs == {"use_cache": False}
    with pytest.raises(InvalidSetting, match="no forward"):
        calibration_from(lambda: None, model, owner="gptq")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "at least one"),
        ([""], "none is left"),
        (["", "  "], "2 empty"),
        ("one text", "list of texts"),
        ([[4]], "none is left"),
        ([[4, 50]], "below 50"),
        ([[4, -1]], "token ids"),
        ([torch.zeros(3)], "token ids"),
        (5, "texts, token ids"),
        (["a", 5], "all texts"),
    ],
)
def test_what_cannot_be_used_is_refused(given, words):
    with pytest.raises(InvalidSetting, match=words):
        sequences(given)


def test_what_a_model_does_not_take_is_refused():
    with pytest.raises(InvalidSetting, match="positions"):
        sequences(["abc"], llama(max_position_embeddings=16), sequence_length=17)
    with pytest.raises(InvalidSetting, match="takes no input_ids"):
        sequences(["abc"], tiny.build("wan"))
    with pytest.raises(InvalidSetting, match="decoder_input_ids"):
        sequences(["abc"], t5(whole=True))
    with pytest.raises(InvalidSetting, match="tokenizer"):
        calibration_from(["abc"], llama(), owner="gptq")
    with pytest.raises(InvalidSetting, match="dicts"):
        calibration_from([{"hidden_states": torch.zeros(1)}, "text"], tiny.build("wan"), owner="gptq")
