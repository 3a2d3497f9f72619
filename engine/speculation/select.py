"""Which drafters an engine has."""

from collections.abc import Callable

from engine.config import EngineConfig
from engine.schedule.step import DraftedTokens, DraftRow
from engine.speculation.drafter import Drafter
from engine.speculation.grammar import GrammarDrafter
from engine.speculation.model import ModelDrafter
from engine.speculation.ngram import NgramDrafter
from engine.speculation.prediction import PredictionDrafter
from engine.speculation.speculator import Speculator
from engine.speculation.suffix import SuffixDrafter


def new_speculator(
    config: EngineConfig,
    num_ahead: int,
    max_drafts: int,
    forced: Callable[[int, bool], tuple[int, str]],
    encode: Callable[[str], list[int]],
    draft: Callable[[list[DraftRow]], DraftedTokens],
) -> Speculator | None:
    """As the configuration says; None where nothing is to be guessed.

    Args:
        num_ahead: see `Speculator`.
        max_drafts: see `ModelRunner`.
        forced, encode: see `GrammarDrafter`.
        draft: see `ModelDrafter`.
    """
    if max_drafts == 0:
        return None
    drafters: list[Drafter] = [PredictionDrafter(), GrammarDrafter(forced, encode)]
    if config.speculation == "ngram":
        drafters.append(NgramDrafter())
    elif config.speculation == "model":
        drafters.append(ModelDrafter(draft, config.block_size))
    elif config.speculation != "grammar":
        drafters.append(SuffixDrafter())
    return Speculator(drafters, max_drafts, num_ahead)
