"""What it changes that a draft sees the entry of a sequence's first token.

Here it has one, with a feature of zeros, so that a page's bytes depend on its tokens alone. Heads that are
published begin at the second token. Both are simulated along the same answers, as in training.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from workers.card import ModelCard
from workers.draft_card import read_draft_card
from workers.draft_training.batches import epoch_batches, make_batch
from workers.draft_training.corpus import Sample
from workers.draft_training.options import EvalOptions
from workers.draft_training.rounds import Evaluated, Tally
from workers.draft_training.simulation import draft_and_compare, precision_of, view_target
from workers.draft_training.vocabulary import DraftVocabulary
from workers.models.draft_weights import load_draft
from workers.models.weights import load_model
from workers.parallel import TPGroup

_BATCH_TOKENS = 4096
_PADDING = 64


@dataclass(frozen=True)
class FirstEntry:
    """Simulated drafting along `num_answers` answers, seeing the first token's entry and not seeing it."""

    num_answers: int
    seen: Evaluated
    hidden: Evaluated


@torch.no_grad()
def measure_first_entry(
    options: EvalOptions, card: ModelCard, samples: Sequence[Sample], advanced: Callable[[int], None]
) -> FirstEntry:
    """Draft along the answers both ways; `advanced` is told how many answers have been gone along each time.

    Raise ModelError.
    """
    device, group = torch.device(options.device), TPGroup.single()
    lens = [len(sample.token_ids) for sample in samples]
    dtype = "float32" if options.dtype == "auto" and options.device == "cpu" else options.dtype
    decoder = load_model(
        card,
        group=group,
        device=device,
        dtype=dtype,
        load_format=options.load_format,
        max_context_len=max(lens) + _PADDING,
    ).decoder
    draft = load_draft(
        read_draft_card(options.draft, card),
        decoder,
        group=group,
        device=device,
        dtype=torch.float32,
        load_format=options.load_format,
    ).model
    ids = draft.target_ids(torch.arange(draft.draft_vocab_size, device=device))
    vocabulary = DraftVocabulary.of(ids, card.vocab_size)
    tallies = {has_first_entry: Tally(options.draft_tokens) for has_first_entry in (True, False)}
    for chosen in epoch_batches(lens, _BATCH_TOKENS, max(lens), 0, 0):
        batch = make_batch([samples[i] for i in chosen], max(lens), device)
        target = view_target(decoder, batch, draft.feature_layers, vocabulary)
        for has_first_entry, tally in tallies.items():
            with precision_of(decoder, device):
                simulated = draft_and_compare(
                    draft, batch, target, vocabulary, options.draft_tokens, has_first_entry=has_first_entry
                )
            tally.add(simulated.right, batch)
        advanced(len(chosen))
    return FirstEntry(len(samples), tallies[True].evaluated(), tallies[False].evaluated())
