"""A drafter without a model: when the last few tokens came before, it drafts what followed them then.

Prompt lookup decoding. The model verifies the draft in one forward and keeps what it would have written itself, so the
text stays the model's own; it is faster where texts repeat themselves, as in code, summaries and edits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from hf_accel.config import Config, setting
from hf_accel.method import DecodingMethod, Draft, Facts


@dataclass(frozen=True)
class RepeatNgramConfig(Config):
    METHOD = "repeat-ngram"
    n: int = setting(3, "tokens that must have come before", ge=1)
    draft_tokens: int = setting(8, "tokens drafted at a time", ge=1)


@dataclass
class Text:
    """What is known of one text: its tokens, and for every n-gram the place behind its last occurrence."""

    tokens: list[int] = field(default_factory=list)
    ends: dict[tuple[int, ...], int] = field(default_factory=dict)


class RepeatNgram(DecodingMethod):
    name, paper, summary = "repeat-ngram", "none", "drafts what followed the last few tokens when they came before"
    facts = Facts(
        sites=frozenset({"decoding: drafter"}),
        media=frozenset({"text"}),
        hosts=frozenset({"language model"}),
        exact=True,  # whatever is drafted, the text is the model's own
    )
    Config = RepeatNgramConfig

    def new_state(self) -> Text:
        # Never on self: a server decodes several texts at once with one object of this class.
        return Text()

    def draft(self, state: Text, tokens: torch.Tensor) -> Draft:
        n, text = self.config.n, state.tokens
        for token in tokens[0, len(text) :].tolist():
            # An n-gram is noted when something follows it, so that the newest one does not find itself.
            if len(text) >= n:
                state.ends[tuple(text[-n:])] = len(text)
            text.append(token)
        follows = state.ends.get(tuple(text[-n:]))
        if follows is None:
            return Draft.nothing()
        return Draft.chain(text[follows : follows + self.config.draft_tokens])
