"""A guess of the tokens that come next: a chain, or a tree of several."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_accel.errors import HFAccelError


@dataclass(frozen=True)
class Draft:
    """Tokens that may come next, for the model to verify.

    Attributes:
        tokens: ids ``[N]``, int64; of a chain in order, of a tree every parent before its children. Empty: no guess.
        parents: of a tree, ``[N]``, int64: the place of each token's parent in ``tokens``, -1 where that is the text
            itself. None: a chain.
        logits: ``[N, V]``, floating point: what each token was drawn from, where it was drawn. With them sampling is
            verified by rejection (Leviathan et al., arXiv 2211.17192), else by comparison with the model's own sample.

    Raises:
        HFAccelError: other shapes or dtypes, or a parent that does not come before its child.
    """

    tokens: torch.Tensor
    parents: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    def __post_init__(self) -> None:
        count = len(self.tokens) if self.tokens.ndim == 1 else -1
        if count < 0 or self.tokens.dtype != torch.int64:
            raise HFAccelError(f"Draft: tokens must be int64 [N]; got {self.tokens.dtype} {list(self.tokens.shape)}.")
        if self.logits is not None and (self.logits.ndim != 2 or len(self.logits) != count):
            raise HFAccelError(f"Draft: logits must be [{count}, V], as the tokens; got {list(self.logits.shape)}.")
        if self.parents is None:
            return
        if self.parents.dtype != torch.int64 or self.parents.shape != self.tokens.shape:
            raise HFAccelError(f"Draft: parents must be int64 [{count}]; got {list(self.parents.shape)}.")
        places = torch.arange(count, device=self.parents.device)
        if bool(((self.parents >= places) | (self.parents < -1)).any()):
            raise HFAccelError("Draft: every parent must come before its child, or be -1 for the text itself.")

    @classmethod
    def nothing(cls) -> Draft:
        """No guess: the model decodes one token."""
        return cls(torch.empty(0, dtype=torch.int64))

    @classmethod
    def chain(cls, tokens: list[int] | tuple[int, ...] | torch.Tensor, logits: torch.Tensor | None = None) -> Draft:
        """One guess, token after token."""
        return cls(torch.as_tensor(tokens, dtype=torch.int64), None, logits)

    def __len__(self) -> int:
        return len(self.tokens)

    def first_path(self) -> Draft:
        """As a chain: of a tree, the first child of the text, its first child, and so on."""
        if self.parents is None:
            return self
        path, last = [], -1
        for place, parent in enumerate(self.parents.tolist()):
            if parent == last:
                path.append(place)
                last = place
        return Draft(self.tokens[path], None, self.logits[path] if self.logits is not None else None)

    def shortened(self, count: int) -> Draft:
        """A chain's first ``count`` tokens."""
        return Draft(self.tokens[:count], None, self.logits[:count] if self.logits is not None else None)
