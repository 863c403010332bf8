"""QWHA in peft's own tests: a pytest plug-in that adds its rows to the lists peft's test files run through.

peft tests all its tuners by the same functions, each parametrised over a list of configurations. The files are those of
peft's sdist; ``tests/peers/peft.sh`` fetches it and loads this plug-in (``-p peft_plugin``). When one of the files is
imported, the rows of :data:`LISTS` and :data:`INLINE` are put behind peft's own, and its parametrisations are narrowed
to ours: peft has run its own rows already. Tests that run through none of these lists are deselected.

No model of the Hub is needed: of each architecture that the lists name, :data:`STAND_INS` makes a small one with random
weights, laid out as the Hub's cache. Tests that need what cannot be made here are skipped, :data:`SKIPS` says why;
:data:`FAILURES` says why QWHA cannot pass a test, and a test named there that passes is a failure. What peft's
functions skip by lists in their own bodies no plug-in can lengthen; the summary names those skips in peft's words. They
are: prompt learning (QWHA is none), weighted adapters and mixed batches of the models of the Hub (peft names LoRA, IA3
and RoAd; ours are tested in ``tests/sites/adapter``), and biases that Llama and Gemma do not have.

Files of peft's with no list for a tuner such as QWHA: those of one tuner, ``test_mixed`` (a closed list in peft),
``test_target_parameters`` (LoRA), ``test_vision_models`` (convolutions), GPU, quantisation by other libraries. For want
of a stand-in for its pipeline, ``test_stablediffusion``.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import sys
import tempfile
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Read by huggingface_hub when it is imported, which importing peft does.
os.environ["HF_HUB_OFFLINE"] = "1"
_HUB = tempfile.TemporaryDirectory(prefix="hf_accel-peers-")
os.environ["HF_HUB_CACHE"] = _HUB.name

import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from peft import LoraConfig  # noqa: E402

from hf_accel.peft import QWHAConfig  # noqa: E402

_TOKENS = {"vocab_size": 128, "max_position_embeddings": 100}
_GPT = {"vocab_size": 128, "n_positions": 100, "n_embd": 16, "n_layer": 2, "n_head": 4, "eos_token_id": 2}
_LLAMA = {
    **_TOKENS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
_BERT = {
    **_TOKENS, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0,
}  # fmt: skip
_DEBERTA = {
    **_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16,
    "type_vocab_size": 0,
}  # fmt: skip
_OPT = {
    **_TOKENS, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "word_embed_proj_dim": 16, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
_T5 = {
    "vocab_size": 128, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
_BART = {
    **_TOKENS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
}  # fmt: skip

#: Name on the Hub, classes of model and configuration, settings. Vocabularies are smaller than the originals'.
STAND_INS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", _OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", {**_GPT, "bos_token_id": 0}),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", {**_GPT, "rotary_dim": 4}),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_LLAMA, "head_dim": 4},
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "T5Config",
        _T5,
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        _BART,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", _BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", _DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", _DEBERTA),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        _BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        _BERT,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        _LLAMA,
    ),
}

#: The adapter that test_config reads, a LoRA, and its revision.
ADAPTER = ("peft-internal-testing/tiny-opt-lora-revision", "test")

_SMALL = {"n_coefficients": 10}
# test_lora_conversion makes a LoRA of rank 4 (Qwen2) or 8 of it and limits the error of the hidden states by a number.
# Four coefficients fit into that rank; more, in rows and columns of their own as they begin, do not.
_BUDGET = {"n_coefficients": 4, "target_modules": None}


def _mlp(name: str, model: str = "MLP", **settings: Any) -> tuple[str, str, type, dict[str, Any]]:
    return (name, model, QWHAConfig, {**_SMALL, **settings})


def _mixed(name: str, first: dict[str, Any], second: dict[str, Any]) -> tuple[str, QWHAConfig, QWHAConfig]:
    shared = {**_SMALL, "target_modules": ["lin0"], "init_weights": False}
    return (name, QWHAConfig(**{**shared, **first}), QWHAConfig(**{**shared, **second}))


#: By test file and name of the list.
LISTS: dict[str, dict[str, list[Any]]] = {
    "test_custom_models": {
        "TEST_CASES": [
            _mlp("Vanilla MLP 1 QWHA", target_modules="lin0"),
            _mlp("Vanilla MLP 2 QWHA", target_modules=["lin0"]),
            _mlp("Vanilla MLP 3 QWHA", target_modules=["lin1"]),
            _mlp("Vanilla MLP 4 QWHA", target_modules=["lin0", "lin1"], path="weight"),
            _mlp("Vanilla MLP 5 QWHA", target_modules=["lin0"], modules_to_save=["lin1"]),
            _mlp("Vanilla MLP 6 QWHA", target_modules=["lin0", "lin1"], path="activation"),
            (
                "Vanilla MLP 7 QWHA",
                "MLP",
                QWHAConfig,
                {"r": 1, "coefficients_pattern": {"lin0": 30}, "target_modules": ["lin0", "lin1"]},
            ),
            _mlp("Embedding + transformers Conv1D 1 QWHA", "EmbConv1D", target_modules=["conv1d"], n_coefficients=3),
        ],
        "ALL_PEFT_CONFIG_CLASSES": [QWHAConfig],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": [
            (
                "QWHA Same",
                "qwha",
                QWHAConfig,
                {**_SMALL, "target_modules": ["lin0"], "init_weights": False},
                {**_SMALL, "target_modules": ["lin0"], "init_weights": False},
            ),
            (
                "QWHA Different",
                "qwha",
                QWHAConfig,
                {**_SMALL, "target_modules": ["lin0"], "init_weights": False},
                {**_SMALL, "target_modules": ["lin1"], "init_weights": False},
            ),
        ],
        "MIXED_ADAPTER_TEST_CASES": [_mixed("QWHA mixed adapter", {}, {"n_coefficients": 30})],
    },
    "test_config": {
        "ALL_CONFIG_CLASSES": [(QWHAConfig, {})],
        "LAYER_INDEXING_CONFIG_CLASSES": [(QWHAConfig, {})],
    },
    "test_decoder_models": {"ALL_CONFIGS": [(QWHAConfig, {"task_type": "CAUSAL_LM", **_BUDGET})]},
    "test_encoder_decoder_models": {"ALL_CONFIGS": [(QWHAConfig, {"task_type": "SEQ_2_SEQ_LM", **_BUDGET})]},
    "test_feature_extraction_models": {"ALL_CONFIGS": [(QWHAConfig, {"task_type": "FEATURE_EXTRACTION", **_BUDGET})]},
    "test_seq_classifier": {"ALL_CONFIGS": [(QWHAConfig, {"task_type": "SEQ_CLS", **_BUDGET})]},
    "test_token_classification_qa": {
        "TOKEN_CLS_CONFIGS": [(QWHAConfig, {"task_type": "TOKEN_CLS", **_BUDGET})],
        "QA_CONFIGS": [(QWHAConfig, {"task_type": "QUESTION_ANS", **_BUDGET})],
    },
}

#: Lists that stand in a test's own decorator: by test file and function, the rows for its first list of tuners.
INLINE: dict[str, dict[str, list[Any]]] = {
    "test_custom_models": {
        "test_multiple_adapters_mixed_modules_to_save": [lambda **more: QWHAConfig(**_SMALL, **more)],
        "test_multiple_adapters_mixed_modules_to_save_order_switched": [lambda **more: QWHAConfig(**_SMALL, **more)],
        "test_adapter_name_makes_no_difference": [QWHAConfig(**_SMALL, target_modules=["lin0"], init_weights=False)],
        "test_mixed_adapter_batches_different_target_layers": [
            _mixed("QWHA mixed adapter with different target layers", {}, {"target_modules": ["lin1"]})
        ],
        "test_mixed_adapter_batches_multiple_modules_to_save": [
            _mixed("QWHA mixed adapter with modules to save", *[{"modules_to_save": ["lin1"]}] * 2)
        ],
        "test_mixed_adapter_batches_partly_overlapping_target_layers": [
            _mixed("QWHA mixed adapter with overlapping layers", {}, {"target_modules": ["lin0", "lin1"]})
        ],
    },
    "test_low_level_api": {
        "test_inject_from_state_dict_and_from_config_target_same_layers": [QWHAConfig(n_coefficients=40)],
    },
    "test_other": {
        "test_self_targeting_is_ignored": [
            (QWHAConfig, {**_SMALL, "target_modules": "l1.*"}),
        ],
    },
}

#: Pattern of a test's id, and what it needs that is not here.
SKIPS: dict[str, str] = {
    r"test_config.py.*test_from_pretrained_cache_dir\[": "downloads from the Hub into an empty folder",
}

#: Pattern of a test's id, and why QWHA does not pass it.
FAILURES: dict[str, str] = {}


# -- the hooks ---------------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    for name in ("is_gradient_checkpointing", "gradient_checkpointing_enable"):
        # peft's pyproject makes errors of transformers' warnings, and peft calls what this transformers deprecates.
        config.addinivalue_line("filterwarnings", f"ignore:.{name}. is deprecated:FutureWarning")
    if importlib.util.find_spec("datasets") is None:
        # peft's testing_utils imports it for tests on data of the Hub, of which none is ours.
        stand_in: Any = types.ModuleType("datasets")
        stand_in.__spec__ = importlib.machinery.ModuleSpec("datasets", None)  # is_datasets_available() looks
        stand_in.load_dataset = lambda *args, **kwargs: pytest.skip("needs a data set of the Hub")
        sys.modules["datasets"] = stand_in


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makemodule(module_path: Path) -> Iterator[Any]:
    collector = yield
    name = module_path.stem
    if name in LISTS or name in INLINE:
        extend(collector.obj, LISTS.get(name, {}), INLINE.get(name, {}))
        package = collector.obj.__package__
        utils = sys.modules.get(f"{package}.testing_utils")
        if utils is not None:  # what was accessed before is not asked for at the Hub again
            utils._HUB_MODEL_ACCESSES.update(dict.fromkeys(STAND_INS, 1))
        common: Any = sys.modules.get(f"{package}.testing_common")
        if common is not None:  # it has a list of the tuners that take Conv1D, which QWHA does
            common._skip_if_conv1d_not_supported = lambda *args: None
    return collector


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours, theirs = [], []
    for item in items:
        (ours if getattr(getattr(item, "function", None), "_hf_accel_rows", False) else theirs).append(item)
    config.hook.pytest_deselected(items=theirs)
    items[:] = ours
    for item in items:
        for pattern, reason in SKIPS.items():
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.skip(reason=reason))
        for pattern, reason in FAILURES.items():
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))


@pytest.fixture(scope="session", autouse=True)
def hub(request: pytest.FixtureRequest) -> None:
    """The stand-ins, where ``from_pretrained`` looks for what was downloaded before."""
    asked = repr([getattr(getattr(item, "callspec", None), "params", None) for item in request.session.items])
    for name, (model, config, settings) in STAND_INS.items():
        if name in asked:
            torch.manual_seed(0)
            made = getattr(transformers, model)(getattr(transformers, config)(**settings))
            made.save_pretrained(_snapshot(name, "main"))
    LoraConfig().save_pretrained(_snapshot(*ADAPTER))


def _snapshot(name: str, revision: str) -> Path:
    """The folder of one revision of a repository in the Hub's cache."""
    home, commit = Path(_HUB.name) / f"models--{name.replace('/', '--')}", "0" * 40
    (home / "refs").mkdir(parents=True)
    (home / "refs" / revision).write_text(commit)
    return home / "snapshots" / commit


# -- the lists ---------------------------------------------------------------------------------------------------------


def extend(module: Any, lists: dict[str, list[Any]], inline: dict[str, list[Any]]) -> None:
    """Put our rows behind those of a test file of peft's, and narrow its tests to ours.

    Raises:
        LookupError: the file has no such list or test: this is another peft than the one the tables were made for.
    """
    theirs = {id(getattr(module, name, None)): rows for name, rows in lists.items()}
    for name, rows in lists.items():
        if not hasattr(module, name):
            raise LookupError(f"{module.__name__} has no list {name}")
        found = getattr(module, name)
        setattr(module, name, type(found)([*found, *rows]))
    missing = set(inline)
    for function in _functions(module):
        missing.discard(function.__name__)
        marks = getattr(function, "pytestmark", [])
        for place, mark in enumerate(marks):
            if mark.name != "parametrize":
                continue
            names, values = mark.args
            rows = theirs.get(id(values))
            if rows is None and "config" in str(names):
                rows = inline.get(function.__name__)
            if rows is not None:
                ids = ["QWHA"] if len(rows) == 1 else None
                marks[place] = pytest.mark.parametrize(names, rows, ids=ids).mark
                function._hf_accel_rows = True
    if missing:
        raise LookupError(f"{module.__name__} has no test {', '.join(sorted(missing))}")


def _functions(module: Any) -> Iterable[Any]:
    for value in vars(module).values():
        members = vars(value).values() if isinstance(value, type) and value.__module__ == module.__name__ else [value]
        yield from (m for m in members if isinstance(m, types.FunctionType) and m.__name__.startswith("test_"))
