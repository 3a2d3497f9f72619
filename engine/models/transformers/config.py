"""The shape of a model that a module of transformers computes."""

from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from engine.models.hf_config import longest_text
from engine.models.shape import LayerCache, ModelShape
from engine.models.transformers.probe import Probed, probe


@dataclass(frozen=True, eq=False)
class TransformersShape(ModelShape):
    hf: PreTrainedConfig
    _probed: dict[int, Probed] = field(default_factory=dict)  # by how many ranks there are

    @classmethod
    def of(cls, hf: PreTrainedConfig) -> "TransformersShape":
        """Raises CheckpointError with the reason when it cannot be served."""
        found = probe(hf)
        dtype = str(hf.dtype).removeprefix("torch.")
        return cls(
            f"{hf.model_type}, computed by transformers' own modules",
            found.vocab_size,
            longest_text(hf),
            dtype,
            None,
            hf,
            {1: found},
        )

    @property
    def state_bytes(self) -> int:
        return self.probed(1).state_bytes

    def probed(self, num_ranks: int) -> Probed:
        if num_ranks not in self._probed:
            self._probed[num_ranks] = probe(self.hf, num_ranks)
        return self._probed[num_ranks]

    def caches(self, num_ranks: int) -> tuple[LayerCache, ...]:
        return self.probed(num_ranks).caches

    def check_divisible(self, num_ranks: int) -> None:
        self.probed(num_ranks)
