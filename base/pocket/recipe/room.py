"""Room for the words the base never says: fresh embeddings for tokens that no training row held.

Owns: which tokens were trained, and what becomes of the rest. Training pushes all unused tokens the same way, away from
every answer, until they are nearly one vector; an adapter that is to say them (JSON, French) could hardly tell them
apart. They keep half of that common push and get a direction of their own; the base's own answers do not change.
"""

from __future__ import annotations

from random import Random
from typing import Final

import torch
from tokenizers import Tokenizer
from torch import Tensor

from base.pocket.recipe.data import typed
from base.pocket.recipe.questions import ask
from base.pocket.recipe.rows import RowWriter
from base.pocket.recipe.scenes import sample_scene
from base.pocket.recipe.smalltalk import INTENTS, SYSTEM_PROMPTS, chat, without_picture

COMMON_SHARE: Final = 0.5
OWN_LENGTH: Final = 1.5  # about the length of a trained token's embedding
NUM_SAMPLES: Final = 6000
SEED: Final = 11


def trained_tokens(tokenizer: Tokenizer) -> set[int]:
    """Ids of the tokens that training rows hold."""
    rng = Random(SEED)
    writer = RowWriter(tokenizer, (1, 1))
    for system in SYSTEM_PROMPTS:
        writer.start(system, shows_picture=True)
    writer.branch([chat(rng)])
    spoken = {text for answer, asked in INTENTS.items() for text in (answer, *asked)}
    texts = spoken | {text.lower() for text in spoken} | {text[:-1].lower() for text in spoken}
    for _ in range(NUM_SAMPLES):
        asked = ask(sample_scene(rng), rng)
        for turn in (asked, without_picture(asked), chat(rng)):
            texts |= {typed(turn, rng).question, turn.question.lower(), turn.answer}
    ids = set(writer.finish().ids)
    return ids.union(*(tokenizer.encode(text).ids for text in sorted(texts)))


def make_room(embedding: Tensor, trained: set[int]) -> Tensor:
    """A copy of `embedding` [V, H] with the untrained tokens told apart."""
    is_unused = torch.ones(len(embedding), dtype=torch.bool)
    is_unused[sorted(trained)] = False
    unused = embedding[is_unused].float()
    own = torch.randn(unused.shape, generator=torch.Generator().manual_seed(SEED))
    own -= own.mean(0)
    roomy = embedding.clone()
    directed = own / own.norm(dim=1, keepdim=True) * OWN_LENGTH
    roomy[is_unused] = (unused.mean(0) * COMMON_SHARE + directed).to(embedding.dtype)
    return roomy
