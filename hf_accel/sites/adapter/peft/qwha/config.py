"""Settings of a QWHA adapter, and what they make of a layer of a given size."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType
from peft.utils.other import get_pattern_key

from hf_accel.errors import InvalidSetting, WeightsMismatch
from hf_accel.kernels.hadamard import block_size, factor

FORMAT = 1
README_HEADING = "## How to load this adapter"
README = f"""{README_HEADING}

It is of type QWHA, which peft knows once `hf_accel.peft` is imported. Import it first:

```python
import hf_accel.peft  # pip install hf_accel; registers QWHA with peft
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "this folder or repository")
```

Without that import peft, transformers and diffusers stop with `KeyError: 'QWHA'`. An adapter that was initialised from
a quantised base repairs the error of that very base: load it on the same quantised weights.
"""


@dataclass
class QWHAConfig(PeftConfig):
    """Configuration of a QWHA adapter (arXiv 2509.17428): ``dW = factor * F H / n`` with a sparse, trained F.

    Args:
        r: budget of a layer ``[m, n]`` in units of a LoRA rank: F gets ``r * (m + n)`` coefficients.
        n_coefficients: coefficients of every layer, instead of ``r``.
        coefficients_pattern: coefficients of some layers, by name or regular expression for the end of one.
        alpha: scale of the update in units in which the transform is orthonormal: ``factor = alpha * sqrt(n)``, so that
            coefficients and weights move by equal amounts. The paper's "alpha = 1".
        scale: the released code's ``s``, instead of ``alpha``: ``factor = s / sqrt(m)``. Its scripts train with 4e3.
        target_modules: names, ends of names, a regular expression, or "all-linear".
        exclude_modules: likewise, to leave out.
        modules_to_save: other modules to train and save.
        bias: "none", "all" or "qwha_only": biases of the base to train.
        layers_to_transform: indices of layers, with ``layers_pattern`` the name of their list.
        init_weights: True: coefficients begin at zero, so that the adapter begins as nothing. False: normal random,
            from torch's global generator, as for peft's other tuners.
            ``hf_accel.initialize_qwha`` chooses both positions and values by calibration.
        selection: which coefficients the initialiser keeps, see ``hf_accel.patches.qwha``: "paper" or "code".
        allocation: how the initialiser divides a layer's budget among its outputs: "paper" or "code".
        temperature: exponent of the allocation; 0 gives every output the same.
        strict: refuse layers whose n has no Hadamard transform ``K * 2^m``. Otherwise those get a block-diagonal one,
            which is our extension of the paper.
        path: "weight" adds the update to the weight before the product, "activation" to the output after it, "auto"
            takes the cheaper by the number of tokens. They are equal to rounding.
        seed: of the positions before initialisation, which are spread at random; not of the values.
        format_version: of the adapter file.
    """

    r: int = field(default=64, metadata={"help": "Budget in units of a LoRA rank: r * (m + n) coefficients."})
    n_coefficients: int | None = field(default=None, metadata={"help": "Coefficients per layer, instead of r."})
    coefficients_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Coefficients of some layers by name or regular expression."}
    )
    alpha: float = field(default=1.0, metadata={"help": "Scale of the update; the transform is orthonormal at 1."})
    scale: float | None = field(default=None, metadata={"help": "The released code's s, instead of alpha."})
    target_modules: Any = field(default=None, metadata={"help": "Names or a regular expression of linears."})
    exclude_modules: Any = field(default=None, metadata={"help": "Names or a regular expression to leave out."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    bias: str = field(default="none", metadata={"help": "'none', 'all' or 'qwha_only'."})
    layers_to_transform: Any = field(default=None, metadata={"help": "Indices of the layers to adapt."})
    layers_pattern: Any = field(default=None, metadata={"help": "Name of the list of layers."})
    init_weights: bool = field(default=True, metadata={"help": "Zero coefficients (True) or random ones (False)."})
    selection: str = field(default="paper", metadata={"help": "Which coefficients initialisation keeps."})
    allocation: str = field(default="paper", metadata={"help": "How initialisation divides the budget."})
    temperature: float = field(default=1.0, metadata={"help": "Exponent of the allocation."})
    strict: bool = field(default=False, metadata={"help": "Refuse layers without a whole Hadamard transform."})
    path: str = field(default="auto", metadata={"help": "'auto', 'weight' or 'activation'."})
    seed: int = field(default=0, metadata={"help": "Of the positions before initialisation."})
    format_version: int = field(default=FORMAT, metadata={"help": "Of the adapter file."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("QWHA")
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list | tuple) else value)
        if self.format_version > FORMAT:
            raise WeightsMismatch(
                f"This adapter is of format {self.format_version}, this hf_accel knows {FORMAT}. Upgrade hf_accel."
            )
        self._check()

    def _check(self) -> None:
        whole: dict[str, Any] = {"r": self.r, "n_coefficients": self.n_coefficients, **self.coefficients_pattern}
        for name, value in whole.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InvalidSetting("QWHAConfig", name, value, "a positive integer")
        for name, number in (("alpha", self.alpha), ("scale", self.scale)):
            if number is not None and not (isinstance(number, int | float) and math.isfinite(number) and number > 0):
                raise InvalidSetting("QWHAConfig", name, number, "a positive number")
        if self.scale is not None and self.alpha != 1.0:
            raise InvalidSetting("QWHAConfig", "alpha", self.alpha, "left at 1 where scale is given")
        if not (isinstance(self.temperature, int | float) and 0 <= self.temperature < math.inf):
            raise InvalidSetting("QWHAConfig", "temperature", self.temperature, "a number of at least 0")
        for name, choices in (
            ("selection", ("paper", "code")),
            ("allocation", ("paper", "code")),
            ("path", ("auto", "weight", "activation")),
            ("bias", ("none", "all", "qwha_only")),
        ):
            if getattr(self, name) not in choices:
                raise InvalidSetting("QWHAConfig", name, getattr(self, name), f"one of {', '.join(map(repr, choices))}")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    # The words in backquotes are peft's, here and below, which tools match.
                    raise InvalidSetting(
                        "QWHAConfig", name, getattr(self, name),
                        f"None where target_modules is a regular expression: `{name}` cannot be used when "
                        "`target_modules` is a str. Give target_modules as a list",
                    )  # fmt: skip
        if self.layers_pattern and self.layers_to_transform is None:
            raise InvalidSetting(
                "QWHAConfig", "layers_pattern", self.layers_pattern,
                "given with layers_to_transform: When `layers_pattern` is specified, `layers_to_transform` must also "
                "be specified",
            )  # fmt: skip

    def coefficients(self, name: str, rows: int, columns: int) -> int:
        """p, the coefficients of a layer ``[rows, columns]``.

        Raises:
            InvalidSetting: more than the layer has weights; says how many fit.
        """
        pattern = self.coefficients_pattern
        key = get_pattern_key(list(pattern), name) if pattern else name
        if key in pattern:
            field_name, count = "coefficients_pattern", pattern[key]
        elif self.n_coefficients is not None:
            field_name, count = "n_coefficients", self.n_coefficients
        else:
            field_name, count = "r", self.r * (rows + columns)
        if count > rows * columns:
            most = rows * columns // (rows + columns)
            fits = f"at most {most}" if field_name == "r" else f"at most {rows * columns}"
            raise InvalidSetting(
                "QWHAConfig",
                field_name,
                self.r if field_name == "r" else count,
                f"{fits}: {name} is [{rows}, {columns}], and {count} coefficients are more than it has weights",
            )
        return count

    def block(self, name: str, columns: int) -> int:
        """Length of the transform of a layer with that many inputs.

        Raises:
            InvalidSetting: ``strict``, and there is no transform of the whole length.
        """
        if self.strict and factor(columns) is None:
            raise InvalidSetting(
                "QWHAConfig",
                "strict",
                True,
                f"False for {name}: its {columns} inputs are no K * 2^m with a Hadamard matrix of order K. With "
                f"strict=False it gets a block-diagonal transform in blocks of {block_size(columns)} (an extension of "
                "the paper); or leave the layer out of target_modules",
            )
        return block_size(columns)

    def factor(self, rows: int, block: int) -> float:
        """What multiplies ``F H / block`` in a layer of that many outputs."""
        return self.alpha * math.sqrt(block) if self.scale is None else self.scale / math.sqrt(rows)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json``, and into the README beside it what a loader must import first."""
        super().save_pretrained(save_directory, **kwargs)
        readme = Path(save_directory) / "README.md"
        text = readme.read_text(encoding="utf-8") if readme.exists() else "---\nlibrary_name: peft\n---\n"
        if README_HEADING not in text:
            readme.write_text(_with_readme(text), encoding="utf-8")


def _with_readme(text: str) -> str:
    """The section before all others: behind the card's front matter."""
    end = text.find("\n---", 3) if text.startswith("---") else -1
    cut = text.find("\n", end + 1) + 1 if end >= 0 else 0
    return f"{text[:cut]}\n{README}\n{text[cut:].lstrip()}"


__all__ = ["QWHAConfig"]
