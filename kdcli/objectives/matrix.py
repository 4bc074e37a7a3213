"""The matrix objective: outputs of single linear maps (MaKD's finest level)."""

from collections.abc import Sequence

from torch import Tensor

from kdcli.objectives.base import Objective
from kdcli.objectives.hidden import mean_token_mse
from kdcli.signals import Request, Signals


class MatrixObjective(Objective):
    """Mean over pairs of blocks and over `names` of the squared difference of matrix outputs, bias included.

    With `match_norm` every difference is relative to the teacher's mean square. Source: MaKD's L_mha
    (query, key, value, attention_output) and L_ffn (ffn_in before the activation, ffn_out).
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], names: Sequence[str], *, match_norm: bool = True) -> None:
        super().__init__()
        self.pairs = tuple(pairs)
        self.names = tuple(names)
        self.match_norm = match_norm

    def student_request(self) -> Request:
        return Request(matrices=frozenset((s, n) for s, _ in self.pairs for n in self.names))

    def teacher_request(self) -> Request:
        return Request(matrices=frozenset((t, n) for _, t in self.pairs for n in self.names))

    def forward(self, student: Signals, teacher: Signals, batch: object) -> Tensor:
        compared = [(student.matrices[(s, n)], teacher.matrices[(t, n)]) for s, t in self.pairs for n in self.names]
        return mean_token_mse(compared, student.mask, match_norm=self.match_norm)
